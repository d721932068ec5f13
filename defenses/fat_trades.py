"""FAT for TRADES: Zhang et al. (ICML 2020), Algorithms 3 and 4."""

from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import FriendlyRule
from fatbench.quantities import CountSchedule

from .trades import Trades


@dataclass(frozen=True)
class FatTrades(FriendlyRule, Trades):
    """FAT for TRADES: TRADES on the early-stopped search, which climbs the KL and checks the label."""

    name: ClassVar[str] = "fat-trades"

    # FAT_for_TRADES.py: epochs 1-30, 31-50, 51-70, 71-85.
    tau: CountSchedule = (("0", 0), ("30/85", 1), ("50/85", 2), ("70/85", 3))
