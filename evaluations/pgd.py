"""PGD-N: projected gradient ascent, last iterate (Madry et al., ICLR 2018), as its users report it."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fatbench.attacks import STARTS, Crafted, Now, Objective, StopRule, cross_entropy, cw_margin, pgd
from fatbench.evaluation import Attacked, Chunk, Evaluation, Work
from fatbench.quantities import NonNegative, StepSize, step_of


@dataclass
class _Misled(StopRule):
    """Stops who is misclassified by the network itself: of whom a copy calls misled it is asked."""

    chunk: Chunk
    asked: int = 0

    def __call__(self, now: Now) -> Tensor:
        logits, asked = self.chunk.judged(now.x_adv, now.logits, now.logits.argmax(dim=1) != now.y)
        self.asked += asked
        return logits.argmax(dim=1) != now.y


@dataclass(frozen=True)
class Pgd(Evaluation):
    """PGD-N, constant step, on cross-entropy and at the last iterate unless told otherwise.

    With `iterate = "best"` an example stops at the first iterate that misleads, and of several restarts the first that
    misleads counts in any case.
    """

    name: ClassVar[str] = "pgd"

    steps: Annotated[int, Field(ge=1)] = 20
    step_size: StepSize = "eps/4"
    start: Literal["uniform", "gaussian", "natural"] = "uniform"
    clamp_start: bool = True
    restarts: Annotated[int, Field(ge=1)] = 1
    loss: Literal["cross-entropy", "cw-margin"] = "cross-entropy"
    kappa: NonNegative = 50.0  # of cw-margin; attack_generator.py:4-16; MART's authors used another and say not which
    iterate: Literal["last", "best"] = "last"

    def objective(self) -> Objective:
        if self.loss == "cross-entropy":
            return cross_entropy
        return cw_margin if self.kappa == 50.0 else Objective(partial(cw_margin.loss, kappa=self.kappa))

    def work(self, stage: str, classes: int) -> Work:
        return Work(self.restarts - 1, self.restarts * self.steps)

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        runs = [self._run(model, chunk, eps, restart) for restart in range(self.restarts)]
        x_adv = runs[0].x_adv
        for run in runs[1:]:  # of several restarts, the first that misleads counts
            x_adv = torch.where(self._right(chunk.judge or model, x_adv, chunk.y), run.x_adv, x_adv)
        checks = (self.restarts - 1) * len(chunk.x)
        return Attacked(x_adv, sum(r.forwards for r in runs) + checks, sum(r.backwards for r in runs))

    def _run(self, model: nn.Module, chunk: Chunk, eps: float, restart: int) -> Crafted:
        # The path is one, however long: a longer run goes on from where a shorter one stopped, with identical numbers.
        path = (
            self.objective(),
            eps,
            step_of(self.step_size, eps),
            self.start,
            self.clamp_start,
            self.iterate,
            restart,
        )
        past, point = chunk.scratch.get(path, (0, None))
        begin = partial(STARTS[self.start], draws=chunk.draws(restart), clamp=self.clamp_start)
        left, known = (self.steps - past, point) if past <= self.steps else (self.steps, None)
        start = begin if known is None else lambda x, eps: known
        stop = _Misled(chunk) if self.iterate == "best" else None
        run = pgd(
            model, chunk.x, chunk.y, eps=eps, step_size=path[2], steps=left, objective=path[0], start=start, stop=stop
        )
        chunk.scratch[path] = (self.steps, run.x_adv)
        return replace(run, forwards=run.forwards + (stop.asked if stop else 0))

    @staticmethod
    @torch.no_grad()
    def _right(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        right: Tensor = model(x).argmax(dim=1) == y
        return right[:, None, None, None]
