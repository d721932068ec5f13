"""Figures 4 to 20: tau, backward passes over the epochs, eps_train, and search without the ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fatbench.paper import verdicts as tests
from fatbench.paper.claims import Claim
from fatbench.paper.contestants import DIGITS, Contestant, World
from fatbench.paper.experiment import FRIENDS, GRADIENT, STEPS, Experiment, Whom, at, ends, shorter, shortest
from fatbench.paper.verdicts import MARGIN, PLATEAU, Test

TAUS = tuple(range(11))


def _by_tau(*taus: int, defense: str = "fat") -> Whom:
    return lambda world: [
        Contestant(defense, world.eps, epochs, (("tau", tau),)) for epochs in world.ends for tau in taus
    ]


def _along_tau(epochs: int) -> list[tuple[float, Contestant]]:
    return [(tau, at("fat", tau=tau)(epochs)) for tau in TAUS]


def _figure_5(defense: str) -> tuple[Test, ...]:
    place, shares = "Figure 5", (59 / 120, 89 / 120)
    key = f"fig5-{defense}"
    return tuple(
        test
        for tau in (0, 3)
        for test in (
            tests.grows(
                Claim(f"{key}-grows-{tau}", place, f"backward passes grow as {defense}, tau {tau}, trains"),
                at(defense, tau=tau),
            ),
            tests.cheaper(
                Claim(f"{key}-cheaper-{tau}", place, f"{defense}, tau {tau}, takes fewer than K backward passes"),
                at(defense, tau=tau),
                STEPS,
            ),
            tests.surges(
                Claim(
                    f"{key}-surge-{tau}",
                    place,
                    f"backward passes of {defense}, tau {tau}, surge where the learning rate drops",
                ),
                at(defense, tau=tau),
                shares,
            ),
        )
    )


CURVES = {
    "fig4": Experiment(
        "Figure 4",
        "natural and robust accuracy over tau 0 to 10",
        _by_tau(*TAUS),
        GRADIENT,
        (
            tests.falls(
                Claim("fig4-natural", "Figure 4", "natural accuracy falls as tau grows"), _along_tau, "clean", "tau"
            ),
            tests.versus(
                Claim("fig4-robust", "Figure 4", "tau 3 is more robust than tau 0 under pgd-20"),
                at("fat", tau=3),
                at("fat", tau=0),
                "pgd-20",
            ),
            tests.versus(
                Claim("fig4-robust-cw", "Figure 4", "tau 3 is more robust than tau 0 under cw-inf"),
                at("fat", tau=3),
                at("fat", tau=0),
                "cw-inf",
            ),
            tests.alike(
                Claim(
                    "fig4-plateau",
                    "Figure 4",
                    f"from tau 3 to tau K robustness under pgd-20 changes by less than {PLATEAU:g} points",
                ),
                at("fat", tau=3),
                at("fat", tau=STEPS),
                "pgd-20",
            ),
        ),
        ends,
        ("fig-4-",),
    ),
    "fig5": Experiment(
        "Figure 5",
        "backward passes an example over the epochs, FAT and FAT for TRADES",
        lambda world: _by_tau(0, 1, 2, 3, STEPS)(world) + _by_tau(0, 1, 2, 3, STEPS, defense="fat-trades")(world),
        GRADIENT,
        (*_figure_5("fat"), *_figure_5("fat-trades")),
        ends,
        ("fig-5-",),
    ),
}


def _swept(base: str, steps: int) -> list[Callable[[str, int], Contestant]]:
    """Figure 6's contestants: the base, and its friend at tau 0, 1 and 3; alpha is eps_train / 10.

    More steps take longer, and what lies between tau 0 and 3 is told at K = 10.
    """
    own = {"step_size": "eps/10"} | ({"steps": steps} if steps != STEPS else {})
    lines: list[dict[str, Any]] = [{}, *({"tau": tau} for tau in ((0, 1, 3) if steps == STEPS else (0, 3)))]
    return [
        partial(
            lambda defense, fields, eps, epochs: at(defense, eps, **fields)(epochs),
            FRIENDS[base] if more else base,
            {**more, **own},
        )
        for more in lines
    ]


def _sweep(base: str, steps: int, budgets: Callable[[World], Sequence[int]]) -> Whom:
    return lambda world: [
        line(eps, epochs) for epochs in budgets(world) for eps in world.sweep for line in _swept(base, steps)
    ]


def _figure_6(place: str, base: str, steps: int = STEPS) -> tuple[Test, ...]:
    friend, key = FRIENDS[base], place.lower().replace("figure ", "fig")
    plain, zero, *_, three = _swept(base, steps)
    most, second = DIGITS.sweep[-1], f"pgd-20@{DIGITS.second}"

    def everywhere(epochs: int) -> list[Contestant]:
        return [line(eps, epochs) for eps in DIGITS.sweep for line in (plain, zero)]

    return (
        tests.collapses(
            Claim(f"{key}-collapse", place, f"at the largest eps_train {base} collapses and {friend}, tau 0, does not"),
            partial(plain, most),
            partial(zero, most),
            everywhere,
        ),
        tests.versus(
            Claim(
                f"{key}-natural",
                place,
                f"at the largest eps_train {friend}, tau 0, has more natural accuracy than {base}",
            ),
            partial(zero, most),
            partial(plain, most),
            "clean",
        ),
        tests.versus(
            Claim(
                f"{key}-natural-here",
                place,
                f"trained at the eps of the attacks {friend}, tau 3, has more natural accuracy than {base}",
            ),
            partial(three, DIGITS.eps),
            partial(plain, DIGITS.eps),
            "clean",
        ),
        tests.versus(
            Claim(f"{key}-robust-here", place, f"and is not below it by more than {MARGIN:g} under pgd-20"),
            partial(three, DIGITS.eps),
            partial(plain, DIGITS.eps),
            "pgd-20",
            MARGIN,
        ),
        tests.versus(
            Claim(
                f"{key}-second",
                place,
                f"at the largest eps_train {friend}, tau 0, is more robust than {base} under "
                "pgd-20 at the second, larger eps",
            ),
            partial(zero, most),
            partial(plain, most),
            second,
        ),
    )


def _swept_figure(place: str, base: str, shelf: tuple[str, ...], steps: int = STEPS, **more: Any) -> Experiment:
    budgets = more.pop("budgets", shortest)
    attacks = (*GRADIENT, f"pgd-20@{DIGITS.second}")
    told = f"{FRIENDS[base]} against {base} over eps_train" + (f", K = {steps}" if steps != STEPS else "")
    return Experiment(
        place, told, _sweep(base, steps, budgets), attacks, _figure_6(place, base, steps), budgets, shelf, **more
    )


def _free(base: str, tau: int | None) -> Callable[[str, int], Contestant]:
    """A contestant of Figures 9 and 10: no ball, from the clean image, with a step size of its own."""
    own: dict[str, Any] = {"start": "natural", "project": False} | ({} if tau is None else {"tau": tau})
    return lambda size, epochs: at(base if tau is None else FRIENDS[base], step_size=size, **own)(epochs)


_FREE = [_free("madry", tau) for tau in (None, 0, 1, 3)]

FIGURES = {
    "fig6": _swept_figure("Figure 6", "madry", ("fig-6-", "fig-13-"), budgets=shorter),
    "fig16": _swept_figure("Figure 16", "trades", ("fig-15-", "fig-16-")),
    "fig18": _swept_figure("Figure 18", "madry", ("fig-17-", "fig-18-"), steps=20),
    "fig20": _swept_figure("Figure 20", "trades", ("fig-19-", "fig-20-"), steps=20),
    "fig10": Experiment(
        "Figure 10",
        "search without the eps-ball, over the step size",
        lambda world: [one(size, world.short) for size in world.free for one in _FREE],
        GRADIENT,
        (
            tests.versus(
                Claim(
                    "fig10-natural",
                    "Figure 10",
                    "without the ball fat, tau 0, keeps more natural accuracy than madry at the largest step",
                ),
                partial(_FREE[1], DIGITS.free[-1]),
                partial(_FREE[0], DIGITS.free[-1]),
                "clean",
            ),
            tests.versus(
                Claim("fig10-robust", "Figure 10", "and is more robust under pgd-20"),
                partial(_FREE[1], DIGITS.free[-1]),
                partial(_FREE[0], DIGITS.free[-1]),
                "pgd-20",
            ),
        ),
        shortest,
        ("fig-9-", "fig-10-"),
    ),
}
