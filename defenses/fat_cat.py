"""FAT for CAT: the curriculum's attacks, each stopped early. tau counts within the lesson's strength."""

from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import FriendlyRule

from .cat import Cat


@dataclass(frozen=True)
class FatCat(FriendlyRule, Cat):
    """FAT for CAT: the curriculum of CAT on the early-stopped search. Not in the papers."""

    name: ClassVar[str] = "fat-cat"
