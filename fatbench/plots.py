"""Figures of records, as PNG and SVG: training curves, robustness against eps, the tau trade-off, classes.

Readable in print and without colour: every line has a marker and a dash of its own beside Okabe and Ito's colours. The
same records give the same bytes with the same matplotlib: no date, no random id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fatbench import faces
from fatbench.compare import held
from fatbench.errors import Refused, unknown
from fatbench.files import canonical, write_atomic
from fatbench.leaderboard import board, tables
from fatbench.publish import slug
from fatbench.quantities import number
from fatbench.recipe import shared
from fatbench.record import Record, read_outcomes

# Okabe and Ito, without the yellow that paper swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "xxx", "++", "\\\\\\", "ooo")
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "fatbench", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.dpi": 200,
}  # fmt: skip
# curve, factor, label, whose examples
CURVES = (
    ("val_natural", 100, "natural accuracy, %", "validation"),
    ("val_pgd-10", 100, "accuracy under PGD-10, %", "validation"),
    ("steps_per_example", 1, "attack steps an example", "training"),
)
MOST = 7  # bars side by side in one figure of classes

Drawn = Iterator[tuple[str, Figure]]


def draw(records: Sequence[Record], folder: Path, out: Path, kinds: Sequence[str] = ()) -> list[Path]:
    """Draws every kind of figure that the records have something for; returns the files.

    Args:
        records: What `gather` found in `folder`.
        kinds: curves, eps, tau, classes; all unless given.

    Raises:
        Refused: an unknown kind, or nothing to draw.
    """
    known: dict[str, Callable[[], Drawn]] = {
        "curves": partial(curves, records), "eps": partial(against_eps, records), "tau": partial(trade_off, records),
        "classes": partial(classes, records, folder),
    }  # fmt: skip
    for kind in kinds:
        if kind not in known:
            raise unknown("kind of figure", kind, known)
    written = []
    with rc_context(STYLE):
        for kind in kinds or known:
            for name, figure in known[kind]():
                written += save(figure, out / f"{kind}-{name}")
    if not written:
        wanted = ", ".join(kinds or known)
        raise Refused(f"nothing to draw for {wanted}: no record has training curves, several eps or tau, or outcomes")
    return written


def save(figure: Figure, path: Path) -> list[Path]:
    paths = [path.with_name(f"{path.name}.{form}") for form in ("png", "svg")]
    for target, metadata in zip(paths, ({"Software": None}, {"Date": None, "Creator": None}), strict=True):
        write_atomic(target, partial(figure.savefig, format=target.suffix[1:], metadata=metadata))
    return paths


@contextmanager
def _figure(title: str, columns: int = 1, wide: float = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with its axes, and a legend under them where there is anything to tell apart."""
    figure = Figure(figsize=(4.2 * columns * wide + 0.6, 3.6))
    axes = list(np.atleast_1d(figure.subplots(1, columns)))
    figure.suptitle(plain(title), fontsize=9)
    yield figure, axes
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        fit = figure.get_figwidth() / (0.45 + 0.075 * max(map(len, labels)))  # inches of 8-point text
        figure.set_figheight(3.6 + 0.17 * -(-len(labels) // max(1, int(fit))))
        figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(fit)), fontsize=8)


def plain(text: object) -> str:
    """A name as it is: matplotlib would read mathematics between dollar signs."""
    return str(text).replace("$", r"\$")


def styles() -> Iterator[dict[str, Any]]:
    dashes = cycle(dash for dash in DASHES for _ in COLOURS)
    for colour, marker, dash in zip(cycle(COLOURS), cycle(MARKERS), dashes, strict=False):
        yield {"color": colour, "marker": marker, "linestyle": dash, "markersize": 4, "linewidth": 1.3}


def _rows(records: Sequence[Record]) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The measured rows of each table that came to their end; `ids` of the seeds that did."""
    ended = {r.id for r in records if r.result.network.status == "done" and not r.result.collapsed}
    made = {}
    for key, table in tables(board(records)).items():
        rows = [{str(k): v for k, v in row.items()} for row in table[table["status"] == "done"].to_dict("records")]
        made[key] = [{**row, "ids": [one for one in row["ids"].split() if one in ended]} for row in rows]
    return made


# What sets rows apart that their defense and its fields do not, and how a name says it.
APART = {"eps_train": "eps {}", "epochs": "{} epochs", "arch": "{}", "selection": "{}"}


def _names(rows: list[dict[str, Any]], *apart: str) -> list[str]:
    """A name for each row: its defense, and of what is to be told apart that in which others of its name differ."""
    names = [faces.named(row) for row in rows]
    for column in apart or APART:
        told = ["" if pd.isna(row[column]) else APART[column].format(row[column]) for row in rows]
        seen: dict[str, set[str]] = {}
        for name, one in zip(names, told, strict=True):
            seen.setdefault(name, set()).add(one)
        names = [
            f"{name}, {one}" if one and len(seen[name]) > 1 else name for name, one in zip(names, told, strict=True)
        ]
    return names


# ------------------------------------------------------------------------------------------------ training curves


def curves(records: Sequence[Record]) -> Drawn:
    """Validation accuracy and attack steps an example over the epochs: the median over seeds."""
    known = {record.id: record.training.curves for record in records if record.training and record.training.curves}
    for key, rows in _rows(records).items():
        told = {
            name: [known[i] for i in row["ids"] if i in known] for name, row in zip(_names(rows), rows, strict=True)
        }
        told = {name: seeds for name, seeds in told.items() if seeds}
        if not told:
            continue
        with _figure(faces.heading(key), 3) as (figure, axes):
            for (name, seeds), style in zip(told.items(), styles(), strict=False):
                for axis, (curve, factor, _, _) in zip(axes, CURVES, strict=True):
                    x, y = median_curve([seed.get(curve, []) for seed in seeds])
                    axis.plot(x, factor * y, label=plain(name), markevery=max(1, len(x) // 8), **style)
            for axis, (_, _, label, split) in zip(axes, CURVES, strict=True):
                axis.set(xlabel="epoch", ylabel=label, ylim=(0, None))
                axis.set_title(split, fontsize=8, loc="left")
        yield slug(key), figure


def median_curve(seeds: Sequence[Sequence[float | None]]) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, values): the median of those seeds that have a value there."""
    longest = max((len(values) for values in seeds), default=0)
    at = [[values[e] for values in seeds if e < len(values) and values[e] is not None] for e in range(longest)]
    known = [epoch for epoch, values in enumerate(at) if values]
    return np.array(known) + 1, np.array([median(v for v in at[epoch] if v is not None) for epoch in known])


# ------------------------------------------------------------------------------------------------ eps and tau


def against_eps(records: Sequence[Record]) -> Drawn:
    """Worst-case accuracy against the budget of the attacks, of one training at several budgets, or trained at each."""
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for (dataset, norm, _, protocol), rows in _rows(records).items():
        found.setdefault((dataset, norm, protocol), []).extend(rows)
    for key, rows in found.items():
        named: dict[str, list[dict[str, Any]]] = {}
        for name, row in zip(_names(rows, "epochs", "arch", "selection"), rows, strict=True):
            named.setdefault(f"{name}, trained at {row['eps_train'] or 'no eps'}", []).append(row)
            if row["eps_train"] == row["eps"]:
                named.setdefault(f"{name}, trained at each eps", []).append(row)
        several = {name: rows for name, rows in named.items() if len({row["eps"] for row in rows}) > 1}
        if not several:
            continue
        with _figure(", ".join(key), wide=1.4) as (figure, (axis,)):
            for (name, rows), style in zip(several.items(), styles(), strict=False):
                rows.sort(key=lambda row: number(row["eps"]))
                _bars(axis, [number(row["eps"]) for row in rows], rows, "worst", label=plain(name), **style)
            axis.set(xlabel="eps of the attacks, in pixel units", ylabel="worst-case accuracy, %", ylim=(0, None))
            budgets = {row["eps_class"]: number(row["eps"]) for rows in several.values() for row in rows}
            axis.set_xticks(list(budgets.values()), list(budgets))
        yield slug(key), figure


def trade_off(records: Sequence[Record]) -> Drawn:
    """Natural and worst-case accuracy against a constant tau, of one friendly defense trained with several."""
    networks = {record.id: record.result.network for record in records}
    for key, rows in _rows(records).items():
        lines: dict[str, list[tuple[int, dict[str, Any]]]] = {}
        for row in rows:
            network = networks[row["ids"][0]]
            tau, others = network.fields.get("tau"), {k: v for k, v in network.fields.items() if k != "tau"}
            if isinstance(tau, int):
                said = {**shared(network.settings), "fields": others}
                lines.setdefault(canonical([said, *(row[column] for column in APART)]), []).append((tau, row))
        several = [found for found in lines.values() if len({tau for tau, _ in found}) > 1]
        names = _names([{**found[0][1], "variant": ""} for found in several])
        for number_, (name, found) in enumerate(zip(names, several, strict=True)):
            found.sort(key=lambda pair: pair[0])
            with _figure(f"{name}, {faces.heading(key)}") as (figure, (axis,)):
                for measure, label, style in zip(("clean", "worst"), ("natural", "worst case"), styles(), strict=False):
                    _bars(axis, [tau for tau, _ in found], [row for _, row in found], measure, label=label, **style)
                axis.set(xlabel="tau", ylabel="accuracy, %", ylim=(0, 100), xticks=sorted({tau for tau, _ in found}))
            again = f"-{number_ + 1}" if names.count(name) > 1 else ""  # other fields of theirs differ
            yield slug((name, *key)) + again, figure


def _bars(axis: Axes, x: list[Any], rows: list[dict[str, Any]], measure: str, **style: Any) -> None:
    y = np.array([row[measure] for row in rows], dtype=float)
    low = y - np.array([row[f"{measure}_low"] for row in rows], dtype=float)
    high = np.array([row[f"{measure}_high"] for row in rows], dtype=float) - y
    # Wilson's interval is about the nearest count, which the median of an even number of seeds need not be.
    axis.errorbar(x, y, yerr=[np.maximum(low, 0), np.maximum(high, 0)], capsize=2.5, elinewidth=0.8, **style)


# ------------------------------------------------------------------------------------------------ classes


def classes(records: Sequence[Record], folder: Path) -> Drawn:
    """Worst-case accuracy class by class, of a table's first rows; the median over seeds."""
    known = {record.id: record for record in records}
    paths = {path.stem: path for path in sorted(folder.rglob("*.parquet"))}
    for key, rows in _rows(records).items():
        shown = [row for row in rows if not pd.isna(row["rank"])][:MOST]
        if not shown:
            continue
        shares = [_by_class([(known[i], paths[i]) for i in row["ids"]]) for row in shown]
        with _figure(f"{faces.heading(key)}: worst case by class", wide=2) as (figure, (axis,)):
            _side_by_side(axis, shares, [plain(name) for name in _names(shown)])
        yield slug(key), figure


def _by_class(seeds: list[tuple[Record, Path]]) -> pd.Series:
    """The share of each class that no attack broke, in percent: the median over seeds."""
    each = []
    for record, path in seeds:
        outcomes = read_outcomes(path)
        each.append(100 * held(record, outcomes, record.attacks)["worst"].groupby(outcomes["label"]).mean())
    return pd.concat(each, axis=1).median(axis=1)


def _side_by_side(axis: Axes, shares: list[pd.Series], names: list[str]) -> None:
    width = 0.85 / len(shares)
    for at, (share, name, style) in enumerate(zip(shares, names, styles(), strict=False)):
        place = np.arange(len(share)) + (at - (len(shares) - 1) / 2) * width
        hatch = HATCHES[at % len(HATCHES)]
        axis.bar(place, share, width, label=name, color=style["color"], hatch=hatch, edgecolor="white", linewidth=0.3)
    labels = list(shares[0].index)
    axis.set(xlabel="class", ylabel="worst-case accuracy, %", xticks=np.arange(len(labels)), xticklabels=labels)
    axis.grid(axis="x", visible=False)
