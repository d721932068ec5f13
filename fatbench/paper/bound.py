"""Theorem 1 of FAT, measured along training: a bound of the adversarial risk, beside TRADES's.

Let l be a loss that is at least 1 wherever a network h errs, here cross-entropy / ln 2: who errs gives the true class
at most 1/2. Over the eps-ball of x, of label y, the risk is P[some x' has h(x') != y], and each of these bounds it:

    FAT     E l(x, y) + E l*(x, y), l* the loss of an x' that h errs on, hardly more than it takes (the least loss, plus
            rho), where there is one, and the greatest loss where there is none;
    Madry   E l(x, y) + E max l(x', y), the greatest loss whatever h says of it;
    TRADES  E l(x, y) + E max l(x', h(x)): errors, and predictions that change within the ball (Zhang et al., ICML 2019,
            Theorem 3.1, with this loss and lambda = 1).

FAT's is the least of what the definitions allow; but a bound of the true risk asks for true minima and maxima, and
training has those that PGD finds. Measured: with l* at early-stopped PGD's points (tau = 0) and the others' maxima at
the whole PGD's, from the same starts, does the bound stay above the risk that stronger attacks find, and is it the
least of the three? The theorem is of two classes; with more the inequalities stand as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from fatbench import data, recipe
from fatbench.attacks import Friendly, cw_margin, pgd, uniform
from fatbench.draws import Draws
from fatbench.paper.claims import Claim, Finding, mean_interval, sided
from fatbench.paper.pictured import grouped, logits_of, rounded, trained
from fatbench.plots import COLOURS, DASHES, MARKERS, STYLE
from fatbench.quantities import number

PLACE = "Theorem 1"
TIGHTER = Claim(
    "theorem1-tighter", PLACE, "FAT's bound of the adversarial risk is tighter than TRADES's throughout training"
)
ABOVE = Claim(
    "theorem1-above", PLACE, "FAT's bound, at early-stopped PGD's points, is above the risk that stronger attacks find"
)
TRAINED = ("fat", "trades")
EPOCHS, STEPS, STRONG = 15, 20, 50
LOOKS = 8  # at most so many in a run
LINES = {"trades": "TRADES's bound", "madry": "greatest loss", "friendly": "FAT's bound", "risk": "risk found"}


def measured(
    dataset: str, seed: int, *, defense: str = "fat", arch: str | None = None, eps: str | None = None,
    epochs: int = EPOCHS, n: int = 500, lr: float = 0.1, batch_size: int = 64, device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Trains a contestant and measures the bounds and the risk on the first n test images on the way: plain JSON."""
    loaded = data.load(dataset)
    settings = recipe.resolve(
        defense, dataset=dataset, arch=arch, eps=eps, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed
    )
    x, y = loaded.x_test[:n], loaded.y_test[:n]
    times = min(LOOKS, epochs)
    looks = {round(epochs * at / times) for at in range(1, times + 1)}
    curves: dict[str, list[float]] = {name: [] for name in ("epoch", *LINES)}
    for epoch, net in trained(settings, loaded, device):
        if epoch in looks:
            where = next(net.parameters()).device
            for name, value in {"epoch": epoch, **bounds(net, x.to(where), y.to(where), number(settings.eps))}.items():
                curves[name].append(value)
    said = {"figure": "theorem1", "dataset": dataset, "arch": settings.arch, "defense": defense, "seed": seed}
    return rounded({**said, "epochs": epochs, "eps": settings.eps, "n": len(y), "curves": curves})


def bounds(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, float]:
    """The three bounds, and the risk that PGD-50 and C&W's margin find beside the points they are measured at."""
    draws = Draws(("theorem 1",), np.arange(len(x)))
    search = partial(pgd, net, eps=eps, step_size=eps / 4, steps=STEPS, start=partial(uniform, draws=draws))
    guess = logits_of(net, x).argmax(dim=1)
    friendly, largest = search(x, y, stop=Friendly(0, y)).x_adv, search(x, y).x_adv
    changed = search(x, guess).x_adv
    natural = _loss(net, x, y)
    return {
        "friendly": (natural + _loss(net, friendly, y)).mean().item(),
        "madry": (natural + _loss(net, largest, y)).mean().item(),
        "trades": (natural + _loss(net, changed, guess)).mean().item(),
        "risk": _risk(net, y, [x, friendly, largest, changed, *_strong(net, x, y, eps)]),
    }


def _loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """(N,) cross-entropy / ln 2: at least 1 where the network errs."""
    return F.cross_entropy(logits_of(net, x), y, reduction="none") / math.log(2)


def _risk(net: nn.Module, y: Tensor, points: Sequence[Tensor]) -> float:
    """The share of examples that the network errs on at one of the points at least."""
    errs = torch.stack([logits_of(net, point).argmax(dim=1) != y for point in points])
    return errs.any(dim=0).double().mean().item()


def _strong(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> Iterator[Tensor]:
    """PGD-50 in steps of eps / 10 on cross-entropy and on C&W's margin, each from a start of its own."""
    for restart, objective in enumerate((None, cw_margin), start=1):
        draws = Draws(("theorem 1",), np.arange(len(x))).restart(restart)
        start = partial(uniform, draws=draws)
        # Stopped at the first error: that it was found is all that counts.
        yield pgd(
            net, x, y, eps=eps, step_size=eps / 10, steps=STRONG, objective=objective, start=start, stop=Friendly(0, y)
        ).x_adv


# ------------------------------------------------------------------------------------------------ drawn and found


def drawn(evidence: Sequence[dict[str, Any]]) -> Figure:
    """The bounds and the risk over the longest runs, a panel for each contestant: the seeds' median and range."""
    longest = max(one["epochs"] for one in evidence)
    panels = grouped([one for one in evidence if one["epochs"] == longest], "defense")
    first = evidence[0]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.2 * len(panels) + 0.6, 4))
        (axes,) = figure.subplots(1, len(panels), sharey=True, squeeze=False)
        figure.suptitle(f"Bounds of the risk on {first['dataset']}, eps {first['eps']}", fontsize=9)
        for axis, ((name,), runs) in zip(axes, panels.items(), strict=True):
            _curves(axis, [one["curves"] for one in runs])
            axis.set_title(f"trained by {name}, {len(runs)} seeds", fontsize=8, loc="left")
            axis.set(xlabel="epoch", yscale="log")
        axes[0].set_ylabel("risk, and bounds of it, 1 = all")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _curves(axis: Axes, seeds: Sequence[dict[str, list[float]]]) -> None:
    for (name, label), colour, marker, dash in zip(LINES.items(), COLOURS, MARKERS, DASHES, strict=False):
        values, epochs = np.array([seed[name] for seed in seeds]), seeds[0]["epoch"]
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": dash,
            "markersize": 4,
            "linewidth": 1.3,
        }
        axis.plot(epochs, np.median(values, axis=0), label=label, **style)
        axis.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15, linewidth=0)


def found(evidence: Sequence[dict[str, Any]]) -> list[Finding]:
    """The verdicts for each contestant and budget: the smallest distance of a run, by a t interval over seeds."""
    groups = grouped(evidence, "defense", "epochs").values()
    return [finding for runs in groups for finding in _found_of(runs)]


def _found_of(runs: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    first, seeds = runs[0], len(runs)
    last = {name: fmean(one["curves"][name][-1] for one in runs) for name in LINES}
    ends = ", ".join(f"{LINES[name]} {value:.3g}" for name, value in last.items())
    command = f"fatbench reproduce theorem1 --dataset {first['dataset']} --seeds {seeds}"
    for claim, above, below in ((TIGHTER, "trades", "friendly"), (ABOVE, "friendly", "risk")):
        least = [min(a - b for a, b in zip(one["curves"][above], one["curves"][below], strict=True)) for one in runs]
        mean, low, high = mean_interval(least)
        said = f"{LINES[above]} less {LINES[below]}, the least of {len(first['curves']['epoch'])} looks"
        own = Claim(f"{claim.id}-{first['defense']}", PLACE, f"{claim.text}, of {first['defense']}")
        yield Finding(
            own, sided(low, high), f"{said}: {mean:.3g} [{low:.3g}, {high:.3g}]; in the end {ends}",
            first["n"], seeds, f"{first['epochs']} epochs", command,
        )  # fmt: skip
