"""Writes a leaderboard's faces: tables as Markdown, CSV and LaTeX, the whole as CSV, JSON and one HTML page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from fatbench import faces, page
from fatbench.beside import Line
from fatbench.files import digest, write_json, write_text
from fatbench.leaderboard import Key, board, overviews, tables
from fatbench.record import Record


def publish(records: Sequence[Record], out: Path, beside: Sequence[Line] = ()) -> dict[Key, pd.DataFrame]:
    """Writes every face into a folder, the same bytes for the same records; returns the tables."""
    whole = board(records, beside)
    made, sides = tables(whole), overviews(whole)
    index = ["# Leaderboards", "", "- [All of it on one page](index.html), as [csv](board.csv) and [json](board.json)"]
    index[-1] += "; [what the columns say](columns.md)"
    for key, table in (sides | made).items():
        name = slug(key, sides | made)
        write_text(out / f"{name}.md", faces.markdown(key, table))
        write_text(out / f"{name}.csv", faces.csv(table))
        write_text(out / f"{name}.tex", faces.latex(key, table))
        what = "rows" if key in made else "rows of all protocols and sources side by side"
        links = f"([csv]({name}.csv), [tex]({name}.tex))"
        index.append(f"- [{faces.escaped(faces.heading(key))}]({name}.md), {len(table)} {what} {links}")
    write_text(out / "board.csv", faces.csv(whole))
    write_json(out / "board.json", faces.as_json(whole))
    write_text(out / "columns.md", faces.documented(whole))
    write_text(out / "index.html", page.html(whole, records))
    write_text(out / "index.md", "\n".join(index) + "\n")
    return made


def slug(key: Key, others: Iterable[Key] = ()) -> str:
    """A table's file name; where another table's would be the same, with a hash of the whole title."""
    plain = _plain(key)
    return f"{plain}-{digest(key)[:6]}" if sum(_plain(other) == plain for other in others) > 1 else plain


def _plain(key: Key) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_" if "/" in part else "-", part) for part in key).lower()
