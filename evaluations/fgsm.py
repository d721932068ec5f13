"""FGSM (Goodfellow et al., ICLR 2015): one step of eps. Always name its start: with a random one it is much weaker."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fatbench.quantities import StepSize

from .pgd import Pgd


@dataclass(frozen=True)
class Fgsm(Pgd):
    """FGSM: one step of eps on cross-entropy, from the clean image unless a protocol says otherwise."""

    name: ClassVar[str] = "fgsm"

    steps: Annotated[int, Field(ge=1, le=1)] = 1
    step_size: StepSize = "eps"
    start: Literal["uniform", "gaussian", "natural"] = "natural"
