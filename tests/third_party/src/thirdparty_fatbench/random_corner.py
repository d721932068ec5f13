"""The worst of a few random corners of the eps-ball: no gradient, a floor that every real attack must be below."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from fatbench.evaluation import Attacked, Chunk, Evaluation


@dataclass(frozen=True)
class RandomCorner(Evaluation):
    """The worst of `tries` random corners of the eps-ball."""

    name: ClassVar[str] = "random-corner"

    tries: Annotated[int, Field(ge=1)] = 4

    @torch.no_grad()
    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        x_adv = chunk.x.clone()
        for number in range(self.tries):
            corner = (chunk.x + eps * chunk.draws(number).uniform(chunk.x, "corner").sign()).clamp(0, 1)
            wrong = model(corner).argmax(dim=1) != chunk.y
            x_adv[wrong] = corner[wrong]
        return Attacked(x_adv, self.tries * len(chunk.x), 0)
