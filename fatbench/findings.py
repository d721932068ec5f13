"""What the steps of an examination say together: outcomes per example, stages, costs, reasons for doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from fatbench.doubts import square_below_white_box
from fatbench.ledger import Ledger, Step
from fatbench.stats import wilson


@dataclass(frozen=True)
class Findings:
    """What the ledger's entries say together.

    Attributes:
        table: One row an example: index, label, clean_pred, `<attack>.pred`, `<attack>.broken`, and of an attack in
            stages `<attack>.stage`: which broke it first, from 1; 0 where it was wrong before, -1 where it stands.
        stages: For each attack in several stages, how many examples each broke first.
        warnings: Reasons for doubt.
        doubts: What each check for gradient masking saw, {fired, said}; none where nothing was asked.
        costs: Forwards, backwards and seconds of each attack, and of its stages.
    """

    table: pd.DataFrame
    stages: dict[str, dict[str, int]]
    warnings: tuple[str, ...]
    doubts: dict[str, dict[str, Any]]
    costs: dict[str, dict[str, Any]]

    @property
    def after(self) -> dict[str, dict[str, int]]:
        """For each attack in several stages, how many examples were still right after each."""
        right = {attack: int((self.table[f"{attack}.stage"] != 0).sum()) for attack in self.stages}
        return {
            attack: {stage: right[attack] - fell for stage, fell in zip(broke, accumulate(broke.values()), strict=True)}
            for attack, broke in self.stages.items()
        }


def gathered(
    ledger: Ledger, rows: np.ndarray, labels: np.ndarray, attacks: Mapping[str, tuple[str, ...]], *, checked: bool
) -> Findings:
    """The findings on these examples; `attacks` names each attack's stages, () where it has none.

    The ledger may hold more, of an examination that went further.
    """
    columns: dict[str, Any] = {"index": rows, "label": labels, "clean_pred": _joined(ledger, "clean", "", "pred")}
    broke: dict[str, dict[str, int]] = {}
    costs: dict[str, dict[str, Any]] = {}
    doubts = {step.stage: e["doubt"] for step, e in ledger.entries.items() if checked and "doubt" in e}
    for attack, stages in attacks.items():
        last = stages[-1] if stages else ""  # a stage's entry says what the former ones left too
        columns[f"{attack}.pred"] = _joined(ledger, attack, last, "pred")
        columns[f"{attack}.broken"] = _joined(ledger, attack, last, "broken").astype(bool)
        costs[attack] = _cost(ledger, attack, stages or ("",))
        if stages:
            fell = columns[f"{attack}.stage"] = _broken_by(ledger, attack, stages)
            broke[attack] = {stage: int((fell == k).sum()) for k, stage in enumerate(stages, start=1)}
            costs[attack]["stages"] = {stage: _cost(ledger, attack, (stage,)) for stage in stages}
    told = (
        f"{attack}: {warning}" for attack, stages in attacks.items() for stage in stages or ("",)
        for entry in _of(ledger, attack, stage) for warning in entry["warnings"]
    )  # fmt: skip
    warnings = list(dict.fromkeys(told))  # in this order, whoever did the steps
    warnings += [f"{name}: {doubt['said']}" for name, doubt in doubts.items() if doubt["fired"]]
    for attack, fell_to in broke.items():
        if "square" in fell_to:
            black_box = square_below_white_box(fell_to, len(rows))
            warnings += [f"{attack}: {black_box.said}: gradients may be masked"] if black_box.fired else []
            doubts |= {"square-below-white-box": asdict(black_box)} if doubts else {}
    return Findings(pd.DataFrame(columns), broke, tuple(warnings), doubts, costs)


def _of(ledger: Ledger, attack: str, stage: str) -> list[dict[str, Any]]:
    """A step's entries, chunk by chunk."""
    chunks = 1 + max(step.chunk for step in ledger.entries)
    return [ledger.entries[Step(c, attack, stage)] for c in range(chunks)]


def _joined(ledger: Ledger, attack: str, stage: str, what: str) -> np.ndarray:
    return np.concatenate([np.asarray(entry[what], dtype=np.int64) for entry in _of(ledger, attack, stage)])


def _broken_by(ledger: Ledger, attack: str, stages: tuple[str, ...]) -> np.ndarray:
    """(N,) which stage broke each example first, from 1; 0 where it was broken before, -1 where it stands."""
    by = np.where(_joined(ledger, attack, stages[-1], "broken") > 0, 0, -1)
    for k, stage in enumerate(stages, start=1):
        first = 0
        for entry in _of(ledger, attack, stage):
            by[first + np.asarray(entry["fell"], dtype=np.int64)] = k
            first += len(entry["pred"])
    return by


def _cost(ledger: Ledger, attack: str, stages: tuple[str, ...]) -> dict[str, Any]:
    entries = [entry for stage in stages for entry in _of(ledger, attack, stage)]
    return {key: round(sum(e[key] for e in entries), 3) for key in ("forwards", "backwards", "seconds")}


def collapsed(table: pd.DataFrame) -> bool:
    """Whether the network is no better, on clean examples, than always giving one answer: no defense, whatever stands.

    A constant answer is right for the examples of its class under every attack, and would rank by that.
    """
    right, n = int((table["clean_pred"] == table["label"]).sum()), len(table)
    commonest = table["label"].value_counts().iloc[0] / n
    one_answer = table["clean_pred"].value_counts().iloc[0] / n > 0.99
    return bool(n >= 50 and commonest < 0.9 and (one_answer or wilson(right, n)[0] <= commonest))
