"""Intervals and spreads. scipy does the mathematics."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, stdev


def wilson(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of n samples, as fractions.

    >>> [round(bound, 4) for bound in wilson(57, 100)]
    [0.4721, 0.6627]
    """
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Median and standard deviation (n - 1) over training seeds, as the FAT paper reports; spread 0 of one seed."""
    return median(values), stdev(values) if len(values) > 1 else 0.0
