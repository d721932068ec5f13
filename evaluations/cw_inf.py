"""C&W-inf: PGD-30 on the Carlini & Wagner margin with confidence kappa, as the FAT paper evaluates (Eq. 12)."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

from pydantic import Field

from fatbench.attacks import Objective, cw_margin
from fatbench.quantities import NonNegative

from .pgd import Pgd


@dataclass(frozen=True)
class CwInf(Pgd):
    """C&W-inf: PGD-30 on the margin of the logits, kappa 50."""

    name: ClassVar[str] = "cw-inf"

    steps: Annotated[int, Field(ge=1)] = 30
    kappa: NonNegative = 50.0  # attack_generator.py:4-16; MART's authors used another and say not which

    def objective(self) -> Objective:
        return cw_margin if self.kappa == 50.0 else Objective(partial(cw_margin.loss, kappa=self.kappa))
