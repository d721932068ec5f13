"""Figure 1 of FAT: two classes in the plane, and what PGD and early-stopped PGD make of them.

PGD takes every point as far over the decision boundary as its ball lets it, into the other class; early-stopped PGD
(tau = 0) leaves it where it is first misclassified. Drawn, and measured: how far over the boundary points end, and how
many end among the other class.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from fatbench.attacks import Friendly, natural, pgd
from fatbench.paper.claims import Claim, Finding, sided
from fatbench.paper.pictured import logits_of, mean_difference, rounded, scatter, strangers
from fatbench.plots import STYLE

PLACE = "Figure 1"
FAR_OVER = Claim(
    "fig1-far", PLACE, "PGD takes points far over the decision boundary, early-stopped PGD leaves them beside it"
)
MIXTURE = Claim("fig1-mixture", PLACE, "PGD puts points among the other class, early-stopped PGD does so less")

N, STEPS, UPDATES = 200, 20, 500
EPS = 0.12
FAR = 0.25  # of eps: two and a half steps of eps / 10
FIELD = 49  # points a side at which the network is drawn
TITLES = {"natural": "natural", "pgd": f"PGD-{STEPS}", "friendly": f"PGD-{STEPS}-0, stopped early"}


class Plane(nn.Sequential):
    """Points of the plane as images (N, 2, 1, 1), two hidden layers of 64, two classes."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))


def measured(seed: int, *, picture: bool = True, n: int = N, eps: float = EPS) -> dict[str, Any]:
    """Two moons, a network trained on them, and the two attacks: plain JSON, with `picture` also what is drawn."""
    x, y = _moons(seed, n)
    net = _trained(x, y, seed)
    attack: dict[str, Any] = {"eps": eps, "step_size": eps / 10, "steps": STEPS, "start": natural}
    sets = {
        "natural": x,
        "pgd": pgd(net, x, y, **attack).x_adv,
        "friendly": pgd(net, x, y, **attack, stop=Friendly(0, y)).x_adv,
    }
    evidence: dict[str, Any] = {
        "figure": "fig1", "seed": seed, "n": n, "eps": eps, "steps": STEPS, "updates": UPDATES,
        "figures": {name: _figures(net, x, point, y, eps) for name, point in sets.items()},
    }  # fmt: skip
    if picture:
        places = {name: point.flatten(1).tolist() for name, point in sets.items()}
        evidence["picture"] = {"labels": y.tolist(), "field": _field(net), "points": places}
    return rounded(evidence)


def _moons(seed: int, n: int) -> tuple[Tensor, Tensor]:
    """(n, 2, 1, 1) two half circles that reach into each other, scaled into [0.2, 0.8], and their labels."""
    from sklearn.datasets import make_moons

    raw, label = make_moons(n, noise=0.08, random_state=seed)
    low, high = raw.min(axis=0), raw.max(axis=0)
    x = 0.2 + 0.6 * (raw - low) / (high - low)  # no ball is cut off at the edge of [0, 1]
    return torch.tensor(x, dtype=torch.float32)[:, :, None, None], torch.tensor(label, dtype=torch.int64)


def _trained(x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """A network trained on the natural points, all at once."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Plane()
    adam = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(UPDATES):
        adam.zero_grad()
        torch.autograd.backward(F.cross_entropy(net(x), y))
        adam.step()
    return net


def _figures(net: nn.Module, x: Tensor, point: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """Shares of the points, in percent: misclassified, far over the boundary, among the other class."""
    over = _over(net, x, point, y) / eps
    return {
        "wrong": 100 * (logits_of(net, point).argmax(dim=1) != y).double().mean().item(),
        "far": 100 * (over > FAR).double().mean().item(),
        "crossed": 100 * strangers(point.flatten(1), x.flatten(1), y).mean().item(),
    }


def _over(net: nn.Module, x: Tensor, point: Tensor, y: Tensor, halvings: int = 20) -> Tensor:
    """(N,) how far a point lies beyond where its way from x first turned wrong, l-inf; 0 where it did not cross.

    Found by bisection between x and the point: a crossing of it, the only one where the boundary is crossed once.
    """
    low, high = torch.zeros(len(x)), torch.ones(len(x))
    for _ in range(halvings):
        middle = (low + high) / 2
        right = logits_of(net, x + middle[:, None, None, None] * (point - x)).argmax(dim=1) == y
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    reach = (point - x).flatten(1).abs().amax(dim=1)
    crossed = (logits_of(net, x).argmax(dim=1) == y) & (logits_of(net, point).argmax(dim=1) != y)
    return torch.where(crossed, (1 - high) * reach, 0)


def _field(net: nn.Module) -> list[list[float]]:
    """(FIELD, FIELD) rows from below: logit of class 1 less that of class 0 over [0, 1]^2."""
    side = torch.linspace(0, 1, FIELD)
    down, across = torch.meshgrid(side, side, indexing="ij")
    logits = logits_of(net, torch.stack([across, down], dim=-1).reshape(-1, 2, 1, 1))
    field: list[list[float]] = (logits[:, 1] - logits[:, 0]).reshape(FIELD, FIELD).tolist()
    return field


def drawn(evidence: Sequence[dict[str, Any]]) -> Figure:
    """The first points that were kept: natural, PGD's, early-stopped PGD's, over the decision boundary."""
    one = next(one for one in evidence if "picture" in one)
    field, labels = one["picture"]["field"], one["picture"]["labels"]
    side = np.linspace(0, 1, len(field))
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.4))
        axes = figure.subplots(1, 3, sharex=True, sharey=True)
        figure.suptitle(f"Two moons, eps {one['eps']}, a network trained on the natural points", fontsize=9)
        for axis, (name, title) in zip(axes, TITLES.items(), strict=True):
            axis.contourf(side, side, field, levels=[-1e9, 0, 1e9], colors=["#dceaf5", "#fbe5d6"])
            axis.contour(side, side, field, levels=[0], colors="black", linewidths=1)
            scatter(axis, one["picture"]["points"][name], labels)
            said = one["figures"][name]
            axis.set_title(
                f"{title}\nfar over {said['far']:.0f} %, among the other class {said['crossed']:.0f} %", fontsize=8
            )
            axis.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[], yticks=[])
            axis.grid(visible=False)
    return figure


def found(evidence: Sequence[dict[str, Any]]) -> list[Finding]:
    """The verdicts, by a t interval over the seeds' differences between the two attacks."""
    return [_compared(claim, evidence, figure) for claim, figure in ((FAR_OVER, "far"), (MIXTURE, "crossed"))]


def _compared(claim: Claim, evidence: Sequence[dict[str, Any]], figure: str) -> Finding:
    low, high, said = mean_difference(
        [one["figures"]["pgd"][figure] - one["figures"]["friendly"][figure] for one in evidence]
    )
    shares = {name: fmean(one["figures"][name][figure] for one in evidence) for name in TITLES}
    what = f"over by more than eps/{1 / FAR:g}" if figure == "far" else "among the other class"
    told = ", ".join(f"{shares[name]:.1f} % of {title.split(',')[0]}" for name, title in TITLES.items())
    first, seeds = evidence[0], len(evidence)
    return Finding(
        claim, sided(low, high), f"{what}: {told}; PGD less early-stopped {said}", first["n"], seeds,
        f"{first['updates']} updates", f"fatbench reproduce fig1 --seeds {seeds}",
    )  # fmt: skip
