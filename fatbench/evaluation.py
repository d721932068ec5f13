"""The contract of an evaluation: one attack family that examines a network, chunk by chunk.

An examiner is one frozen dataclass in a file of its own; its fields are what a protocol may set. It says `attack`, and
the harness counts: it verifies every example in float32 on the network itself, keeps outcomes per example, and resumes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fatbench.defense import build, settings_of
from fatbench.draws import Draws
from fatbench.errors import Refused, unknown
from fatbench.registry import evaluations


class Attacked(NamedTuple):
    """What an examiner hands back.

    Attributes:
        x_adv: (N, C, H, W) its best examples, in input order; the clean image where it found none.
        forwards, backwards: Examples passed through the network, example gradients taken.
        warnings: What it noticed, one line each.
        stages: Of an attack in several stages, how many examples each broke that the former left standing.
    """

    x_adv: Tensor
    forwards: int
    backwards: int
    warnings: tuple[str, ...] = ()
    stages: dict[str, int] = {}


@dataclass
class Chunk:
    """A fixed run of consecutive test examples: the unit of attack, of resume and of sharding.

    Attributes:
        x, y: (N, C, H, W) in [0, 1] float32 contiguous, (N,) int64.
        indices: (N,) their places in the test set.
        classes: How many logits the network has.
        seed: The examination's seed.
        scratch: What one attack leaves for the next on this chunk: PGD-100 goes on from where PGD-20 stopped.
    """

    x: Tensor
    y: Tensor
    indices: np.ndarray
    classes: int
    seed: int
    scratch: dict[Any, Any] = field(default_factory=dict)

    def part(self, which: np.ndarray) -> Chunk:
        """Some of its examples, by place; an example's starts stay its own."""
        rows = torch.as_tensor(which, device=self.x.device)
        return Chunk(self.x[rows].contiguous(), self.y[rows], self.indices[which], self.classes, self.seed)

    def draws(self, restart: int = 0) -> Draws:
        """Random starts keyed by (seed, kind of start, restart, example): never by attack name, batch or rank."""
        return Draws(("evaluation", self.seed), self.indices).restart(restart)


@dataclass(frozen=True)
class Evaluation:
    """What every examiner has.

    Attributes:
        name: The registered name; the file's name, with hyphens.
    """

    name: ClassVar[str]

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        """Examples within eps (l-inf) of chunk.x and within [0, 1]. The model comes in eval mode, parameters frozen."""
        raise NotImplementedError(f"{type(self).__name__} must say how it attacks")


def examiner(attack: str, settings: dict[str, Any]) -> Evaluation:
    """The examiner of an attack's name: `fgsm`, `cw-inf`, `autoattack`, or with its steps, `pgd-20`, `pgd-20@16/255`.

    Raises:
        Refused: nobody has that name, or a setting does not fit.
    """
    name = attack.partition("@")[0].lower().replace("_", "-")
    if name in evaluations:
        return _built(name, dict(settings))
    family, _, steps = name.rpartition("-")
    if family in evaluations and re.fullmatch(r"[1-9][0-9]{0,5}", steps):
        if "steps" not in settings_of(evaluations[family]):
            raise Refused(f"attack {attack!r}: {family} has no steps; write {family}")
        return _built(family, {**settings, "steps": int(steps)})
    raise unknown("attack", attack, [*evaluations, "pgd-20", "pgd-100"])


def _built(name: str, settings: dict[str, Any]) -> Evaluation:
    built: Evaluation = build(evaluations[name], settings)
    return built
