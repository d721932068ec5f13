"""The columns of the leaderboard's one frame: names, types and what they mean. Every face is made of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Column(NamedTuple):
    """One column: its pandas type, and what it says; an empty cell is what nobody knows or what was not done."""

    name: str
    dtype: str
    meaning: str


def _columns(dtype: str, **meanings: str) -> tuple[Column, ...]:
    return tuple(Column(name, dtype, meaning) for name, meaning in meanings.items())


GROUP = _columns(
    "string",
    dataset="the test data; two files of one name are told apart by their hash",
    norm="of the perturbation",
    eps_class="budgets that one table compares: 8/255 holds 0.031",
    protocol="name and version",
)
HEAD = (
    *GROUP,
    Column("rank", "Int64", "1 + the measured rows of the same table whose worst-case interval lies wholly above"),
    *_columns(
        "string",
        source="measured here, reported by a paper, quoted by it from another, or listed by robustbench",
        defense="registered name, network where that is not known, or RobustBench's id",
        variant="what sets it apart from others of its defense: beta, and settings that differ between such rows",
        arch="the network",
        family="networks that are one bear one name",
        data="what it was trained on",
        eps="budget of the attacks, as published",
        eps_train="budget of training, as published",
    ),
    Column("epochs", "Int64", "of training"),
    Column("selection", "string", "last epoch, or best on the validation split"),
    Column("n", "Int64", "test examples"),
    Column("seeds", "Int64", "training runs behind the row that came to their end"),
    Column("failed", "Int64", "training runs that failed or are unfinished"),
    Column("status", "string", "done, or why there is no number"),
)
# Four columns for natural accuracy, for each attack, and for the worst of them all.
ACCURACY = (
    ("", "accuracy in percent; the median over seeds"),
    ("_spread", "standard deviation over seeds (n - 1), in points; 0 of one seed"),
    ("_low", "lower end of Wilson's 95 % interval over the n test examples, in percent"),
    ("_high", "upper end"),
)
TAIL = (
    Column(
        "best_known",
        "Float64",
        "the least worst case of the same networks on the same images at this budget, under any protocol's or outside "
        "attacks among the records; the median over seeds",
    ),
    Column("pgd_gap", "Float64", "PGD-20 minus AutoAttack, in points; the median over seeds"),
    Column("masking", "string", "what the checks for masked gradients say: suspected (and by which), or no sign"),
    Column("best_minus_last", "Float64", "worst case of the best epoch minus that of the last, in points: overfitting"),
    Column("backwards_per_example", "Float64", "gradients that crafting took, a training example and epoch"),
    Column("train_seconds", "Float64", "of the whole training; the median over seeds"),
    *_columns(
        "string",
        crafted_in="what attacks were made in; every success counts in float32 alone",
        train_device="what it was trained on",
        notes="warnings of the examination, or what is to be known of a printed number",
        reference="where a published row stands",
        ids="the records behind a measured row",
    ),
)


def described(attacks: Iterable[str]) -> list[Column]:
    """Every column of a frame with these attacks, in order."""
    accuracies = [
        Column(f"{attack}{end}", "Float64", f"{attack}: {meaning}")
        for attack in ("clean", *attacks, "worst")
        for end, meaning in ACCURACY
    ]
    return [*HEAD, *accuracies, *TAIL]
