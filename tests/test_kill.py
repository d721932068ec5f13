"""Processes that are really killed, at random moments: training and examination end as if nothing had happened.

FATBENCH_KILLS says how many kills each of the two tests makes (3 unless set; 30 and 20 were passed for a release).
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

KILLS = int(os.environ.get("FATBENCH_KILLS", "3"))


def fatbench(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fatbench", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> float:
    began = time.monotonic()
    _, said = process.communicate(timeout=240)
    assert process.returncode == 0, said
    return time.monotonic() - began


def killed_until_done(kills: int, seconds: float, chance: random.Random, *arguments: object) -> int:
    """Kills the command `kills` times at random moments, then lets it finish; returns how often it ran yet."""
    struck = 0
    for _ in range(kills):
        process = fatbench(*arguments)
        # Not in the imports, which take most of a short run's time: from the first sign of the run on.
        time.sleep(chance.uniform(0.5, 1.0) * seconds)
        struck += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    finish(fatbench(*arguments))
    return struck


def end_of(run: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {name: load_file(run / f"{name}.safetensors") for name in ("last", "best")}
    return {
        "metrics": [{key: value for key, value in line.items() if key != "seconds"} for line in lines],
        "weights": {f"{n} {k}": v.numpy().tobytes() for n, state in weights.items() for k, v in state.items()},
    }


@pytest.mark.timeout(1200)
def test_training_killed_at_random_ends_with_the_same_bits(tmp_path: Path) -> None:
    chance = random.Random(2)
    struck = 0
    for number, defense in enumerate(("fat", "fat-cat", "trades")):
        kills = KILLS // 3 + (number < KILLS % 3)
        short = (
            "train",
            defense,
            "--epochs",
            30,
            "--n-train",
            400,
            "--batch-size",
            64,
            "--lr",
            0.05,
            "--device",
            "cpu",
        )
        seconds = finish(fatbench(*short, "--out", tmp_path / f"{defense}-whole"))
        again = (*short, "--out", tmp_path / f"{defense}-killed", "--resume")
        struck += killed_until_done(kills, seconds, chance, *again)
        assert end_of(tmp_path / f"{defense}-killed") == end_of(tmp_path / f"{defense}-whole")
    assert struck >= KILLS // 3


@pytest.mark.timeout(1200)
def test_an_examination_killed_at_random_ends_with_the_same_result(tmp_path: Path) -> None:
    short = ("--epochs", 4, "--n-train", 400, "--batch-size", 64, "--lr", 0.1, "--device", "cpu")
    finish(fatbench("train", "fat", *short, "--out", tmp_path / "run"))
    examine = ("evaluate", tmp_path / "run", "--n", 120, "--device", "cpu", "--eps", 0.1, "--out")
    seconds = finish(fatbench(*examine, tmp_path / "whole"))
    killed_until_done(KILLS * 2 // 3, seconds, random.Random(3), *examine, tmp_path / "killed")
    whole, killed = (json.loads(next((tmp_path / name).glob("*.json")).read_text()) for name in ("whole", "killed"))
    assert killed["result"] == whole["result"]
    assert killed["hash"] == whole["hash"]
