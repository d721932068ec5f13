"""FAT by a margin: Zhang et al. (ICML 2020), Appendix A, where a margin rho takes the place of tau's steps."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from fatbench.attacks import Margin, StopRule
from fatbench.quantities import NonNegative, Progress

from .madry import Madry


@dataclass(frozen=True)
class FatMargin(Madry):
    """FAT whose attack stops once the example is misclassified by a margin rho, rather than tau steps after."""

    name: ClassVar[str] = "fat-margin"

    # 0 is FAT with tau = 0. No released code has the rule, so the value is ours. A gap of probabilities is at most 1:
    # a larger rho stops nobody, as Madry.
    rho: NonNegative = 0.1
    gap: Literal["probability", "loss"] = "probability"  # what reaches rho: see fatbench.attacks.Margin

    def stop(self, progress: Progress, y: Tensor) -> StopRule | None:
        return Margin(self.rho, self.gap)
