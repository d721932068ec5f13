"""AutoAttack (Croce & Hein, ICML 2020), run by the library pyautoattack."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fatbench.attacks import crafting
from fatbench.evaluation import Attacked, Chunk, Evaluation


@dataclass(frozen=True)
class AutoAttack(Evaluation):
    """AutoAttack: APGD-CE, targeted APGD, targeted FAB and Square in turn, each on whom the former left standing."""

    name: ClassVar[str] = "autoattack"

    version: Literal["standard", "plus", "rand"] = "standard"

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        counted = _Counted(model)
        with _guarded(model, chunk.x) as warnings:
            library = self._library(counted, chunk, eps)
            x_adv, stages = self._cascade(library, counted, chunk)
        return Attacked(x_adv, counted.forwards, counted.backwards, tuple(dict.fromkeys(warnings)), stages)

    @staticmethod
    def _cascade(library: Any, model: nn.Module, chunk: Chunk) -> tuple[Tensor, dict[str, int]]:
        """The library's stages one by one, each on whom the former left standing: the same flags, and who fell to what.

        Its own check on Square is thereby not made: it would judge a chunk alone, where one example is too many.
        """
        x_adv, stages = chunk.x.clone(), dict.fromkeys(library.attacks_to_run, 0)
        with torch.no_grad():
            standing = (model(chunk.x).argmax(dim=1) == chunk.y).nonzero().squeeze(1)
        for stage in stages:
            if not len(standing):
                break
            library.attacks_to_run = [stage]
            x, y = chunk.x[standing], chunk.y[standing]
            found, predicted = library.run_standard_evaluation(x, y, batch_size=len(x))
            fell = predicted != y
            x_adv[standing[fell]] = found[fell]
            stages[stage] = int(fell.sum())
            standing = standing[~fell]
        return x_adv, stages

    def _library(self, model: nn.Module, chunk: Chunk, eps: float) -> Any:
        import pyautoattack

        device = chunk.x.device
        # A seed must be given: without one the library takes the clock.
        made = pyautoattack.AutoAttack(model, device=device, eps=eps, seed=chunk.seed, version=self.version)
        # With fewer than ten classes the library's nine targets do not exist (it would crash after paying APGD-CE);
        # the DLR loss needs three classes, its targeted form four.
        targets = min(9, chunk.classes - 1)
        made.apgd_targeted.n_target_classes = made.fab.n_target_classes = targets
        if chunk.classes < 4:
            instead = {"apgd-t": "apgd-dlr"} if chunk.classes == 3 and "apgd-dlr" not in made.attacks_to_run else {}
            unusable = {"apgd-t"} if chunk.classes == 3 else {"apgd-t", "apgd-dlr"}
            wanted = [instead.get(attack, attack) for attack in made.attacks_to_run]
            made.attacks_to_run = [attack for attack in wanted if attack not in unusable]
            if instead:
                made.apgd.n_restarts = 1
        return made


class _Counted(nn.Module):
    """The network, counting the examples that pass through it forwards and backwards."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x.contiguous())
        if logits.requires_grad:
            logits.register_hook(self._count)  # type: ignore[no-untyped-call]
        return logits

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


class _Heard(logging.Handler):
    """Keeps what the library says at WARNING, which is how it reports that it may not be trusted."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage().partition(" See flags_doc")[0]
        if "classes" not in said:  # too few for its defaults: `_library` has seen to that
            self.heard.append(said)


@contextmanager
def _guarded(model: nn.Module, x: Tensor) -> Iterator[list[str]]:
    """Undoes what the library leaves behind: torch's random stream, gradients, the tracer, its own counters and log."""
    from pyautoattack import checks

    warnings: list[str] = []
    logger, handler, tracer = logging.getLogger("auto-attack"), _Heard(warnings), sys.gettrace()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    devices = [x.device] if x.device.type == "cuda" else []
    for name in checks.funcs:  # counted over the whole process, and never reset: one dynamic model marks all later ones
        checks.funcs[name] = 0
    try:
        with torch.random.fork_rng(devices=devices), crafting(model):
            yield warnings
    finally:
        sys.settrace(tracer)
        logger.removeHandler(handler)
        logger.propagate = propagate
