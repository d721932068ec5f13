"""How a claim is judged by recorded runs: differences, trends, collapses and curves, each with its verdict.

A test takes the pool of recorded runs and a budget (epochs) and gives its finding, or None where the runs that it needs
are not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

import numpy as np

from fatbench.faces import title
from fatbench.paper.claims import (
    Claim,
    Finding,
    Interval,
    Verdict,
    mean_interval,
    not_below,
    sided,
    trend,
    within,
)
from fatbench.paper.contestants import Contestant, World
from fatbench.paper.pool import Pool, Seeds, same_examples
from fatbench.stats import contrast, over_seeds

# What "not below" and "no more than" may be off by, in percentage points.
MARGIN = 1.0
PLATEAU = 2.0
At = Callable[[World, int], Contestant]  # a contestant in a world, at a budget


class Test(NamedTuple):
    """A claim and how it is judged."""

    claim: Claim
    judge: Callable[[Pool, int], tuple[Verdict, str, Sequence[Seeds]] | None]

    def finding(self, pool: Pool, epochs: int, command: str) -> Finding | None:
        """What the runs at a budget say; None where they are not there."""
        judged = self.judge(pool, epochs)
        if judged is None:
            return None
        verdict, said, seen = judged
        seeds = min(len(side.runs) for side in seen)
        claim = self.claim._replace(text=pool.world.said(self.claim.text))
        return Finding(claim, verdict, said, seen[0].n, seeds, f"{epochs} epochs", command)


def versus(claim: Claim, first: At, second: At, measure: str, margin: float | None = None) -> Test:
    """The first is above the second under a measure; with a margin, not below it by more than that."""

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        attack = pool.world.said(measure)
        sides = _all(pool, [first(pool.world, epochs), second(pool.world, epochs)], [attack])
        if sides is None:
            return None
        same_examples(*sides)
        difference = contrast(sides[0].outcomes(attack), sides[1].outcomes(attack))
        bounds = difference.low, difference.high
        verdict = sided(*bounds) if margin is None else not_below(*bounds, margin)
        told = ", ".join(f"{side.contestant.name} {_mean(side, attack)}" for side in sides)
        if margin is not None and max(fmean(side.accuracies(attack)) for side in sides) <= margin:
            verdict, more = "undecided", "; both have next to nothing to lose"
        else:
            verdict, more = (verdict, "") if attack == "clean" else _without_constants(verdict, sides)
        return verdict, f"{title(attack)}: {told}; difference {difference.told()}{more}", sides

    return Test(claim, judge)


def _without_constants(verdict: Verdict, sides: Sequence[Seeds]) -> tuple[Verdict, str]:
    """A verdict and what must be said with it, where a side gives one answer to all in every run.

    The tenth that such a network keeps under any attack is no robustness: it speaks for nobody, only against.
    """
    gone = [all(run.collapsed for run in side.runs) for side in sides]
    names = " and ".join(side.contestant.name for side, lost in zip(sides, gone, strict=True) if lost)
    favoured = {"holds": gone[0], "does not hold": gone[1]}.get(verdict, False)
    more = f"; {names} collapsed in every run, and what one constant answer keeps is no robustness" if names else ""
    return ("undecided" if favoured else verdict), more


def alike(claim: Claim, first: At, second: At, measure: str, margin: float = PLATEAU) -> Test:
    """The two differ by no more than a margin."""

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        sides = _all(pool, [first(pool.world, epochs), second(pool.world, epochs)], [measure])
        if sides is None:
            return None
        difference = contrast(sides[0].outcomes(measure), sides[1].outcomes(measure))
        told = ", ".join(f"{side.contestant.name} {_mean(side, measure)}" for side in sides)
        verdict = within(difference.low, difference.high, margin)
        return verdict, f"{title(measure)}: {told}; difference {difference.told()}", sides

    return Test(claim, judge)


def falls(claim: Claim, line: Callable[[World, int], list[tuple[float, Contestant]]], measure: str, what: str) -> Test:
    """A measure falls along a line of contestants, by its slope."""

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        points = line(pool.world, epochs)
        sides = _all(pool, [contestant for _, contestant in points], [measure])
        if sides is None:
            return None
        pairs = [(x, y) for (x, _), side in zip(points, sides, strict=True) for y in side.accuracies(measure)]
        slope = trend(*zip(*pairs, strict=True))
        ends = f"{_mean(sides[0], measure)} at {points[0][0]:g}, {_mean(sides[-1], measure)} at {points[-1][0]:g}"
        said = f"{title(measure)}: {ends}; slope {slope.told('+.2f')} points for 1 of {what}"
        return sided(-slope.high, -slope.low), said, sides

    return Test(claim, judge)


def collapses(claim: Claim, falling: At, standing: At, best: Callable[[World, int], list[Contestant]]) -> Test:
    """At the same large budget of training one defense collapses and the other does not.

    A run has collapsed where it gives one answer to all, or keeps less than half of the natural accuracy that its
    defense's best in the sweep has. Holds where every run of the first collapsed and none of the other; does not hold
    where none of the first did, or the other as often.
    """

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        sides = _all(pool, [falling(pool.world, epochs), standing(pool.world, epochs)], ["clean"])
        if sides is None:
            return None
        gone = []
        for side in sides:
            others = [pool.of(one, []) for one in best(pool.world, epochs) if one.defense == side.contestant.defense]
            top = max(fmean(one.accuracies("clean")) for one in [side, *others] if one)
            gone.append(sum(r.collapsed or 2 * 100 * r.right["clean"].mean() < top for r in side.runs))
        first, other = (count / len(side.runs) for count, side in zip(gone, sides, strict=True))
        verdict: Verdict = "undecided"
        if first == 1 and other == 0:
            verdict = "holds"
        elif first <= other:
            verdict = "does not hold"
        said = "; ".join(
            f"{side.contestant.name} collapsed in {count} of {len(side.runs)} runs, natural {_mean(side, 'clean')}"
            for side, count in zip(sides, gone, strict=True)
        )
        return verdict, f"trained at eps {sides[0].contestant.eps}: {said}", sides

    return Test(claim, judge)


def grows(claim: Claim, whose: At) -> Test:
    """Attack steps an example, and so backward passes, grow over the epochs: the slope of each run, over seeds."""

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        side = _trained(pool, whose(pool.world, epochs))
        if side is None:
            return None
        curves = side.curves("steps_per_example")
        slope = Interval(*mean_interval([epochs * float(np.polyfit(range(len(c)), c, 1)[0]) for c in curves]))
        first, last = (fmean(curve[at] for curve in curves) for at in (0, -1))
        said = f"{side.contestant.name}: {first:.2f} steps in the first epoch, {last:.2f} in the last; "
        return sided(*slope[1:]), f"{said}slope {slope.told('+.2f')} over the training", [side]

    return Test(claim, judge)


def cheaper(claim: Claim, whose: At, steps: int) -> Test:
    """Fewer backward passes an example than the whole attack takes, over the training."""

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        side = _trained(pool, whose(pool.world, epochs))
        if side is None:
            return None
        saved = Interval(*mean_interval([steps - fmean(curve) for curve in side.curves("steps_per_example")]))
        said = f"{side.contestant.name}: {steps - saved.middle:.2f} of {steps} steps; saved {saved.told('.2f')}"
        return sided(*saved[1:]), said, [side]

    return Test(claim, judge)


def surges(claim: Claim, whose: At, shares: Sequence[float]) -> Test:
    """Steps rise more over the drops of the learning rate (at these shares of the epochs) than just before them.

    They grow all the time, so the rise from the few epochs before a drop to those after it says nothing by itself: what
    counts is how far it is above the rise over as many epochs before.
    """

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        side = _trained(pool, whose(pool.world, epochs))
        if side is None:
            return None
        near = max(1, epochs // 20)
        drops = [round(share * epochs) for share in shares]
        jumps = [fmean(_rise(curve, at, near) for at in drops) for curve in side.curves("steps_per_example")]
        befores = [fmean(_rise(curve, at - near, near) for at in drops) for curve in side.curves("steps_per_example")]
        surge = Interval(*mean_interval([jump - before for jump, before in zip(jumps, befores, strict=True)]))
        where = " and ".join(str(at + 1) for at in drops)
        said = (
            f"{side.contestant.name}: {fmean(jumps):+.2f} steps over the drops before epochs {where}, "
            f"{fmean(befores):+.2f} just before; surge {surge.told('+.2f')}"
        )
        return sided(*surge[1:]), said, [side]

    return Test(claim, judge)


def _rise(curve: Sequence[float], at: int, near: int) -> float:
    """From the `near` epochs before one to the `near` from it on."""
    return fmean(curve[at : at + near]) - fmean(curve[at - near : at])


def at_equal_cost(claim: Claim, frugal: At, lavish: Callable[[World], list[Contestant]], measure: str) -> Test:
    """After as many backward passes the one is not below the other.

    The other is known at several numbers of epochs. Between the two of them whose passes lie around the first one's, an
    example's share of right answers is taken to change in proportion to the passes.
    """

    def judge(pool: Pool, epochs: int) -> tuple[Verdict, str, Sequence[Seeds]] | None:
        sides = _all(pool, [frugal(pool.world, epochs), *lavish(pool.world)], [measure])
        if sides is None or not all(side.passes() for side in sides):
            return None
        first, *others = sides
        cost, costs = fmean(first.passes()), {fmean(other.passes()): other for other in others}
        around = next(((low, high) for low, high in pairwise(sorted(costs)) if low <= cost <= high), None)
        if around is None:
            return None
        below, above = (costs[one] for one in around)
        share = (cost - around[0]) / (around[1] - around[0])
        between = _between(below.outcomes(measure), above.outcomes(measure), share)
        difference = contrast(first.outcomes(measure), between)
        told = "; ".join(
            f"{side.contestant.name}, {side.contestant.epochs} epochs: {fmean(side.passes()):.0f} passes an example, "
            f"{_mean(side, measure)}"
            for side in (first, below, above)
        )
        said = f"{title(measure)}: {told}; difference at equal cost {difference.told()}"
        return not_below(difference.low, difference.high, MARGIN), said, [first, below, above]

    return Test(claim, judge)


def _between(below: Sequence[np.ndarray], above: Sequence[np.ndarray], share: float) -> list[np.ndarray]:
    """For each seed (n,) the outcomes of two budgets, mixed: `share` of the way from the first to the second."""
    return [(1 - share) * one + share * other for one, other in zip(below, above, strict=False)]


def _all(pool: Pool, whom: Sequence[Contestant], measures: Sequence[str]) -> list[Seeds] | None:
    """Everybody's runs; None where somebody has none."""
    found = [pool.of(one, [measure for measure in measures if measure != "clean"]) for one in whom]
    return [one for one in found if one] if all(found) else None


def _trained(pool: Pool, whom: Contestant) -> Seeds | None:
    side = pool.of(whom, [])
    return side if side and side.curves("steps_per_example") else None


def _mean(side: Seeds, measure: str) -> str:
    """`57.1 ± 0.4`: over seeds; means, so that the difference that is told is that of the two."""
    accuracies = side.accuracies(measure)
    return f"{fmean(accuracies):.1f} ± {over_seeds(accuracies)[1]:.1f}"
