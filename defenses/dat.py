"""Wang et al., "On the Convergence and Robustness of Adversarial Training" (ICML 2019): DAT, also "Dynamic".

Each example's attack stops once its FOSC is below c_t = max(c_max - t * c_max / T', 0): weak attacks early in training,
converged ones later. The attack stops computing for whom it stops, which the released code does not.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.attacks import Converged, StopRule
from fatbench.defense import Defense, eval_logits
from fatbench.quantities import Moment, NonNegative, Progress


@dataclass(frozen=True)
class Dat(Defense):
    """DAT (dynamic adversarial training): PGD that stops at a convergence criterion falling to 0 over training."""

    name: ClassVar[str] = "dat"

    c_max: NonNegative = 0.5  # train_models.py:106-108; holds for summed losses and eps 0.031 on CIFAR-10
    until: Moment = "100/120"  # T': from here on c_t = 0
    origin: Literal["clean", "start"] = "clean"  # the condition's centre; the released code takes the noisy start
    first: Literal[0, 1] = 1  # the released code always takes the first step
    weighted: bool = False  # the released code weights CE by itself from the second epoch on (116-127); the paper not

    def threshold(self, progress: Progress) -> float:
        """c_t, t the epochs done."""
        if not Fraction(self.until):
            return 0.0
        return max(self.c_max * float(1 - progress.fraction / Fraction(self.until)), 0.0)

    def stop(self, progress: Progress, y: Tensor) -> StopRule | None:
        return Converged(self.threshold(progress), self.eps_at(progress), origin=self.origin, first=self.first)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        if not self.weighted or progress.done == 0:
            return F.cross_entropy(model(x_adv), y)
        weight = F.cross_entropy(eval_logits(model, x_adv), y, reduction="none")
        return (weight * F.cross_entropy(model(x_adv), y, reduction="none")).mean()
