"""What the paper's pictures share: networks as they train, points as they are drawn, shares as they are told."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from fatbench.attacks import crafting
from fatbench.data import Data
from fatbench.devices import fabric_on
from fatbench.errors import RunFailed
from fatbench.paper.claims import mean_interval
from fatbench.plots import COLOURS, MARKERS
from fatbench.quantities import Progress
from fatbench.recipe import Settings
from fatbench.team import Team
from fatbench.trainer import Run

NEIGHBOURS = 5


def trained(settings: Settings, loaded: Data, device: str = "auto") -> Iterator[tuple[int, nn.Module]]:
    """(epochs done, the network) after each epoch of the trainer's own loop. Nothing is validated or written.

    Raises:
        RunFailed: a loss that is not finite.
    """
    run = Run(settings, Path(), loaded, Team(fabric_on(device, settings.precision)))
    for epoch in range(settings.epochs):
        if batch := run.learn(Progress(epoch, settings.epochs)).first_broken():
            raise RunFailed(f"the loss was not finite at epoch {epoch + 1}, batch {batch}; a smaller lr may help")
        yield epoch + 1, run.subject


def logits_of(net: nn.Module, x: Tensor) -> Tensor:
    """(N, classes) in eval mode, no gradient."""
    with crafting(net), torch.no_grad():
        logits: Tensor = net(x)
    return logits


def strangers(points: Tensor, among: Tensor, y: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """(N,) float64, 1 where most of a point's nearest points `among` others are of other classes, 0 elsewhere.

    Row i of both is made of example i, which is no neighbour of itself.

    Args:
        points, among: (N, D), in the space where nearness is meant.
        y: (N,) labels.
    """
    distance = torch.cdist(points.double(), among.double()).fill_diagonal_(torch.inf)
    nearest = distance.topk(neighbours, largest=False).indices
    return ((y[nearest] != y[:, None]).sum(dim=1) > neighbours / 2).double()


def rounded(evidence: dict[str, Any]) -> dict[str, Any]:
    """Every number in it cut to 4 significant digits: what is committed stays small."""
    return {key: _cut(value) for key, value in evidence.items()}


def _cut(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return rounded(value)
    return [_cut(v) for v in value] if isinstance(value, (list, tuple)) else value


def grouped(evidence: Sequence[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Evidence by the values of some keys, in the order in which they first come."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for one in evidence:
        groups.setdefault(tuple(one[key] for key in keys), []).append(one)
    return groups


def scatter(axis: Axes, points: Sequence[Sequence[float]], labels: Sequence[int], **style: Any) -> None:
    """Points in the plane, each class with a colour and a marker of its own."""
    for at, label in enumerate(sorted(set(labels))):
        x, y = zip(*(point for point, own in zip(points, labels, strict=True) if own == label), strict=True)
        axis.scatter(x, y, marker=MARKERS[at], color=COLOURS[at], **{"s": 12, "linewidths": 0, **style})


def mean_difference(values: Sequence[float]) -> tuple[float, float, str]:
    """The interval of the mean of differences in percentage points, one a seed, and how it is told:
    `12.0 [8.0, 16.0] points`.

    Returns:
        (low, high, told).
    """
    mean, low, high = mean_interval(values)
    return low, high, f"{mean:.1f} [{low:.1f}, {high:.1f}] points"
