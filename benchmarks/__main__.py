"""Prints ratios of times, theirs / ours, so more is better: each pair alternated in one process, median with spread.

    python -m benchmarks [--rounds 7] [--batch 128]

One FAT training step of the Small CNN on made-up 32x32 images, tau 0, 1 and K, against the textbook form of
benchmarks/textbook.py, from the same starts; and the start-up of `fatbench --help` against `import torch`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.textbook import earlystop
from fatbench import models
from fatbench.attacks import Friendly, pgd, uniform

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ratios(theirs: Callable[[], object], ours: Callable[[], object], rounds: int) -> list[float]:
    theirs(), ours()
    return sorted(timed(theirs) / timed(ours) for _ in range(rounds))


def world(batch: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The Small CNN after some FAT steps on ten noisy patterns: neither untrained nor finished."""
    torch.manual_seed(0)
    net = models.build("small-cnn")
    y = torch.arange(batch) % 10
    patterns = torch.rand(10, 3, 32, 32)
    sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for _ in range(12):
        x = (0.15 * patterns[y] + 0.4 + 0.1 * torch.rand(batch, 3, 32, 32)).clamp(0, 1)
        x_adv = pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS, stop=Friendly(0, y)).x_adv
        net.train()
        sgd.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x_adv), y))
        sgd.step()
    return net, x, y


def training_step(tau: int, batch: int, rounds: int) -> dict[str, Any]:
    net, x, y = world(batch)
    x_init = uniform(x, EPS)
    taken: list[float] = []

    def update(x_adv: Tensor, labels: Tensor) -> None:
        net.train()
        net.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x_adv), labels))

    def ours() -> None:
        rule = Friendly(tau, y) if tau < STEPS else None
        crafted = pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS, stop=rule, start=lambda x, eps: x_init)
        taken.append(crafted.steps.double().mean().item())
        update(crafted.x_adv, y)

    def theirs() -> None:
        update(*earlystop(net, x, y, x_init, eps=EPS, step_size=STEP, steps=STEPS, tau=tau))

    return {"tau": tau, **spread(ratios(theirs, ours, rounds)), "steps": round(taken[0], 2)}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "ratio_median": round(median(values), 3),
        "ratio_min": round(values[0], 3),
        "ratio_max": round(values[-1], 3),
    }


def startup(rounds: int) -> dict[str, Any]:
    def start(*command: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *command], check=True, capture_output=True)

    return spread(ratios(start("-c", "import torch"), start("-m", "fatbench", "--help"), rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| what | against | model | tau | steps | theirs / ours |\n|---|---|---|---|---|---|")
    for tau in (0, 1, STEPS):
        found = training_step(tau, arguments.batch, arguments.rounds)
        rows.append({"what": "train", "against": "textbook", "model": "small-cnn", "precision": "float32", **found})
        told(rows[-1], str(found["steps"]))
    rows.append({"what": "startup", "against": "import torch", "model": "", "tau": "", **startup(arguments.rounds)})
    told(rows[-1], "")
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"
    folder = Path(__file__).parent
    (folder / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def told(row: dict[str, Any], steps: str) -> None:
    ratio = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    print(f"| {row['what']} | {row['against']} | {row['model']} | {row['tau']} | {steps} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
