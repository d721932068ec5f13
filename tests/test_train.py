"""The loop: every contestant trains; a run killed anywhere ends with the same bits; no folder is taken."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fatbench import checkpoint, data, demo, devices, files, protocol, recipe, trainer
from fatbench.attacks import Crafted
from fatbench.defense import Verdict
from fatbench.errors import Refused, RunFailed
from fatbench.evaluate import Examination, evaluate
from fatbench.quantities import Progress
from fatbench.registry import defenses


def settings(defense: str, **options: Any) -> recipe.Settings:
    short: dict[str, Any] = {"epochs": 2, "n_train": 120, "batch_size": 32, "lr": 0.05, "eps": "0.2"}
    return recipe.resolve(defense, **{**short, **options})


def metrics(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def left_behind(run: Path) -> dict[str, Any]:
    """All that a run leaves, but for the times."""
    state = torch.load(run / "resume.pt", weights_only=True)
    return {
        "last": load_file(run / "last.safetensors"),
        "best": load_file(run / "best.safetensors"),
        "labels": [checkpoint.load(run / f"{name}.safetensors").meta for name in ("last", "best")],
        "metrics": metrics(run),
        "memory": state["memory"],
        "momentum": state["optimizer"]["state"],
        "done": (run / "done").read_text(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("defense", list(defenses))
def test_every_defense_trains_on_digits(defense: str, tmp_path: Path) -> None:
    run = trainer.train(settings(defense), tmp_path / "run")
    first, last = metrics(run)
    assert last["epoch"] == 2
    assert np.isfinite([first["loss"], last["loss"]]).all()
    assert 0 <= last["val_natural"] <= 1
    assert last["backwards"] >= round(last["steps_per_example"] * 108)
    assert {"forwards", "tau", "K", "eps", "lr", "train_accuracy", "val_pgd-10"} <= last.keys()
    subject = checkpoint.load(run)
    assert subject.meta["settings"]["defense"] == defense
    assert subject.meta["status"] == "done"
    quick = protocol.load(protocol.DEFAULT).only(["fgsm", "pgd-5"])
    found = evaluate(Examination(subject, data.load("digits"), quick, "0.2", n=60), tmp_path / "records").result
    assert found.network.defense == defense
    assert 0 <= found.correct["worst"] <= found.correct["clean"] <= 60


@pytest.mark.parametrize("defense", list(defenses))
def test_every_defense_steps_on_real_colour_images(defense: str, shared: Path, tmp_path: Path) -> None:
    images = str(shared / "data" / "cifar10_20k.npz")
    real = settings(defense, dataset=images, arch="small-cnn", eps="8/255", epochs=1, n_train=46, batch_size=2)
    run = trainer.train(real, tmp_path / "run")
    assert np.isfinite(metrics(run)[0]["loss"])


def test_a_short_run_learns(tmp_path: Path) -> None:
    run = trainer.train(settings("fat", epochs=6, n_train=600, lr=0.1, batch_size=64), tmp_path / "run")
    first, last = metrics(run)[0], metrics(run)[-1]
    assert last["loss"] < first["loss"]
    assert last["val_natural"] > 0.6


def test_a_demo_length_curriculum_reaches_the_second_lesson(tmp_path: Path) -> None:
    run = trainer.train(settings("cat", epochs=15, n_train=None, batch_size=64, lr=0.1, eps="0.3"), tmp_path / "run")
    strengths = [line["K"] for line in metrics(run)]
    assert strengths[0] == 0
    assert strengths == sorted(strengths)
    assert strengths[-1] >= 2


def test_schedules_reach_the_optimizer(tmp_path: Path) -> None:
    drops = "lr_divisors=[['0', 1], ['1/2', 10]]"
    run = trainer.train(settings("fat", epochs=4, sets=[drops, "tau=[['0', 0], ['3/4', 2]]"]), tmp_path / "run")
    assert [line["lr"] for line in metrics(run)] == [0.05, 0.05, 0.005, 0.005]
    assert [line["tau"] for line in metrics(run)] == [0, 0, 0, 2]


def test_validation_examples_are_never_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[int] = set()
    held: set[int] = set()
    batches = trainer.Run.batches

    def watched(self: trainer.Run, epoch: int) -> Iterator[np.ndarray]:
        held.update(self.held.tolist())
        for rows in batches(self, epoch):
            seen.update(rows.tolist())
            yield rows

    monkeypatch.setattr(trainer.Run, "batches", watched)
    trainer.train(settings("standard"), tmp_path / "run")
    assert len(seen) == 108
    assert len(held) == 12
    assert not seen & held


def test_the_seed_decides_and_nothing_else_does(tmp_path: Path) -> None:
    runs = [trainer.train(settings("fat", seed=seed), tmp_path / f"{i}") for i, seed in enumerate((0, 0, 1))]
    torch.rand(3)
    again, other = (checkpoint.load(runs[i]).fingerprint for i in (1, 2))
    assert checkpoint.load(runs[0]).fingerprint == again != other


def test_bfloat16_and_float64_train_too(tmp_path: Path) -> None:
    for precision, dtype in (("bf16-mixed", torch.float32), ("64-true", torch.float64)):
        run = trainer.train(settings("fat-trades", precision=precision, epochs=1), tmp_path / precision)
        assert load_file(run / "last.safetensors")["0.weight"].dtype == dtype
        assert np.isfinite(metrics(run)[0]["loss"])


@pytest.mark.parametrize("defense", list(defenses))
def test_in_bfloat16_an_update_is_of_it_too_and_its_loss_of_float32(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, update, entropy = trainer.models.build, trainer.Run.update, torch.nn.functional.cross_entropy
    learned_in, lost_in, still = set(), set(), []

    def looking(module: torch.nn.Module, inputs: Any, answer: torch.Tensor) -> None:
        if module.weight.requires_grad and torch.is_grad_enabled():  # while crafting no weight asks for a gradient
            learned_in.add(answer.dtype)

    def built(*arguments: Any) -> torch.nn.Module:
        net = build(*arguments)
        convolutions = [module for module in net.modules() if isinstance(module, torch.nn.Conv2d)]
        for convolution in convolutions:
            convolution.register_forward_hook(looking)
        return net

    def updated(run: trainer.Run, *arguments: Any) -> Any:
        found = update(run, *arguments)
        still.extend(name for name, weight in run.net.named_parameters() if not weight.grad.abs().sum())
        return found

    def lost(logits: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        lost_in.add(logits.dtype)
        return entropy(logits, *arguments, **options)

    monkeypatch.setattr(trainer.models, "build", built)
    monkeypatch.setattr(trainer.Run, "update", updated)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", lost)
    run = trainer.train(settings(defense, precision="bf16-mixed", epochs=1), tmp_path / "run")
    assert learned_in == {torch.bfloat16}
    assert lost_in == {torch.float32}
    assert not still, "weights that an update gave no gradient"
    assert metrics(run)[0]["train_accuracy"] > 0


def test_normalisation_goes_with_the_checkpoint(tmp_path: Path) -> None:
    run = trainer.train(settings("fat", sets=["mean=[0.3]", "std=[0.4]"]), tmp_path / "run")
    subject = checkpoint.load(run)
    assert subject.meta["mean"] == [0.3]
    inner = load_file(run / "last.safetensors")
    assert "0.weight" in inner  # the network's own keys, without a wrapper's prefix
    x = torch.rand(2, 1, 8, 8)
    bare = checkpoint.models.build("digits-cnn", 10, 1)
    bare.load_state_dict(inner)
    assert torch.allclose(subject.model(x), bare.eval()((x - 0.3) / 0.4))


# ------------------------------------------------------------------------------------------------ failure


def test_a_loss_that_is_not_finite_fails_the_run_and_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = defenses["madry"].loss

    def breaks(self: Any, model: Any, x: Any, x_adv: Any, y: Any, progress: Progress) -> Any:
        return loss(self, model, x, x_adv, y, progress) * (float("nan") if progress.done == 1 else 1.0)

    monkeypatch.setattr(defenses["madry"], "loss", breaks)
    with pytest.raises(RunFailed, match="epoch 2, batch 1"):
        trainer.train(settings("madry"), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "done").read_text())["status"] == "failed"
    assert checkpoint.load(tmp_path / "run").meta["status"].startswith("failed: the loss was not finite at epoch 2")
    with pytest.raises(RunFailed, match="has failed"):
        trainer.train(settings("madry"), tmp_path / "run", resume=True)


# ------------------------------------------------------------------------------------------------ resume


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and the process' files stay as they are."""


def killing_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The run dies at its number-th touch of the disk: before or within a write, a sync, a rename or an unlink."""
    touches = iter(range(10_000))

    def dying(touch: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if next(touches) == number:
                raise Killed
            return touch(*arguments, **options)

        return wrapped

    monkeypatch.setattr(files.os, "fsync", dying(os.fsync))
    monkeypatch.setattr(Path, "replace", dying(Path.replace))
    monkeypatch.setattr(files, "write_atomic", dying(files.write_atomic))
    monkeypatch.setattr(trainer, "write_atomic", dying(trainer.write_atomic))
    monkeypatch.setattr(checkpoint, "write_atomic", dying(checkpoint.write_atomic))
    monkeypatch.setattr(trainer, "append_line", dying(trainer.append_line))


@pytest.mark.parametrize("defense", ["fat", "fat-cat", "trades"])
def test_a_run_killed_at_any_write_and_resumed_ends_with_the_same_bits(defense: str, tmp_path: Path) -> None:
    wanted = settings(defense, epochs=3, n_train=60)
    whole = left_behind(trainer.train(wanted, tmp_path / "whole"))
    for number in range(1000):
        run = tmp_path / f"killed-{number}"
        with pytest.MonkeyPatch.context() as patch:
            killing_at(patch, number)
            try:
                trainer.train(wanted, run)
                break
            except Killed:
                pass
        trainer.train(wanted, run, resume=True)
        assert same(left_behind(run), whole), f"killed at touch {number}"
        assert not list(run.glob(".*.tmp"))
    assert number > 30


def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path: Path) -> None:
    wanted = settings("fat-cat", epochs=4, n_train=60)
    whole = left_behind(trainer.train(wanted, tmp_path / "whole"))
    for _ in range(60):
        with pytest.MonkeyPatch.context() as patch:
            killing_at(patch, 12)
            try:
                trainer.train(wanted, tmp_path / "run", resume=True)
                break
            except Killed:
                continue
    assert same(left_behind(tmp_path / "run"), whole)


def test_a_finished_run_resumed_stays_as_it_is(tmp_path: Path) -> None:
    run = trainer.train(settings("standard"), tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    trainer.train(settings("standard"), run, resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_changed_recipe_is_refused_with_the_difference(tmp_path: Path) -> None:
    run = trainer.train(settings("fat"), tmp_path / "run")
    with pytest.raises(Refused, match=r"lr: 0.05 -> 0.01; tau: .* -> 1"):
        trainer.train(settings("fat", lr=0.01, sets=["tau=1"]), run, resume=True)


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    wanted = settings("standard")
    run = trainer.train(wanted, tmp_path / "run")
    (run / "done").unlink()
    (run / "resume.pt").write_bytes((run / "resume.pt").read_bytes()[:200])
    with pytest.raises(Refused, match="damaged") as refusal:
        trainer.train(wanted, run, resume=True)
    assert "\n" not in str(refusal.value)


# ------------------------------------------------------------------------------------------------ the folder


def test_a_run_is_not_overwritten_unless_forced(tmp_path: Path) -> None:
    run = trainer.train(settings("standard"), tmp_path / "run")
    with pytest.raises(Refused, match="--resume"):
        trainer.train(settings("standard"), run)
    trainer.train(settings("standard", epochs=1), run, force=True)
    assert len(metrics(run)) == 1


def test_somebody_elses_folder_is_left_alone_even_by_force(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    for force in (False, True):
        with pytest.raises(Refused, match="something else"):
            trainer.train(settings("standard"), tmp_path, force=force)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="is a file"):
        trainer.train(settings("standard"), tmp_path / "file")


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    run = trainer.train(settings("standard"), tmp_path / "run")
    with files.locked(run / ".lock", "here"), pytest.raises(Refused, match="another process"):
        trainer.train(settings("standard"), run, resume=True)


@pytest.mark.parametrize("full", ["metrics.jsonl", "last.safetensors", "resume.pt", "settings.toml"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_afterwards(full: str, tmp_path: Path) -> None:
    wanted = settings("fat", epochs=2, n_train=60)
    whole = left_behind(trainer.train(wanted, tmp_path / "whole"))
    with pytest.MonkeyPatch.context() as patch:
        fsync = os.fsync

        def no_space(descriptor: int) -> None:
            if full in str(Path(f"/proc/self/fd/{descriptor}").readlink()):
                raise OSError(errno.ENOSPC, "No space left on device")
            fsync(descriptor)

        patch.setattr(files.os, "fsync", no_space)
        with pytest.raises(Refused, match="No space left on device") as refusal:
            trainer.train(wanted, tmp_path / "run")
    assert "\n" not in str(refusal.value)
    trainer.train(wanted, tmp_path / "run", resume=True)
    assert same(left_behind(tmp_path / "run"), whole)


def test_a_disk_that_really_fills_is_one_line(tmp_path: Path, no_file_beyond: Any) -> None:
    wanted = settings("standard", epochs=1, n_train=60)
    with no_file_beyond(40_000), pytest.raises(Refused, match=r"cannot write .*resume\.pt") as refusal:
        trainer.train(wanted, tmp_path / "run")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:0:1", "cpu:0", "cuda:99"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(Refused, match="--device"):
        devices.fabric_on(device)


def test_nothing_is_written_where_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="n-train"):
        trainer.train(settings("fat", n_train=5000), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_best_is_what_was_measured_though_other_weights_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = iter([0.1, 0.1, 0.9, 0.9])  # natural and robust accuracy, epoch by epoch
    monkeypatch.setattr(trainer.Yardstick, "__call__", lambda self, craft=None: next(figures))
    back = {1: Verdict(remember=True), 2: Verdict(reload_best=True)}
    monkeypatch.setattr(defenses["standard"], "after_epoch", lambda self, progress, *_: back[progress.done])
    run = trainer.train(settings("standard"), tmp_path / "run")
    assert checkpoint.load(run / "best.safetensors").meta["epoch"] == 2
    assert not same(load_file(run / "best.safetensors"), load_file(run / "last.safetensors"))


def test_a_mean_and_a_std_for_other_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="mean has 3 numbers, digits 1 channels"):
        trainer.train(settings("fat", sets=["mean=[0.3, 0.3, 0.3]", "std=[0.4, 0.4, 0.4]"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------ moving average


def test_a_moving_average_is_what_is_validated_saved_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defenses["standard"], "average", lambda self, progress: 0.5)
    wanted = settings("standard", epochs=3, n_train=60)
    whole = trainer.train(wanted, tmp_path / "whole")
    state = torch.load(whole / "resume.pt", weights_only=True)
    assert same(load_file(whole / "last.safetensors"), dict(state["average"]))
    assert not same(dict(state["net"]), dict(state["average"]))
    with pytest.MonkeyPatch.context() as patch:
        killing_at(patch, 17)
        with pytest.raises(Killed):
            trainer.train(wanted, tmp_path / "run")
    trainer.train(wanted, tmp_path / "run", resume=True)
    assert same(left_behind(tmp_path / "run"), left_behind(whole))


def test_a_moving_average_may_begin_later_and_is_the_weights_till_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defenses["standard"], "average", lambda self, now: 0.9 if now.done else None)
    for epochs, apart in ((1, False), (2, True)):
        run = trainer.train(settings("standard", epochs=epochs, n_train=60), tmp_path / f"{epochs}")
        state = torch.load(run / "resume.pt", weights_only=True)
        assert (state["average"] is not None) == apart
        if apart:
            assert not same(dict(state["net"]), dict(state["average"]))
            assert same(load_file(run / "last.safetensors"), dict(state["average"]))


def test_crafting_sees_the_inner_network_in_its_own_mode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    craft = defenses["fat"].craft
    types = []

    def watched(self: Any, model: Any, *arguments: Any, **options: Any) -> Crafted:
        types.append(type(model).__name__)
        return craft(self, model, *arguments, **options)

    monkeypatch.setattr(defenses["fat"], "craft", watched)
    trainer.train(settings("fat", epochs=1), tmp_path / "run")
    assert set(types) == {"DigitsCNN"}


# ------------------------------------------------------------------------------------------------ nothing held out


def test_with_nothing_held_out_every_example_is_trained_on_and_there_is_no_best(tmp_path: Path) -> None:
    run = trainer.train(settings("fat", sets=["validation=0"]), tmp_path / "run")
    assert [line["examples"] for line in metrics(run)] == [120, 120]
    assert {line["val_natural"] for line in metrics(run)} == {None}
    assert not (run / "best.safetensors").exists()
    assert checkpoint.load(run).meta["status"] == "done"


def test_a_curriculum_by_validation_needs_some(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"cat decides by accuracy on validation: --set validation=0\.02"):
        trainer.train(settings("cat", sets=["validation=0"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_demo_whose_training_fails_has_a_row_that_says_so_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "LR", 1e30)
    for _ in range(2):  # and again by the same command
        (found,) = demo.demo(tmp_path, defenses=["standard"], epochs=1, device="cpu")
        assert found.result.network.status.startswith("failed: the loss was not finite")
        assert found.result.correct == {}
    assert "failed" in (tmp_path / "board.csv").read_text()
