"""Where a record would stand on RobustBench's published board: the k-th of n, the slice named."""

from __future__ import annotations

from fatbench import robustbench
from fatbench.catalogue import family
from fatbench.quantities import eps_class
from fatbench.record import Record
from fatbench.stats import wilson


def standing(record: Record) -> list[str]:
    """Sentences on its place among all listed models, and among those of its architecture; none where no board fits.

    A board fits data of its name, l-inf at its eps class, under AutoAttack's standard version, carried out whole.

    Raises:
        Refused: robustbench's boards cannot be read.
    """
    result = record.result
    said = record.protocol.attacks.get("autoattack", {})
    if said.get("version") != "standard" or "standing_after" in said or "autoattack" not in result.correct:
        return []
    if result.bound:
        return []
    board = [
        model
        for model in robustbench.published()
        if (model.dataset, model.norm, eps_class(model.eps)) == (result.data.name, result.norm, eps_class(result.eps))
    ]
    if not board:
        return []
    kind = family(result.network.arch)
    alike = [model for model in board if family(model.arch) == kind]
    name = f"RobustBench's {board[0].dataset} {board[0].norm} board at {board[0].eps}"
    told = [f"It would stand {_place(record, board)} on {name}, of the models that come with its package"]
    told += [f"and {_place(record, alike)} among those with its architecture ({kind})"] if alike else []
    sentence = ", ".join(told) + "."
    if result.data.n < result.data.of:
        sentence += f" It was examined on {result.data.n} of {result.data.of} samples, the board's models on all."
    if result.eps != board[0].eps:
        sentence += f" It was attacked at {result.eps}."
    return [sentence]


def _place(record: Record, board: list[robustbench.Listed]) -> str:
    """`12th of 77 (9th to 15th at 95 %)`: one more than are listed above it, among the listed and itself."""
    right, n = record.result.correct["autoattack"], record.result.data.n
    low, high = wilson(right, n)
    at, best, worst = (1 + sum(float(m.robust) > 100 * share for m in board) for share in (right / n, high, low))
    return f"{_ordinal(at)} of {len(board) + 1} ({_ordinal(best)} to {_ordinal(worst)} at 95 %)"


def _ordinal(place: int) -> str:
    """
    >>> [_ordinal(k) for k in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)]
    ['1st', '2nd', '3rd', '4th', '11th', '12th', '13th', '21st', '102nd', '111th']
    """
    ending = "th" if 10 <= place % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(place % 10, "th")
    return f"{place}{ending}"
