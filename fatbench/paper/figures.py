"""Figures 4 to 20: tau, backward passes over the epochs, eps_train, and search without the ball."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fatbench.paper import verdicts as tests
from fatbench.paper.claims import Claim
from fatbench.paper.contestants import Contestant, World
from fatbench.paper.experiment import (
    FRIENDS,
    GRADIENT,
    STEPS,
    Experiment,
    Whom,
    at,
    here,
    most,
    shorter,
    shortest,
)
from fatbench.paper.verdicts import MARGIN, PLATEAU, At, Test

SECOND = "pgd-20@{second}"


def _by_tau(world: World, taus: Sequence[int], defense: str = "fat") -> list[Contestant]:
    return [at(defense, tau=tau)(world, epochs) for epochs in world.budgets[:2] for tau in taus]


def _along_tau(world: World, epochs: int) -> list[tuple[float, Contestant]]:
    return [(tau, at("fat", tau=tau)(world, epochs)) for tau in world.taus]


def _over_epochs(world: World) -> list[Contestant]:
    return _by_tau(world, (0, 1, 2, 3, STEPS)) + _by_tau(world, world.divergent, "fat-trades")


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
        "natural and robust accuracy over tau",
        lambda world: _by_tau(world, world.taus),
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
        shorter,
        ("fig-4-",),
    ),
    "fig5": Experiment(
        "Figure 5",
        "backward passes an example over the epochs, FAT and FAT for TRADES",
        _over_epochs,
        GRADIENT,
        (*_figure_5("fat"), *_figure_5("fat-trades")),
        shorter,
        ("fig-5-",),
    ),
}


def _swept(base: str, steps: int, tau: int | None, eps: str | Callable[[World], str]) -> At:
    """One of Figure 6's contestants: the base, or its friend at a tau; alpha is eps_train / 10."""
    own: dict[str, Any] = {"step_size": "eps/10"} | ({"steps": steps} if steps != STEPS else {})
    return at(base, eps, **own) if tau is None else at(FRIENDS[base], eps, tau=tau, **own)


def _sweep(base: str, steps: int, budgets: Callable[[World], Sequence[int]]) -> Whom:
    """Everybody at every eps_train. More steps take longer: there the least and the most tau of the lines must do."""

    def whom(world: World) -> list[Contestant]:
        taus = world.lines if steps == STEPS else (world.lines[0], world.lines[-1])
        return [
            _swept(base, steps, tau, eps)(world, epochs)
            for epochs in budgets(world)
            for eps in world.sweep
            for tau in (None, *taus)
        ]

    return whom


def _figure_6(place: str, base: str, steps: int = STEPS) -> tuple[Test, ...]:
    friend, key = FRIENDS[base], place.lower().replace("figure ", "fig")
    plain, zero = (_swept(base, steps, tau, most) for tau in (None, 0))
    plain_here, three_here = (_swept(base, steps, tau, here) for tau in (None, 3))

    def everywhere(world: World, epochs: int) -> list[Contestant]:
        return [_swept(base, steps, tau, eps)(world, epochs) for eps in world.sweep for tau in (None, 0)]

    largest = f"at the largest eps_train {friend}, tau 0,"
    equal = f"trained at the eps of the attacks {friend}, tau 3,"
    return (
        tests.collapses(
            Claim(f"{key}-collapse", place, f"at the largest eps_train {base} collapses and {friend}, tau 0, does not"),
            plain,
            zero,
            everywhere,
        ),
        tests.versus(
            Claim(f"{key}-natural", place, f"{largest} has more natural accuracy than {base}"), zero, plain, "clean"
        ),
        tests.versus(
            Claim(f"{key}-natural-here", place, f"{equal} has more natural accuracy than {base}"),
            three_here,
            plain_here,
            "clean",
        ),
        tests.versus(
            Claim(f"{key}-robust-here", place, f"{equal} is not below {base} by more than {MARGIN:g} under pgd-20"),
            three_here,
            plain_here,
            "pgd-20",
            MARGIN,
        ),
        tests.versus(
            Claim(
                f"{key}-second",
                place,
                f"{largest} is more robust than {base} under pgd-20 at the second, larger eps",
            ),
            zero,
            plain,
            SECOND,
        ),
    )


def _swept_figure(place: str, base: str, shelf: tuple[str, ...], steps: int = STEPS, **more: Any) -> Experiment:
    budgets = more.pop("budgets", shortest)
    told = f"{FRIENDS[base]} against {base} over eps_train" + (f", K = {steps}" if steps != STEPS else "")
    return Experiment(
        place,
        told,
        _sweep(base, steps, budgets),
        (*GRADIENT, SECOND),
        _figure_6(place, base, steps),
        budgets,
        shelf,
        **more,
    )


def _free(tau: int | None, size: str) -> At:
    """A contestant of Figures 9 and 10: no ball, from the clean image, with a step size of its own."""
    own: dict[str, Any] = {"step_size": size, "start": "natural", "project": False}
    return at("madry", **own) if tau is None else at("fat", **own, tau=tau)


def _farthest(tau: int | None) -> At:
    """The same at the largest step size."""
    return lambda world, epochs: _free(tau, world.free[-1])(world, epochs)


FIGURES = {
    "fig6": _swept_figure("Figure 6", "madry", ("fig-6-", "fig-13-"), budgets=shorter),
    "fig16": _swept_figure("Figure 16", "trades", ("fig-15-", "fig-16-")),
    "fig18": _swept_figure("Figure 18", "madry", ("fig-17-", "fig-18-"), steps=20),
    "fig20": _swept_figure("Figure 20", "trades", ("fig-19-", "fig-20-"), steps=20),
    "fig10": Experiment(
        "Figure 10",
        "search without the eps-ball, over the step size",
        lambda world: [_free(tau, size)(world, world.short) for size in world.free for tau in (None, 0, 1, 3)],
        GRADIENT,
        (
            tests.versus(
                Claim(
                    "fig10-natural",
                    "Figure 10",
                    "without the ball fat, tau 0, keeps more natural accuracy than madry at the largest step",
                ),
                _farthest(0),
                _farthest(None),
                "clean",
            ),
            tests.versus(
                Claim(
                    "fig10-robust",
                    "Figure 10",
                    "without the ball fat, tau 0, is more robust than madry under pgd-20 at the largest step",
                ),
                _farthest(0),
                _farthest(None),
                "pgd-20",
            ),
        ),
        shortest,
        ("fig-9-", "fig-10-"),
    ),
}
