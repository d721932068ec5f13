"""A swifter copy answers as its network does, and what it finds counts only where the network agrees."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fatbench import checkpoint, data, models
from fatbench.attacks import pgd
from fatbench.checkpoint import Subject
from fatbench.errors import Refused
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Chunk, examiner, verified
from fatbench.projection import projected
from fatbench.protocol import Protocol
from fatbench.registry import evaluations
from fatbench.swift import swift

AutoAttack: Any = evaluations["autoattack"]
ALONE = Protocol(name="quick", version=1, summary="cheap", source="these tests", attacks=("pgd-20", "autoattack"))


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture(scope="module")
def net(digits: data.Data) -> nn.Module:
    torch.manual_seed(0)
    net = models.DigitsCNN(10, 1, 8)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(60):
        batch = torch.arange(step * 128, step * 128 + 128) % len(digits.x_train)
        x, y = digits.x_train[batch], digits.y_train[batch]
        sgd.zero_grad()
        nn.functional.cross_entropy(net.train()(pgd(net, x, y, eps=0.15, step_size=0.08, steps=3).x_adv), y).backward()
        sgd.step()
    return net.eval()


@pytest.mark.parametrize("arch", ["digits-cnn", "small-cnn", "resnet-18", "wrn-40-4"])
def test_a_copy_answers_as_its_network(arch: str) -> None:
    torch.manual_seed(0)
    net = models.build(arch).eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    x = torch.rand(4, 3, 32, 32)
    copy = swift(net, x)
    assert copy is not None
    with torch.no_grad():
        torch.testing.assert_close(copy(x), net(x), rtol=1e-4, atol=1e-5)
    half = swift(net, x, "bf16")
    assert half is not None
    assert half(x).dtype == torch.float32
    assert net.training is False
    assert all(p.dtype == torch.float32 for p in net.parameters())


def test_normalisation_is_copied_too(net: nn.Module, digits: data.Data) -> None:
    wrapped = models.Normalised(net, (0.4,), (0.3,)).eval()
    for precision in ("float32", "bf16"):
        assert swift(wrapped, digits.x_test[:8], precision) is not None  # type: ignore[arg-type]


class Random(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + torch.randn_like(x))
        return logits


class Branching(nn.Module):
    """A network that cannot be traced."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x if x.mean() > -1 else -x)
        return logits


def test_a_network_that_does_not_repeat_itself_has_no_copy(net: nn.Module, digits: data.Data) -> None:
    assert swift(Random(net), digits.x_test[:8]) is None


def test_a_network_that_cannot_be_traced_is_copied_whole(net: nn.Module, digits: data.Data) -> None:
    copy = swift(Branching(net), digits.x_test[:8])
    assert copy is not None
    with torch.no_grad():
        torch.testing.assert_close(copy(digits.x_test[:8]), net(digits.x_test[:8]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("far", [0.1, 3.0, 30.0, 300.0])
def test_the_projection_is_the_librarys_without_its_sort(scale: float, far: float) -> None:
    from pyautoattack.fab_projections import projection_linf

    x = torch.rand(16, 300)
    x[:, :50], x[:, 50:80] = 0, 1
    w = scale * torch.randn(16, 300)
    w[:, ::50] = 0
    b = (w * x).sum(dim=1) + far * scale * torch.randn(16)  # the farthest cannot be reached within the box
    move = projected(x, w, b)
    torch.testing.assert_close(move, projection_linf(x, w, b), rtol=1e-5, atol=1e-6)
    assert projected(x, torch.zeros_like(w), b).abs().max() == 0


# ------------------------------------------------------------------------------------------------ in an examination


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    library = AutoAttack._library

    def cheap(self: Any, *given: Any) -> Any:
        made = library(self, *given)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 6
        made.square.n_queries = 40
        return made

    monkeypatch.setattr(AutoAttack, "_library", cheap)


def task(net: nn.Module, digits: data.Data, **more: Any) -> Examination:
    subject = Subject(net, {"arch": "digits-cnn", "mean": None, "std": None}, checkpoint.fingerprint(net))
    return Examination(subject, digits, ALONE, "0.15", **{"n": 40, "chunk": 40, **more})


def test_whatever_is_crafted_on_the_network_judges(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None
) -> None:
    given, swifter, half = (
        evaluate(task(net, digits, **how), tmp_path / str(k))
        for k, how in enumerate(({"layout": "given"}, {}, {"attack_precision": "bf16"}))
    )
    assert given.result == swifter.result  # so few examples leave no room for a difference
    assert given.id == swifter.id != half.id
    assert half.result.attack_precision == half.run["crafted_in"] == "bf16"
    assert "crafted in bfloat16; every success was verified in float32" in half.result.warnings
    assert abs(half.result.correct["autoattack"] - given.result.correct["autoattack"]) <= 1


class Pessimist(nn.Module):
    """A copy that calls everything wrong: hardly one of its successes holds."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits.roll(1, dims=1)


def test_what_only_the_copy_calls_broken_goes_on_standing(
    net: nn.Module, digits: data.Data, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fatbench import examine

    honest = evaluate(task(net, digits, n=24), tmp_path / "honest").result
    monkeypatch.setattr(examine, "swift", lambda model, x, precision: Pessimist(net).eval())
    misled = evaluate(replace(task(net, digits, n=24), eps="0.0001"), tmp_path / "misled").result
    assert misled.correct["autoattack"] == misled.correct["clean"]
    again = evaluate(task(net, digits, n=24), tmp_path / "again").result
    assert 0 < again.correct["autoattack"] >= honest.correct["autoattack"]


class Hasty(Pessimist):
    """A copy that calls an example wrong before it is."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits - 1.5 * nn.functional.one_hot(logits.argmax(dim=1), logits.shape[1])


@pytest.mark.parametrize(
    ("attack", "family"),
    [
        ("pgd-6", {"restarts": 3, "iterate": "best", "step_size": "eps/4"}),
        ("pgd-6", {"restarts": 3, "step_size": "eps/4"}),
        ("multitargeted", {"steps": 6, "targets": 2, "restarts": 4, "nearest": 0.5}),
    ],
)
def test_an_attack_that_stops_at_a_success_asks_the_network_itself(
    attack: str, family: dict[str, Any], net: nn.Module, digits: data.Data
) -> None:
    one, x, y = examiner(attack, family), digits.x_test[:40].contiguous(), digits.y_test[:40]
    whole, copy = Chunk(x, y, np.arange(40), 10, 0), Hasty(net).eval()
    found = {
        "network": one.attack(net, whole, 0.1),
        "copy": one.attack(copy, replace(whole, scratch={}), 0.1),
        "judged": one.attack(copy, replace(whole, scratch={}, judge=net), 0.1),
    }
    fell = {who: int(verified(net, x, made.x_adv, y, 0.1)[1].sum()) for who, made in found.items()}
    assert fell["copy"] < fell["judged"]
    assert abs(fell["judged"] - fell["network"]) <= 2


def test_bfloat16_that_a_network_does_not_bear_is_refused(net: nn.Module, digits: data.Data, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="leave --attack-precision out"):
        evaluate(task(Random(net), digits, attack_precision="bf16"), tmp_path)
