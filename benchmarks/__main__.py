"""Every benchmark in one command: a table of ratios, theirs / ours, so more is better.

    python -m benchmarks [--rounds 5] [--only train,evaluate,floor,change,startup,autoattack] [--models small-cnn]

Written to benchmarks/results.json and benchmarks/results.md. The machine should have nothing else to do. AutoAttack
beside the stock library is shown on a few made-up pictures; python -m benchmarks.autoattack takes real ones.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import autoattack, changes, evaluation, floor, training
from benchmarks.timing import HEAD, over, row, told, turns
from benchmarks.worlds import BATCHES, STEPS


def startup(rounds: int) -> Iterator[dict[str, Any]]:
    def start(*command: str) -> Callable[[], object]:
        return partial(subprocess.run, [sys.executable, *command], check=True, capture_output=True)

    times = turns({"torch": start("-c", "import torch"), "help": start("-m", "fatbench", "--help")}, rounds)
    note = f"fatbench --help, {median(times['help']):.2f} s"
    yield row("startup", "import torch", "", over(times["torch"], times["help"]), note=note)


def measured(kinds: set[str], models: list[str], rounds: int, taus: list[int]) -> Iterator[dict[str, Any]]:
    if "startup" in kinds:
        yield from startup(rounds)
    for arch in models:
        if "change" in kinds:
            yield from changes.steps(arch, 3 * rounds)
        if "floor" in kinds:
            yield from floor.distances(arch, rounds)
            yield floor.memory(arch)
        if "evaluate" in kinds:
            yield from evaluation.suites(arch, rounds)
        if "train" in kinds:
            yield from training.steps(arch, rounds, taus)
            yield from training.epochs(arch, rounds)
            yield from training.friendly(arch, rounds)
    if "autoattack" in kinds:
        yield from autoattack.rows()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="startup,change,floor,evaluate,train,autoattack")
    parser.add_argument("--models", default=",".join(BATCHES))
    parser.add_argument("--taus", default=f"0,1,{STEPS}", help="of one training step")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"
    print(machine, HEAD, sep="\n\n", flush=True)
    rows: list[dict[str, Any]] = []
    taus = [int(tau) for tau in asked.taus.split(",")]
    for found in measured(set(asked.only.split(",")), asked.models.split(","), asked.rounds, taus):
        rows.append(found)
        print(told(found), flush=True)
        # After every row: a run of an hour that is cut short has its rows all the same.
        (asked.out / "results.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")
        (asked.out / "results.md").write_text("\n".join([machine, "", HEAD, *map(told, rows)]) + "\n")


if __name__ == "__main__":
    main()
