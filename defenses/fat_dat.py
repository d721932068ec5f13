"""FAT for DAT: an example stops when it is misled, or when its attack has converged, whichever comes first."""

from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import FriendlyRule

from .dat import Dat


@dataclass(frozen=True)
class FatDat(FriendlyRule, Dat):
    """FAT for DAT: DAT on the early-stopped search; either rule stops an example. Not in the papers."""

    name: ClassVar[str] = "fat-dat"
