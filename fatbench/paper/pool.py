"""What is recorded of contestants, found by the settings that they were trained with, whoever trained them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import ValidationError

from fatbench.compare import held
from fatbench.errors import Refused
from fatbench.files import digest
from fatbench.paper.contestants import Contestant, World
from fatbench.recipe import Settings, shared
from fatbench.record import Record, Training, read, read_outcomes


@dataclass(frozen=True)
class Run:
    """One training run, as it was examined: perhaps in several records, each under some of the attacks.

    Attributes:
        seed: Of training.
        found: (record, its per-example outcomes) of the last epoch's network.
    """

    seed: int
    found: tuple[tuple[Record, pd.DataFrame], ...]

    @cached_property
    def right(self) -> pd.DataFrame:
        """A row a test example, a column clean and each attack: whether it is still classified rightly."""
        columns: dict[str, pd.Series[bool]] = {}
        for record, outcomes in self.found:
            told = held(record, outcomes, record.attacks).drop(columns="worst")
            columns |= {str(name): told[name] for name in told if name not in columns}
        return pd.DataFrame(columns)

    @property
    def collapsed(self) -> bool:
        return any(record.result.collapsed for record, _ in self.found)

    @cached_property
    def training(self) -> Training | None:
        return next((record.training for record, _ in self.found if record.training), None)


@dataclass(frozen=True)
class Seeds:
    """A contestant's runs, by seed."""

    contestant: Contestant
    runs: tuple[Run, ...]

    def outcomes(self, measure: str) -> list[np.ndarray]:
        """For each seed (n,) bool."""
        return [run.right[measure].to_numpy() for run in self.runs]

    def accuracies(self, measure: str) -> list[float]:
        """For each seed, in percent."""
        return [100 * float(right.mean()) for right in self.outcomes(measure)]

    def curves(self, name: str) -> list[list[float]]:
        """A value an epoch, for each seed whose training is recorded."""
        told = [run.training.curves.get(name, []) for run in self.runs if run.training]
        return [[value for value in curve if value is not None] for curve in told]

    def passes(self) -> list[float]:
        """For each seed the backward passes a training example, over the training: crafting's and the updates'."""
        told = [run.training for run in self.runs if run.training and run.training.backwards_per_example is not None]
        return [(1 + (t.backwards_per_example or 0.0)) * t.epochs for t in told]

    @property
    def n(self) -> int:
        return len(self.runs[0].right)


class Pool:
    """The records of some folders (or of the `records` in them), by the settings of their networks."""

    def __init__(self, folders: Iterable[Path], world: World) -> None:
        self.world = world
        self.paths: dict[str, dict[int, list[Path]]] = {}
        self._read: dict[Path, tuple[Record, pd.DataFrame]] = {}
        for path in sorted(path for folder in folders for path in _place(folder).rglob("*.json")):
            if path.name.startswith("."):
                continue
            record = read(path)
            known = _known(record.result.network.settings)
            if known is None or not _usable(record, world):
                continue
            self.paths.setdefault(_key(known), {}).setdefault(known.seed, []).append(path)
            self._read[path] = record, read_outcomes(path.with_suffix(".parquet"))

    def of(self, contestant: Contestant, attacks: Sequence[str], seeds: int | None = None) -> Seeds | None:
        """Its first `seeds` runs that were examined under all of these attacks; None where there is none."""
        found = []
        for seed in sorted(self.seeds(contestant)):
            if not self.missing(contestant, seed, attacks):
                run = Run(seed, tuple(self._read[path] for path in self.seeds(contestant)[seed]))
                found.append(run)
        return Seeds(contestant, tuple(found[:seeds])) if found else None

    def seeds(self, contestant: Contestant) -> dict[int, list[Path]]:
        return self.paths.get(_key(contestant.settings(self.world, 0)), {})

    def missing(self, contestant: Contestant, seed: int, attacks: Sequence[str]) -> list[str]:
        """Those of the attacks that no record tells of for this seed; all of them where it was not trained."""
        known = {attack for path in self.seeds(contestant).get(seed, ()) for attack in self._read[path][0].attacks}
        return [attack for attack in attacks if attack not in known]

    def used(self, seeds: Iterable[Seeds]) -> list[Path]:
        """The files of these runs."""
        keys = {(_key(one.contestant.settings(self.world, 0)), run.seed) for one in seeds for run in one.runs}
        return sorted({path for key, seed in keys for path in self.paths[key][seed]})


def _place(folder: Path) -> Path:
    """Where a folder's records lie: itself, unless it is an --out, which holds other files too."""
    own = any((folder / name).is_dir() for name in ("records", "jobs", "evidence"))
    return folder / "records" if own else folder


def _known(settings: dict[str, Any]) -> Settings | None:
    """The settings of a network that was trained here; None of any other."""
    try:
        return Settings.model_validate(settings)
    except ValidationError:
        return None


def _usable(record: Record, world: World) -> bool:
    """Whether it tells of a finished network's last epoch, as this world examines, on all its examples."""
    result = record.result
    return (
        result.network.selection == "last" and result.network.status == "done" and not result.bound
        and result.data.name == world.dataset and result.data.rule == "all" and result.eps == world.eps
        and (record.protocol.name, record.protocol.version) == _house()
        and result.attack_precision == world.attack_precision
    )  # fmt: skip


def _house() -> tuple[str, int]:
    from fatbench import protocol

    said = protocol.load(protocol.DEFAULT)
    return said.name, said.version


def _key(settings: Settings) -> str:
    """One for all the runs of one contestant."""
    return digest(shared(settings.model_dump(mode="json")))


def same_examples(one: Seeds, other: Seeds) -> None:
    """Raises Refused where two contestants were not examined on as many examples."""
    if one.n != other.n:
        raise Refused(
            f"{one.contestant.name} was examined on {one.n} examples and {other.contestant.name} on {other.n}: examine "
            "both on all"
        )
