"""A claim of the FAT paper, what was found of it, and the intervals that decide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal, NamedTuple

Verdict = Literal["holds", "does not hold", "undecided"]


class Claim(NamedTuple):
    """What a paper says.

    Attributes:
        id: `table1-natural`.
        place: In the paper, `Table 1`; "beyond the paper" where it does not ask.
        text: The claim, a sentence without its stop.
        paper: Its figures, as printed; empty where it prints none.
    """

    id: str
    place: str
    text: str
    paper: str = ""


class Finding(NamedTuple):
    """What was found of a claim.

    Attributes:
        said: The figures, with intervals, in words.
        n: Test examples.
        seeds: Training runs of each contestant.
        budget: `60 epochs`.
        command: What makes it.
    """

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


def not_below(low: float, high: float, margin: float) -> Verdict:
    """Whether a difference is above -margin with its whole interval, or below."""
    return sided(low + margin, high + margin)


class Interval(NamedTuple):
    """An estimate with its 95 % interval."""

    middle: float
    low: float
    high: float

    def told(self, form: str = "+.1f") -> str:
        """`+1.2 [+0.4, +2.0]`"""
        return f"{self.middle:{form}} [{self.low:{form}}, {self.high:{form}}]"


def trend(x: Sequence[float], y: Sequence[float]) -> Interval:
    """The slope of y over x by least squares, with its t interval."""
    from scipy.stats import linregress, t

    fit = linregress(x, y)
    reach = float(t.ppf(0.975, len(x) - 2) * fit.stderr)
    return Interval(float(fit.slope), float(fit.slope) - reach, float(fit.slope) + reach)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float, float]:
    """Mean and t interval over seeds; of one seed the interval is all numbers."""
    from scipy.stats import t

    mean, k = fmean(values), len(values)
    if k < 2:
        return mean, -math.inf, math.inf
    reach = float(t.ppf((1 + confidence) / 2, k - 1)) * stdev(values) / math.sqrt(k)
    return mean, mean - reach, mean + reach
