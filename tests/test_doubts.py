"""A network that hides its gradients is named for it, and one that does not is left in peace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fatbench import checkpoint, data
from fatbench.attacks import crafting, pgd
from fatbench.checkpoint import Subject
from fatbench.doubts import CHECKS, Doubt, Look, ask, learning, square_below_white_box
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Chunk
from fatbench.models import DigitsCNN
from fatbench.protocol import Protocol

EPS = 0.15


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


def train(net: nn.Module, digits: data.Data, eps: float, steps: int) -> nn.Module:
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        batch = torch.arange(step * 128, step * 128 + 128) % len(digits.x_train)
        x, y = digits.x_train[batch], digits.y_train[batch]
        x = pgd(net, x, y, eps=eps, step_size=eps / 2, steps=3).x_adv if eps else x
        sgd.zero_grad()
        nn.functional.cross_entropy(net.train()(x), y).backward()
        sgd.step()
    sgd.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def net(digits: data.Data) -> nn.Module:
    torch.manual_seed(0)
    return train(DigitsCNN(10, 1, 8), digits, EPS, 60)


@pytest.fixture(scope="module")
def undefended(digits: data.Data) -> nn.Module:
    torch.manual_seed(1)
    return train(DigitsCNN(10, 1, 8), digits, 0.0, 120)


def asked(network: nn.Module, digits: data.Data, *names: str, n: int = 48, **more: Any) -> dict[str, Doubt]:
    chunk = Chunk(digits.x_test[:n], digits.y_test[:n], np.arange(n), 10, 0)
    training = learning(network)
    with crafting(network):
        look = Look(network, chunk, EPS, training=training, **more)
        return {name: ask(name, look) for name in names or CHECKS}


def fired(doubts: dict[str, Doubt]) -> set[str]:
    assert all("\n" not in doubt.said and doubt.said for doubt in doubts.values())
    return {name for name, doubt in doubts.items() if doubt.fired}


class Around(nn.Module):
    """A network with something done to its input or its answer."""

    def __init__(self, net: nn.Module, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.net, self.before, self.after = net, before or (lambda x: x), after or (lambda z: z)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.after(self.net(self.before(x)))
        return answer


class Restless(Around):
    """A network that normalises by the batch whatever mode it is told to be in."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(deepcopy(net))

    def train(self, mode: bool = True) -> Restless:
        return super().train(True)


class ByBatch(nn.Module):
    """A network that looks at its neighbours and keeps no state."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits - logits.mean(dim=0, keepdim=True)


def test_an_honest_network_is_left_in_peace(net: nn.Module, undefended: nn.Module, digits: data.Data) -> None:
    assert fired(asked(net, digits)) == set()
    assert fired(asked(undefended, digits)) == set()


@pytest.mark.parametrize(
    ("name", "masks"),
    [
        ("random", lambda net: Around(net, before=lambda x: x + 0.05 * torch.randn_like(x))),
        ("softmax", lambda net: Around(net, after=lambda z: z.softmax(dim=1))),
        ("quantised", lambda net: Around(net, before=lambda x: (6 * x).round() / 6)),
        ("zero-gradient", lambda net: Around(net, before=lambda x: (6 * x).round() / 6)),
        ("train-mode", Restless),
        ("train-mode", ByBatch),
    ],
    ids=["random", "softmax", "quantised", "its gradient", "train mode", "neighbours"],
)
def test_what_masks_its_gradient_is_named(
    name: str, masks: Callable[[nn.Module], nn.Module], net: nn.Module, digits: data.Data
) -> None:
    found = fired(asked(masks(net).eval(), digits, "random", "softmax", "quantised", "zero-gradient", "train-mode"))
    assert name in found
    assert found <= {name} | ({"quantised", "zero-gradient"} if name in ("quantised", "zero-gradient") else set())


def test_a_network_that_came_in_train_mode_is_told_apart(net: nn.Module, digits: data.Data) -> None:
    net.train()
    try:
        doubt = asked(net, digits, "train-mode")["train-mode"]
    finally:
        net.eval()
    assert doubt.fired
    assert "came in train mode, and was examined in eval mode" in doubt.said
    net[2].train()  # a ReLU: a flag of its own, and nothing that would move
    assert not asked(net, digits, "train-mode")["train-mode"].fired


def test_a_network_that_takes_gradients_on_its_way_is_named(net: nn.Module, digits: data.Data) -> None:
    class Purifies(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.backward()
            logits: Tensor = net(x)
            return logits

        def backward(self) -> None:
            pass

    assert fired(asked(Purifies(), digits, "dynamic")) == {"dynamic"}
    assert fired(asked(net, digits, "dynamic")) == set()  # what was seen before is forgotten


def test_a_gradient_that_points_the_wrong_way_is_seen(net: nn.Module, digits: data.Data) -> None:
    class Shattered(torch.autograd.Function):
        """Honest for the clean images (the first call's), and turned round everywhere else."""

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.clean = bool(torch.isclose(x * 16, (x * 16).round(), atol=1e-4).all())
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad if ctx.clean else -grad

    shattered = Around(net, before=Shattered.apply)
    assert fired(asked(shattered, digits, "fgsm-below-pgd")) == {"fgsm-below-pgd"}


def test_a_wall_without_a_gradient_is_seen_at_any_budget(net: nn.Module, digits: data.Data) -> None:
    blind = Around(net, before=lambda x: x.detach() + 0 * x)
    assert "large-eps" in fired(asked(blind, digits, "large-eps"))


def test_more_steps_that_break_fewer_are_seen(net: nn.Module, digits: data.Data, monkeypatch: Any) -> None:
    x = digits.x_test[:48]
    chunk = Chunk(x, net(x).argmax(dim=1), np.arange(48), 10, 0)
    look = Look(net, chunk, EPS)
    wrong = look.run(0.9, 30)
    monkeypatch.setattr(look, "run", lambda eps, steps, *more, **rest: wrong if steps == 20 else x)
    doubt = CHECKS["pgd-100-above-pgd-20"](look)
    assert doubt.fired
    assert doubt.said == f"PGD-100 leaves 48 of 48, PGD-20 {look.right(wrong)}"


def test_a_surrogate_that_does_better_is_told(net: nn.Module, digits: data.Data) -> None:
    masked = Around(net, before=lambda x: (6 * x).round() / 6)
    assert fired(asked(masked, digits, "transfer", surrogate=net)) == {"transfer"}
    assert fired(asked(net, digits, "transfer", surrogate=masked)) == set()


def test_square_is_weighed_against_two_in_a_thousand() -> None:
    verdicts = [square_below_white_box({"apgd-ce": 3, "square": k}, n).fired for n, k in ((99, 1), (99, 2), (1500, 3))]
    assert verdicts == [False, True, False]


def test_checks_repeat_themselves_and_leave_the_random_stream(net: nn.Module, digits: data.Data) -> None:
    noisy = Around(net, before=lambda x: x + 0.05 * torch.randn_like(x))
    stream = torch.get_rng_state()
    runs = [asked(noisy, digits, "random", "fgsm-below-pgd", "quantised", n=16) for _ in range(2)]
    assert runs[0] == runs[1]
    assert torch.equal(stream, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------ in the record


def test_the_verdict_is_a_part_of_the_result(net: nn.Module, digits: data.Data, tmp_path: Path) -> None:
    fgsm = Protocol(name="quick", version=1, summary="cheap", source="these tests", attacks=("fgsm",))

    def examined(network: nn.Module, **more: Any) -> Any:
        subject = Subject(network, {"arch": "mine", "mean": None, "std": None}, checkpoint.fingerprint(network))
        return evaluate(Examination(subject, digits, fgsm, str(EPS), n=20, chunk=10, **more), tmp_path)

    plain, checked = examined(net), examined(net, checked=True)
    assert (plain.result.masking, plain.result.doubts) == (None, {})
    assert checked.result.masking == ()
    assert set(checked.result.doubts) == CHECKS.keys() - {"transfer"}
    assert plain.id != checked.id
    masked = Around(net, before=lambda x: (6 * x).round() / 6, after=lambda z: z.softmax(dim=1)).eval()
    told = examined(masked, checked=True, surrogate=Subject(net, {}, "0" * 64)).result
    assert {"softmax", "quantised", "zero-gradient", "transfer"} <= set(told.masking)
    assert told.surrogate == "0" * 64
    assert f"softmax: {told.doubts['softmax'].said}" in told.warnings
