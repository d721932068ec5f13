"""Why a robust accuracy may not be what it seems: checks for gradient masking, each a small function with a name.

After Athalye et al. (ICML 2018, section 3), Carlini et al. (2019, "On evaluating adversarial robustness") and
AutoAttack's own flags. They look at a few examples, once; random numbers are their own, so that they repeat. That a
check is silent proves nothing; the names of those that fire are the verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from fatbench.attacks import Objective, Start, cross_entropy, cw_margin, natural, pgd, uniform
from fatbench.evaluation import Chunk

# Examples that a check looks at.
EXAMPLES = 128
# Budgets at which nothing recognisable is left of an image: a pixel can be anything, or any grey.
BLIND = (0.5, 1.0)


@dataclass(frozen=True)
class Doubt:
    """A check's verdict.

    Attributes:
        fired: Whether the network's robustness is in doubt.
        said: One line: what was seen.
    """

    fired: bool
    said: str


@dataclass
class Look:
    """What a check looks at.

    Attributes:
        model: The network, in eval mode as far as it obeys, parameters frozen.
        chunk: A few examples.
        eps: The budget.
        surrogate: Another network for the same images, if there is one.
        training: The layers that were in train mode when the network came.
    """

    model: nn.Module
    chunk: Chunk
    eps: float
    surrogate: nn.Module | None = None
    training: tuple[str, ...] = ()

    @property
    def n(self) -> int:
        return len(self.chunk.x)

    @property
    def slack(self) -> int:
        """By how many examples two attacks may differ for no reason: 2 in 100, and one."""
        return 1 + self.n // 50

    @cached_property
    @torch.no_grad()
    def logits(self) -> Tensor:
        answered: Tensor = self.model(self.chunk.x)
        return answered

    def run(self, eps: float, steps: int, start: Start | None = None, loss: Objective = cross_entropy) -> Tensor:
        """(n, C, H, W) of PGD with steps of eps/4 (a single one: eps), from the examples' own noise unless told."""
        size = eps if steps == 1 else eps / 4
        start = start or partial(uniform, draws=self.chunk.draws())
        x, y = self.chunk.x, self.chunk.y
        return pgd(self.model, x, y, eps=eps, step_size=size, steps=steps, objective=loss, start=start).x_adv

    @torch.no_grad()
    def right(self, x: Tensor) -> int:
        return int((self.model(x).argmax(dim=1) == self.chunk.y).sum())

    @cached_property
    def pgd_20(self) -> Tensor:
        return self.run(self.eps, 20)


@torch.no_grad()
def random(look: Look) -> Doubt:
    """AutoAttack's own test: five answers to the same images, each of length one."""
    answers = [look.model(look.chunk.x) for _ in range(5)]
    lengths = [nn.functional.normalize(answer, dim=1) for answer in answers]
    apart = max(float((a - lengths[0]).norm(dim=1).max()) for a in lengths[1:])
    return Doubt(not apart <= 1e-4, f"asked again, the network's answers lie up to {apart:.2g} apart")


def softmax(look: Look) -> Doubt:
    """Probabilities saturate, and their gradients with them."""
    logits = look.logits
    sums = float((logits.sum(dim=1) - 1).abs().max())
    fired = bool((logits >= -1e-5).all()) and sums < 1e-4
    return Doubt(fired, "its outputs are probabilities, not logits" if fired else "its outputs are no probabilities")


@torch.no_grad()
def quantised(look: Look) -> Doubt:
    """A network that rounds its input answers the same to images that differ by less than a rounding step."""
    somewhere = look.run(max(look.eps, 0.02), 0)
    nearby = (somewhere + 1e-5 * look.chunk.draws(1).uniform(somewhere, "uniform")).clamp(0, 1)
    same = float((look.model(somewhere) == look.model(nearby)).all(dim=1).float().mean())
    return Doubt(same > 0.5, f"{same:.0%} of the images are answered alike when moved by 0.00001")


def zero_gradient(look: Look) -> Doubt:
    """The share of examples at whose start no gradient shows the way."""

    def share(objective: Objective) -> float:
        x = look.run(look.eps, 0).requires_grad_()
        grad = torch.autograd.grad(objective.loss(look.model(x), look.chunk.y).sum(), x)[0]
        return float((grad == 0).flatten(1).all(dim=1).float().mean())

    margin, entropy = share(cw_margin), share(cross_entropy)
    said = f"the gradient is zero for {margin:.0%} of the examples on the margin, {entropy:.0%} on cross-entropy"
    return Doubt(margin > 0.05, said)


def train_mode(look: Look) -> Doubt:
    """Layers that go on learning, or look at an image's neighbours, while the network is examined."""
    before = {name: buffer.clone() for name, buffer in look.model.named_buffers()}
    with torch.no_grad():
        together, again = look.model(look.chunk.x), look.model(look.chunk.x)
        alone = look.model(look.chunk.x[: max(1, look.n // 2)])
    moved = [name for name, buffer in look.model.named_buffers() if not torch.equal(buffer, before[name])]
    drift = float((together[: len(alone)] - alone).abs().max() / together.abs().max().clamp(min=1e-12))
    for layers, what in (
        (learning(look.model), "stays in train mode whatever it is told"),
        (look.training, "came in train mode, and was examined in eval mode"),
        (moved, "changes while the network is examined"),
    ):
        if layers:
            return Doubt(True, f"{layers[0]} (of {len(layers)}) {what}")
    if not torch.allclose(together, again, rtol=1e-3):
        return Doubt(False, "no layer is in train mode; its answers are random, and not compared")
    return Doubt(not drift <= 1e-3, f"without its neighbours an image's logits differ by {drift:.2g} of the largest")


def learning(model: nn.Module) -> tuple[str, ...]:
    """The layers in train mode of which it makes a difference."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    return tuple(name or type(m).__name__ for name, m in model.named_modules() if isinstance(m, kinds) and m.training)


def fgsm_below_pgd(look: Look) -> Doubt:
    """One step that breaks more than twenty: the gradient does not lead where it points."""
    one = look.right(look.run(look.eps, 1, natural))
    many = look.right(look.pgd_20)
    return Doubt(one < many - look.slack, f"FGSM leaves {one} of {look.n}, PGD-20 {many}")


def pgd_100_above_pgd_20(look: Look) -> Doubt:
    """More steps that break fewer."""
    few = look.right(look.pgd_20)
    many = look.right(look.run(look.eps, 80, lambda x, eps: look.pgd_20))
    return Doubt(many > few + look.slack, f"PGD-100 leaves {many} of {look.n}, PGD-20 {few}")


def large_eps(look: Look) -> Doubt:
    """With a budget that leaves nothing of the image every network must fail."""
    left = [look.right(look.run(eps, 40)) for eps in BLIND]
    left[-1] = min(left[-1], look.right(look.run(BLIND[-1], 40, loss=cw_margin)))
    most = look.slack + look.n // 20
    said = ", ".join(f"{right} of {look.n} at {eps}" for right, eps in zip(left, BLIND, strict=True))
    return Doubt(min(left) > most, f"PGD-40 leaves {said}")


def dynamic(look: Look) -> Doubt:
    """A network that takes gradients on its way, to purify its input, say."""
    from fatbench.autoattack import takes_gradients

    fired = takes_gradients(look.model, look.chunk.x[:8])
    return Doubt(fired, "it takes gradients while it answers" if fired else "it takes no gradients while it answers")


def transfer(look: Look) -> Doubt:
    """Examples made on another network that break more than those made on this one."""
    if look.surrogate is None:
        return Doubt(False, "no surrogate was given")
    theirs = Look(look.surrogate, look.chunk, look.eps)
    foreign, own = look.right(theirs.pgd_20), look.right(look.pgd_20)
    return Doubt(foreign < own - look.slack, f"PGD-20 on the surrogate leaves {foreign} of {look.n}, on itself {own}")


CHECKS: dict[str, Callable[[Look], Doubt]] = {
    "random": random, "softmax": softmax, "quantised": quantised, "zero-gradient": zero_gradient,
    "train-mode": train_mode, "dynamic": dynamic, "fgsm-below-pgd": fgsm_below_pgd,
    "pgd-100-above-pgd-20": pgd_100_above_pgd_20, "large-eps": large_eps, "transfer": transfer,
}  # fmt: skip


def ask(name: str, look: Look) -> Doubt:
    """One check, with random numbers of its own."""
    devices = [look.chunk.x.device] if look.chunk.x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        torch.manual_seed(look.chunk.seed)
        return CHECKS[name](look)


def square_below_white_box(broke: dict[str, int], n: int) -> Doubt:
    """Square, which sees no gradient, breaking what gradients left: AutoAttack's own sign of masking (0.2 points)."""
    fell = broke["square"]
    fired = fell > max(1, 0.002 * n)
    return Doubt(fired, f"Square broke {fell} of {n} that white-box attacks left")
