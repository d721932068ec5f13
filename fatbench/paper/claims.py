"""A claim of the FAT paper, what was found of it, and the intervals that decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

Verdict = Literal["holds", "does not hold", "undecided"]


class Claim(NamedTuple):
    """What a paper says."""

    id: str
    place: str
    text: str
    paper: str = ""


class Finding(NamedTuple):
    """What was found of a claim."""

    claim: Claim
    verdict: Verdict
    said: str
    n: int
    seeds: int
    budget: str
    command: str


def sided(low: float, high: float) -> Verdict:
    """Whether a whole interval lies above 0, or below."""
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def within(low: float, high: float, margin: float) -> Verdict:
    """Whether a whole interval lies within +-margin, or outside."""
    if -margin <= low and high <= margin:
        return "holds"
    return "does not hold" if low > margin or high < -margin else "undecided"


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval over seeds; of one seed the interval is all numbers."""
    from scipy.stats import t

    mean, k = fmean(values), len(values)
    if k < 2:
        return mean, -math.inf, math.inf
    reach = float(t.ppf((1 + confidence) / 2, k - 1)) * stdev(values) / math.sqrt(k)
    return mean, mean - reach, mean + reach
