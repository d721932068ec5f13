"""Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger" (ICML 2020): FAT."""

from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import FriendlyRule

from .madry import Madry


@dataclass(frozen=True)
class Fat(FriendlyRule, Madry):
    """FAT (friendly adversarial training): Madry on the early-stopped PGD-K-tau, Algorithms 1 and 2."""

    name: ClassVar[str] = "fat"
