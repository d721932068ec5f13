"""Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks" (ICLR 2018).

min_theta mean_i max_{||d||_inf <= eps} CE(f(x_i + d), y_i), the maximum by PGD-K from a random start.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.defense import Defense
from fatbench.quantities import Progress


@dataclass(frozen=True)
class Madry(Defense):
    """Madry (PGD adversarial training): cross-entropy at PGD-K examples.

    As the FAT paper runs it, FAT with tau = K. The authors' TensorFlow code crafts in train mode (train.py:41,
    `--set mode=train`) and says 10 steps in config.json where its released network took 7 (cifar10_challenge #25).
    """

    name: ClassVar[str] = "madry"

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x_adv), y)
