"""Is that difference real? Two or more contestants on the same samples: paired tables, tests, and what may be said.

The samples are paired, so a difference is told by those that only one of the two got right: McNemar's exact test for
whether it is there, Newcombe's paired interval for how large it is (fatbench/stats.py). That weighs the test samples
alone. Where a contestant brings several training seeds, seeds and samples are weighed together (stats.contrast).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from fatbench.errors import Refused
from fatbench.protocol import budget_of
from fatbench.recipe import shared
from fatbench.record import Record, read, read_outcomes
from fatbench.stats import Contrast, Paired, contrast, holm


@dataclass(frozen=True)
class Contestant:
    """One side: a record for each of its training seeds, and what became of every sample.

    Attributes:
        right: For each seed's record, samples by measure, True where the network was right: clean, each attack that all
            sides share, and worst, the worst of these.
    """

    name: str
    records: tuple[Record, ...]
    right: tuple[pd.DataFrame, ...]
    label: pd.Series


@dataclass(frozen=True)
class Pair:
    """Two contestants under every measure.

    Attributes:
        seeds: For each measure, the paired counts of every pair of seeds; of one where a side has one.
        contrasts: For each measure, the difference over seeds and samples; empty where both sides have one seed.
        p: For the worst case: the contrast's, or McNemar's of one seed a side; `adjusted` for being one of several
            pairs.
        classes: class, n, both accuracies and their difference under the worst case; p adjusted over the classes.
    """

    first: Contestant
    second: Contestant
    seeds: dict[str, list[Paired]]
    contrasts: dict[str, Contrast]
    p: float
    adjusted: float
    classes: pd.DataFrame = field(repr=False)

    @property
    def several(self) -> bool:
        return bool(self.contrasts)


@dataclass(frozen=True)
class Comparison:
    """All contestants, every pair of them, and the attacks left out, with the reason."""

    contestants: tuple[Contestant, ...]
    pairs: tuple[Pair, ...]
    left_out: dict[str, str]


# ------------------------------------------------------------------------------------------------ who is meant


def find(text: str, folder: Path) -> list[tuple[Record, pd.DataFrame]]:
    """The records that one argument names: paths or ids, several of one contestant's seeds joined by commas.

    Raises:
        Refused: none of that name, more than one, or one without a number.
    """
    found = []
    for name in (part.strip() for part in text.split(",")):
        path = Path(name) if name.endswith(".json") else _by_id(name, folder)
        record = read(path)
        if not record.result.correct:
            raise Refused(f"{path}: {record.result.network.status}: it has no outcomes to compare")
        found.append((record, read_outcomes(path.with_suffix(".parquet"))))
    return found


def _by_id(name: str, folder: Path) -> Path:
    """A record by its id, or by the twelve digits that tables show of it."""
    paths = [path for path in sorted(folder.rglob("*.json")) if path.stem == name or path.stem.endswith(f"-{name}")]
    if not name or not paths:
        raise Refused(f"no record {name!r} in {folder}: give a path to its .json, or its id and --records FOLDER")
    if len(paths) > 1:
        raise Refused(f"{name!r} means {paths[0]} and {paths[1]}: give a path")
    return paths[0]


def compare(sides: Sequence[Sequence[tuple[Record, pd.DataFrame]]]) -> Comparison:
    """Compares contestants, each given by its records and their outcomes.

    Raises:
        Refused: fewer than two, other samples or budgets, or seeds that are not of one contestant.
    """
    if len(sides) < 2:
        raise Refused("compare takes two contestants or more")
    everyone = [one for side in sides for one in side]
    for record, outcomes in everyone[1:]:
        _same_samples(everyone[0], (record, outcomes))
    for side in sides:
        _one_contestant([record for record, _ in side])
    attacks, left_out = _shared([record for record, _ in everyone])
    names = _names([side[0][0] for side in sides])
    contestants = tuple(_contestant(name, side, attacks) for name, side in zip(names, sides, strict=True))
    raw = [_pair(a, b) for a, b in combinations(contestants, 2)]
    pairs = tuple(
        replace(pair, adjusted=adjusted) for pair, adjusted in zip(raw, holm([pair.p for pair in raw]), strict=True)
    )
    return Comparison(contestants, pairs, left_out)


def _same_samples(one: tuple[Record, pd.DataFrame], other: tuple[Record, pd.DataFrame]) -> None:
    a, b = one[0], other[0]
    if a.result.data.fingerprint != b.result.data.fingerprint or not one[1]["index"].equals(other[1]["index"]):
        raise Refused(
            f"{a.id} and {b.id} were examined on other samples ({a.result.data.n} of {a.result.data.name}, "
            f"{b.result.data.n} of {b.result.data.name}): examine both on the same"
        )
    if a.result.eps_value != b.result.eps_value:
        raise Refused(f"{a.id} was attacked at eps {a.result.eps}, {b.id} at {b.result.eps}: examine both at one eps")


def _one_contestant(records: list[Record]) -> None:
    def told(record: Record) -> tuple[object, ...]:
        network = record.result.network  # of foreign weights the settings are not known, but what they are for is
        return shared(network.settings), network.selection, network.arch, network.defense, network.eps_train

    for record in records[1:]:
        if told(record) != told(records[0]):
            raise Refused(f"{records[0].id} and {record.id} are no seeds of one contestant: compare them with a space")
        if record.result.network.fingerprint == records[0].result.network.fingerprint:
            raise Refused(f"{records[0].id} and {record.id} are of the same weights: name each seed once")


def _shared(records: list[Record]) -> tuple[list[str], dict[str, str]]:
    """The attacks that all were examined under in the same way; and why others are left out."""
    names = dict.fromkeys(attack for record in records for attack in record.attacks)
    left_out = {}
    for attack in names:
        settings = [record.protocol.attacks.get(attack) for record in records]
        if not all(attack in record.attacks for record in records):
            left_out[attack] = "not everyone was examined under it"
        elif any(record.result.bound and attack in record.result.stages for record in records):
            left_out[attack] = "of some it is an upper bound: examine with --tier full"
        elif any(said != settings[0] for said in settings):
            left_out[attack] = "the protocols mean different things by it"
    return [attack for attack in names if attack not in left_out], left_out


def _names(records: list[Record]) -> list[str]:
    """Short names that tell the contestants apart."""
    names = [record.result.network.defense or record.result.network.arch for record in records]
    if len(set(names)) < len(names):
        names = [f"{name} {record.id.rpartition('-')[2][:6]}" for name, record in zip(names, records, strict=True)]
    return names


def _contestant(name: str, side: Sequence[tuple[Record, pd.DataFrame]], attacks: list[str]) -> Contestant:
    ordered = sorted(side, key=lambda one: (one[0].result.network.seed or 0, one[0].id))
    return Contestant(
        name,
        tuple(record for record, _ in ordered),
        tuple(held(record, outcomes, attacks) for record, outcomes in ordered),
        ordered[0][1]["label"],
    )


def held(record: Record, outcomes: pd.DataFrame, attacks: Sequence[str]) -> pd.DataFrame:
    """Which samples a network got right: clean, under each attack, and under the worst of them."""
    right = pd.DataFrame({"clean": outcomes["clean_pred"] == outcomes["label"]})
    for attack in attacks:
        right[attack] = ~outcomes[f"{attack}.broken"]
    # An attack with a budget of its own is another question than the worst case at the protocol's.
    worst = right[[name for name in right.columns if not budget_of(str(name))]].all(axis=1)
    # What was given only whom another attack left standing counts in the worst case alone.
    later = [attack for attack in attacks if "standing_after" in record.protocol.attacks.get(attack, {})]
    return right.drop(columns=later).assign(worst=worst)


# ------------------------------------------------------------------------------------------------ what differs


def _pair(a: Contestant, b: Contestant) -> Pair:
    """Both, as if there were no other pair."""
    measures = a.right[0].columns
    seeds = {
        measure: [paired(x[measure], y[measure]) for x, y in zip(a.right, b.right, strict=False)]
        for measure in measures
    }
    contrasts = {}
    if max(len(a.right), len(b.right)) > 1:
        contrasts = {
            measure: contrast(*([right[measure].to_numpy() for right in side.right] for side in (a, b)))
            for measure in measures
        }
    p = contrasts["worst"].p if contrasts else seeds["worst"][0].p
    return Pair(a, b, seeds, contrasts, p, p, _classes(a, b))


def paired(a: pd.Series, b: pd.Series) -> Paired:
    """The 2 x 2 table of two networks' outcomes on the same samples."""
    return Paired(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))


def _classes(a: Contestant, b: Contestant) -> pd.DataFrame:
    """The worst case class by class, of the first seed of each."""
    rows = []
    for label in sorted(a.label.unique()):
        here = (a.label == label).to_numpy()
        found = paired(a.right[0]["worst"][here], b.right[0]["worst"][here])
        low, high = found.interval()
        rows.append(
            {
                "class": int(label), "n": found.n, a.name: 100 * (found.both + found.first) / found.n,
                b.name: 100 * (found.both + found.second) / found.n, "difference": 100 * found.difference,
                "low": 100 * low, "high": 100 * high, "p": found.p,
            }
        )  # fmt: skip
    table = pd.DataFrame(rows)
    return table.assign(p=holm(table["p"].tolist()))


def differences(pair: Pair, measure: str) -> np.ndarray:
    """First minus second in points, for each pair of seeds."""
    return np.array([100 * found.difference for found in pair.seeds[measure]])
