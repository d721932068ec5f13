"""What the steps of an examination say together: outcomes per example, stages, costs, reasons for doubt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

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
        costs: Forwards, backwards and seconds of each attack, and of its stages.
    """

    table: pd.DataFrame
    stages: dict[str, dict[str, int]]
    warnings: tuple[str, ...]
    costs: dict[str, dict[str, Any]]

    @property
    def after(self) -> dict[str, dict[str, int]]:
        """For each attack in several stages, how many examples were still right after each."""
        right = int((self.table["clean_pred"] == self.table["label"]).sum())
        return {
            attack: {stage: right - fallen for stage, fallen in zip(broke, accumulate(broke.values()), strict=True)}
            for attack, broke in self.stages.items()
        }


def gathered(ledger: Ledger, rows: np.ndarray, labels: np.ndarray, attacks: Mapping[str, tuple[str, ...]]) -> Findings:
    """The findings on these examples; `attacks` names each attack's stages, () where it has none."""
    chunks = 1 + max(step.chunk for step in ledger.entries)
    clean = _joined(ledger, chunks, "clean", "pred")
    columns: dict[str, Any] = {"index": rows, "label": labels, "clean_pred": clean}
    broke: dict[str, dict[str, int]] = {}
    costs: dict[str, dict[str, Any]] = {}
    for attack, stages in attacks.items():
        if stages:
            columns |= _staged(ledger, chunks, attack, stages, clean, labels)
            fell = columns[f"{attack}.stage"]
            broke[attack] = {stage: int((fell == k).sum()) for k, stage in enumerate(stages, start=1)}
        else:
            columns[f"{attack}.pred"] = _joined(ledger, chunks, attack, "pred")
            columns[f"{attack}.broken"] = _joined(ledger, chunks, attack, "broken").astype(bool)
        costs[attack] = _cost(ledger, [(attack, stage) for stage in stages or ("",)])
        if stages:
            costs[attack]["stages"] = {stage: _cost(ledger, [(attack, stage)]) for stage in stages}
    told = ((step.attack, warning) for step, entry in ledger.entries.items() for warning in entry["warnings"])
    order = list(attacks)
    heard = sorted(dict.fromkeys(t for t in told if t[0] in attacks), key=lambda t: order.index(t[0]))
    warnings = [f"{attack}: {warning}" for attack, warning in heard]
    return Findings(pd.DataFrame(columns), broke, (*warnings, *_black_box(broke, len(rows))), costs)


def _joined(ledger: Ledger, chunks: int, attack: str, what: str) -> np.ndarray:
    return np.concatenate([np.asarray(ledger.entries[Step(c, attack)][what], dtype=np.int64) for c in range(chunks)])


def _staged(
    ledger: Ledger, chunks: int, attack: str, stages: tuple[str, ...], clean: np.ndarray, labels: np.ndarray
) -> dict[str, np.ndarray]:
    """An attack's columns: an example that stands is predicted as when it was clean."""
    pred, stage = clean.copy(), np.where(clean != labels, 0, -1)
    first = 0
    for c in range(chunks):
        for k, name in enumerate(stages, start=1):
            entry = ledger.entries[Step(c, attack, name)]
            fell = first + np.asarray(entry["fell"], dtype=np.int64)
            pred[fell], stage[fell] = entry["pred"], k
        first += len(ledger.entries[Step(c, "clean")]["pred"])
    return {f"{attack}.pred": pred, f"{attack}.broken": stage >= 0, f"{attack}.stage": stage}


def _cost(ledger: Ledger, parts: list[tuple[str, str]]) -> dict[str, Any]:
    entries = [e for step, e in ledger.entries.items() if (step.attack, step.stage) in parts]
    return {key: round(sum(e[key] for e in entries), 3) for key in ("forwards", "backwards", "seconds")}


def _black_box(stages: dict[str, dict[str, int]], n: int) -> list[str]:
    """Square, which sees no gradient, breaking what gradients left: AutoAttack's own sign of masking (0.2 points)."""
    more = {attack: broke["square"] for attack, broke in stages.items() if broke.get("square", 0) > max(1, 0.002 * n)}
    return [
        f"{attack}: Square broke {k} of {n} that white-box attacks left: gradients may be masked"
        for attack, k in more.items()
    ]


def collapsed(table: pd.DataFrame) -> bool:
    """Whether the network is no better, on clean examples, than always giving one answer: no defense, whatever stands.

    A constant answer is right for the examples of its class under every attack, and would rank by that.
    """
    right, n = int((table["clean_pred"] == table["label"]).sum()), len(table)
    commonest = table["label"].value_counts().iloc[0] / n
    one_answer = table["clean_pred"].value_counts().iloc[0] / n > 0.99
    return bool(n >= 50 and commonest < 0.9 and (one_answer or wilson(right, n)[0] <= commonest))
