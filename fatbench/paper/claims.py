"""What a paper claims, what was found of it, and the tests that tell: t intervals over training seeds and examples.

Accuracies are in points (0 to 100). Each test gives an interval of what the claim is about, signed so that the claim's
own side lies above 0, and the interval gives the verdict: whole on that side the claim holds, whole on the other it
does not hold, and else it is undecided at this many seeds and examples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import Literal, NamedTuple

import numpy as np

Verdict = Literal["holds", "does not hold", "undecided"]
CONFIDENCE = 0.95


class Claim(NamedTuple):
    """One sentence that can be tested.

    Attributes:
        id: experiment and claim, `fig4-natural-falls`.
        place: Where the paper says it; "beyond the paper" where it does not.
        text: The claim in plain words.
        paper: The paper's own figures; empty where it prints none.
    """

    id: str
    place: str
    text: str
    paper: str = ""


class Finding(NamedTuple):
    """A claim put to the test.

    Attributes:
        said: The measured figures in words, with their interval.
        n: Test examples, or whatever the claim counts.
        seeds: Training seeds of each contestant; the fewest.
        budget: `60 epochs`.
        command: What makes it again from nothing.
    """

    claim: Claim
    verdict: Verdict
    said: str
    n: int
    seeds: int
    budget: str
    command: str


class Estimate(NamedTuple):
    """A value with its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


# ------------------------------------------------------------------------------------------------ verdicts


def sided(low: float, high: float) -> Verdict:
    """What an interval says of "more than 0".

    >>> sided(0.2, 1.4), sided(-2, -1), sided(-1, 1)
    ('holds', 'does not hold', 'undecided')
    """
    return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def within(low: float, high: float, margin: float) -> Verdict:
    """What an interval says of "no further from 0 than `margin`".

    >>> within(-0.5, 1.5, 2), within(2.5, 4, 2), within(-1, 3, 2)
    ('holds', 'does not hold', 'undecided')
    """
    if -margin <= low and high <= margin:
        return "holds"
    return "does not hold" if low > margin or high < -margin else "undecided"


# ------------------------------------------------------------------------------------------------ intervals


def t_interval(value: float, error: float, freedom: float, confidence: float = CONFIDENCE) -> Estimate:
    """`value` with `error` (its standard error) and Student's t of so many degrees of freedom; all of R without any."""
    from scipy.stats import t

    if freedom <= 0:
        return Estimate(value, -math.inf, math.inf)
    reach = float(t.ppf((1 + confidence) / 2, freedom)) * error if error else 0.0
    return Estimate(value, value - reach, value + reach)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float, float]:
    """(mean, low, high) of a value measured once for each training seed; one seed tells nothing of the others.

    >>> mean_interval([1.0, 2.0, 3.0])[0]
    2.0
    >>> mean_interval([1.0])
    (1.0, -inf, inf)
    """
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    value, low, high = t_interval(fmean(values), error, len(values) - 1, confidence)
    return value, low, high


def difference(first: np.ndarray, second: np.ndarray) -> Estimate:
    """How much more of the examples the first contestant gets right than the second, in points.

    Two things are drawn by chance: training seeds, each side its own, and test examples, the same for both. The
    variances of both add up: s_1^2 / k_1 + s_2^2 / k_2 + var(d_i) / n, where s^2 is over the seeds' accuracies and d_i
    an example's difference of the two sides' means over seeds. The degrees of freedom are Welch and Satterthwaite's.

    Args:
        first, second: (k, n) for each seed and example whether it was right; n and the examples are the same.
    """
    seeds = [(100 * side.mean(axis=1)).tolist() for side in (first, second)]
    if min(map(len, seeds)) < 2:
        return Estimate(fmean(seeds[0]) - fmean(seeds[1]), -math.inf, math.inf)
    n = first.shape[1]
    each = 100 * (first.mean(axis=0) - second.mean(axis=0))
    parts = [(variance(accuracies) / len(accuracies), len(accuracies) - 1) for accuracies in seeds]
    parts.append((float(each.var(ddof=1)) / n, n - 1))
    error = sum(part for part, _ in parts)
    freedom = error**2 / sum(part**2 / free for part, free in parts) if error else 1.0
    return t_interval(fmean(seeds[0]) - fmean(seeds[1]), math.sqrt(error), freedom)


def slope(x: Sequence[float], y: Sequence[float]) -> Estimate:
    """How much y grows as x grows by 1: the least-squares line through all points, with the t interval of its slope."""
    from scipy.stats import linregress

    if len(x) < 3 or len(set(x)) < 2:
        return Estimate(math.nan, -math.inf, math.inf)
    line = linregress(x, y)
    return t_interval(float(line.slope), float(line.stderr), len(x) - 2)


def share(count: int, of: int) -> Estimate:
    """A share of seeds in points, with Wilson's interval."""
    from fatbench.stats import wilson

    low, high = wilson(count, of, CONFIDENCE)
    return Estimate(100 * count / of, 100 * low, 100 * high)
