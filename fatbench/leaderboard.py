"""Records -> one DataFrame -> tables: one for each (dataset, norm, eps class, protocol).

Nothing else is measured: fatbench/rows.py makes the rows, fatbench/columns.py tells their columns, fatbench/publish.py
writes their faces. What others have published may stand beside (fatbench/beside.py), with its source and no rank.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from fatbench import columns, protocol
from fatbench.beside import Line
from fatbench.catalogue import family
from fatbench.errors import Refused
from fatbench.quantities import number
from fatbench.record import Record, read
from fatbench.reported import parsed
from fatbench.rows import GROUP, grouped, in_order, lines, rows

# The order of a table's rows by where they come from.
SOURCES = ("measured", "reported", "quoted", "robustbench")
Key = tuple[str, ...]


def gather(folder: Path) -> list[Record]:
    """Every record in a folder and below it, checked, in the order of their ids.

    Raises:
        Refused: no record there, one that was tampered with, or two of one id that differ.
    """
    if not folder.is_dir():
        raise Refused(f"no folder of records at {folder}: fatbench evaluate writes them, --out says where")
    records: dict[str, Record] = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith("."):
            continue
        record = read(path)
        if records.setdefault(record.id, record).hash != record.hash:
            raise Refused(f"{path}: two different records are called {record.id}: keep one")
    if not records:
        raise Refused(f"no record in {folder}: fatbench evaluate writes them, --out says where")
    return [records[ident] for ident in sorted(records)]


# ------------------------------------------------------------------------------------------------ the one frame


def board(records: Sequence[Record], beside: Sequence[Line] = ()) -> pd.DataFrame:
    """Every row of every table in a fixed order: the one frame that all faces are made of.

    Raises:
        Refused: protocols of one name and version that are not one.
    """
    _one_meaning_each(records)
    found = [_published(line) for line in beside]
    found += [row for table in grouped(lines(records), *GROUP) for row in rows(table)]
    attacks = in_order(name.removesuffix("_spread") for row in found for name in row if name.endswith("_spread"))
    for row in found:
        row["family"] = family(row["arch"])
    found.sort(key=_order)
    types = {column.name: column.dtype for column in columns.described(attacks)}
    return pd.DataFrame(found, columns=pd.Index([*types, "printed"])).astype(types)


def _published(line: Line) -> dict[str, Any]:
    """A published row in a table's columns; what its source does not tell stays unset."""
    row = {**line, "status": "done", "selection": "", "ids": ""}
    for attack, printed in line["printed"].items():
        row[attack], row[f"{attack}_spread"] = parsed(printed)
    return row


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Measured rows by rank, then the unranked, then what others published by source and robustness."""
    attacked = [row[name.removesuffix("_spread")] for name in row if name.endswith("_spread") and "clean" not in name]
    robust = row.get("worst") or min((value for value in attacked if value is not None), default=0.0)
    table = (row["dataset"], row["norm"], number(row["eps_class"]), row["protocol"])
    rank = row.get("rank", math.inf)
    return *table, SOURCES.index(row["source"]), rank, -robust, -(row.get("clean") or 0.0), row["defense"]


def tables(whole: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """(dataset, norm, eps class, protocol) -> its rows."""
    return {_key(key): _view(part) for key, part in whole.groupby(GROUP, sort=False)}


def overviews(whole: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """(dataset, norm, eps class) -> the rows of all its protocols and sources by architecture family, without ranks.

    Only where there is more than one protocol or source; the families seen under most protocols come first.
    """
    found: dict[Key, pd.DataFrame] = {}
    for key, part in whole.groupby(GROUP[:3], sort=False):
        if part["protocol"].nunique() > 1 or part["source"].nunique() > 1:
            by_family = pd.DataFrame(
                {
                    "seen": -part.groupby("family")["protocol"].transform("nunique"),
                    "family": part["family"].str.lower(),
                    "listed": part["source"] == "robustbench",
                }
            ).sort_values(["seen", "family", "listed"], kind="stable")
            found[_key(key)] = _view(part.drop(columns="rank").loc[by_family.index])
    return found


def _key(key: Any) -> Key:
    return tuple(str(part) for part in key)


def _view(part: pd.DataFrame) -> pd.DataFrame:
    """Some rows of the frame, without the attacks that none of them was examined under."""
    attacks = [name.removesuffix("_spread") for name in part.columns if name.endswith("_spread")]
    absent = [a for a in attacks if a != "clean" and part[a].isna().all()]
    unwanted = [f"{a}{end}" for a in absent for end, _ in columns.ACCURACY]
    return part.drop(columns=unwanted).reset_index(drop=True)


def as_on_the_shelf(record: Record) -> None:
    """Raises Refused of a record that bears a built-in protocol's name and did something else under it."""
    name, version = record.protocol.name, record.protocol.version
    known = protocol.load(name) if name in protocol.shelf() else None
    if known is None or known.version != version:
        return
    for attack, settings in record.protocol.attacks.items():
        for key, value in known.settings_for(attack).items():
            if settings.get(key) != value:
                raise Refused(
                    f"{record.id} calls its protocol {name} v{version}, whose {attack} has {key} {value}, and examined "
                    f"with {settings.get(key)}: its protocol must bear another name"
                )


def _one_meaning_each(records: Iterable[Record]) -> None:
    meant: dict[tuple[str, int, str], tuple[str, dict[str, Any]]] = {}
    for record in records:
        as_on_the_shelf(record)
        for attack, settings in record.protocol.attacks.items():
            key = (record.protocol.name, record.protocol.version, attack)
            first, theirs = meant.setdefault(key, (record.id, settings))
            if theirs != settings:
                raise Refused(
                    f"{first} and {record.id} mean different things by {attack} of {key[0]} v{key[1]}: their protocols "
                    "must have different names or versions to be ranked"
                )


def summary(record: Record) -> str:
    """A record in one JSON line, for scripts."""
    return json.dumps({"id": record.id, **record.result.accuracies})
