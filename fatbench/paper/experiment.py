"""What an experiment is: a table or figure of the paper, whom it trains, what is claimed of it, and its recipes.

Zhang et al., "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger" (ICML 2020). At laptop scale the
networks and budgets are those of a `World`; figures that differ in the paper by data or network alone share one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fatbench.paper.contestants import Contestant, World
from fatbench.paper.verdicts import At, Test

GRADIENT = ("fgsm", "pgd-20", "pgd-100", "cw-inf")
WHOLE = (*GRADIENT, "autoattack")
STEPS = 10
FRIENDS = {"madry": "fat", "trades": "fat-trades", "mart": "fat-mart", "cat": "fat-cat", "dat": "fat-dat"}
Whom = Callable[[World], list[Contestant]]


@dataclass(frozen=True)
class Experiment:
    """One table or figure.

    Attributes:
        place: In the paper.
        summary: One line.
        whom: Whom it trains at laptop scale.
        attacks: What they are examined under, at the world's eps unless their names say `@{second}`.
        tests: Its claims.
        budgets: The epochs at which its claims are judged.
        recipes: What it is at the paper's scale: names on the shelf, or how they begin.
        note: What a reader must know of it.
        beside: Whom it trains too, of whom its claims ask no more than gradient attacks.
    """

    place: str
    summary: str
    whom: Whom
    attacks: tuple[str, ...]
    tests: tuple[Test, ...]
    budgets: Callable[[World], Sequence[int]]
    recipes: tuple[str, ...] = ()
    note: str = field(default="", repr=False)
    beside: Whom = field(default=lambda world: [], repr=False)

    def under(self, world: World) -> tuple[str, ...]:
        """The attacks by their names."""
        return tuple(map(world.said, self.attacks))

    def everybody(self, world: World) -> dict[Contestant, tuple[str, ...]]:
        """Contestant -> the attacks that it is examined under."""
        whom = dict.fromkeys(self.whom(world), self.under(world))
        return whom | {one: GRADIENT for one in self.beside(world) if one not in whom}


def here(world: World) -> str:
    """The eps of the attacks."""
    return world.eps


def second(world: World) -> str:
    """The larger one, 16/255 in the paper."""
    return world.second


def most(world: World) -> str:
    """The largest eps_train of a sweep."""
    return world.most


def at(defense: str, eps: str | Callable[[World], str] = here, **fields: Any) -> At:
    """A contestant in whatever world, at whatever budget; its eps as published, or as the world has it."""
    return partial(_contestant, defense, eps, tuple(fields.items()))


def _contestant(
    defense: str, eps: str | Callable[[World], str], fields: tuple[tuple[str, Any], ...], world: World, epochs: int
) -> Contestant:
    return Contestant(defense, eps if isinstance(eps, str) else eps(world), epochs, fields)


def at_eps(*defenses: str, budgets: Callable[[World], Sequence[int]]) -> Whom:
    return lambda world: [Contestant(defense, world.eps, epochs) for epochs in budgets(world) for defense in defenses]


def longest(world: World) -> tuple[int, ...]:
    return world.budgets[-1:]


def every(world: World) -> tuple[int, ...]:
    return world.budgets


def shorter(world: World) -> tuple[int, ...]:
    return world.budgets[:2]


def shortest(world: World) -> tuple[int, ...]:
    return world.budgets[:1]
