"""AutoAttack (Croce & Hein, ICML 2020), run by the library pyautoattack, stage by stage."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fatbench.autoattack import Watched, built, guarded, looked_at, perturbed, spares, stages
from fatbench.errors import Refused
from fatbench.evaluation import NO_ROOM, Attacked, Chunk, Staged, Work
from fatbench.projection import quick_projection


@dataclass(frozen=True)
class AutoAttack(Staged):
    """AutoAttack: APGD-CE, targeted APGD, targeted FAB and Square in turn, each on whom the former left standing."""

    name: ClassVar[str] = "autoattack"

    version: Literal["standard", "plus", "rand"] = "standard"

    def stages(self, classes: int) -> tuple[str, ...]:
        return stages(self.version, classes)

    def bounding(self, classes: int) -> tuple[str, ...]:
        return tuple(takewhile(lambda stage: stage.startswith("apgd"), self.stages(classes)))

    def stage(self, stage: str, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        while True:
            try:
                return self._stage(stage, model, chunk, eps)
            except torch.OutOfMemoryError:
                # The batch stays one to the library, whose random numbers hang on it; only the network takes less.
                at_once = min(chunk.shared.get("piece", len(chunk.x)), len(chunk.x))
                if at_once == 1:
                    raise Refused(NO_ROOM) from None
                chunk.shared["piece"] = at_once // 2

    def _stage(self, stage: str, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        with guarded(model, chunk.x) as warnings:
            dependable = self._dependable(model, chunk)
            network = Watched(model, chunk.craft if dependable else None, chunk.shared.get("piece"))
            library = self._library(network, chunk, eps)
            if stage == self.stages(chunk.classes)[0]:
                looked_at(network, self.version, chunk.x, chunk.y)
            if dependable:
                spares(library, network)
            with quick_projection() if network.craft is not model else nullcontext():
                x_adv = perturbed(library, stage, chunk.x, chunk.y)
        return Attacked(x_adv, network.forwards, network.backwards, tuple(dict.fromkeys(warnings)))

    def _library(self, network: nn.Module, chunk: Chunk, eps: float) -> Any:
        return built(network, self.version, chunk.classes, eps, chunk.seed, chunk.x.device)

    @staticmethod
    @torch.no_grad()
    def _dependable(model: nn.Module, chunk: Chunk) -> bool:
        """Whether an example's logits are its own: the same when asked again, and without its neighbours.

        Of any other network (random, or normalising over the batch) nothing may be left out.
        """
        if "dependable" not in chunk.shared:
            few = chunk.x[: -(-len(chunk.x) // 2)]
            whole, alone = model(chunk.x)[: len(few)], model(few)
            chunk.shared["dependable"] = bool(
                torch.allclose(whole, alone, rtol=1e-3, atol=1e-4 * float(whole.abs().max()))
            )
        return bool(chunk.shared["dependable"])

    def work(self, stage: str, classes: int) -> Work:
        made = built(nn.Identity(), self.version, classes, 0.1, 0, torch.device("cpu"))
        apgd, targeted, fab, square = made.apgd, made.apgd_targeted, made.fab, made.square
        return {
            "apgd-ce": Work(0, apgd.n_restarts * (apgd.n_iter + 1) * apgd.eot_iter),
            "apgd-dlr": Work(0, apgd.n_restarts * (apgd.n_iter + 1) * apgd.eot_iter),
            "apgd-t": Work(0, targeted.n_target_classes * (targeted.n_iter + 1)),
            "fab": Work(fab.n_restarts * fab.n_iter, fab.n_restarts * fab.n_iter * classes),
            "fab-t": Work(fab.n_target_classes * fab.n_iter, fab.n_target_classes * fab.n_iter),
            "square": Work(square.n_queries, 0),
        }[stage]
