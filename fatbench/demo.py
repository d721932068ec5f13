"""The main job on data that needs no download: train five contestants, examine them, rank them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch

from fatbench import checkpoint, data, devices, leaderboard, protocol, recipe, runs, trainer
from fatbench.console import stderr
from fatbench.errors import RunFailed
from fatbench.evaluate import Examination, evaluate
from fatbench.publish import publish
from fatbench.recipe import Settings
from fatbench.record import Record

DEFENSES = ("standard", "madry", "trades", "fat", "fat-trades")
EPOCHS = 15
# One learning rate for all, chosen on the validation split by benchmarks/choose_lr.py.
LR = 0.1
BATCH_SIZE = 64


def settings(defense: str, *, eps: str, epochs: int, seed: int) -> Settings:
    """One contestant's run: the same budget for all."""
    return recipe.resolve(defense, dataset="digits", eps=eps, epochs=epochs, lr=LR, batch_size=BATCH_SIZE, seed=seed)


def demo(
    out: Path,
    *,
    defenses: Sequence[str] = DEFENSES,
    eps: Sequence[str] = ("0.3",),
    epochs: int = EPOCHS,
    seeds: int = 1,
    best: bool = False,
    device: str,
) -> list[Record]:
    """Trains, examines under every attack of the house protocol and publishes the tables into `out`.

    Every defense at every eps with every seed; with `best`, the best epoch on validation is examined beside the last.
    Whatever is finished in `out` already is not done again.
    """
    # A second thread gains little on networks this small, and one gives the same bits on any number of cores.
    torch.set_num_threads(1)
    digits, records = data.load("digits"), []
    where = devices.fabric_on(device).device
    for budget, seed, defense in product(eps, range(seeds), defenses):
        folder = out / "runs" / f"{defense}-eps{budget.replace('/', '_')}-epochs{epochs}-seed{seed}"
        wanted = settings(defense, eps=budget, epochs=epochs, seed=seed)
        networks = [folder, folder / "best.safetensors"] if best else [folder]
        try:
            trainer.train(wanted, folder, device=device, resume=(folder / "settings.toml").exists())
        except RunFailed as failure:  # it has a row that says so, and the others go on
            if not runs.failed(folder):
                raise
            stderr.print(str(failure), soft_wrap=True)
            networks = [folder]
        for network in networks:
            task = Examination(checkpoint.load(network), digits, protocol.load(protocol.DEFAULT), budget)
            records.append(evaluate(task, out / "records", device=where))
            stderr.print(leaderboard.summary(records[-1]), soft_wrap=True)
    publish(leaderboard.gather(out / "records"), out)
    return records
