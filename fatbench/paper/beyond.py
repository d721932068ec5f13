"""What the paper does not ask: AutoAttack, FAT-CAT and FAT-DAT, budgets, equal cost, and the margin rule."""

from __future__ import annotations

from functools import partial

from fatbench.paper import verdicts as tests
from fatbench.paper.claims import Claim
from fatbench.paper.contestants import DIGITS, Contestant
from fatbench.paper.experiment import FRIENDS, WHOLE, Experiment, at, at_eps, every, longest, shortest
from fatbench.paper.verdicts import MARGIN, Test


def _budgets_of(defense: str) -> list[Contestant]:
    return [Contestant(defense, DIGITS.eps, epochs) for epochs in DIGITS.budgets]


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
        lambda world: [
            at("fat-margin", rho=0.1)(world.short),
            at("fat-margin", rho=0.5)(world.short),
            at("fat", tau=0)(world.short),
            at("fat", tau=1)(world.short),
        ],
        WHOLE,
        (
            tests.versus(
                Claim(
                    "margin-robust", "Appendix A", "a margin of 0.5 is not below tau 1 by more than 1 under autoattack"
                ),
                at("fat-margin", rho=0.5),
                at("fat", tau=1),
                "autoattack",
                MARGIN,
            ),
            tests.versus(
                Claim(
                    "margin-natural",
                    "Appendix A",
                    "a margin of 0.5 is not below tau 1 by more than 1 in natural accuracy",
                ),
                at("fat-margin", rho=0.5),
                at("fat", tau=1),
                "clean",
                MARGIN,
            ),
        ),
        shortest,
    ),
}
