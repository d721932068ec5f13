"""The board as one HTML page that needs no network: fatbench/templates/, filled with the frame and its records."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.resources import files
from typing import Any

import pandas as pd

from fatbench import faces
from fatbench.catalogue import base_of
from fatbench.files import canonical
from fatbench.record import Record

POINTS = 100  # of a training curve; a longer one is thinned out
# What a base defense and its friendly counterpart share, where both tell it.
ALIKE = ("family", "eps_train", "epochs", "selection")


def html(whole: pd.DataFrame, records: Sequence[Record]) -> str:
    """The page. Text reaches it as JSON and becomes text nodes there: no name can be markup."""
    from jinja2 import Environment, PackageLoader

    rows = [_known(row) for row in whole.to_dict("records")]
    for row in rows:
        row["table"] = faces.heading(tuple(row[part] for part in ("dataset", "norm", "eps_class", "protocol")))
    known = {
        "columns": {column.name: column.meaning for column in faces.columns_of(whole)},
        "attacks": [[attack, faces.title(attack)] for attack in faces.attacks_of(whole)],
        "rows": rows,
        "arrows": _arrows(rows),
        "records": {record.id: _detail(record) for record in records},
        "protocols": {_protocol(record): record.protocol.model_dump(mode="json") for record in records},
        "notes": faces.notes(whole.assign(notes="")),
    }
    templates = files("fatbench") / "templates"
    page = Environment(loader=PackageLoader("fatbench"), autoescape=True, keep_trailing_newline=True)
    return page.get_template("board.html").render(
        style=(templates / "board.css").read_text(encoding="utf-8"),
        script=(templates / "board.js").read_text(encoding="utf-8"),
        # Inside a script element nothing but "<" could end it.
        data=canonical(known).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"),
    )


def _known(row: dict[Any, Any]) -> dict[str, Any]:
    """A row without what nobody knows; numbers with as many digits as a reader can use."""
    printed = row.pop("printed")
    told = {str(name): value for name, value in row.items() if not pd.isna(value) and value != ""}
    told = {name: round(value, 3) if isinstance(value, float) else value for name, value in told.items()}
    return told | ({"printed": printed} if isinstance(printed, dict) else {})


def _arrows(rows: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(base, friendly) by their places: the same training and examination, but for the rule that stops early."""
    bases: dict[tuple[Any, ...], list[int]] = {}
    for at, row in enumerate(rows):
        bases.setdefault((row["table"], row["source"] == "measured", row["defense"]), []).append(at)
    return [
        (base, at)
        for at, row in enumerate(rows)
        for base in bases.get((row["table"], row["source"] == "measured", base_of(row["defense"])), ())
        if all(name not in row or rows[base].get(name, row[name]) == row[name] for name in ALIKE)
        and _parts(rows[base]) <= _parts(row)  # "beta 6" and "beta 6, tau 2"
    ]


def _parts(row: dict[str, Any]) -> set[str]:
    return {part for part in row.get("variant", "").split(", ") if part}


def _protocol(record: Record) -> str:
    return f"{record.protocol.name} v{record.protocol.version}"


def _detail(record: Record) -> dict[str, Any]:
    """What the page shows of one record; all of it is in the record's own file."""
    network, training = record.result.network, record.training
    settings = {key: value for key, value in network.settings.items() if key not in ("fields", "source")}
    run = {key: record.run[key] for key in ("device", "fatbench", "torch") if isinstance(record.run.get(key), str)}
    told: dict[str, Any] = {
        "fingerprint": network.fingerprint, "seed": network.seed, "status": network.status, "epoch": network.epoch,
        "epochs": network.epochs, "fields": network.fields, "settings": settings, "run": run, "hash": record.hash,
        "correct": record.result.correct, "n": record.result.data.n, "stages": record.result.stages,
        "checks": {name: doubt.said for name, doubt in record.result.doubts.items()},
        "warnings": record.result.warnings, "protocol": _protocol(record),
        "data": record.result.data.model_dump(mode="json", include={"name", "fingerprint", "rule", "of"}),
    }  # fmt: skip
    if training:
        told["curves"] = {name: _thinned(values) for name, values in training.curves.items()}
        told["training"] = training.model_dump(mode="json", exclude={"curves"})
    return told


def _thinned(values: Sequence[float | None]) -> list[list[float]]:
    """[epoch, value] of at most about 100 epochs, the last among them."""
    if not values:
        return []
    every = max(1, -(-len(values) // POINTS))
    kept: Iterable[int] = sorted({*range(0, len(values), every), len(values) - 1})
    return [[epoch + 1, round(value, 4)] for epoch in kept if (value := values[epoch]) is not None]
