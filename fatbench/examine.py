"""The steps of an examination, carried out on a network: what is left of them, each verified and kept as it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fatbench import console
from fatbench.attacks import crafting
from fatbench.data import Data
from fatbench.doubts import EXAMPLES, Look, ask, learning
from fatbench.draws import seed_of
from fatbench.errors import Refused, first_line
from fatbench.evaluation import NO_ROOM, Attacked, Chunk, Evaluation, Staged, Work, verified
from fatbench.examination import DOUBTS, Examination
from fatbench.ledger import Ledger, Step
from fatbench.pace import WORTH_SAYING, Pace, human, timed
from fatbench.swift import swift

# A step's entry in the ledger, and the examples (K, C, H, W) that it broke.
Outcome = tuple[dict[str, Any], Tensor]


def examine(
    task: Examination, model: nn.Module, ledger: Ledger, device: torch.device | str, share: tuple[int, int] = (0, 1)
) -> None:
    """Carries out what the ledger does not hold yet, of every `of` chunks the one at `rank`: share = (rank, of)."""
    rank, of = share
    steps = [step for step in task.steps() if step.chunk % of == rank]
    left = [step for step in steps if step not in ledger.entries]
    if not left:
        return
    done = len(steps) - len(left)
    if done:
        console.stderr.print(f"resuming at {left[0]}: {done} of {len(steps)} steps are done", soft_wrap=True)
    bench = _Bench(task, model, ledger, device, learning(model))
    with exact(), crafting(model):
        pace = bench.pace(left)
        with console.waiting(f"examining {task.data.info.name}", len(steps), done=done) as bar:
            for number, step in enumerate(left, start=1):
                ledger.add(step, *bench.outcome(step))
                bar.advance(str(step), left=pace.left(number))


@contextmanager
def exact() -> Iterator[None]:
    """float32 means float32: no TF32, or two GPUs would differ in the third digit of a logit."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def fitting(task: Examination, device: torch.device | str) -> nn.Module:
    """The network to be examined, on its device, once it and the surrogate have been seen to fit.

    Raises:
        Refused: what does not fit.
    """
    for subject in filter(None, (task.surrogate, task.subject)):
        model = subject.model.to(device, torch.float32)
        fits(model, task.data, device, gradients=not task.outside)
    return model


def fits(model: nn.Module, loaded: Data, device: torch.device | str, *, gradients: bool = True) -> None:
    """One image through the network: shape, number of classes, finite logits, and a gradient where one is needed.

    Raises:
        Refused: what does not fit.
    """
    try:
        with crafting(model):
            logits = model(loaded.x_test[:1].to(device, torch.float32).requires_grad_())
    except Exception as error:  # the network may be anybody's code
        raise Refused(
            f"the network cannot take {loaded.info.name}'s images {loaded.shape}: {first_line(error)}"
        ) from None
    if not isinstance(logits, Tensor):
        raise Refused(
            f"the network answers {loaded.info.name}'s images with a {type(logits).__name__}, not with logits"
        )
    if logits.ndim != 2 or logits.shape[1] != loaded.classes:
        answers = " x ".join(map(str, logits.shape[1:]))
        raise Refused(f"the network answers with {answers} classes, {loaded.info.name} has {loaded.classes}")
    if not torch.isfinite(logits).all():
        raise Refused("the network's logits are not finite: its weights are broken")
    if gradients and not logits.requires_grad:
        raise Refused(
            "the network's answers have no gradient (a detach, no_grad or argmax within), and attacks need one: give "
            "a network without it, or examples made elsewhere with --external"
        )


@dataclass
class _Bench:
    """A network on the bench: the examination's chunks, one at a time, and what a step does to them.

    Attributes:
        training: The layers that were in train mode when the network came.
    """

    task: Examination
    model: nn.Module
    ledger: Ledger
    device: torch.device | str
    training: tuple[str, ...]
    _held: tuple[int, Chunk] | None = None

    @cached_property
    def examiners(self) -> dict[str, Evaluation]:
        return self.task.examiners()

    @cached_property
    def craft(self) -> nn.Module | None:
        """What attacks may be made on beside the network itself."""
        precision = self.task.attack_precision
        staged = any(isinstance(one, Staged) for one in self.examiners.values())
        if precision == "float32" and (self.task.layout == "given" or not staged):
            return None
        copy = swift(self.model, self._images(0)[:32], precision)
        if copy is None and precision == "bf16":
            raise Refused("the network does not keep its answers in bfloat16: leave --attack-precision out")
        return copy

    @property
    def _on_copy(self) -> bool:
        """Whether attacks that come in no stages are handed the copy in the network's place."""
        return self.task.attack_precision != "float32" and self.craft is not None

    def chunk(self, number: int) -> Chunk:
        if self._held is None or self._held[0] != number:
            task, rows = self.task, self._rows(number)
            y = task.data.y_test[rows].to(self.device, torch.int64)
            judge = self.model if self._on_copy else None
            chunk = Chunk(self._images(number), y, rows, task.data.classes, task.seed, self.craft, judge)
            self._held = number, chunk
        return self._held[1]

    def _rows(self, number: int) -> np.ndarray:
        return self.task.rows()[number * self.task.chunk : (number + 1) * self.task.chunk]

    def _images(self, number: int) -> Tensor:
        return self.task.data.x_test[self._rows(number)].contiguous().to(self.device, torch.float32)

    def pace(self, left: list[Step]) -> Pace:
        """The time that these steps will take; said where it is worth a line."""
        work = [self._work(step) for step in left]
        seconds = timed(self.craft or self.model, self._images(0)) if any(map(any, work)) else lambda work: 0.0
        pace = Pace([seconds(w) * len(self._rows(step.chunk)) for w, step in zip(work, left, strict=True)])
        if pace.total > WORTH_SAYING:
            console.stderr.print(f"this will take at most about {human(pace.total)}", soft_wrap=True)
        return pace

    def _work(self, step: Step) -> Work:
        examiner = self.examiners.get(step.attack)
        return examiner.work(step.stage, self.task.data.classes) if examiner else Work(1, 0)

    def outcome(self, step: Step) -> Outcome:
        """A step's entry, and the examples that it broke; a network that draws random numbers has a step's own."""
        chunk = self.chunk(step.chunk)
        with torch.random.fork_rng(devices=[chunk.x.device] if chunk.x.device.type == "cuda" else []):
            torch.manual_seed(seed_of("examined", self.task.seed, *step))
            if step.attack == DOUBTS:
                return self._doubt(step.stage, chunk)
            run, former = partial(self.attacked, step), self.task.former(step)
            return run(chunk) if former is None else _on_standing(chunk, self.ledger.entries[former], run)

    def attacked(self, step: Step, chunk: Chunk) -> Outcome:
        """One step on one chunk: predictions, and whom it broke, verified on the network itself."""
        began, eps, examiner = time.perf_counter(), self.task.eps_of(step.attack), self.examiners.get(step.attack)
        if examiner is None:
            found = Attacked(chunk.x, 0, 0)
        elif isinstance(examiner, Staged):
            found = examiner.stage(step.stage, self.model, chunk, eps)
        else:
            handed = self.craft if self._on_copy and self.craft is not None else self.model
            found = self._as_memory_allows(examiner, handed, chunk, eps)
        predictions, broken, invalid = verified(self.model, chunk.x, found.x_adv, chunk.y, eps)
        out = (f"{invalid} examples lay outside the ball or [0, 1] and were not counted",) if invalid else ()
        entry = {
            "pred": predictions.tolist(), "broken": broken.tolist(), "fell": broken.nonzero().squeeze(1).tolist(),
            "forwards": found.forwards + len(chunk.x), "backwards": found.backwards,
            "warnings": [*found.warnings, *out], "seconds": round(time.perf_counter() - began, 3),
        }  # fmt: skip
        return entry, found.x_adv[broken]

    def _as_memory_allows(self, examiner: Evaluation, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        """An attack on a chunk, in pieces where the device's memory asks for it.

        An example's random numbers are its own, and its outcome with them, but for an attack that shares out restarts.
        """
        while True:
            size = min(chunk.shared.get("attacked", len(chunk.x)), len(chunk.x))
            parts = [chunk] if size == len(chunk.x) else [chunk.part(rows) for rows in _pieces(len(chunk.x), size)]
            try:
                return Attacked.joined([examiner.attack(model, part, eps) for part in parts])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise Refused(NO_ROOM) from None
                chunk.shared["attacked"] = size // 2

    def _doubt(self, name: str, chunk: Chunk) -> Outcome:
        few = chunk.part(np.arange(min(EXAMPLES, len(chunk.x))))
        other = self.task.surrogate
        surrogate = None if other is None else other.model.to(self.device, torch.float32)
        look = Look(self.model, few, self.task.eps_of(""), surrogate, self.training)
        return {"doubt": asdict(ask(name, look)), "warnings": []}, chunk.x[:0]


def _pieces(n: int, size: int) -> list[np.ndarray]:
    return [np.arange(first, min(first + size, n)) for first in range(0, n, size)]


def _on_standing(chunk: Chunk, former: dict[str, Any], run: Callable[[Chunk], Outcome]) -> Outcome:
    """A step on whom the former left standing; the others stay as fallen as they were."""
    predictions, broken = np.asarray(former["pred"]), np.asarray(former["broken"])
    standing = np.flatnonzero(~broken)
    if not len(standing):
        idle = {"fell": [], "forwards": 0, "backwards": 0, "warnings": [], "seconds": 0.0}
        return {"pred": former["pred"], "broken": former["broken"], **idle}, chunk.x[:0]
    entry, examples = run(chunk.part(standing))
    predictions[standing], broken[standing] = entry["pred"], entry["broken"]
    fell = standing[entry["fell"]].tolist()
    return {**entry, "pred": predictions.tolist(), "broken": broken.tolist(), "fell": fell}, examples
