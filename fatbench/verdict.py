"""What may be said of a comparison: in sentences, as Markdown tables, and as JSON."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from fatbench.compare import Comparison, Pair, differences
from fatbench.faces import escaped, title
from fatbench.standing import standing
from fatbench.stats import Paired, over_seeds

LEVEL = 0.05


def markdown(comparison: Comparison) -> str:
    """The whole comparison as text: what may be said first, then every table behind it."""
    first = comparison.contestants[0].records[0].result
    text = [f"# {' against '.join(escaped(side.name) for side in comparison.contestants)}"]
    rule = "the same" if first.data.n < first.data.of else "all"
    text.append(f"On {rule} {first.data.n} test samples of {escaped(first.data.name)}, {first.norm}, eps {first.eps}.")
    for side in comparison.contestants:
        text.append(f"- {escaped(side.name)}: {', '.join(record.id for record in side.records)}")
    for pair in comparison.pairs:
        text += [
            f"## {escaped(pair.first.name)} and {escaped(pair.second.name)}",
            *_bullets(verdict(pair, len(comparison.pairs))),
        ]
        text += [
            _grid(_measures(pair)),
            _how(pair),
            f"### The worst case class by class{', first seed of each' if pair.several else ''}",
            _grid(_classes(pair)),
        ]
    for attack, why in comparison.left_out.items():
        text.append(f"- {escaped(title(attack))} is left out: {why}")
    for side in comparison.contestants:
        text += _bullets([f"{side.name}: {sentence}" for sentence in standing(side.records[0])])
    return _joined(text)


def _bullets(sentences: list[str]) -> list[str]:
    return [f"- {escaped(sentence)}" for sentence in sentences]


def _joined(text: list[str]) -> str:
    """Blank lines between blocks, none between the bullets of a list."""
    out = text[0]
    for before, block in pairwise(text):
        out += ("\n" if before.startswith("- ") and block.startswith("- ") else "\n\n") + block
    return out + "\n"


def _grid(table: pd.DataFrame) -> str:
    shown = table.map(escaped)
    shown.columns = pd.Index([escaped(name) for name in table.columns])
    return shown.to_markdown(index=False, disable_numparse=True)


def _how(pair: Pair) -> str:
    if pair.several:
        return "Medians over seeds, in percent; differences are first minus second, in points, seed by seed."
    return (
        "`both`, `first`, `second`, `neither`: how many samples both, only the first, only the second, or neither got "
        "right. Differences are first minus second, in points, with Newcombe's paired 95 % interval; p is McNemar's "
        "exact, two-sided, of each measure alone."
    )


def _measures(pair: Pair) -> pd.DataFrame:
    return pd.DataFrame([_measure(pair, name, found) for name, found in pair.seeds.items()])


def _measure(pair: Pair, name: str, found: list[Paired]) -> dict[str, str]:
    if pair.several:
        medians = [over_seeds([100 * right[name].mean() for right in side.right]) for side in (pair.first, pair.second)]
        told = [f"{middle:.1f} ± {spread:.1f}" for middle, spread in medians]
        middle, spread = over_seeds(differences(pair, name).tolist())
        each = ", ".join(f"{100 * one.difference:+.1f} (p {p_value(one.p)})" for one in found)
        rest = {"difference": f"{middle:+.1f} ± {spread:.1f}", "seed by seed": each}
    else:
        (one,) = found
        told = [f"{100 * right / one.n:.1f}" for right in (one.both + one.first, one.both + one.second)]
        rest = {key: str(count) for key, count in one._asdict().items()}
        rest |= {"difference": points(one), "p": p_value(one.p)}
    return {"under": title(name), **dict(zip((pair.first.name, pair.second.name), told, strict=True)), **rest}


def _classes(pair: Pair) -> pd.DataFrame:
    found = pair.classes
    shown = found[["class", "n"]].astype(str)
    for side in (pair.first, pair.second):
        shown[side.name] = [f"{value:.1f}" for value in found[side.name]]
    shown["difference"] = [
        f"{d:+.1f} [{low:+.1f}, {high:+.1f}]"
        for d, low, high in zip(found["difference"], found["low"], found["high"], strict=True)
    ]
    shown["p (Holm)"] = [p_value(p) for p in found["p"]]
    return shown


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The same for machines: counts, differences and intervals as fractions of the samples."""
    return {
        "contestants": [
            {"name": side.name, "records": [r.id for r in side.records], "standing": standing(side.records[0])}
            for side in comparison.contestants
        ],
        "left_out": comparison.left_out,
        "pairs": [
            {
                "first": pair.first.name, "second": pair.second.name, "p": pair.p, "adjusted": pair.adjusted,
                "measures": {name: [_figures(found) for found in seeds] for name, seeds in pair.seeds.items()},
                "classes": pair.classes.to_dict("records"), "verdict": verdict(pair, len(comparison.pairs)),
            }
            for pair in comparison.pairs
        ],
    }  # fmt: skip


def _figures(found: Paired) -> dict[str, Any]:
    low, high = found.interval()
    return {**found._asdict(), "difference": found.difference, "low": low, "high": high, "p": found.p}


# ------------------------------------------------------------------------------------------------ in words


def verdict(pair: Pair, pairs: int) -> list[str]:
    """What may be said of two contestants, and what may not."""
    told = [_worst_case(pair, pairs)]
    if pair.several:
        given = ", ".join(f"{d:+.1f}" for d in differences(pair, "worst"))
        same = len({np.sign(d) for d in differences(pair, "worst")}) == 1
        told.append(f"Seed by seed the worst case differs by {given} points: {'one' if same else 'not one'} direction.")
    else:
        told.append("At least one side is a single training run: this does not say what another seed would give.")
    if not pair.several:
        natural = pair.seeds["clean"][0]
        told.append(f"Natural accuracy: {points(natural)}, p = {p_value(natural.p)}.")
    for side in (pair.first, pair.second):
        doubts = dict.fromkeys(warning for record in side.records for warning in record.result.warnings)
        if doubts:
            told.append(f"{side.name}'s examination warns ({next(iter(doubts))}): its robust accuracy may be too high.")
        if any(record.result.collapsed for record in side.records):
            told.append(f"{side.name} answers no better than one class for everything: its accuracy is no defense.")
    return told


def _worst_case(pair: Pair, pairs: int) -> str:
    adjusted = f", {p_value(pair.adjusted)} among {pairs} pairs (Holm)" if pairs > 1 else ""
    if pair.several:
        medians = [
            over_seeds([100 * right["worst"].mean() for right in side.right])[0] for side in (pair.first, pair.second)
        ]
        size = f"median {medians[0]:.1f} against {medians[1]:.1f} over {len(pair.seeds['worst'])} seeds"
        test, ahead = f"Welch's t over seeds p = {p_value(pair.p)}", medians[0] - medians[1]
    else:
        found = pair.seeds["worst"][0]
        size, test, ahead = points(found), f"McNemar's exact p = {p_value(pair.p)}", found.difference
    if pair.adjusted < LEVEL and ahead:
        winner, other = (pair.first, pair.second) if ahead > 0 else (pair.second, pair.first)
        who = (winner.name, other.name) if pair.several else (f"This {winner.name} network", f"this {other.name} one")
        return f"{who[0]} is more robust than {who[1]} in the worst case: {size}; {test}{adjusted}."
    missed = 100 * pair.seeds["worst"][0].detectable()
    # Without a single sample that only one got right there is nothing to reckon the power from.
    power = (
        f" On {pair.seeds['worst'][0].n} samples a true difference of less than about {missed:.1f} points is missed "
    )
    power += "more often than one time in five."
    return (
        f"{pair.first.name} and {pair.second.name} are not told apart in the worst case: {size}; {test}{adjusted}."
        f"{power if missed and not pair.several else ''}"
    )


def points(found: Paired) -> str:
    low, high = found.interval()
    return f"{100 * found.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def p_value(value: float) -> str:
    return "≤ 0.001" if value < 0.001 else f"{value:.3f}"
