"""The contract of an evaluation: one attack family that examines a network, chunk by chunk.

An examiner is one frozen dataclass in a file of its own; its fields are what a protocol may set. It says `attack`, or
in stages (`Staged`) what each stage does, and the harness counts: it verifies every example in float32 on the network
itself, keeps outcomes per example, and resumes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fatbench.defense import build, settings_of
from fatbench.draws import Draws
from fatbench.errors import Refused, unknown
from fatbench.quantities import TOLERANCE
from fatbench.registry import evaluations

NO_ROOM = "the device's memory does not hold one image's gradient: use another --device"


class Attacked(NamedTuple):
    """What an examiner hands back.

    Attributes:
        x_adv: (N, C, H, W) its best examples, in input order; the clean image where it found none.
        forwards, backwards: Examples passed through the network, example gradients taken.
        warnings: What it noticed, one line each.
    """

    x_adv: Tensor
    forwards: int
    backwards: int
    warnings: tuple[str, ...] = ()

    @classmethod
    def joined(cls, parts: Sequence[Attacked]) -> Attacked:
        """Consecutive parts of one chunk as one."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            torch.cat([part.x_adv for part in parts]),
            sum(part.forwards for part in parts),
            sum(part.backwards for part in parts),
            tuple(dict.fromkeys(warning for part in parts for warning in part.warnings)),
        )


class Work(NamedTuple):
    """What an attack costs at most, for each example: forwards alone, and forwards with their backward."""

    forwards: int
    backwards: int


@dataclass
class Chunk:
    """A fixed run of consecutive test examples: the unit of attack, of resume and of sharding.

    Attributes:
        x, y: (N, C, H, W) in [0, 1] float32 contiguous, (N,) int64.
        indices: (N,) their places in the test set.
        classes: How many logits the network has.
        seed: The examination's seed.
        craft: A swifter copy of the network, on which an attack may craft; what it finds there may not hold.
        judge: The network itself, where an attack is handed that copy in its place.
        scratch: What one attack leaves for the next on this chunk: PGD-100 goes on from where PGD-20 stopped.
        shared: As scratch, and handed on to the chunk's parts.
    """

    x: Tensor
    y: Tensor
    indices: np.ndarray
    classes: int
    seed: int
    craft: nn.Module | None = None
    judge: nn.Module | None = None
    scratch: dict[Any, Any] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)

    def draws(self, restart: int = 0) -> Draws:
        """Random starts keyed by (seed, kind of start, restart, example): never by attack name, batch or rank."""
        return Draws(("evaluation", self.seed), self.indices).restart(restart)

    @torch.no_grad()
    def judged(self, x: Tensor, logits: Tensor, which: Tensor) -> tuple[Tensor, int]:
        """Logits (M, classes) that are the judge's own wherever `which` (M,) bool asks, and how many it asks for."""
        if self.judge is None:
            return logits, 0
        rows = which.nonzero().squeeze(1)
        if not len(rows):
            return logits, 0
        return logits.detach().index_copy(0, rows, self.judge(x[rows].detach()).to(logits.dtype)), len(rows)

    def part(self, which: np.ndarray) -> Chunk:
        """Some of its examples, by place; an example's starts stay its own."""
        rows = torch.as_tensor(which, device=self.x.device)
        x, y, indices = self.x[rows].contiguous(), self.y[rows], self.indices[which]
        return replace(self, x=x, y=y, indices=indices, scratch={})


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

    def told(self) -> dict[str, Any]:
        """Its settings, as a record tells them."""
        return asdict(self)

    def stages(self, classes: int) -> tuple[str, ...]:
        """Of an attack in stages, their names in order; () of any other."""
        return ()

    def work(self, stage: str, classes: int) -> Work:
        """The most that it (or a stage of it) can cost, for the estimate of time; (0, 0) where it cannot say."""
        return Work(0, 0)


@dataclass(frozen=True)
class Staged(Evaluation):
    """An attack in stages, each asked only of whom the former left standing; a kill costs at most one of a chunk."""

    def stages(self, classes: int) -> tuple[str, ...]:
        raise NotImplementedError(f"{type(self).__name__} must name its stages")

    def bounding(self, classes: int) -> tuple[str, ...]:
        """The first stages, after which accuracy is a close upper bound already; all of them unless it says."""
        return self.stages(classes)

    def stage(self, stage: str, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        """As `attack`, of one stage; everyone in the chunk is still classified rightly."""
        raise NotImplementedError(f"{type(self).__name__} must say what a stage does")

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        """All stages in turn."""
        x_adv, broken = chunk.x.clone(), verified(model, chunk.x, chunk.x, chunk.y, eps)[1]
        warnings: dict[str, None] = {}
        forwards, backwards = len(chunk.x), 0
        for stage in self.stages(chunk.classes):
            standing = (~broken).nonzero().squeeze(1)
            if not len(standing):
                break
            part = chunk.part(standing.cpu().numpy())
            found = self.stage(stage, model, part, eps)
            fell = verified(model, part.x, found.x_adv, part.y, eps)[1]
            x_adv[standing[fell]], broken[standing[fell]] = found.x_adv[fell], True
            forwards, backwards = forwards + found.forwards + len(standing), backwards + found.backwards
            warnings |= dict.fromkeys(found.warnings)
        return Attacked(x_adv, forwards, backwards, tuple(warnings))


@torch.no_grad()
def verified(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """What an attack truly achieved: predictions (N,), broken (N,), and how many examples were not allowed.

    Broken means misclassified by this very model in float32, at a point within eps of x (l-inf) and within [0, 1].
    """
    x_adv = x_adv.to(x)
    predictions: Tensor = model(x_adv).argmax(dim=1)
    far = (x_adv.double() - x.double()).abs().flatten(1).amax(dim=1)
    low, high = x_adv.flatten(1).amin(dim=1), x_adv.flatten(1).amax(dim=1)
    allowed = (far <= eps + TOLERANCE) & (low >= 0) & (high <= 1)  # NaN is in no interval
    return predictions, (predictions != y) & allowed, int((~allowed).sum())


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
