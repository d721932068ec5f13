"""What the paper does not ask: AutoAttack, FAT-CAT and FAT-DAT, budgets, equal cost, and the margin rule."""

from __future__ import annotations

from functools import partial

from fatbench.paper import verdicts as tests
from fatbench.paper.claims import Claim
from fatbench.paper.contestants import Contestant, World
from fatbench.paper.experiment import FRIENDS, WHOLE, Experiment, at, at_eps, every, longest, shortest
from fatbench.paper.verdicts import MARGIN, At, Test


def _budgets_of(defense: str, world: World) -> list[Contestant]:
    return [Contestant(defense, world.eps, epochs) for epochs in world.budgets]


_BEYOND = "beyond the paper"


def _friendlier(base: str) -> tuple[Test, ...]:
    friend = FRIENDS[base]
    return (
        tests.versus(
            Claim(f"friendly-{base}-natural", _BEYOND, f"{friend} has more natural accuracy than {base}"),
            at(friend),
            at(base),
            "clean",
        ),
        tests.versus(
            Claim(
                f"friendly-{base}-robust",
                _BEYOND,
                f"{friend} is not below {base} by more than {MARGIN:g} under autoattack",
            ),
            at(friend),
            at(base),
            "autoattack",
            MARGIN,
        ),
    )


def _costs(base: str) -> Test:
    friend = FRIENDS[base]
    claim = Claim(
        f"cost-{base}",
        _BEYOND,
        f"at no more backward passes {friend} is not below {base} by more than {MARGIN:g} under autoattack",
    )
    return tests.at_equal_cost(claim, at(friend), partial(_budgets_of, base), "autoattack")


# A gap of probabilities is at most 1; a gap of losses of 1 is odds of e against the label.
_MARGINS = {
    f"a {gap} gap of {rho:g}": at("fat-margin", rho=rho, **({} if gap == "probability" else {"gap": gap}))
    for gap, rho in (("probability", 0.1), ("probability", 0.5), ("loss", 0.5), ("loss", 2.0))
}
_TAUS = (at("fat", tau=0), at("fat", tau=1))


def _margin(told: str, whom: At) -> tuple[Test, ...]:
    """A margin instead of one step more: tau 1 is the least that goes on past the boundary."""
    key = f"margin-{told.removeprefix('a ').replace(' gap of ', '-')}"
    return tuple(
        tests.versus(
            Claim(
                f"{key}-{name}",
                "Appendix A",
                f"stopping at {told} is not below tau 1 by more than {MARGIN:g} {under}",
            ),
            whom,
            at("fat", tau=1),
            measure,
            MARGIN,
        )
        for name, measure, under in (
            ("robust", "autoattack", "under autoattack"),
            ("natural", "clean", "in natural accuracy"),
        )
    )


BEYOND = {
    "friendly": Experiment(
        _BEYOND,
        "FAT-CAT and FAT-DAT against CAT and DAT",
        at_eps("cat", "fat-cat", "dat", "fat-dat", budgets=longest),
        WHOLE,
        (*_friendlier("cat"), *_friendlier("dat")),
        longest,
    ),
    "budget": Experiment(
        _BEYOND,
        "Tables 1 and 2 at one, two and four times the epochs",
        at_eps("madry", "fat", "trades", "fat-trades", budgets=every),
        WHOLE,
        (),
        every,
        note="Its verdicts are those of Tables 1 and 2 at every budget.",
    ),
    "cost": Experiment(
        _BEYOND,
        "robust accuracy at equal backward passes",
        at_eps("madry", "fat", "trades", "fat-trades", budgets=every),
        WHOLE,
        (_costs("madry"), _costs("trades")),
        longest,
    ),
    "margin": Experiment(
        _BEYOND,
        "the margin rule of Appendix A against tau",
        lambda world: [one(world, world.short) for one in (*_MARGINS.values(), *_TAUS)],
        WHOLE,
        tuple(test for told, whom in _MARGINS.items() for test in _margin(told, whom)),
        shortest,
    ),
}
