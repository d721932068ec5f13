"""PGD-K-tau, the one attack that everything here trains on and is examined with.

Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger" (ICML 2020), Algorithms 1 and 3;
with no stop rule it is the PGD of Madry et al. (ICLR 2018). Images x are (N, C, H, W) in [0, 1], labels y are (N,)
int64, logits are (N, classes); eps and step_size are in pixel units, distances are l-inf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.draws import Draws
from fatbench.folding import folded

Mode = Literal["eval", "train"]
Loss = Callable[[Tensor, Tensor], Tensor]
Start = Callable[[Tensor, float], Tensor]
Noise = Callable[[int, Tensor], Tensor]


# ------------------------------------------------------------------------------------------------ objectives


def labels(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The target of a supervised objective: y itself."""
    return y


def clean_probabilities(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The target of TRADES's inner maximisation: softmax of the clean images' logits, (N, classes), no gradient."""
    with torch.no_grad():
        probabilities: Tensor = model(x).to(x.dtype).softmax(dim=1)
    return probabilities


@dataclass(frozen=True)
class Objective:
    """What an attack climbs.

    Attributes:
        loss: (logits (M, classes), target (M, ...)) -> (M,), one value an example, ascended.
        target: A tensor with a row for each example, or a function of (model, x, y) that makes it, called once.

    An objective is called like its loss: `cw_margin(logits, y)`.
    """

    loss: Callable[..., Tensor]
    target: Tensor | Callable[[nn.Module, Tensor, Tensor], Tensor] = labels

    def __call__(self, logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return self.loss(logits, target, **options)


def _cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(logits, y, reduction="none")


def _kl(logits: Tensor, probabilities: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(logits, dim=1), probabilities, reduction="none").sum(dim=1)


def _cw_margin(logits: Tensor, y: Tensor, kappa: float = 50.0) -> Tensor:
    true = F.one_hot(y, logits.shape[1]).to(logits.dtype)
    real = (true * logits).sum(dim=1)
    # -1e4 takes the true class out of the maximum even where every other logit is negative.
    other = (logits - 1e4 * true).max(dim=1).values  # among equals the gradient goes to one, as in the code
    return -(real - other + kappa).clamp(min=0)


# CE(f(x_adv), y): FAT, Madry, MART, DAT, CAT.
cross_entropy = Objective(_cross_entropy)
# KL(p(x) || p(x_adv)): TRADES (Zhang et al., ICML 2019) and Algorithm 3.
kl = Objective(_kl, clean_probabilities)
# -max(z_y - max_{j != y} z_j + kappa, 0), Carlini & Wagner 2017 as PGD's objective; kappa 50 as in FAT.
cw_margin = Objective(_cw_margin)


# ------------------------------------------------------------------------------------------------ starts


def uniform(x: Tensor, eps: float, *, draws: Draws | None = None, clamp: bool = True) -> Tensor:
    """x + U(-eps, eps) a pixel, clamped to [0, 1]. Without `draws` it takes from torch's own stream."""
    noise = torch.rand_like(x) * 2 - 1 if draws is None else draws.uniform(x, "uniform start")
    return _within_range(x + eps * noise, clamp)


def gaussian(x: Tensor, eps: float, *, draws: Draws | None = None, clamp: bool = True) -> Tensor:
    """x + 0.001 N(0, 1), clamped to [0, 1]: the start of TRADES and MART, who leave it unclamped."""
    noise = torch.randn_like(x) if draws is None else draws.normal(x, "gaussian start")
    return _within_range(x + 0.001 * noise, clamp)


def natural(x: Tensor, eps: float, *, draws: Draws | None = None, clamp: bool = True) -> Tensor:
    """x itself: Algorithm 1 as printed."""
    return x.clone()


def _within_range(x: Tensor, clamp: bool) -> Tensor:
    return x.clamp(0, 1) if clamp else x


STARTS: dict[str, Callable[..., Tensor]] = {"uniform": uniform, "gaussian": gaussian, "natural": natural}


# ------------------------------------------------------------------------------------------------ stop rules


@dataclass
class Now:
    """What a stop rule is shown: the examples still moving (M of N), before their step k (from 0).

    Attributes:
        which: (M,) their rows in the batch.
        k: Steps taken so far.
        x, start, x_adv: (M, C, H, W) the clean image, where the attack began, where it stands.
        y, target: (M,), (M, ...) the labels, and the objective's target.
        logits: (M, classes) at x_adv.
    """

    which: Tensor
    k: int
    x: Tensor
    start: Tensor
    x_adv: Tensor
    y: Tensor
    logits: Tensor
    target: Tensor
    loss: Loss
    asked: bool = field(default=False, init=False)

    @cached_property
    def grad(self) -> Tensor:
        """(M, C, H, W) each example's own gradient at x_adv. A rule that looks makes everyone pay the backward."""
        self.asked = True
        return self._ascent(self.logits, self.target)

    def grad_of(self, moving: Tensor | slice) -> Tensor:
        """The gradient of the rows that go on, (moving.sum(), C, H, W); the others' losses are left out of it."""
        if self.asked:
            return self.grad[moving]
        return self._ascent(self.logits[moving], self.target[moving])[moving]

    def _ascent(self, logits: Tensor, target: Tensor) -> Tensor:
        # A sum, not a mean: an example's gradient must not depend on who else is in the batch.
        return torch.autograd.grad(self.loss(logits, target).sum(), self.x_adv)[0]


class StopRule:
    """Says who has moved enough: `rule(now)` is (M,) bool, asked before each step; state begins anew at k = 0."""

    def __call__(self, now: Now) -> Tensor:
        raise NotImplementedError  # a rule says it

    def __or__(self, other: StopRule) -> StopRule:
        return Either(self, other)


@dataclass
class Either(StopRule):
    """`a | b`: stops whom either stops. Both are asked every time, so that neither loses count."""

    first: StopRule
    second: StopRule

    def __call__(self, now: Now) -> Tensor:
        return self.first(now).logical_or(self.second(now))


@dataclass
class Friendly(StopRule):
    """Algorithm 1 of FAT: an example goes on until it has been misclassified at tau checks, and stops at the next.

    tau (a number, or one for each example, (N,)) counts wrong checks, not consecutive ones: turning right again spends
    nothing and refunds nothing. tau >= K never stops anyone.
    """

    tau: int | Tensor
    y: Tensor
    left: Tensor = field(init=False, repr=False)

    def __call__(self, now: Now) -> Tensor:
        if now.k == 0:
            self.left = torch.zeros_like(self.y) + self.tau
        wrong = now.logits.argmax(dim=1) != self.y[now.which]
        left = self.left[now.which]
        self.left[now.which] = left - wrong.long()
        return wrong & (left <= 0)


@dataclass
class Margin(StopRule):
    """Appendix A of FAT: an example goes on until the best wrong class leads its own by a margin rho.

    The gap of cross-entropy losses is CE_y - min_{j != y} CE_j, which is max_{j != y} z_j - z_y; that of probabilities
    is max_{j != y} p_j - p_y. rho = 0 is Friendly with tau = 0, rho = inf never stops anyone.
    """

    rho: float
    gap: Literal["probability", "loss"] = "probability"

    def __call__(self, now: Now) -> Tensor:
        logits, y = now.logits.detach(), now.y.unsqueeze(1)
        scores = logits if self.gap == "loss" else logits.softmax(dim=1)
        ahead = scores.scatter(1, y, -torch.inf).amax(dim=1) - scores.gather(1, y).squeeze(1)
        # The prediction is asked too: between equal scores it takes the first, and Friendly goes by it.
        return (logits.argmax(dim=1) != now.y) & (ahead >= self.rho)


@dataclass
class Converged(StopRule):
    """DAT's first-order stationary condition (Wang et al., ICML 2019): stops once FOSC <= c.

    FOSC(x_k) = eps * ||g||_1 - <x_k - origin, g>, g the example's own gradient; 0 where no first-order step within the
    box gains anything. The definition's origin is the clean image, the released code's is the noisy start.

    Attributes:
        first: Steps taken before the rule is asked at all (the released code asks after the first step).
    """

    c: float
    eps: float
    origin: Literal["clean", "start"] = "clean"
    first: int = 1

    def __call__(self, now: Now) -> Tensor:
        if now.k < self.first:
            return torch.zeros_like(now.which, dtype=torch.bool)
        return self.fosc(now) <= self.c

    def fosc(self, now: Now) -> Tensor:
        """(M,) the condition's value at x_adv."""
        moved = now.x_adv.detach() - (now.x if self.origin == "clean" else now.start)
        return self.eps * now.grad.abs().flatten(1).sum(dim=1) - (moved * now.grad).flatten(1).sum(dim=1)


# ------------------------------------------------------------------------------------------------ the engine


@dataclass(frozen=True)
class Crafted:
    """What an attack made.

    Attributes:
        x_adv: (N, C, H, W) where each example stopped, in input order, laid out like x.
        steps: (N,) int64 gradient steps that each example took.
        forwards: Examples passed through the network, clean targets included.
        backwards: Example gradients taken. An example that a logit rule stops is not among them, though its row rides
            along, with zeros, in the backward of those who go on; one that a gradient rule (FOSC) stops is: the rule
            looked at its gradient.
    """

    x_adv: Tensor
    steps: Tensor
    forwards: int
    backwards: int

    @classmethod
    def joined(cls, parts: Sequence[Crafted]) -> Crafted:
        """Consecutive parts of one batch as one."""
        return cls(
            torch.cat([part.x_adv for part in parts]),
            torch.cat([part.steps for part in parts]),
            sum(part.forwards for part in parts),
            sum(part.backwards for part in parts),
        )


@contextmanager
def crafting(model: nn.Module, mode: Mode = "eval") -> Iterator[None]:
    """The model as an attack may use it, and afterwards as it was: flags per module, requires_grad, gradients.

    In eval mode parameters and buffers stay as they were; in train mode BatchNorm's statistics move, on purpose.
    """
    training = [(module, module.training) for module in model.modules()]
    learning = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.train(mode == "train")
        for parameter, _ in learning:
            parameter.requires_grad_(False)  # input gradients only: half of the backward is not done
        with torch.enable_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag
        for parameter, flag in learning:
            parameter.requires_grad_(flag)


def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float,
    step_size: float | Callable[[int], float],
    steps: int,
    objective: Objective | Loss | None = None,
    start: Start = uniform,
    stop: Callable[[Now], Tensor] | None = None,
    noise: float | Noise = 0.0,
    project: bool = True,
    mode: Mode = "eval",
) -> Crafted:
    """Projected gradient ascent on `objective`, stopped early by `stop`: PGD-K-tau (Algorithms 1 and 3).

    While steps are left: predict at the current point; whom the rule stops stays there; the others take
    x <- clip_[0,1](clip_[x0-eps, x0+eps](x + step_size * sign(g) + noise)), x0 the CLEAN image, sign(0) = 0. After the
    last step nobody is asked. Only examples still moving go through the network.

    Args:
        model: (M, C, H, W) in [0, 1] -> logits (M, classes).
        x: (N, C, H, W) clean images.
        y: (N,) labels.
        eps: Radius of the l-inf ball.
        step_size: alpha, or a function of the step k (from 0).
        steps: K, at most so many.
        objective: Ascended; cross_entropy unless given.
        start: (x, eps) -> first point; a caller's start is taken as it is, inside the ball or not.
        stop: (now) -> (M,) bool; Friendly, Converged, `a | b`, or any function.
        noise: omega, the scale of N(0, 1) added to each step, or a function (k, which (M,)) -> (M, C, H, W).
        project: Without it there is no eps-ball (FAT, Appendix B); [0, 1] is kept.
        mode: The network's mode while crafting.
    """
    objective = objective if isinstance(objective, Objective) else Objective(objective or cross_entropy)
    perturb = noise if callable(noise) else _gaussian_steps(x, noise)
    size = step_size if callable(step_size) else lambda k: step_size
    x = x.detach()
    begin = torch.empty_like(x).copy_(start(x, eps))
    x_adv = begin.clone()
    which = torch.arange(len(x), device=x.device)
    taken = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    forwards = backwards = 0
    with crafting(model, mode):
        network: Callable[..., Tensor] = folded(model) if mode == "eval" else model
        made = callable(objective.target) and objective.target is not labels
        forwards += len(x) if made else 0
        target = objective.target(model, x, y) if callable(objective.target) else objective.target
        for k in range(steps):
            if not len(which):
                break
            point = x_adv[which].requires_grad_()
            logits = network(point).to(x.dtype)  # bfloat16 has no digits for what a loss does with them
            forwards += len(which)
            now = Now(which, k, x[which], begin[which], point, y[which], logits, target[which], objective.loss)
            # A mask's count must be known before what it picks has a shape: with no rule nothing waits for the GPU.
            moving = slice(None) if stop is None else ~stop(now)
            asked, which = len(which), which[moving]
            if not len(which):
                backwards += asked if now.asked else 0
                break
            grad = now.grad_of(moving)
            backwards += asked if now.asked else len(which)
            x_adv[which] = _step(point.detach()[moving], grad, size(k), perturb(k, which), now.x[moving], eps, project)
            taken[which] += 1
    return Crafted(x_adv, taken, forwards, backwards)


def _step(point: Tensor, grad: Tensor, size: float, noise: Tensor | float, x: Tensor, eps: float, box: bool) -> Tensor:
    point = point + size * grad.sign() + noise
    if box:
        point = torch.minimum(torch.maximum(point, x - eps), x + eps)
    return point.clamp(0, 1)


def _gaussian_steps(x: Tensor, omega: float) -> Callable[[int, Tensor], Tensor | float]:
    if not omega:
        return lambda k, which: 0.0
    return lambda k, which: omega * torch.randn_like(x[which])
