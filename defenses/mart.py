"""Wang et al., "Improving Adversarial Robustness Requires Revisiting Misclassified Examples" (ICLR 2020): MART.

min_theta mean_i [ BCE(p(x~_i), y_i) + beta * KL(p(x_i) || p(x~_i)) * (1 - p_y(x_i)) ], x~ by PGD-K on CE.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.defense import Defense
from fatbench.quantities import NonNegative, Progress


@dataclass(frozen=True)
class Mart(Defense):
    """MART: boosted cross-entropy at the adversarial, plus a KL weighted by how wrong the clean prediction is."""

    name: ClassVar[str] = "mart"

    start: Literal["uniform", "gaussian", "natural"] = "gaussian"  # mart.py: 0.001 N(0, 1)
    beta: NonNegative = 6.0  # 6 for WRN-34-10, 5 for ResNet-18 in MART's code; 6 in the FAT paper
    forwards: Literal["nat-adv", "adv-nat"] = "nat-adv"  # MART's code; FAT_for_MART.py has adv first

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        if self.forwards == "nat-adv":
            clean, adversarial = model(x), model(x_adv)
        else:
            adversarial, clean = model(x_adv), model(x)
        p, p_adv = clean.softmax(dim=1), adversarial.softmax(dim=1)
        # The most probable class other than y. No detach anywhere: the gradient flows through the weight too.
        wrong = p_adv.masked_fill(F.one_hot(y, p_adv.shape[1]).bool(), -1.0).max(dim=1).values
        bce = F.cross_entropy(adversarial, y) - torch.log(1.0001 - wrong + 1e-12).mean()  # mart.py:42-56
        divergence = (p * (clean.log_softmax(dim=1) - torch.log(p_adv + 1e-12))).sum(dim=1)
        weight = 1.0000001 - p.gather(1, y[:, None]).squeeze(1)
        loss: Tensor = bce + self.beta * (weight * divergence).mean()
        return loss
