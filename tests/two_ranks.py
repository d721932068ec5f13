"""What each of two processes does for tests/test_scale.py: `python two_ranks.py OUT`, with SLURM's variables set.

One launch serves many checks, because importing torch costs more than all of them. Each rank writes what it saw into
OUT/rank-R.json.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fatbench import checkpoint, files, models, recipe, trainer
from fatbench.attacks import crafting
from fatbench.errors import Refused, RunFailed
from fatbench.registry import defenses

RANK = int(os.environ.get("SLURM_PROCID", 0))
RUNS: list[trainer.Run] = []  # every run that has begun, the last one last
GO, UPDATE, BUILD = trainer.Run.go, trainer.Run.update, models.build


def settings(defense: str, **options: Any) -> recipe.Settings:
    """104 to train on: batches of 32, 32, 32 and 8; with ranks=2, 16 + 16 and 4 + 4."""
    short: dict[str, Any] = {"epochs": 1, "n_train": 116, "batch_size": 32, "lr": 0.05, "eps": "0.2"}
    return recipe.resolve(defense, **{**short, **options})


def frozen(*arguments: Any) -> nn.Module:
    """A network whose BatchNorm stays in eval mode, whatever is said: its own statistics would differ by share."""
    net = BUILD(*arguments)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
            module.train = lambda mode=True, module=module: module  # type: ignore[method-assign, assignment]
    return net


def everything(run: trainer.Run) -> dict[str, Any]:
    """All that must be the same on every rank."""
    momentum = [entry["momentum_buffer"] for entry in run.optimizer.state_dict()["state"].values()]
    return {
        "network": checkpoint.fingerprint(run.net),
        "momentum": [float(value.double().sum()) for value in momentum],
        "memory": run.defense.memory,
        "best": run.best,
    }


def told(work: Callable[[], object]) -> str:
    """How it was refused or failed."""
    try:
        work()
    except (Refused, RunFailed) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main(out: Path) -> None:
    def watched(run: trainer.Run) -> None:
        RUNS.append(run)
        GO(run)

    trainer.Run.go = watched  # type: ignore[method-assign]
    checks = (every_defense, frozen_batchnorm, half, resumed, desynchronised, full_disk, not_finite, claimed)
    seen = {check.__name__: check(out / check.__name__) for check in checks}
    (out / f"rank-{RANK}.json").write_text(json.dumps(seen))


def every_defense(out: Path) -> dict[str, Any]:
    """One epoch each, with rank 1 taking passes through the network that rank 0 does not take."""

    def uneven(craft: Callable[..., Any]) -> Callable[..., Any]:
        def crafted(self: Any, model: nn.Module, x: Any, y: Any, progress: Any, **options: Any) -> Any:
            with crafting(model), torch.no_grad():
                for _ in range(3 * RANK):
                    model(x)
            return craft(self, model, x, y, progress, **options)

        return crafted

    seen = {}
    for name in defenses:
        original = defenses[name].craft
        defenses[name].craft = uneven(original)  # type: ignore[method-assign]
        trainer.train(settings(name, ranks=2), out / name)
        defenses[name].craft = original  # type: ignore[method-assign]
        seen[name] = everything(RUNS[-1])
    return seen


def frozen_batchnorm(out: Path) -> dict[str, Any]:
    models.build = frozen  # type: ignore[assignment]
    for name in ("madry", "fat-trades", "fat-mart"):
        trainer.train(settings(name, ranks=2, precision="64-true", n_train=114), out / name)
    models.build = BUILD
    return everything(RUNS[-1])


def half(out: Path) -> dict[str, Any]:
    models.build = frozen  # type: ignore[assignment]
    trainer.train(settings("fat-dat", ranks=2, precision="bf16-mixed", n_train=114), out)
    models.build = BUILD
    return everything(RUNS[-1])


def resumed(out: Path) -> list[dict[str, Any]]:
    """A curriculum whose decisions all ranks must share, whole and in two parts."""
    wanted = settings("fat-cat", ranks=2, epochs=4, sets=["patience=1"])
    trainer.train(wanted, out / "whole")
    whole = everything(RUNS[-1])

    def leaves(run: trainer.Run) -> None:
        RUNS.append(run)
        while run.epoch < 2:
            run.one_epoch()
        raise RunFailed("interrupted, for the test")

    watched, trainer.Run.go = trainer.Run.go, leaves  # type: ignore[method-assign]
    told(lambda: trainer.train(wanted, out / "parts"))
    trainer.Run.go = watched  # type: ignore[method-assign]
    trainer.train(wanted, out / "parts", resume=True)
    return [whole, everything(RUNS[-1])]


def desynchronised(out: Path) -> str:
    """One bit of one weight differs on rank 1 after the second update."""

    def astray(run: trainer.Run, *arguments: Any) -> Any:
        found = UPDATE(run, *arguments)
        with torch.no_grad():
            weight = next(run.net.parameters()).view(-1)[:1]
            weight.view(torch.int32).add_(RANK)
        return found

    trainer.Run.update = astray  # type: ignore[method-assign]
    said = told(lambda: trainer.train(settings("standard", ranks=2), out))
    trainer.Run.update = UPDATE  # type: ignore[method-assign]
    return said


def full_disk(out: Path) -> str:
    """The disk refuses the only rank that writes."""

    def full(*_: Any) -> None:
        raise Refused("cannot write: No space left on device")

    write, trainer.write_atomic = files.write_atomic, full  # type: ignore[assignment, attr-defined]
    said = told(lambda: trainer.train(settings("standard", ranks=2), out))
    trainer.write_atomic = write  # type: ignore[attr-defined]
    return said


def not_finite(out: Path) -> str:
    """The loss breaks on rank 1 alone, at the third batch."""
    loss, calls = defenses["madry"].loss, iter(range(1, 100))

    def breaks(self: Any, *arguments: Any) -> Any:
        return loss(self, *arguments) * (float("nan") if next(calls) == 3 and RANK else 1.0)

    defenses["madry"].loss = breaks  # type: ignore[method-assign]
    said = told(lambda: trainer.train(settings("madry", ranks=2), out))
    defenses["madry"].loss = loss  # type: ignore[method-assign]
    return said


def claimed(out: Path) -> str:
    """Only rank 0 looks at the folder; both leave."""
    if RANK == 0:
        out.mkdir()
        (out / "thesis.tex").write_text("mine")
    return told(lambda: trainer.train(settings("standard", ranks=2), out))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
