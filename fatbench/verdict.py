"""What may be said of a comparison: in sentences, as Markdown tables, and as JSON."""

from __future__ import annotations

from itertools import pairwise
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd

from fatbench.compare import Comparison, Contestant, Pair, differences
from fatbench.faces import escaped, title
from fatbench.record import IN_BF16
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
        return (
            "Means over seeds ± their standard deviation, in percent. Differences are first minus second, in points, "
            "with a 95 % interval over seeds and samples together; p is of each measure alone, and seed by seed "
            "McNemar's exact."
        )
    return (
        "`both`, `first`, `second`, `neither`: how many samples both, only the first, only the second, or neither got "
        "right. Differences are first minus second, in points, with Newcombe's paired 95 % interval; p is McNemar's "
        "exact, two-sided, of each measure alone."
    )


def _measures(pair: Pair) -> pd.DataFrame:
    return pd.DataFrame([_measure(pair, name, found) for name, found in pair.seeds.items()])


def _measure(pair: Pair, name: str, found: list[Paired]) -> dict[str, str]:
    if pair.several:
        told = [_over_seeds(side, name) for side in (pair.first, pair.second)]
        difference = pair.contrasts[name]
        each = ", ".join(f"{100 * one.difference:+.1f} ({_p_is(one.p)})" for one in found)
        rest = {"difference": difference.told(), "p": p_value(difference.p), "seed by seed": each}
    else:
        (one,) = found
        told = [f"{100 * right / one.n:.1f}" for right in (one.both + one.first, one.both + one.second)]
        rest = {key: str(count) for key, count in one._asdict().items()}
        rest |= {"difference": points(one), "p": p_value(one.p)}
    return {"under": title(name), **dict(zip((pair.first.name, pair.second.name), told, strict=True)), **rest}


def _over_seeds(side: Contestant, measure: str) -> str:
    """`57.1 ± 0.4`; of one seed `57.1`."""
    accuracies = [100 * float(right[measure].mean()) for right in side.right]
    return f"{fmean(accuracies):.1f}" + (f" ± {over_seeds(accuracies)[1]:.1f}" if len(accuracies) > 1 else "")


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
                "contrasts": {name: found._asdict() for name, found in pair.contrasts.items()},
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
    single = [side.name for side in (pair.first, pair.second) if len(side.right) == 1]
    if not single:
        given = ", ".join(f"{d:+.1f}" for d in differences(pair, "worst"))
        same = len({np.sign(d) for d in differences(pair, "worst")}) == 1
        told.append(f"Seed by seed the worst case differs by {given} points: {'one' if same else 'not one'} direction.")
    else:
        told.append(f"{' and '.join(single)}: a single training run; this does not say what another seed would give.")
    size, p = _size(pair, "clean")
    told.append(f"Natural accuracy: {size}, {_p_is(p)}.")
    for side in (pair.first, pair.second):
        doubts = dict.fromkeys(w for record in side.records for w in record.result.warnings if w != IN_BF16)
        if doubts:
            told.append(f"{side.name}'s examination warns ({next(iter(doubts))}): its robust accuracy may be too high.")
        if any(record.result.collapsed for record in side.records):
            told.append(f"{side.name} answers no better than one class for everything: its accuracy is no defense.")
    return told


def _worst_case(pair: Pair, pairs: int) -> str:
    adjusted = f", {p_value(pair.adjusted)} among {pairs} pairs (Holm)" if pairs > 1 else ""
    size, _ = _size(pair, "worst")
    ahead = pair.contrasts["worst"].middle if pair.several else pair.seeds["worst"][0].difference
    test = ("over seeds and samples" if pair.several else "McNemar's exact") + f" {_p_is(pair.p)}"
    if pair.adjusted < LEVEL and ahead:
        winner, other = (pair.first, pair.second) if ahead > 0 else (pair.second, pair.first)
        return (
            f"{_subject(winner, 'This', 'network')} is more robust than {_subject(other, 'this', 'one')} in the worst "
            f"case: {size}; {test}{adjusted}."
        )
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


def _subject(side: Contestant, this: str, one: str) -> str:
    """A defense by its name where it has several seeds, else one network of it."""
    return side.name if len(side.right) > 1 else f"{this} {side.name} {one}"


def _size(pair: Pair, measure: str) -> tuple[str, float]:
    """(the difference in words, its p) under a measure."""
    if not pair.several:
        found = pair.seeds[measure][0]
        return points(found), found.p
    found_over = pair.contrasts[measure]
    first, second = (_over_seeds(side, measure) for side in (pair.first, pair.second))
    counts = " and ".join(str(len(side.right)) for side in (pair.first, pair.second))
    return f"{first} against {second} over {counts} seeds, {found_over.told()} points", found_over.p


def points(found: Paired) -> str:
    low, high = found.interval()
    return f"{100 * found.difference:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p_is(value: float) -> str:
    """`p = 0.048`, `p ≤ 0.001`"""
    told = p_value(value)
    return f"p {told}" if told.startswith("≤") else f"p = {told}"


def p_value(value: float) -> str:
    return "≤ 0.001" if value < 0.001 else f"{value:.3f}"
