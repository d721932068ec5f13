"""Cai et al., "Curriculum Adversarial Training" (IJCAI 2018): CAT.

Lesson K trains on attacks of strength 0..K mixed in one batch, until accuracy on validation under strength K has not
risen for `patience` epochs; then the best weights of the lesson come back and K grows by one.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.attacks import Crafted, Mode, natural, pgd, uniform
from fatbench.defense import Defense, Measure, Verdict
from fatbench.draws import Draws
from fatbench.quantities import Count, NonNegative, Progress


@dataclass(frozen=True)
class Cat(Defense):
    """CAT (curriculum adversarial training): attack strength grows when validation accuracy stops rising."""

    name: ClassVar[str] = "cat"

    mode: Mode = "train"  # the released code never calls eval() here: each chunk's own BatchNorm statistics
    clamp_start: bool = False  # PGDAttack.py:44-81
    patience: Count | None = None  # epochs without a rise; a twelfth of the run unless given: 10 of 120, the paper's
    jitter: bool = True  # one step a call, (2 eps / k) U(1, 10 / k), PGDAttack.py; False: 2 eps / k
    train_above: NonNegative = 0.0  # released code: advance only with training accuracy above 0.9; the paper not
    levels: Count = 0  # released code validates on images quantised to 16 levels (utils.py:15-21); 0: as they are

    def __post_init__(self) -> None:
        self.memory.update(strength=0, best=-1.0, waited=0)

    def steps_at(self, progress: Progress) -> int:
        return int(self.memory["strength"])

    def attack(
        self, model: nn.Module, x: Tensor, y: Tensor, k: int, eps: float, draws: Draws | None, size: float, **how: Any
    ) -> Crafted:
        """Strength k: k steps of 2 eps / k, times `size`; strength 0 is the clean image."""
        start = partial(uniform if k else natural, draws=draws, clamp=self.clamp_start)
        step = (self.step_size or 2 * eps) / max(k, 1) * size
        return pgd(model, x, y, eps=eps, step_size=step, steps=k, start=start, **how)

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress, *, draws: Draws | None = None
    ) -> Crafted:
        top, eps, parts = self.steps_at(progress), self.eps_at(progress), []
        width = len(x) // (top + 1)
        for k in range(top + 1 if width else 1):  # in batch order; the last chunk takes the rest (284-310)
            k = k if width else top  # a batch smaller than the lessons gets the present one; the code skips it
            rows = slice(k * width, (k + 1) * width if k < top else len(x))
            own = None if draws is None else draws.rows(rows)
            u = torch.rand(()).item() if own is None else own.scalar("jitter")
            size = 1 + u * (10 / max(k, 1) - 1) if self.jitter else 1.0
            how: dict[str, Any] = {"stop": self.stop(progress, y[rows]), "noise": self.step_noise(x[rows], own)}
            how |= {"project": self.project, "mode": self.mode}
            parts.append(self.attack(model, x[rows], y[rows], k, eps, own, size, **how))
        return Crafted(
            torch.cat([part.x_adv for part in parts]),
            torch.cat([part.steps for part in parts]),
            sum(part.forwards for part in parts),
            sum(part.backwards for part in parts),
        )

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x_adv), y)

    def after_epoch(self, progress: Progress, model: nn.Module, measure: Measure) -> Verdict:
        def examine(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
            x_adv = self.attack(model, x, y, self.memory["strength"], self.eps_at(progress), draws, 1.0).x_adv
            quantised = (x_adv * self.levels).floor().clamp(max=self.levels - 1) / max(self.levels - 1, 1)
            return quantised if self.levels and self.memory["strength"] else x_adv

        accuracy, patience = measure(examine), self.patience or max(1, round(progress.total / 12))
        if accuracy > self.memory["best"]:
            self.memory.update(best=accuracy, waited=0)
            return Verdict(remember=True)
        self.memory["waited"] += 1
        top = self.memory["strength"] >= self.steps
        if self.memory["waited"] < patience or measure.train_accuracy <= self.train_above or top:
            return Verdict()
        # The next lesson's best is measured at the next epoch's end: weights that were never trained at this strength
        # would set no mark worth beating.
        self.memory.update(strength=self.memory["strength"] + 1, best=-1.0, waited=0)
        return Verdict(reload_best=True)
