"""FAT with smoothed labels and averaged weights, as a third party would write it."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from fatbench.defense import Defense, FriendlyRule
from fatbench.quantities import Progress


@dataclass(frozen=True)
class SmoothFat(FriendlyRule, Defense):
    """FAT with label smoothing, and an exponential moving average of the weights as the network that counts."""

    name: ClassVar[str] = "smooth-fat"

    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.1
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return F.cross_entropy(model(x_adv), y, label_smoothing=self.smoothing)

    def average(self, progress: Progress) -> float | None:
        return self.decay
