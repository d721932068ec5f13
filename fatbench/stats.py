"""Intervals, ranks, spreads and paired comparisons. scipy does the mathematics."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from statistics import median, stdev
from typing import NamedTuple

import numpy as np

Interval = tuple[float, float]


@cache
def wilson(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's interval of a share of n samples, as fractions.

    >>> [round(bound, 4) for bound in wilson(57, 100)]
    [0.4721, 0.6627]
    """
    from scipy.stats import binomtest

    interval = binomtest(right, n).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def ranks(intervals: Sequence[Interval]) -> list[int]:
    """1 + how many intervals lie wholly above: who overlaps with the best shares its rank.

    >>> ranks([(50, 60), (55, 65), (40, 49), (61, 70)])
    [2, 1, 4, 1]
    """
    lows = sorted(low for low, _ in intervals)
    return [1 + len(lows) - bisect_right(lows, high) for _, high in intervals]


def over_seeds(values: Sequence[float]) -> tuple[float, float]:
    """Median and standard deviation (n - 1) over training seeds, as the FAT paper reports; spread 0 of one seed."""
    return median(values), stdev(values) if len(values) > 1 else 0.0


class Paired(NamedTuple):
    """Two networks on the same samples: how many both, only the first, only the second, and neither got right."""

    both: int
    first: int
    second: int
    neither: int

    @property
    def n(self) -> int:
        return sum(self)

    @property
    def difference(self) -> float:
        """Accuracy of the first minus that of the second, a fraction."""
        return (self.first - self.second) / self.n

    @property
    def p(self) -> float:
        """McNemar's exact test, two-sided: are the samples that only one got right split evenly?"""
        from scipy.stats import binomtest

        split = self.first + self.second
        return float(binomtest(self.first, split, 0.5).pvalue) if split else 1.0

    def interval(self, confidence: float = 0.95) -> Interval:
        """Newcombe's score interval of the difference, paired (Statistics in Medicine 17, 1998, method 10)."""
        n, difference = self.n, self.difference
        right = self.both + self.first, self.both + self.second
        (low_1, high_1), (low_2, high_2) = (wilson(k, n, confidence) for k in right)
        up_1, down_1 = high_1 - right[0] / n, right[0] / n - low_1
        up_2, down_2 = high_2 - right[1] / n, right[1] / n - low_2
        phi = self._phi()
        low = difference - math.sqrt(max(0.0, down_1**2 - 2 * phi * down_1 * up_2 + up_2**2))
        high = difference + math.sqrt(max(0.0, up_1**2 - 2 * phi * up_1 * down_2 + down_2**2))
        return max(-1.0, low), min(1.0, high)

    def _phi(self) -> float:
        """The correlation of the two outcomes, with Newcombe's continuity correction towards 0 where it is positive."""
        both, first, second, neither = self
        margins = (both + first) * (second + neither) * (both + second) * (first + neither)
        product = both * neither - first * second
        corrected = max(0.0, product - self.n / 2) if product > 0 else product
        return corrected / math.sqrt(margins) if margins else 0.0

    def detectable(self, power: float = 0.8, level: float = 0.05) -> float:
        """The true difference that McNemar's test would find with this power, at this share of discordant samples.

        The normal approximation of Connor (Biometrics 43, 1987); a fraction.
        """
        from scipy.stats import norm

        discordant = (self.first + self.second) / self.n
        return float((norm.ppf(1 - level / 2) + norm.ppf(power)) * math.sqrt(discordant / self.n))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for being several (Holm 1979), in their order.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    adjusted, worst = [0.0] * len(p_values), 0.0
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda at: p_values[at])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[at]))
        adjusted[at] = worst
    return adjusted


class Contrast(NamedTuple):
    """A difference in points with its 95 % interval, and the two-sided p of there being none."""

    middle: float
    low: float
    high: float
    p: float

    def told(self) -> str:
        """`+1.2 [+0.4, +2.0]`"""
        return f"{self.middle:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def contrast(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> Contrast:
    """The difference of two contestants' accuracies, in points, over training seeds and test examples.

    d = mean over seeds of the first - mean over seeds of the second,
    SE^2 = s_1^2 / k_1 + s_2^2 / k_2 + var_i(d_i) / n,
    s^2 the variance of accuracies over k training seeds and d_i an example's mean difference over seeds; the interval
    is a t's, with the degrees of freedom of Welch and Satterthwaite. A side of one seed speaks of that network alone.

    Args:
        first, second: For each seed (n,) whether each test example is still classified rightly, or the share of two
            networks that do; the same n.
    """
    from scipy.stats import t

    each = 100 * (np.mean(first, axis=0) - np.mean(second, axis=0))
    parts = [(float(np.var(each, ddof=1)) / len(each), len(each) - 1)]
    for side in (first, second):
        if len(side) > 1:
            parts.append((float(np.var([100 * right.mean() for right in side], ddof=1)) / len(side), len(side) - 1))
    square = sum(part for part, _ in parts)
    middle = float(each.mean())
    if not square:
        return Contrast(middle, middle, middle, float(not middle))
    freedom = square**2 / sum(part**2 / own for part, own in parts)
    error = math.sqrt(square)
    reach = float(t.ppf(0.975, freedom)) * error
    return Contrast(middle, middle - reach, middle + reach, float(2 * t.sf(abs(middle) / error, freedom)))
