"""Every experiment by its name."""

from __future__ import annotations

from fatbench.paper.beyond import BEYOND
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
