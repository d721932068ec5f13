"""FAT for MART: Zhang et al. (ICML 2020), Algorithms 1 and 5."""

from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import FriendlyRule
from fatbench.quantities import CountSchedule

from .mart import Mart


@dataclass(frozen=True)
class FatMart(FriendlyRule, Mart):
    """FAT for MART: MART on the early-stopped PGD-K-tau."""

    name: ClassVar[str] = "fat-mart"

    # FAT_for_MART.py: epochs 1-20, 21-40, 41-60, 61-80, 81-90.
    tau: CountSchedule = (("0", 0), ("20/90", 1), ("40/90", 2), ("60/90", 3), ("80/90", 4))
