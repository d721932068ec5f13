"""Whom the experiments train at laptop scale, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from fatbench import recipe
from fatbench.errors import Refused
from fatbench.recipe import Settings


@dataclass(frozen=True)
class World:
    """A data set on which a laptop can train hundreds of networks.

    Attributes:
        dataset: By name.
        eps: Of the attacks, as published, and of training where it is not swept.
        second: A larger budget of the attacks, as in Figure 6.
        sweep: eps_train of Figure 6 and its kin.
        free: Step sizes of Figures 9 and 10, where nothing projects onto the ball; the first is eps / 10.
        lr, batch_size: Of every run.
        budgets: Epochs: short, twice as many, and so long that Madry has converged.
    """

    dataset: str
    eps: str
    second: str
    sweep: tuple[str, ...]
    free: tuple[str, ...]
    lr: float
    batch_size: int
    budgets: tuple[int, ...]

    @property
    def short(self) -> int:
        return self.budgets[0]

    @property
    def ends(self) -> tuple[int, ...]:
        """The shortest and the longest budget."""
        return self.budgets[0], self.budgets[-1]


# The learning rate was chosen on the validation split by benchmarks/choose_lr.py; batch and rate are the demo's.
DIGITS = World(
    "digits", "0.3", "0.4", ("0.1", "0.2", "0.3", "0.4", "0.5"), ("0.03", "0.06", "0.09", "0.12", "0.15"), 0.1, 64,
    (15, 30, 60),
)  # fmt: skip


def world(dataset: str) -> World:
    """The world that a data set's name means.

    Raises:
        Refused: none is set up for it.
    """
    if dataset != DIGITS.dataset:
        raise Refused(f"--scale laptop is set up for digits, not {dataset}: leave --dataset out, or use --scale paper")
    return DIGITS


class Contestant(NamedTuple):
    """A defense as an experiment trains it, over several seeds.

    Attributes:
        fields: The defense's own, where they are not its defaults.
    """

    defense: str
    eps: str
    epochs: int
    fields: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """`fat, tau 3`"""
        told = (f"{key} {value}" for key, value in self.fields if key in ("tau", "rho", "gap", "beta"))
        return ", ".join([self.defense, *told])

    @property
    def slug(self) -> str:
        """A run's name, without its seed."""
        own = "".join(f"-{key}{str(value).replace('/', '_')}" for key, value in self.fields)
        return f"{self.defense}-eps{self.eps.replace('/', '_')}-epochs{self.epochs}{own}"

    def settings(self, world: World, seed: int) -> Settings:
        """One run of it."""
        return recipe.resolve(
            self.defense, dataset=world.dataset, eps=self.eps, epochs=self.epochs, lr=world.lr,
            batch_size=world.batch_size, seed=seed, fields=dict(self.fields),
        )  # fmt: skip
