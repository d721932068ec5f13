"""C&W-inf: PGD-30 on the Carlini & Wagner margin with confidence kappa, as the FAT paper evaluates (Eq. 12)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from .pgd import Pgd


@dataclass(frozen=True)
class CwInf(Pgd):
    """C&W-inf: PGD-30 on the margin of the logits, kappa 50."""

    name: ClassVar[str] = "cw-inf"

    steps: Annotated[int, Field(ge=1)] = 30
    loss: Literal["cross-entropy", "cw-margin"] = "cw-margin"
