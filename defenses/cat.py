"""Cai et al., "Curriculum Adversarial Training" (IJCAI 2018): CAT.

Lesson K trains on attacks of strength 0..K mixed in one batch, until accuracy on validation under strength K has not
risen for `patience` epochs; then the best weights of the lesson come back and K grows by one.
"""

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fatbench.attacks import Crafted, Mode, natural, pgd
from fatbench.defense import Defense, Measure, Verdict
from fatbench.draws import Draws
from fatbench.quantities import NonNegative, Progress, step_of


@dataclass(frozen=True)
class Cat(Defense):
    """CAT (curriculum adversarial training): attack strength grows when validation accuracy stops rising."""

    name: ClassVar[str] = "cat"

    mode: Mode = "train"  # the released code never calls eval() here: each chunk's own BatchNorm statistics
    clamp_start: bool = False  # PGDAttack.py:44-81
    # Epochs without a rise; a twelfth of the run unless given: 10 of 120, the paper's.
    patience: Annotated[int, Field(ge=1)] | None = None
    jitter: bool = True  # one step a call, (2 eps / k) U(1, 10 / k), PGDAttack.py; False: 2 eps / k
    train_above: NonNegative = 0.0  # released code: advance only with training accuracy above 0.9; the paper not
    # The released code validates on images quantised to 16 levels (utils.py:15-21); 0: as they are.
    levels: Literal[0] | Annotated[int, Field(ge=2)] = 0

    def __post_init__(self) -> None:
        self.memory.update(strength=0, best=-1.0, waited=0)

    def steps_at(self, progress: Progress) -> int:
        return int(self.memory["strength"])

    def attack(
        self, model: nn.Module, x: Tensor, y: Tensor, k: int, eps: float, draws: Draws | None, size: float, **how: Any
    ) -> Crafted:
        """Strength k: k steps of 2 eps / k, times `size`; strength 0 is the clean image."""
        start = self.start_at(draws) if k else natural
        step = (2 * eps if self.step_size is None else step_of(self.step_size, eps)) / max(k, 1) * size
        return pgd(model, x, y, eps=eps, step_size=step, steps=k, start=start, **how)

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress, *, draws: Draws | None = None
    ) -> Crafted:
        top, parts = self.steps_at(progress), []
        width = len(x) // (top + 1)
        # In batch order; the last chunk takes the rest (advtrain_all.py:284-310), and all of a batch smaller than that.
        for k in range(top + 1) if width else (top,):
            rows = slice(k * width, (k + 1) * width if k < top else len(x))
            own = None if draws is None else draws.rows(rows)
            u = torch.rand(()).item() if own is None else own.scalar("jitter")
            size = 1 + u * (10 / max(k, 1) - 1) if self.jitter else 1.0
            how: dict[str, Any] = {"stop": self.stop(progress, y[rows]), "noise": self.step_noise(x[rows], own)}
            how |= {"project": self.project, "mode": self.mode}
            parts.append(self.attack(model, x[rows], y[rows], k, self.eps_at(progress), own, size, **how))
        return Crafted.joined(parts)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x_adv), y)

    def after_epoch(self, progress: Progress, model: nn.Module, measure: Measure) -> Verdict:
        strength = self.memory["strength"]

        def examine(model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
            x_adv = self.attack(model, x, y, strength, self.eps_at(progress), draws, 1.0).x_adv
            return quantised(x_adv, self.levels) if self.levels and strength else x_adv

        accuracy = measure(examine)
        patience = max(1, round(progress.total / 12)) if self.patience is None else self.patience
        if accuracy > self.memory["best"]:
            self.memory.update(best=accuracy, waited=0)
            return Verdict(remember=True)
        self.memory["waited"] += 1
        waits = self.memory["waited"] < patience or measure.train_accuracy <= self.train_above
        if waits or strength >= self.steps:
            return Verdict()
        # The new lesson's first mark is set at the end of its first epoch; the released code sets it at once, by the
        # weights that come back.
        self.memory.update(strength=strength + 1, best=-1.0, waited=0)
        return Verdict(reload_best=True)


def quantised(x: Tensor, levels: int) -> Tensor:
    """min(floor(levels * x), levels - 1) / (levels - 1): CAT's transform of images at inference (utils.py:15-21)."""
    return (x * levels).floor().clamp(max=levels - 1) / (levels - 1)
