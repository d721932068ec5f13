"""Whom the experiments train at laptop scale, and on what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fatbench import recipe
from fatbench.catalogue import described
from fatbench.errors import Refused
from fatbench.quantities import Precision
from fatbench.recipe import Settings


@dataclass(frozen=True)
class World:
    """A data set on which a laptop can train hundreds of networks, and how.

    Attributes:
        dataset: By name.
        title: As a reader knows it.
        eps: Of the attacks, as published, and of training where it is not swept.
        second: A larger budget of the attacks, as in Figure 6.
        sweep: eps_train of Figure 6 and its kin.
        lines: tau of the friendly defenses in Figure 6.
        taus: Of Figure 4.
        divergent: tau of FAT for TRADES in Figure 5.
        free: Step sizes of Figures 9 and 10, where nothing projects onto the ball; the first is eps / 10.
        budgets: Epochs: short, twice as many, and so long that Madry has converged; or one alone.
        settings: Of every run.
        attack_precision: What attacks are made in when it is examined: float32, or bf16 and verified in float32.
        tells: The experiments that are set up on it; None: every one.
        how: How its runs are made again, as `fatbench reproduce` takes it.
    """

    dataset: str
    title: str
    eps: str
    second: str
    sweep: tuple[str, ...]
    lines: tuple[int, ...]
    taus: tuple[int, ...]
    divergent: tuple[int, ...]
    free: tuple[str, ...]
    budgets: tuple[int, ...]
    settings: Mapping[str, Any]
    attack_precision: Precision = "float32"
    tells: tuple[str, ...] | None = None
    how: str = ""

    @property
    def short(self) -> int:
        return self.budgets[0]

    @property
    def most(self) -> str:
        """The largest eps_train."""
        return self.sweep[-1]

    def has(self, experiment: str) -> bool:
        """Whether an experiment is set up on it."""
        return self.tells is None or experiment in self.tells

    def said(self, text: str) -> str:
        """A claim's words, or an attack's name, with this world's budgets in them: `pgd-20@{second}`."""
        return text.format(eps=self.eps, second=self.second)


# Learning rates were chosen on validation splits by benchmarks/choose_lr.py; the digits' batch and rate are the demo's.
# Of reduced CIFAR-10 (one seed, 8 epochs): fat has 50.0 % natural and 21.8 % under PGD-10 at rate 0.03, 49.0 and 21.8
# at 0.1; madry 41.9 and 27.7, 39.6 and 27.7. Most of an examination is AutoAttack, and bf16 takes a quarter off it.
DIGITS = World(
    "digits", "digits", "0.3", "0.4", sweep=("0.1", "0.2", "0.3", "0.4", "0.5"), lines=(0, 1, 3), taus=tuple(range(11)),
    divergent=(0, 1, 2, 3, 10), free=("0.03", "0.06", "0.09", "0.12", "0.15"), budgets=(15, 30, 60),
    settings={"lr": 0.1, "batch_size": 64},
)  # fmt: skip
REDUCED = World(
    "cifar10-reduced", "CIFAR-10, reduced", "8/255", "16/255", sweep=("4/255", "8/255", "12/255", "16/255"),
    lines=(0, 3), taus=(0, 1, 2, 3, 10), divergent=(0, 3), free=(), budgets=(8,),
    settings={"lr": 0.03, "batch_size": 128, "precision": "bf16-mixed"}, attack_precision="bf16",
    tells=("table1", "table2", "table4", "fig4", "fig5", "fig6", "friendly"), how=" --dataset cifar10.npz",
)  # fmt: skip
WORLDS = (DIGITS, REDUCED)


def world(dataset: str) -> World:
    """The world that a data set's name means, or a user's own images: CIFAR-10 as a file.

    Raises:
        Refused: none is set up for it.
    """
    info = described(dataset)
    if info.shape is None:
        return REDUCED
    for one in WORLDS:
        if info.name in (one.dataset, described(one.dataset).of):
            return one
    raise Refused(
        f"--scale laptop is set up for digits and CIFAR-10 (by name, or a file), not {dataset}: leave --dataset out, "
        "or use --scale paper"
    )


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
            self.defense, dataset=world.dataset, eps=self.eps, epochs=self.epochs, seed=seed, fields=dict(self.fields),
            **world.settings,
        )  # fmt: skip
