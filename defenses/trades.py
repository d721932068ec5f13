"""Zhang et al., "Theoretically Principled Trade-off between Robustness and Accuracy" (ICML 2019): TRADES.

min_theta mean_i [ CE(f(x_i), y_i) + beta * max KL(p(x_i) || p(x~_i)) ], the maximum by PGD-K on the KL.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.attacks import Objective, kl
from fatbench.defense import Defense
from fatbench.quantities import NonNegative, Progress


@dataclass(frozen=True)
class Trades(Defense):
    """TRADES: natural cross-entropy plus beta times the KL from clean to adversarial predictions."""

    name: ClassVar[str] = "trades"
    objective: ClassVar[Objective] = kl

    # x + 0.001 N(0, 1): at x itself the KL's gradient is rounding noise (trades.py; FAT's earlystop.py:31 clamps it).
    start: Literal["uniform", "gaussian", "natural"] = "gaussian"
    beta: NonNegative = 6.0
    # Train-mode forwards of an update, hence BatchNorm's: TRADES's code passes x twice (trades.py), FAT's port once.
    forwards: Literal["nat-adv", "nat-adv-nat"] = "nat-adv"

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        # The gradient flows through both arguments of the KL. "batchmean" is the sum over classes, mean over examples;
        # log_target keeps the gradient finite where a probability underflows to 0.
        logits = model(x)
        log_adv = F.log_softmax(model(x_adv), dim=1)
        log_clean = F.log_softmax(logits if self.forwards == "nat-adv" else model(x), dim=1)
        divergence = F.kl_div(log_adv, log_clean, reduction="batchmean", log_target=True)
        return F.cross_entropy(logits, y) + self.beta * divergence
