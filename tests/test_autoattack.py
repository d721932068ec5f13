"""AutoAttack finds what the stock library finds, sample by sample, for less, on any input, and leaves no trace."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fatbench import autoattack, checkpoint, data, record
from fatbench.attacks import pgd
from fatbench.checkpoint import Subject
from fatbench.errors import Refused
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Chunk, verified
from fatbench.models import DigitsCNN
from fatbench.protocol import Protocol
from fatbench.registry import evaluations

AutoAttack: Any = evaluations["autoattack"]
ALONE = Protocol(name="quick", version=1, summary="cheap", source="these tests", attacks=("autoattack",))
STANDARD, PLUS = autoattack.STAGES["standard"], autoattack.STAGES["plus"]


# ------------------------------------------------------------------------------------------------ small worlds


def trained(net: nn.Module, x: Tensor, y: Tensor, eps: float, steps: int) -> nn.Module:
    """A network that withstands eps to some degree."""
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = torch.arange(step * 128, step * 128 + 128) % len(x)
        x_adv = pgd(net, x[batch], y[batch], eps=eps, step_size=eps / 2, steps=3).x_adv
        sgd.zero_grad()
        nn.functional.cross_entropy(net.train()(x_adv), y[batch]).backward()
        sgd.step()
    sgd.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture(scope="module")
def _robust(digits: data.Data) -> nn.Module:
    torch.manual_seed(0)
    return trained(DigitsCNN(10, 1, 8), digits.x_train, digits.y_train, 0.2, 60)


@pytest.fixture
def net(_robust: nn.Module) -> nn.Module:
    """A network that is right on most digits, and at eps 0.2 on some of them under every attack."""
    return deepcopy(_robust)


def whole(loaded: data.Data, rows: slice = slice(None), seed: int = 0) -> Chunk:
    indices = np.arange(len(loaded.y_test))[rows]
    return Chunk(loaded.x_test[indices], loaded.y_test[indices], indices, loaded.classes, seed)


def subject(net: nn.Module) -> Subject:
    return Subject(net, {"arch": "digits-cnn", "mean": None, "std": None}, checkpoint.fingerprint(net))


def cheapened(made: Any) -> Any:
    made.apgd.n_iter = made.apgd_targeted.n_iter = 8
    made.fab.n_iter = 5
    made.square.n_queries = 30
    made.apgd.n_restarts, made.fab.n_restarts = min(made.apgd.n_restarts, 2), min(made.fab.n_restarts, 2)
    made.apgd.eot_iter = min(made.apgd.eot_iter, 3)
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoAttack with a budget of moments."""
    library = AutoAttack._library
    monkeypatch.setattr(AutoAttack, "_library", lambda self, *given: cheapened(library(self, *given)))


def stock(net: nn.Module, chunk: Chunk, eps: float, version: Any = "standard", **changes: Any) -> tuple[Tensor, Any]:
    """(N,) whom the library breaks when it is left to itself, and what it was."""
    import pyautoattack

    made = pyautoattack.AutoAttack(net, eps=eps, seed=chunk.seed, version=version)
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(9, chunk.classes - 1)
    made.attacks_to_run = list(autoattack.stages(version, chunk.classes))
    for name, value in changes.items():
        setattr(made, name, value)
    with torch.random.fork_rng():
        _, predicted = cheapened(made).run_standard_evaluation(chunk.x, chunk.y, batch_size=len(chunk.x))
    return predicted != chunk.y, made


def ours(net: nn.Module, chunk: Chunk, eps: float, version: Any = "standard") -> tuple[Tensor, Any]:
    attacked = AutoAttack(version).attack(net, chunk, eps)
    _, broken, invalid = verified(net, chunk.x, attacked.x_adv, chunk.y, eps)
    assert not invalid
    return broken, attacked


# ------------------------------------------------------------------------------------------------ as the library does


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
@pytest.mark.parametrize(("eps", "seed"), [(0.1, 0), (0.2, 3)])
def test_everyone_falls_who_falls_to_the_stock_library(
    version: Any, eps: float, seed: int, net: nn.Module, digits: data.Data, small: None
) -> None:
    chunk = whole(digits, slice(0, 32), seed)
    theirs, _ = stock(net, chunk, eps, version)
    assert 0 < theirs.sum() < len(theirs)
    assert torch.equal(ours(net, chunk, eps, version)[0], theirs)


@pytest.mark.parametrize("attack", ["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"])
def test_every_stage_alone_breaks_whom_it_breaks_in_the_library(
    attack: str, net: nn.Module, digits: data.Data, small: None
) -> None:
    net.requires_grad_(False)
    chunk = whole(digits, slice(0, 64))
    right = (net(chunk.x).argmax(dim=1) == chunk.y).nonzero().squeeze(1)
    theirs, _ = stock(net, chunk, 0.2, "plus", attacks_to_run=[attack])
    part = chunk.part(right.numpy())
    found = AutoAttack("plus").stage(attack, net, part, 0.2)
    broken = verified(net, part.x, found.x_adv, part.y, 0.2)[1]
    assert 0 < broken.sum() < len(broken)
    assert torch.equal(broken, theirs[right])


def test_the_fallen_cost_nothing_more(net: nn.Module, digits: data.Data, small: None) -> None:
    net.requires_grad_(False)
    chunk = whole(digits, slice(0, 64))
    right = (net(chunk.x).argmax(dim=1) == chunk.y).nonzero().squeeze(1)
    part = chunk.part(right.numpy())

    def spent(stage: str, eps: float) -> int:
        return int(AutoAttack().stage(stage, net, part, eps).backwards)

    assert spent("apgd-ce", 0.0) == 9 * len(right)
    assert spent("apgd-ce", 0.5) < 5 * len(right)  # all have fallen, and nobody iterates to the end
    assert spent("apgd-t", 0.0) == 9 * 9 * len(right)
    assert spent("fab-t", 0.5) < 3 * len(right) < spent("fab-t", 0.0) == 9 * 5 * len(right)


class Noisy(nn.Module):
    """A network whose answer is never quite the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + 0.05 * torch.randn_like(x))
        return logits


def test_of_a_random_network_nothing_is_left_out(net: nn.Module, digits: data.Data, small: None) -> None:
    chunk = whole(digits, slice(0, 24))
    noisy = Noisy(net).requires_grad_(False)
    attacked = AutoAttack().stage("apgd-ce", noisy, chunk, 0.5)
    assert attacked.backwards == 9 * int((~verified(net, chunk.x, chunk.x, chunk.y, 0.5)[1]).sum())
    assert any("randomized" in warning for warning in attacked.warnings)


# ------------------------------------------------------------------------------------------------ versions, classes


@pytest.mark.parametrize("version", ["standard", "plus", "rand"])
def test_the_versions_are_the_librarys(version: Any) -> None:
    import pyautoattack

    assert list(autoattack.STAGES[version]) == pyautoattack.AutoAttack(nn.Identity(), version=version).attacks_to_run


@pytest.mark.parametrize(
    ("version", "classes", "attacks", "targets", "restarts"),
    [
        ("standard", 10, STANDARD, 9, 1),
        ("standard", 100, STANDARD, 9, 1),
        ("standard", 4, STANDARD, 3, 1),
        ("standard", 3, ("apgd-ce", "apgd-dlr", "fab-t", "square"), 2, 1),
        ("standard", 2, ("apgd-ce", "fab-t", "square"), 1, 1),
        ("plus", 10, PLUS, 9, 5),
        ("plus", 3, ("apgd-ce", "apgd-dlr", "fab", "square", "fab-t"), 2, 5),
        ("plus", 2, ("apgd-ce", "fab", "square", "fab-t"), 1, 5),
        ("rand", 10, ("apgd-ce", "apgd-dlr"), 9, 1),
        ("rand", 3, ("apgd-ce", "apgd-dlr"), 2, 1),
        ("rand", 2, ("apgd-ce",), 1, 1),
    ],
)
def test_no_more_classes_are_asked_for_than_there_are(
    version: Any, classes: int, attacks: tuple[str, ...], targets: int, restarts: int
) -> None:
    chunk = Chunk(torch.rand(2, 1, 8, 8), torch.tensor([0, 1]), np.arange(2), classes, seed=7)
    one = AutoAttack(version=version)
    made = one._library(DigitsCNN(classes, 1, 8), chunk, 0.1)
    assert one.stages(classes) == attacks
    assert made.apgd_targeted.n_target_classes == made.fab.n_target_classes == targets
    assert made.apgd.n_restarts == restarts
    assert (made.norm, made.epsilon, made.seed, made.square.n_queries) == ("Linf", 0.1, 7, 5000)


@pytest.mark.parametrize("classes", [2, 3, 4])
def test_few_classes_are_enough(classes: int, npz: Callable[..., Path], tmp_path: Path, small: None) -> None:
    few = data.load(str(npz(classes=classes, n=60)))
    net = trained(DigitsCNN(classes, 1, 8), few.x_train, few.y_train, 0.1, 30)
    done = evaluate(Examination(subject(net), few, ALONE, "0.15", chunk=13), tmp_path)
    result, table = done.result, record.read_outcomes(tmp_path / f"{done.id}.parquet")
    assert 0 < result.correct["autoattack"] < result.correct["clean"]
    assert list(result.stages["autoattack"]) == list(AutoAttack().stages(classes))
    assert sum(result.stages["autoattack"].values()) == result.correct["clean"] - result.correct["autoattack"]
    assert table.loc[table["clean_pred"] != table["label"], "autoattack.broken"].all()
    for first in range(0, 30, 13):
        chunk = whole(few, slice(first, first + 13))
        assert table["autoattack.broken"][first : first + 13].tolist() == stock(net, chunk, 0.15)[0].tolist()


# ------------------------------------------------------------------------------------------------ the record


def test_the_record_says_who_fell_to_what_and_what_it_cost(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None
) -> None:
    done = evaluate(Examination(subject(net), digits, ALONE, "0.2", n=64, chunk=40), tmp_path)
    table = record.read_outcomes(tmp_path / f"{done.id}.parquet")
    broke, after = done.result.stages["autoattack"], done.result.after["autoattack"]
    wrong = (table["clean_pred"] != table["label"]).to_numpy()
    assert ((table["autoattack.stage"] == 0) == wrong).all()
    assert ((table["autoattack.stage"] >= 0) == table["autoattack.broken"]).all()
    assert [int((table["autoattack.stage"] == k).sum()) for k in (1, 2, 3, 4)] == list(broke.values())
    assert sum(k > 0 for k in broke.values()) > 1  # or the order would not be seen
    right = done.result.correct["clean"]
    for stage, fell in broke.items():
        right -= fell
        assert after[stage] == right
    assert right == done.result.correct["autoattack"]
    costs = done.run["attacks"]["autoattack"]
    assert list(costs["stages"]) == list(STANDARD)
    for what in ("forwards", "backwards"):
        assert sum(of[what] for of in costs["stages"].values()) == costs[what] > 0
    assert costs["stages"]["square"]["backwards"] == 0


def test_a_stage_that_a_record_misplaces_is_seen(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None
) -> None:
    done = evaluate(Examination(subject(net), digits, ALONE, "0.2", n=20), tmp_path)
    said = done.said()
    said["result"]["stages"]["autoattack"]["square"] += 1
    table = record.read_outcomes(tmp_path / f"{done.id}.parquet")
    record.write(tmp_path, said, table)
    with pytest.raises(Refused, match="do not add up to the record's stages of autoattack"):
        record.read(tmp_path / f"{done.id}.json")


class Killed(BaseException):
    """Stands for SIGKILL."""


def test_a_kill_costs_one_stage_of_one_chunk(
    net: nn.Module,
    digits: data.Data,
    tmp_path: Path,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    task = Examination(subject(net), digits, ALONE, "0.2", n=12, chunk=6)
    undisturbed = evaluate(task, tmp_path / "whole")
    asked: list[tuple[str, int]] = []
    perturbed = autoattack.perturbed

    def dying(library: Any, stage: str, x: Tensor, y: Tensor) -> Tensor:
        found = perturbed(library, stage, x, y)
        asked.append((stage, len(x)))
        if len(asked) % 2 == 0:
            raise Killed
        return found

    monkeypatch.setattr(sys.modules[AutoAttack.__module__], "perturbed", dying)
    kills = 0
    while not list((tmp_path / "killed").glob("*.json")):
        try:
            done = evaluate(task, tmp_path / "killed")
        except Killed:
            kills += 1
    stages = 2 * len(STANDARD)
    assert len(asked) == stages + kills  # each kill has cost one stage of one chunk
    assert (done.result, done.hash) == (undisturbed.result, undisturbed.hash)
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("resuming")]
    assert len(said) == kills
    assert said[0] == "resuming at chunk 1, autoattack apgd-t: 2 of 10 steps are done"


def test_a_stage_that_nobody_reaches_is_done_in_no_time(digits: data.Data, tmp_path: Path, small: None) -> None:
    everywhere = replace(digits, y_test=torch.full_like(digits.y_test, 3))
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    nn.init.zeros_(net[1].weight)
    with torch.no_grad():
        net[1].bias.copy_(torch.arange(10.0))
    done = evaluate(Examination(subject(net.eval()), everywhere, ALONE, "0.2", n=8), tmp_path)
    assert done.result.correct == {"clean": 0, "autoattack": 0, "worst": 0}
    assert done.run["attacks"]["autoattack"]["forwards"] == 0


# ------------------------------------------------------------------------------------------------ any input


def test_a_network_that_nobody_breaks_stays_whole(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None
) -> None:
    done = evaluate(Examination(subject(net), digits, ALONE, "0.0001", n=16), tmp_path)
    assert done.result.correct["autoattack"] == done.result.correct["clean"]
    assert set(done.result.stages["autoattack"].values()) == {0}


@pytest.mark.parametrize("kept", [1, 2])
def test_one_image_is_a_batch(kept: int, net: nn.Module, digits: data.Data, small: None) -> None:
    right = (net(digits.x_test).argmax(dim=1) == digits.y_test).nonzero()[:kept, 0].numpy()
    chunk = Chunk(digits.x_test[right], digits.y_test[right], right, 10, seed=0)
    assert ours(net, chunk, 0.6)[0].all()
    assert not ours(net, chunk, 0.0001)[0].any()


def test_those_who_are_wrong_already_are_left_alone(net: nn.Module, digits: data.Data, small: None) -> None:
    chunk = whole(digits, slice(0, 20))
    wrong = replace(chunk, y=(net(chunk.x).argmax(dim=1) + 1) % 10)
    attacked = AutoAttack().attack(net, wrong, 0.1)
    assert torch.equal(attacked.x_adv, chunk.x)
    assert attacked.backwards == 0


def test_images_may_lie_channels_last(net: nn.Module, digits: data.Data, tmp_path: Path, small: None) -> None:
    torch.manual_seed(1)
    colour = replace(digits, x_test=digits.x_test.expand(-1, 3, -1, -1).contiguous())
    strided = replace(colour, x_test=colour.x_test.contiguous(memory_format=torch.channels_last))
    wide = nn.Sequential(nn.Conv2d(3, 1, 1), net).eval()
    nn.init.constant_(wide[0].weight, 1 / 3)
    nn.init.zeros_(wide[0].bias)
    found = [
        ours(wide, Chunk(given.x_test[:12], digits.y_test[:12], np.arange(12), 10, 0), 0.2)[0]
        for given in (colour, strided)
    ]
    assert torch.equal(*found)
    assert evaluate(Examination(subject(wide), strided, ALONE, "0.2", n=4), tmp_path).result.data.n == 4


@pytest.mark.parametrize("dtype", [np.uint8, np.int32])
def test_labels_may_be_any_integers(dtype: Any, npz: Callable[..., Path], tmp_path: Path, small: None) -> None:
    labels = {f"y_{split}": (np.arange(n) % 3).astype(dtype) for split, n in (("train", 60), ("test", 30))}
    loaded = data.load(str(npz(**labels)))
    net = DigitsCNN(3, 1, 8).eval()
    assert evaluate(Examination(subject(net), loaded, ALONE, "0.15", n=5), tmp_path).result.data.n == 5


def test_a_float64_network_is_examined(net: nn.Module, digits: data.Data, tmp_path: Path, small: None) -> None:
    found = []
    for dtype in (torch.float32, torch.float64):
        task = Examination(subject(deepcopy(net).to(dtype)), digits, ALONE, "0.2", n=10)
        found.append(evaluate(task, tmp_path).result.correct)
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------ memory


class Narrow(nn.Module):
    """A network on a device that holds so many images at once, with their graph or without."""

    def __init__(self, net: nn.Module, most: int) -> None:
        super().__init__()
        self.net, self.most = net, most

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        logits: Tensor = self.net(x)
        return logits


@pytest.mark.parametrize("version", ["standard", "plus"])
def test_memory_that_does_not_suffice_changes_the_batch_and_not_the_result(
    version: Any, net: nn.Module, digits: data.Data, small: None
) -> None:
    chunk = whole(digits, slice(0, 12))
    narrow = Narrow(net, 5).requires_grad_(False)
    assert torch.equal(ours(narrow, chunk, 0.2, version)[0], ours(net, whole(digits, slice(0, 12)), 0.2, version)[0])
    assert chunk.shared["piece"] <= 5


def test_memory_that_does_not_hold_one_image_is_refused(net: nn.Module, digits: data.Data, small: None) -> None:
    with pytest.raises(Refused, match="does not hold one image"):
        AutoAttack().attack(Narrow(net, 0), whole(digits, slice(0, 4)), 0.2)


# ------------------------------------------------------------------------------------------------ no trace


def test_no_trace_is_left(net: nn.Module, digits: data.Data, small: None) -> None:
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    chunk = whole(digits, slice(6))
    before = chunk.x.clone(), chunk.y.clone(), torch.get_rng_state(), list(logger.handlers), logger.propagate
    mine, tracer = lambda *_: None, sys.gettrace()
    checks.funcs["grad"] = 3
    try:
        sys.settrace(mine)
        AutoAttack().attack(net, chunk, 0.1)
        after = sys.gettrace()
    finally:
        sys.settrace(tracer)
    assert after is mine
    assert set(checks.funcs.values()) == {0}
    assert torch.equal(chunk.x, before[0])
    assert torch.equal(chunk.y, before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert (logger.handlers, logger.propagate) == before[3:]
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_everything_is_put_back_after_an_interruption(
    net: nn.Module, digits: data.Data, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pyautoattack.square import SquareAttack

    def interrupted(*_: Any) -> None:
        torch.rand(3)
        raise KeyboardInterrupt

    monkeypatch.setattr(SquareAttack, "perturb", interrupted)
    mine, tracer, stream = lambda *_: None, sys.gettrace(), torch.get_rng_state()
    try:
        sys.settrace(mine)
        with pytest.raises(KeyboardInterrupt):
            AutoAttack().attack(net, whole(digits, slice(6)), 0.001)
        after = sys.gettrace()
    finally:
        sys.settrace(tracer)
    assert after is mine
    assert torch.equal(torch.get_rng_state(), stream)
    assert not [h for h in logging.getLogger("auto-attack").handlers if type(h).__name__ == "_Heard"]
    assert all(p.requires_grad for p in net.parameters())


def test_it_repeats_itself_whatever_went_before(net: nn.Module, digits: data.Data, small: None) -> None:
    runs = []
    for seed in (0, 0, 1):
        torch.rand(5)
        runs.append(AutoAttack().attack(net, whole(digits, slice(10), seed), 0.15).x_adv)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


# ------------------------------------------------------------------------------------------------ the library's doubts


class Probabilities(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=1)


class Dynamic(nn.Sequential):
    """A network that takes gradients on its way, as far as the library can see."""

    def forward(self, x: Tensor) -> Tensor:
        self.grad()
        return super().forward(x)

    def grad(self) -> None:
        pass


def test_what_the_library_doubts_goes_into_the_record(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def warnings(network: nn.Module) -> str:
        task = Examination(subject(network.eval()), digits, ALONE, "0.15", n=6, chunk=3)
        said = evaluate(task, tmp_path / type(network).__name__).result.warnings
        assert len(set(said)) == len(said)
        assert all(warning.startswith("autoattack: ") for warning in said)
        return "; ".join(said)

    assert "dynamic" not in warnings(net)
    assert "it seems that the output is a probability distribution" in warnings(Probabilities(net))
    assert "it seems to be a dynamic defense" in warnings(Dynamic(net))
    assert "dynamic" not in warnings(nn.ModuleList([net])[0])  # what it saw before is forgotten
    assert "it seems" not in "".join(capfd.readouterr())
