"""Standard training: no attack. The undefended reference."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fatbench.quantities import Count

from .madry import Madry


@dataclass(frozen=True)
class Standard(Madry):
    """Standard training, no attack: the undefended reference."""

    name: ClassVar[str] = "standard"

    steps: Count = 0
    start: Literal["uniform", "gaussian", "natural"] = "natural"
