"""Ratios of times, theirs / ours, so more is better: each pair alternated in one process, median with spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way, all in turn in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def over(theirs: Sequence[float], ours: Sequence[float]) -> list[float]:
    """The ratio of each round that both have, sorted."""
    return sorted(a / b for a, b in zip(theirs, ours, strict=False))


def spread(values: list[float]) -> dict[str, float]:
    return {
        "ratio_median": round(median(values), 3),
        "ratio_min": round(min(values), 3),
        "ratio_max": round(max(values), 3),
    }


def row(what: str, against: str, model: str, values: list[float], **more: Any) -> dict[str, Any]:
    return {"what": what, "against": against, "model": model, "tau": "", "precision": "", **more, **spread(values)}


def told(row: dict[str, Any]) -> str:
    """One line of the Markdown table."""
    ratio = f"{row['ratio_median']:.2f} ({row['ratio_min']:.2f} to {row['ratio_max']:.2f})"
    cells = [row["what"], row["against"], row["model"], row["tau"], row["precision"], row.get("note", ""), ratio]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = "| what | against | network | tau | ours in | | theirs / ours |\n|---|---|---|---|---|---|---|"
