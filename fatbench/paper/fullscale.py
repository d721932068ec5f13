"""What was published at full scale, beside the rows of a world that is a reduced one: never ranked with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import median

from fatbench import reported, robustbench
from fatbench.faces import title
from fatbench.paper.contestants import Contestant
from fatbench.paper.experiments import tabled
from fatbench.paper.pool import Pool

# The FAT paper's own tables, as they are kept here.
TABLES = {"table1": "fat-2020-table-1", "table2": "fat-2020-table-2", "table4": "fat-2020-table-4"}
# RobustBench's model of each, and what it has more or other than the contestant.
LISTED = {
    "madry": ("Engstrom2019Robustness", ""),
    "trades": ("Zhang2019Theoretically", ""),
    "mart": ("Wang2020Improving", "with 500,000 more images"),
    "fat-trades": ("Zhang2020Attacks", ""),
}
MEASURES = ("clean", "pgd-20", "autoattack")


def rows(pool: Pool, full: str) -> Iterator[dict[str, str]]:
    """A row a contestant at the eps of the attacks: its medians here, the paper's figures and RobustBench's.

    Args:
        full: The dataset at full scale, `cifar10`.
    """
    listed = {one.id: one for one in robustbench.published() if (one.dataset, one.norm) == (full, "linf")}
    for experiment, whom in tabled(pool.world):
        side = pool.of(whom, MEASURES[1:])
        if side is None or whom.fields or whom.eps != pool.world.eps:
            continue
        here = {f"{title(m)} here": f"{median(side.accuracies(m)):.1f}" for m in MEASURES}
        paper = _printed(experiment, whom)
        theirs = {f"{title(m)}, the paper": paper.get(m, "–") for m in MEASURES[:2]}
        named = _listed(listed, whom.defense)
        yield {"defense": whom.defense, **here, **theirs, "RobustBench: natural, AutoAttack": named}


def _printed(experiment: str, whom: Contestant) -> Mapping[str, str]:
    """What the paper's table prints of a defense at this eps, with the beta that is the papers' main one."""
    for row in reported.read(reported.shelf()[TABLES[experiment]]).rows if experiment in TABLES else ():
        if row.defense == whom.defense and row.beta in (None, 6) and row.eps_train in (None, whom.eps):
            return row.accuracy
    return {}


def _listed(known: dict[str, robustbench.Listed], defense: str) -> str:
    ident, more = LISTED.get(defense, ("", ""))
    if ident not in known:
        return "–"
    one = known[ident]
    return f"{one.clean}, {one.robust} ({', '.join(part for part in (ident, one.arch, more) if part)})"
