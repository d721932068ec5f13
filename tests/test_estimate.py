"""What a run is said to cost: counts exact, time and memory from updates that the trainer itself does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fatbench import data, estimate, models
from fatbench.data import take
from fatbench.devices import fabric_on
from fatbench.errors import Refused
from fatbench.estimate import _counted, _pinned, _rehearsed, _stand_in, _steps_an_example, _update
from fatbench.footprint import Saved, saving
from fatbench.recipe import contestant, resolve
from fatbench.registry import defenses
from fatbench.team import Team
from fatbench.trainer import Run


def begun(name: str, **options: Any) -> Run:
    settings = resolve(name, n_train=200, **options)
    return Run(settings, Path(), take(_stand_in("digits"), 200), Team(fabric_on("cpu")))


def test_parameters_examples_and_updates_are_the_run_s_own() -> None:
    found = estimate.estimate(resolve("fat", arch="wrn-40-4", epochs=7, batch_size=100), device="cpu")
    with torch.device("meta"):
        net = models.build("wrn-40-4", channels=1)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.parameters - found.used == 9_366_394 - 8_949_210  # sub_block1, which no forward uses
    run = Run(resolve("fat"), Path(), data.load("digits"), Team(fabric_on("cpu")))
    assert (found.examples, found.held) == (len(run.rows), len(run.held))
    run.settings = run.settings.model_copy(update={"batch_size": 100})
    assert found.updates == len(list(run.batches(0)))
    assert found.steps == (0, 10) and found.seconds[0] < found.seconds[1]
    said = str(found)
    assert f"{found.used:,} of them used in the forward" in said
    assert f"{found.updates:,} an epoch, {7 * found.updates:,} in 7 epochs" in said
    assert "made up, in digits's shape 1x8x8" in said


@pytest.mark.parametrize("name", ["digits", "mnist", "svhn"])
def test_a_known_dataset_needs_not_be_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "load", lambda *asked: pytest.fail("the data was asked for"))
    loaded = _stand_in(name)
    assert {"digits": (1437, 1, 8, 8), "mnist": (60000, 1, 28, 28), "svhn": (73257, 3, 32, 32)}[name] == tuple(
        loaded.x_train.shape
    )
    assert len(loaded.y_train) == len(loaded.x_train) and loaded.y_train.unique().tolist() == list(range(10))


def test_the_sizes_told_of_datasets_are_those_of_digits() -> None:
    real = data.load("digits")
    assert _stand_in("digits").x_train.shape == real.x_train.shape


@pytest.mark.parametrize("name", list(defenses))
def test_bounds_are_none_to_k_steps_where_a_rule_stops_or_a_lesson_grows(name: str) -> None:
    one = contestant(resolve(name, sets=["steps=7"]))
    fixed = name in ("madry", "trades", "mart", "standard")
    assert _steps_an_example(one, 12) == (7 if fixed else 0, 7)


@pytest.mark.parametrize("name", list(defenses))
@pytest.mark.parametrize("k", [0, 2])
def test_the_timed_update_is_the_trainer_s_with_everybody_taking_k_steps(name: str, k: int) -> None:
    run = begun(name)
    whole, defense, before = run.rows, run.defense, run.net.state_dict()["0.weight"].clone()
    seconds, steps = _update(run, 30, k)
    # CAT mixes strengths 0..k in a batch: 10 examples each of 0, 1 and 2.
    assert steps == (k / 2 if name in ("cat", "fat-cat") else k)
    assert seconds > 0
    assert run.rows is whole and run.defense is defense
    assert not torch.equal(before, run.net.state_dict()["0.weight"])  # the update was really done


def test_a_pinned_defense_keeps_its_fields() -> None:
    one = contestant(resolve("fat-trades", sets=["beta=3", "tau=1", "omega=0.5"]))
    twin: Any = _pinned(one, 4)
    assert (twin.beta, twin.tau, twin.omega, twin.eps) == (3, 1, 0.5, one.eps)


def test_time_is_scaled_by_examples_and_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_update", lambda run, n, k: (0.5 * n + 0.25 * k * n, float(k)))
    monkeypatch.setattr(estimate, "_counted", lambda run, n: (1.0, 1.0))
    found = estimate.estimate(resolve("fat", epochs=2), device="cpu")
    examples, held, step = 1293, 144, 0.25
    validation = 11 * held * step  # PGD-10 and two forwards
    assert found.seconds == pytest.approx((examples * 0.5 + validation, examples * (0.5 + 10 * step) + validation))
    assert f"{2 * found.seconds[0] / 60:.3g} min to {2 * found.seconds[1] / 3600:.3g} hours in all" in str(found)
    plain = estimate.estimate(resolve("madry", epochs=2), device="cpu")
    assert plain.seconds == (found.seconds[1], found.seconds[1])


def test_arithmetic_is_that_of_the_convolutions_and_products() -> None:
    forward = 2 * (64 * 9 * (1 * 16 + 16 * 16) + 16 * 9 * 2 * 16 * 16 + 64 * 10)  # digits-cnn, an image
    first = 2 * 64 * 9 * 16  # whose input's gradient an update does not need
    update, step = _counted(begun("madry"), 2)
    assert update == 3 * forward - first
    assert step == pytest.approx(2 * forward, rel=0.15)  # the first layer's gradient by blocks multiplies zeros too
    assert estimate.estimate(resolve("standard", epochs=1), device="cpu").flop == (1293 * update + 11 * 144 * step,) * 2
    found = estimate.estimate(resolve("fat", epochs=2), device="cpu")
    work = 1293 * update + 11 * 144 * step
    assert found.flop == pytest.approx((2 * work, 2 * (work + 1293 * 10 * step)))
    assert found.on_paper[1] == found.flop[1] / 100e12 / 3600


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", list(defenses))
def test_every_defense_has_its_arithmetic_counted_in_either_mode(name: str, mode: str) -> None:
    update, step = _counted(begun(name, sets=[f"mode={mode}"]), 6)
    least, _ = _counted(begun("standard"), 6)
    assert update >= least and (step > 0 or name == "standard")


def test_a_storage_is_counted_once_and_until_its_graph_is_gone() -> None:
    run = begun("standard")
    x = torch.ones(1000, requires_grad=True)
    with saving(run) as saved:
        first = x.exp()  # keeps its result
        second = first.exp()  # keeps its own; its input is the same storage as first's result
        assert saved.now == 2 * 4000
        third = (first * second).sum()  # keeps both, which are counted
        assert saved.now == 2 * 4000
        third.backward()
        del first, second, third
        assert saved.now == 0
        x.exp()
    assert saved.most == 2 * 4000


def test_what_the_run_holds_anyway_is_not_counted_as_activations() -> None:
    net = nn.Linear(10, 10)
    saved = Saved({t.untyped_storage().data_ptr() for t in net.parameters()})
    x = torch.ones(5, 10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.tensor):
        out = net(x)
    assert saved.now == x.nbytes  # the input, for the weight's gradient; not the weight
    del out


@pytest.mark.parametrize("name", ["madry", "trades", "mart"])
def test_activations_of_a_batch_are_those_of_a_few_examples_scaled(name: str) -> None:
    run = begun(name)
    _, scaled = _rehearsed(run, 64)
    with saving(run) as saved:
        _update(run, 64, 2)
    assert scaled == pytest.approx(saved.most, rel=0.02)


def test_memory_names_its_parts() -> None:
    found = estimate.estimate(resolve("fat", sets=["momentum=0"]), device="cpu").memory
    assert set(found) == {"weights", "gradients", "copy to craft on", "activations", "images"}
    assert found["images"] == 1437 * 64 * 4
    assert found["gradients"] == 4 * 7898 <= found["weights"]


def test_own_data_of_another_shape_is_refused_before_anything_is_timed(npz: Callable[..., Path]) -> None:
    settings = resolve(None, recipe="fig-6-fat", eps="0.06", sets=["tau=0"], dataset=str(npz(shape=(8, 8))))
    with pytest.raises(Refused, match="images of 3x32x32, and made-up has 1x8x8"):
        estimate.estimate(settings, device="cpu")


def test_several_processes_are_told_of_and_never_timed_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = resolve("standard", dataset="digits", epochs=1, ranks=2)
    assert "All this is for one process alone; 2 would share it." in estimate.estimate(shared, device="cpu").timed
    for name, value in {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match="leave torchrun or srun out"):
        estimate.estimate(shared, device="cpu")
