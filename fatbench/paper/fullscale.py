"""What was published at full scale, beside the rows of a world that is a reduced one: never ranked with them."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from fatbench import reported, robustbench
from fatbench.faces import title
from fatbench.paper.contestants import World
from fatbench.paper.experiments import EXPERIMENTS
from fatbench.paper.pool import Pool
from fatbench.reported import Printed, Row

# The tables whose contestants are told of, each with the FAT paper's own; "friendly" has none there.
TABLES = {
    "table1": "fat-2020-table-1",
    "table2": "fat-2020-table-2",
    "table4": "fat-2020-table-4",
    "friendly": "",
}
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
    seen = set()
    for name, table in TABLES.items():
        printed = reported.read(reported.shelf()[table]) if table else None
        for whom in EXPERIMENTS[name].whom(pool.world):
            if whom in seen or whom.fields or whom.eps != pool.world.eps:
                continue
            seen.add(whom)
            side = pool.of(whom, MEASURES[1:])
            if side is None:
                continue
            here = {f"{title(m)} here": f"{median(side.accuracies(m)):.1f}" for m in MEASURES}
            paper = _printed(printed, whom.defense, pool.world)
            theirs = {f"{title(m)}, the paper": paper.accuracy.get(m, "–") if paper else "–" for m in MEASURES[:2]}
            named = _listed(listed, whom.defense)
            yield {"defense": whom.defense, **here, **theirs, "RobustBench: natural, AutoAttack": named}


def _printed(table: Printed | None, defense: str, world: World) -> Row | None:
    """The row of a defense at the eps of the attacks, with the beta that papers take for the main one."""
    of_it = [row for row in (table.rows if table else ()) if row.defense == defense and row.beta in (None, 6)]
    return next((row for row in of_it if row.eps_train in (None, world.eps)), None)


def _listed(known: dict[str, robustbench.Listed], defense: str) -> str:
    ident, more = LISTED.get(defense, ("", ""))
    if ident not in known:
        return "–"
    one = known[ident]
    return f"{one.clean}, {one.robust} ({', '.join(part for part in (ident, one.arch, more) if part)})"
