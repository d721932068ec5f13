"""Multi-targeted PGD (Gowal et al. 2019, arXiv 1910.09338): the margin, then the nearest targets, then restarts.

A step that decays to nothing lets an iterate settle on the corner that a constant step jumps over, and restarts are
spent where they may still change something: on the examples whose margin came nearest to nought.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from fatbench.attacks import Now, Objective, StopRule, pgd, uniform
from fatbench.evaluation import Attacked, Chunk, Evaluation, Work
from fatbench.quantities import StepSize, step_of


@dataclass(frozen=True)
class MultiTargeted(Evaluation):
    """PGD on z_j - z_y: over the best rival, over each likely target, then restarts on the nearest; best iterate."""

    name: ClassVar[str] = "multitargeted"

    steps: Annotated[int, Field(ge=1)] = 40  # of each run
    step_size: StepSize = "eps"  # of the first step; it decays linearly to nothing over the run
    targets: Annotated[int, Field(ge=0)] = 3  # the likeliest wrong classes of the clean image, each climbed alone
    restarts: Annotated[int, Field(ge=0)] = 48  # more runs, on margin and targets in turn
    nearest: Annotated[float, Field(ge=0, le=1)] = 0.1  # the share of a chunk that each restart is spent on

    def work(self, stage: str, classes: int) -> Work:
        runs = 1 + min(self.targets, classes - 1) + self.nearest * self.restarts
        return Work(math.ceil(runs), math.ceil(runs * self.steps))

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        hunt = _Hunt(model, chunk, eps, self)
        targets = min(self.targets, chunk.classes - 1)
        for target in (None, *range(targets)):
            hunt.run(hunt.standing(), target, restart=0)
        for restart in range(1, self.restarts + 1):
            target = (restart - 1) % (targets + 1) - 1
            hunt.run(hunt.near(self.nearest), None if target < 0 else target, restart)
        return Attacked(hunt.x_adv, hunt.forwards, hunt.backwards)


def margin(logits: Tensor, y: Tensor) -> Tensor:
    """(M,) how far the strongest rival leads the label: max_{j != y} z_j - z_y, above 0 where misclassified."""
    true = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
    return logits.masked_fill(true, -torch.inf).amax(dim=1) - logits[true]


def lead(logits: Tensor, pair: Tensor) -> Tensor:
    """(M,) z_t - z_y of pairs (t, y), (M, 2)."""
    z = logits.gather(1, pair)
    return z[:, 0] - z[:, 1]


@dataclass
class _Misled(StopRule):
    """Stops whom the network itself misclassifies, and remembers the best margin (N,) that each example came to."""

    chunk: Chunk
    best: Tensor
    asked: int = 0

    def __call__(self, now: Now) -> Tensor:
        found = margin(now.logits.detach(), now.y)
        logits, asked = self.chunk.judged(now.x_adv, now.logits, found > 0)
        if asked:
            found = margin(logits, now.y)
        self.asked += asked
        self.best[now.which] = torch.maximum(self.best[now.which], found)
        return found > 0


@dataclass
class _Hunt:
    """The runs on one chunk: what has been found, how near each example came, what it cost."""

    model: nn.Module
    chunk: Chunk
    eps: float
    how: MultiTargeted
    x_adv: Tensor = field(init=False)
    best: Tensor = field(init=False)
    rivals: Tensor = field(init=False)
    forwards: int = 0
    backwards: int = 0

    def __post_init__(self) -> None:
        self.x_adv = self.chunk.x.clone()
        logits = self._logits(self.chunk.x)
        self.best = margin(logits, self.chunk.y)
        ranked = logits.scatter(1, self.chunk.y[:, None], -torch.inf).argsort(dim=1, descending=True, stable=True)
        self.rivals = ranked[:, :-1]

    def standing(self) -> Tensor:
        return (self.best <= 0).nonzero().squeeze(1)

    def near(self, share: float) -> Tensor:
        """Those standing whose margin came nearest to nought, in the chunk's order."""
        standing = self.standing()
        order = self.best[standing].argsort(descending=True, stable=True)
        return standing[order[: math.ceil(share * len(self.best))]].sort().values

    def run(self, which: Tensor, target: int | None, restart: int) -> None:
        """One run on some examples: on the margin, or on the lead of the target-th likeliest rival."""
        if not len(which):
            return
        part, first, steps = self.chunk.part(which.cpu().numpy()), step_of(self.how.step_size, self.eps), self.how.steps
        pairs = None if target is None else torch.stack([self.rivals[which, target], part.y], dim=1)
        seen = _Misled(part, self.best[which])
        made = pgd(
            self.model, part.x, part.y, eps=self.eps, step_size=lambda k: first * (1 - k / steps), steps=steps,
            objective=Objective(margin) if pairs is None else Objective(lead, pairs),
            start=partial(uniform, draws=part.draws(restart)), stop=seen,
        )  # fmt: skip
        final = margin(self._logits(made.x_adv), part.y)  # nobody was asked after the last step
        self.best[which] = torch.maximum(seen.best.clamp(max=0), final)
        self.x_adv[which] = torch.where((final > 0)[:, None, None, None], made.x_adv, self.x_adv[which])
        self.forwards += made.forwards + seen.asked
        self.backwards += made.backwards

    @torch.no_grad()
    def _logits(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = (self.chunk.judge or self.model)(x)
        return logits
