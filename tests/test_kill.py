"""Processes that are really killed, at random moments: training and examination end as if nothing had happened.

FATBENCH_KILLS says how many kills hit a training run, and two thirds of it an examination; 3 unless set.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

Command = Callable[[Path], tuple[object, ...]]
KILLS = int(os.environ.get("FATBENCH_KILLS", "3"))


def fatbench(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fatbench", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> float:
    began = time.monotonic()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return time.monotonic() - began


def struck(
    kills: int,
    seconds: float,
    chance: random.Random,
    command: Command,
    tmp_path: Path,
    heard: list[str] | None = None,
) -> Iterator[Path]:
    """Runs the command in one folder after another until `kills` kills have hit it at work; yields those finished.

    `seconds` is what it takes undisturbed, `heard` gets what each run said. Each run is killed at a random moment, and
    started again, until it is done.
    """
    hits = number = 0
    while hits < kills:
        out = tmp_path / f"killed-{number}"
        process = fatbench(*command(out))
        time.sleep(chance.uniform(0.3, 1.0) * seconds)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            hits += 1
        _, said = process.communicate(timeout=60)
        if heard is not None:
            heard.append(said)
        if process.returncode == 0 or hits == kills:
            finish(fatbench(*command(out)))
            yield out
            number += 1


def end_of(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {name: load_file(run / f"{name}.safetensors") for name in ("last", "best")}
    return {
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "weights": {f"{n} {k}": v.numpy().tobytes() for n, state in weights.items() for k, v in state.items()},
    }


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("defense", ["fat", "fat-cat", "trades"])
def test_training_killed_at_random_ends_with_the_same_bits(defense: str, tmp_path: Path) -> None:
    short = ("--epochs", 12, "--n-train", 400, "--batch-size", 64, "--lr", 0.05, "--device", "cpu")

    def command(out: Path) -> tuple[object, ...]:
        return ("train", defense, *short, "--out", out, "--resume")

    seconds = finish(fatbench(*command(tmp_path / "whole")))
    for out in struck(-(-KILLS // 3), seconds, random.Random(2), command, tmp_path):
        assert end_of(out) == end_of(tmp_path / "whole")


@pytest.mark.timeout(1800)
def test_an_examination_killed_at_random_ends_with_the_same_result(tmp_path: Path) -> None:
    short = ("--epochs", 4, "--n-train", 400, "--batch-size", 64, "--lr", 0.1, "--device", "cpu")
    finish(fatbench("train", "fat", *short, "--out", tmp_path / "run"))

    done: list[int] = []

    def command(out: Path) -> tuple[object, ...]:
        (ledger,) = [*out.glob("*.partial.jsonl")] or [None]
        done.append(len(ledger.read_text().splitlines()) - 1 if ledger else 0)
        return ("evaluate", tmp_path / "run", "--device", "cpu", "--n", 200, "--out", out)

    def found(out: Path) -> tuple[object, object]:
        record = json.loads(next(out.glob("*.json")).read_text())
        return record["result"], record["hash"]

    seconds = finish(fatbench(*command(tmp_path / "whole")))
    heard: list[str] = []
    begun: list[int] = []
    for out in struck(-(-KILLS * 2 // 3), seconds, random.Random(3), command, tmp_path, heard):
        assert found(out) == found(tmp_path / "whole")
        begun, done[1:] = [*begun, *done[1:-1]], []  # the last run of each folder is not among those heard
    for said, steps in zip(heard, begun, strict=True):
        where = re.search(r"resuming at chunk \d+, [a-z0-9-]+( [a-z-]+)?: (\d+) of \d+ steps are done", said)
        assert where is None or abs(int(where[2]) - steps) <= 1  # a line that the kill cut off is not counted
