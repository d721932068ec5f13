"""Figures 4, 5, 6 and their kin, drawn from recorded runs: medians over seeds, bands from the least to the greatest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fatbench.faces import title
from fatbench.paper.contestants import Contestant
from fatbench.paper.experiment import STEPS, Experiment
from fatbench.paper.pool import Pool, Seeds
from fatbench.plots import STYLE, median_curve, styles
from fatbench.quantities import number

Drawn = Iterator[tuple[str, Figure]]
Line = list[tuple[float, Seeds]]


def figures(name: str, experiment: Experiment, pool: Pool) -> Drawn:
    """(file's name, figure) of whatever is recorded of an experiment; nothing of one that is a table."""
    known: Mapping[str, Callable[..., Drawn]] = {"fig4": _over_tau, "fig5": _over_epochs, "cost": _over_cost}
    swept = _over_sweep if name.startswith("fig") else None
    if draw := known.get(name, swept):
        with rc_context(STYLE):
            yield from draw(name, experiment, pool)


def _recorded(experiment: Experiment, pool: Pool, epochs: int, attacks: Sequence[str] | None = None) -> list[Seeds]:
    """Who was examined under the attacks, the experiment's own unless given."""
    whom = [one for one in experiment.everybody(pool.world) if one.epochs == epochs]
    found = [pool.of(one, experiment.under(pool.world) if attacks is None else attacks) for one in whom]
    return [one for one in found if one]


def _over_tau(name: str, experiment: Experiment, pool: Pool) -> Drawn:
    """Natural and robust accuracy against tau, a panel a budget."""
    budgets = [e for e in experiment.budgets(pool.world) if _recorded(experiment, pool, e)]
    if not budgets:
        return
    figure, axes = _panels(len(budgets), f"{experiment.place}: FAT on {pool.world.title}, eps {pool.world.eps}")
    for axis, epochs in zip(axes, budgets, strict=True):
        line = [(_field(s.contestant, "tau"), s) for s in _recorded(experiment, pool, epochs)]
        for measure, style in zip(("clean", "pgd-20", "cw-inf"), styles(), strict=False):
            _banded(axis, line, measure, label=title(measure), **style)
        axis.set(xlabel="tau", ylabel="accuracy, %", ylim=(0, 100))
        axis.set_title(f"{epochs} epochs", fontsize=8, loc="left")
    _legend(figure, axes)
    yield name, figure


def _over_epochs(name: str, experiment: Experiment, pool: Pool) -> Drawn:
    """Attack steps an example over the epochs, a panel a defense and budget; the dashed line is K."""
    for epochs in experiment.budgets(pool.world):
        sides = [one for one in _recorded(experiment, pool, epochs, ()) if one.curves("steps_per_example")]
        defenses = list(dict.fromkeys(side.contestant.defense for side in sides))
        if not sides:
            continue
        told = f"{experiment.place}: {pool.world.title}, eps {pool.world.eps}, {epochs} epochs"
        taus = sorted({_field(side.contestant, "tau") for side in sides})
        look = dict(zip(taus, styles(), strict=False))  # a tau looks the same in every panel: there is one legend
        figure, axes = _panels(len(defenses), told)
        for axis, defense in zip(axes, defenses, strict=True):
            for side in (side for side in sides if side.contestant.defense == defense):
                x, y = median_curve(side.curves("steps_per_example"))
                tau = _field(side.contestant, "tau")
                axis.plot(x, y, label=f"tau {tau:g}", markevery=max(1, len(x) // 8), **look[tau])
            axis.axhline(STEPS, color="black", linestyle="--", linewidth=0.8)
            axis.set(xlabel="epoch", ylabel="attack steps an example", ylim=(0, STEPS + 0.5))
            axis.set_title(defense, fontsize=8, loc="left")
        _legend(figure, axes)
        yield f"{name}-{epochs}", figure


def _over_sweep(name: str, experiment: Experiment, pool: Pool) -> Drawn:
    """Accuracies against eps_train, or against the step size, a panel a measure, a figure a budget."""
    for epochs in experiment.budgets(pool.world):
        sides = _recorded(experiment, pool, epochs)
        if not sides:
            continue
        free = any(key == "project" for key, _ in sides[0].contestant.fields)
        lines: dict[str, Line] = {}
        for side in sides:
            at = _field(side.contestant, "step_size") if free else number(side.contestant.eps)
            lines.setdefault(side.contestant.name, []).append((at, side))
        measures = ["clean", "pgd-20", "cw-inf", *(a for a in experiment.under(pool.world) if "@" in a)]
        told = f"{experiment.place}: {experiment.summary}; {pool.world.title}, eps {pool.world.eps}, {epochs} epochs"
        figure, axes = _panels(len(measures), told, wide=0.75)
        for axis, measure in zip(axes, measures, strict=True):
            for (label, line), style in zip(lines.items(), styles(), strict=False):
                _banded(axis, line, measure, label=label, **style)
            axis.set(xlabel="step size" if free else "eps of training", ylim=(0, 100))
            axis.set_title(title(measure), fontsize=8, loc="left")
        axes[0].set_ylabel("accuracy, %")
        _legend(figure, axes)
        yield f"{name}-{epochs}", figure


def _over_cost(name: str, experiment: Experiment, pool: Pool) -> Drawn:
    """Natural accuracy and that under AutoAttack against backward passes; a point for each number of epochs."""
    sides = [one for epochs in pool.world.budgets for one in _recorded(experiment, pool, epochs)]
    lines: dict[str, Line] = {}
    for side in sides:
        if passes := side.passes():
            lines.setdefault(side.contestant.name, []).append((fmean(passes), side))
    if not lines:
        return
    figure, axes = _panels(2, f"{experiment.summary}; {pool.world.title}, eps {pool.world.eps}")
    for axis, measure in zip(axes, ("clean", "autoattack"), strict=True):
        for (label, line), style in zip(lines.items(), styles(), strict=False):
            _banded(axis, sorted(line, key=lambda point: point[0]), measure, label=label, **style)
        axis.set(xlabel="backward passes an example, over the training", ylabel="accuracy, %")
        axis.set_title(title(measure), fontsize=8, loc="left")
    _legend(figure, axes)
    yield name, figure


def _field(contestant: Contestant, key: str) -> float:
    return number(str(dict(contestant.fields)[key]))


def _banded(axis: Axes, line: Line, measure: str, **style: Any) -> None:
    """The median over seeds, and a band from the least to the greatest."""
    each = [side.accuracies(measure) for _, side in line]
    x = [at for at, _ in line]
    axis.plot(x, [median(values) for values in each], **style)
    axis.fill_between(x, [min(v) for v in each], [max(v) for v in each], color=style["color"], alpha=0.15, linewidth=0)


def _panels(count: int, said: str, wide: float = 1.0) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.2 * wide * count + 0.6, 3.6))
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.suptitle(said, fontsize=9)
    return figure, list(axes)


def _legend(figure: Figure, axes: list[Axes]) -> None:
    """One for all panels; what several of them show stands in it once."""
    shown = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(6, len(shown)), fontsize=8)
