"""The experiments that are pictures: what each measures for one seed, how it is drawn, and what is found of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from fatbench.paper import bound, landscape, mixture
from fatbench.paper.claims import Finding

Evidence = dict[str, Any]
Scale = Literal["laptop", "paper"]


class Picture(NamedTuple):
    """One of them.

    Attributes:
        place: In the paper.
        seeds: As many as it takes at laptop scale, unless told otherwise.
        measured: (dataset, seed, scale) -> evidence, plain JSON; points that are drawn are in that of seed 0.
        drawn, found: Of the evidence of all seeds.
    """

    place: str
    seeds: int
    measured: Callable[[str, int, Scale], list[Evidence]]
    drawn: Callable[[Sequence[Evidence]], Figure]
    found: Callable[[Sequence[Evidence]], list[Finding]]


# Epochs at laptop scale: two budgets. The paper says how long it trains for none of these: what stands here is ours.
BUDGETS = (15, 60)
# The paper's networks; batch and learning rate as in its Figures 6 to 20.
PAPER: dict[str, dict[str, Any]] = {
    "fig3": {"arch": "small-cnn", "epochs": 10, "lr": 0.01, "batch_size": 128},
    "fig11": {"arch": "small-cnn", "epochs": 10, "lr": 0.01, "batch_size": 128},
    "fig12": {"arch": "wrn-40-4", "epochs": 30, "lr": 0.01, "batch_size": 128},
    "theorem1": {"arch": "resnet-18", "epochs": 80, "lr": 0.01, "batch_size": 128},
}


def _plane(dataset: str, seed: int, scale: Scale) -> list[Evidence]:
    """Figure 1 has data of its own, and is as large on a laptop as in the paper."""
    return [landscape.measured(seed, picture=seed == 0)]


def _layers(figure: str, dataset: str, seed: int, scale: Scale) -> list[Evidence]:
    if scale == "paper":
        return [mixture.measured(dataset, seed, figure=figure, picture=seed == 0, **PAPER[figure])]
    return [
        mixture.measured(dataset, seed, figure=figure, picture=(seed, epochs) == (0, BUDGETS[0]), epochs=epochs)
        for epochs in BUDGETS
    ]


def _bounds(dataset: str, seed: int, scale: Scale) -> list[Evidence]:
    if scale == "paper":
        return [bound.measured(dataset, seed, defense=name, **PAPER["theorem1"]) for name in bound.TRAINED]
    return [bound.measured(dataset, seed, defense=name, epochs=epochs) for epochs in BUDGETS for name in bound.TRAINED]


PICTURES: dict[str, Picture] = {
    "fig1": Picture(landscape.PLACE, 10, _plane, landscape.drawn, landscape.found),
    **{
        name: Picture(spec.place, 10, partial(_layers, name), mixture.drawn, mixture.found)
        for name, spec in mixture.FIGURES.items()
    },
    "theorem1": Picture(bound.PLACE, 3, _bounds, bound.drawn, bound.found),
}
