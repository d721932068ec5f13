"""The state of an examination under way: what a lost step takes with it, and what many processes say in one order."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fatbench.findings import gathered
from fatbench.ledger import Ledger, Step

COURSE = [("clean", ""), ("pgd-20", ""), ("autoattack", "apgd-ce"), ("autoattack", "square")]


def entry(step: Step, n: int = 2) -> dict[str, Any]:
    said = [f"{step} says so", "they all say so"]
    own = {"pred": [0] * n, "broken": [1] + [0] * (n - 1), "fell": [0], "forwards": 1, "backwards": 1, "seconds": 0.5}
    return {**own, "warnings": [] if step.attack == "clean" else said}


def filled(path: Path, steps: list[Step]) -> Ledger:
    ledger = Ledger(path, "plan", evidence=True)
    for step in steps:
        ledger.add(step, entry(step), torch.zeros(1, 1, 2, 2))
    return ledger


def test_a_step_without_its_examples_takes_the_later_ones_of_its_chunk_with_it(tmp_path: Path) -> None:
    steps = [Step(chunk, *what) for chunk in range(2) for what in COURSE]
    ledger = filled(tmp_path / "a.partial.jsonl", steps)
    ledger._examples(Step(0, "pgd-20")).unlink()
    again = Ledger(tmp_path / "a.partial.jsonl", "plan", evidence=True)
    assert list(again.entries) == [steps[0], *steps[4:]]
    assert again.resumed == 5
    assert len((tmp_path / "a.partial.jsonl").read_text().splitlines()) == 1 + 5
    assert list(Ledger(tmp_path / "a.partial.jsonl", "plan").entries) == list(again.entries)


def test_warnings_come_in_one_order_whoever_did_the_steps(tmp_path: Path) -> None:
    steps = [Step(chunk, *what) for chunk in range(3) for what in COURSE]
    attacks = {"pgd-20": (), "autoattack": ("apgd-ce", "square")}
    found = []
    for seed in range(3):
        mixed = random.Random(seed).sample(steps, len(steps))
        ledger = filled(tmp_path / f"{seed}.partial.jsonl", mixed)
        found.append(gathered(ledger, np.arange(6), np.zeros(6), attacks, checked=False).warnings)
    assert found[0] == found[1] == found[2]
    assert found[0][:3] == (
        "pgd-20: chunk 1, pgd-20 says so", "pgd-20: they all say so", "pgd-20: chunk 2, pgd-20 says so",
    )  # fmt: skip
    assert len([said for said in found[0] if said.endswith("so")]) == 3 * 3 + 2
