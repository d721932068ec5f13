"""Every experiment by its name."""

from __future__ import annotations

from collections.abc import Iterator

from fatbench.paper.beyond import BEYOND
from fatbench.paper.contestants import Contestant, World
from fatbench.paper.experiment import Experiment
from fatbench.paper.figures import CURVES, FIGURES
from fatbench.paper.tables import TABLES

EXPERIMENTS: dict[str, Experiment] = {**TABLES, **CURVES, **FIGURES, **BEYOND}

# In the paper these differ from another by the data or the network alone: on a laptop they are the other.
SAME = {
    "fig7": "fig6",
    "fig9": "fig10",
    "fig13": "fig6",
    "fig14": "fig6",
    "fig15": "fig16",
    "fig17": "fig18",
    "fig19": "fig20",
}


def tabled(world: World) -> Iterator[tuple[str, Contestant]]:
    """(experiment, contestant) of everybody whom the tables train, FAT-CAT and FAT-DAT too, each once."""
    seen = set()
    for name in ("table1", "table2", "table4", "friendly"):
        for whom in EXPERIMENTS[name].everybody(world):
            if whom not in seen:
                seen.add(whom)
                yield name, whom
