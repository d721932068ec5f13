"""A bound goes on to the whole; examples are kept exactly and counted again; outside examples are judged like ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fatbench import asked as asking
from fatbench import checkpoint, data, evidence, record
from fatbench.asked import Network, asked
from fatbench.checkpoint import Subject
from fatbench.errors import Refused
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Chunk, verified
from fatbench.models import DigitsCNN
from fatbench.protocol import Protocol
from fatbench.registry import evaluations

AutoAttack: Any = evaluations["autoattack"]
BOTH = Protocol(name="quick", version=1, summary="cheap", source="these tests", attacks=("pgd-20", "autoattack"))


@pytest.fixture(scope="module")
def three(npz: Callable[..., Path]) -> data.Data:
    """30 images of four classes."""
    return data.load(str(npz(classes=4, n=60)))


@pytest.fixture(scope="module")
def net(three: data.Data) -> nn.Module:
    torch.manual_seed(0)
    net = DigitsCNN(4, 1, 8)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        sgd.zero_grad()
        nn.functional.cross_entropy(net(three.x_train), three.y_train).backward()
        sgd.step()
    return net.eval()


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with a budget of moments."""
    library = AutoAttack._library

    def cheap(self: Any, *given: Any) -> Any:
        made = library(self, *given)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 5
        made.square.n_queries = 20
        return made

    monkeypatch.setattr(AutoAttack, "_library", cheap)


@pytest.fixture
def task(net: nn.Module, three: data.Data) -> Examination:
    subject = Subject(net, {"arch": "digits-cnn", "mean": None, "std": None}, checkpoint.fingerprint(net))
    return Examination(subject, three, BOTH, "0.06", n=20, chunk=8)


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(Refused) as refused:
        run()
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ tiers


def test_a_bound_leaves_out_the_last_stages_and_says_so(task: Examination, tmp_path: Path) -> None:
    bound = evaluate(replace(task, tier="bound"), tmp_path)
    assert bound.result.bound
    assert list(bound.result.stages["autoattack"]) == ["apgd-ce", "apgd-t"]
    assert record.read(tmp_path / f"{bound.id}.json") == bound
    whole = evaluate(task, tmp_path / "alone")
    assert not whole.result.bound
    assert whole.result.correct["autoattack"] <= bound.result.correct["autoattack"] < bound.result.correct["clean"]
    assert whole.result.correct["pgd-20"] == bound.result.correct["pgd-20"]


def test_a_bound_is_completed_from_its_own_state(task: Examination, tmp_path: Path) -> None:
    alone = evaluate(task, tmp_path / "alone")
    for tier in ("quick", "bound"):
        evaluate(replace(task, tier=tier), tmp_path / "grown")  # type: ignore[arg-type]
    whole = evaluate(task, tmp_path / "grown")
    assert (whole.result, whole.hash) == (alone.result, alone.hash)
    assert whole.run["resumed_steps"] == 3 * len(("clean", "pgd-20", "apgd-ce", "apgd-t"))
    assert not list((tmp_path / "grown").glob("*.partial*"))
    assert evaluate(replace(task, tier="bound"), tmp_path / "grown") == whole  # there is more to say than a bound


def test_quick_is_pgd_20_alone(task: Examination, tmp_path: Path) -> None:
    quick = evaluate(replace(task, tier="quick"), tmp_path)
    assert (quick.attacks, quick.result.bound) == (["pgd-20"], True)
    assert evaluate(replace(task, tier="quick"), tmp_path) == quick


@pytest.mark.parametrize(
    ("attacks", "tier", "why"), [("fgsm", "quick", "PGD-20"), ("fgsm,pgd-20", "bound", "has none to leave out")]
)
def test_a_tier_that_means_nothing_is_refused(
    attacks: str, tier: Any, why: str, task: Examination, tmp_path: Path
) -> None:
    asked_for = replace(task, tier=tier, protocol=BOTH.only(attacks.split(",")))
    assert why in refusal(lambda: evaluate(asked_for, tmp_path))


# ------------------------------------------------------------------------------------------------ examples kept


def kept(task: Examination, out: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    done = evaluate(task, out, keep_examples=True)
    return done, load_file(evidence.path(out, done.id))


def test_the_worst_example_of_each_image_is_kept_exactly(task: Examination, net: nn.Module, tmp_path: Path) -> None:
    done, tensors = kept(task, tmp_path)
    x, y, x_adv = task.data.x_test[:20], task.data.y_test[:20], tensors["x_adv"]
    assert (x_adv.dtype, tensors["index"].tolist(), tensors["label"].tolist()) == (
        torch.float32,
        list(range(20)),
        y.tolist(),
    )
    table = record.read_outcomes(tmp_path / f"{done.id}.parquet")
    worst = (table["clean_pred"] != table["label"]) | table["pgd-20.broken"] | table["autoattack.broken"]
    assert 0 < worst.sum() < 20
    _, broken, invalid = verified(net, x, x_adv, y, 0.06)
    assert (broken.tolist(), invalid) == (worst.tolist(), 0)
    assert torch.equal(x_adv[~broken], x[~broken])
    assert not list(tmp_path.glob("*.partial*"))


def test_examples_survive_a_kill(task: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done, whole = kept(task, tmp_path / "whole")
    save, written = evidence.save, []

    def dying(*given: Any) -> None:
        written.append(1)
        if len(written) == 1:
            raise KeyboardInterrupt
        save(*given)

    monkeypatch.setattr(evidence, "save", dying)
    with pytest.raises(KeyboardInterrupt):
        kept(task, tmp_path / "killed")
    again, resumed = kept(task, tmp_path / "killed")
    assert again.hash == done.hash
    assert again.run["resumed_steps"] == 18
    assert torch.equal(whole["x_adv"], resumed["x_adv"])


def test_examples_asked_for_later_are_made_then(task: Examination, tmp_path: Path) -> None:
    first = evaluate(task, tmp_path)
    done, _ = kept(task, tmp_path)
    assert done.hash == first.hash


def test_a_state_without_examples_is_done_again_for_them(task: Examination, tmp_path: Path) -> None:
    evaluate(replace(task, tier="bound"), tmp_path)
    done, tensors = kept(task, tmp_path)
    assert torch.equal(tensors["x_adv"], kept(task, tmp_path / "alone")[1]["x_adv"])
    assert done.run["resumed_steps"] < 12


# ------------------------------------------------------------------------------------------------ counting again


def counted(task: Examination, out: Path, done: Any, **changed: Any) -> evidence.Verified:
    given = {"subject": task.subject, "loaded": task.data, **changed}
    return evidence.verify(done, out / f"{done.id}.json", given["subject"], given["loaded"], "cpu")


def test_counting_again_comes_to_the_same(task: Examination, tmp_path: Path) -> None:
    done, _ = kept(task, tmp_path)
    found = counted(task, tmp_path, done)
    assert (found.clean, found.robust, found.differ) == (done.result.correct["clean"], done.result.correct["worst"], 0)


def test_counting_again_sees_an_example_that_breaks_nothing(task: Examination, tmp_path: Path) -> None:
    done, tensors = kept(task, tmp_path)
    place = evidence.path(tmp_path, done.id)
    _, header = evidence.read(place)
    moved = (tensors["x_adv"] != task.data.x_test[:20]).flatten(1).any(dim=1).nonzero()[0, 0]
    tensors["x_adv"][moved] = task.data.x_test[moved]
    save_file(tensors, place, metadata=header)
    assert counted(task, tmp_path, done).differ == 1


@pytest.mark.parametrize("what", ["network", "data", "record", "ball", "none"])
def test_what_cannot_be_counted_again_is_refused(what: str, task: Examination, tmp_path: Path) -> None:
    done, tensors = kept(task, tmp_path)
    place = evidence.path(tmp_path, done.id)
    _, header = evidence.read(place)
    changed: dict[str, Any] = {}
    if what == "network":
        changed["subject"] = replace(task.subject, fingerprint="0" * 64)
    if what == "data":
        changed["loaded"] = replace(task.data, x_test=1 - task.data.x_test)
    if what == "record":
        save_file(
            tensors, place, metadata={"fatbench": json.dumps({**json.loads(header["fatbench"]), "outcomes": "0"})}
        )
    if what == "ball":
        save_file({**tensors, "x_adv": 1 - tensors["x_adv"]}, place, metadata=header)
    if what == "none":
        place.unlink()
    reasons = {
        "network": "about another network", "data": "about other test images", "record": "is not of the record",
        "ball": "lie outside the ball", "none": "--save-adversarial",
    }  # fmt: skip
    assert reasons[what] in refusal(lambda: counted(task, tmp_path, done, **changed))


# ------------------------------------------------------------------------------------------------ from outside


def outside(file: Path, three: data.Data, source: str | None = "by hand", n: int = 12) -> evidence.External:
    return evidence.external(file, source, np.arange(n), three.shape)


def saved(path: Path, metadata: dict[str, str] | None = None, **tensors: torch.Tensor) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def test_examples_of_others_are_judged_like_ours(task: Examination, net: nn.Module, tmp_path: Path) -> None:
    _, tensors = kept(task, tmp_path)
    x_adv, order = tensors["x_adv"].clone(), torch.arange(19, -1, -1)
    x_adv[0] = 1 - task.data.x_test[0]  # far outside the ball
    file = saved(tmp_path / "adv.safetensors", {"source": "an attack, by its author"}, x_adv=x_adv[order], index=order)
    attack = evidence.external(file, None, np.arange(20), task.data.shape)
    chunk = Chunk(task.data.x_test[:20], task.data.y_test[:20], np.arange(20), 4, 0)
    assert torch.equal(attack.attack(net, chunk, 0.06).x_adv, x_adv)
    protocol = Protocol(name="external-1", version=1, summary="theirs", source=attack.source, attacks=("external",))
    done = evaluate(replace(task, protocol=protocol, outside={"external": attack}), tmp_path)
    assert done.protocol.attacks["external"] == {
        "family": "external", "sha256": attack.sha256, "source": "an attack, by its author",
    }  # fmt: skip
    assert any("1 examples lay outside the ball" in warning for warning in done.result.warnings)


@pytest.mark.parametrize("what", ["shape", "lacking", "source", "file", "places", "nothing"])
def test_a_file_that_is_no_attack_is_refused(what: str, three: data.Data, tmp_path: Path) -> None:
    path, x = tmp_path / "adv.safetensors", three.x_test[:12].contiguous()
    files: dict[str, Callable[[], object]] = {
        "shape": lambda: outside(saved(path, x_adv=x[:, :, :4].contiguous()), three),
        "lacking": lambda: outside(saved(path, x_adv=x), three, n=13),
        "source": lambda: outside(saved(path, x_adv=x), three, source=None),
        "file": lambda: outside(tmp_path / "no.safetensors", three),
        "places": lambda: outside(saved(path, x_adv=x, index=torch.arange(3)), three),
        "nothing": lambda: outside(saved(path, labels=torch.arange(3)), three),
    }
    reasons = {
        "shape": r"must be floating point (N, 1, 8, 8)", "lacking": "no example for 1 of the images, 12 the first",
        "source": "give --source", "file": "no adversarial examples at", "places": "3 places for 12 examples",
        "nothing": "holds no x_adv",
    }  # fmt: skip
    assert reasons[what] in refusal(files[what])


# ------------------------------------------------------------------------------------------------ what is asked


@pytest.fixture
def weights(net: nn.Module, tmp_path: Path) -> Network:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    factory = tmp_path / "mine.py"
    factory.write_text("from fatbench.models import DigitsCNN\ndef make(): return DigitsCNN(4, 1, 8)\n")
    return Network(str(tmp_path / "net.pt"), factory=f"{factory}:make")


OPTIONS: dict[str, Any] = {"dataset": None, "protocol": None, "attacks": None, "eps": "0.06"}


def test_the_command_lines_options_become_an_examination(
    weights: Network, three: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.data, "load", lambda name: three)
    made = asked(weights, **{**OPTIONS, "dataset": "three"}, n=9, seed=3, tier="bound", surrogate=None).task
    assert (made.n, made.seed, made.tier, made.eps, made.checked) == (9, 3, "bound", "0.06", True)
    without = asked(weights, **{**OPTIONS, "dataset": "three", "attacks": "fgsm"}).task
    assert not without.checked  # nobody asked for AutoAttack's figure
    file = saved(tmp_path / "adv.safetensors", x_adv=three.x_test[:7].contiguous())
    judged = asked(weights, **{**OPTIONS, "dataset": "three"}, external=file, source="by hand").task
    assert (list(judged.rows()), judged.protocol.source, judged.checked) == (list(range(7)), "by hand", False)
    assert judged.protocol.name.startswith("external-")


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"attacks": "fgsm", "protocol": "fatbench-linf"}, "give one"),
        ({"attacks": "fgsm", "external": Path("adv.safetensors")}, "give one"),
        ({"source": "me"}, "of --external"),
        ({"dataset": None}, "give --dataset"),
        ({"eps": None}, "give --eps"),
        ({"eps": "8/0"}, "--eps 8/0"),
    ],
)
def test_options_that_say_nothing_together_are_refused(
    more: dict[str, Any], why: str, weights: Network, three: data.Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking.data, "load", lambda name: three)
    assert why in refusal(lambda: asked(weights, **{**OPTIONS, "dataset": "three", **more}))
