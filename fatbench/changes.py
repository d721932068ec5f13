"""What changed between two states of a board: rows that came, went, or say something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fatbench import faces
from fatbench.errors import Refused
from fatbench.files import read_json
from fatbench.leaderboard import board, gather

# What a row is; everything else is what it says.
IS = (
    "dataset", "norm", "eps_class", "protocol", "source", "defense", "variant", "arch", "data", "eps", "eps_train",
    "epochs", "selection", "reference",
)  # fmt: skip
# Follows from the rest, or is told at length elsewhere.
PASSED_OVER = ("ids", "notes", "family")
Row = dict[str, Any]


def diff(old: Path, new: Path) -> list[str]:
    """Lines `+` for rows that came, `-` for those that went, `~` for those that changed, and how.

    Args:
        old, new: A board.json, a folder that holds one, or a folder of records. Records hold measured rows alone: where
            one side is such, what others published is left out of the other.
    """
    before, after = _rows(old), _rows(new)
    if _of_records(old) or _of_records(new):
        before, after = (
            {key: row for key, row in rows.items() if row["source"] == "measured"} for rows in (before, after)
        )
    lines = [f"- {_called(row)}" for key, row in before.items() if key not in after]
    for key, row in after.items():
        if key not in before:
            lines.append(f"+ {_called(row)}")
        elif changed := _changed(before[key], row):
            lines.append(f"~ {_called(row)}: {', '.join(changed)}")
    return lines


def _of_records(path: Path) -> bool:
    return path.is_dir() and not (path / "board.json").exists()


def _rows(path: Path) -> dict[tuple[Any, ...], Row]:
    told = path / "board.json" if path.is_dir() else path
    if _of_records(path):
        rows = faces.as_json(board(gather(path)))["rows"]
    else:
        said = read_json(told, "board.json")
        rows = said.get("rows") if isinstance(said, dict) and said.get("schema") == faces.SCHEMA else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "dataset" in row for row in rows):
            raise Refused(f"{told} is no board.json of schema {faces.SCHEMA}: fatbench leaderboard writes one")
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row.get(name) for name in IS)
        again = sum(other[:-1] == key for other in found)  # rows that nothing tells apart keep their order
        found[(*key, again)] = row
    return found


def _called(row: Row) -> str:
    place = faces.heading(tuple(str(row.get(part)) for part in IS[:4]))
    more = [f"trained at {row['eps_train']}"] if row.get("eps_train") else []
    more += [f"{row['epochs']} epochs"] if row.get("epochs") else []
    more += ["best epoch"] if row.get("selection") == "best" else []
    return f"{place}: {faces.named(row)} ({', '.join([str(row.get('arch')), *more, str(row.get('source'))])})"


def _changed(before: Row, after: Row) -> list[str]:
    names = [name for name in dict.fromkeys([*before, *after]) if name not in (*IS, *PASSED_OVER)]
    return [
        f"{name} {_value(before.get(name))} -> {_value(after.get(name))}"
        for name in names
        if before.get(name) != after.get(name)
    ]


def _value(value: object) -> str:
    return "unknown" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
