"""What records say: leaderboard, compare, plot."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fatbench.commands.options import Out
from fatbench.errors import Refused

if TYPE_CHECKING:
    import pandas as pd


def leaderboard(
    context: typer.Context,
    asked: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECORDS | check FILE... | diff OLD NEW]", help="A folder; ./records unless given."),
    ] = None,
    out: Out = Path("board"),
    beside: Annotated[
        str | None,
        typer.Option("--with", metavar="SOURCES", help="Published rows beside ours: reported,robustbench."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="check: the records that are on the board already.")] = None,
) -> None:
    """Derive the tables from records: one for each dataset, norm, eps class and protocol.

    `check FILE...` looks through outside records and says what is wrong or missing; `diff OLD NEW` tells what changed
    between two boards.
    """
    words = asked or []
    what = words[0] if words[:1] in (["check"], ["diff"]) else "the board"
    for option, takes in {"out": ["the board"], "beside": ["the board"], "against": ["check"]}.items():
        if what not in takes and (source := context.get_parameter_source(option)) and source.name == "COMMANDLINE":
            name = {"beside": "with"}.get(option, option)
            raise Refused(f"--{name} is not for {what}, but for {takes[0]}: leave it out")
    if words[:1] == ["check"]:
        _check_submission([Path(word) for word in words[1:]], against)
    elif words[:1] == ["diff"]:
        _diff_boards(words[1:])
    elif len(words) > 1:
        raise Refused(f"leaderboard takes one folder of records, not {len(words)}; or check FILE..., or diff OLD NEW")
    else:
        derive(Path(words[0]) if words else None, out, beside)


def derive(records: Path | None, out: Path, beside: str | None) -> None:
    """Writes a board and prints its measured tables."""
    from fatbench import beside as published
    from fatbench import faces
    from fatbench import leaderboard as boards
    from fatbench.publish import publish

    others = published.lines([name.strip() for name in (beside or "").split(",") if name.strip()])
    folder = records or Path("records")
    # With published rows a board may do without records; a folder that was named must hold some all the same.
    found = [] if others and not records and not folder.is_dir() else boards.gather(folder)
    for key, table in publish(found, out, others).items():
        if (table["source"] == "measured").any():
            print_table(key, table)
        else:
            typer.echo(f"{faces.heading(key)}: {len(table)} published rows, none measured")
    typer.echo(f"written: {out / 'index.md'} and {out / 'index.html'}")


def _check_submission(paths: list[Path], against: Path | None) -> None:
    from fatbench.leaderboard import gather
    from fatbench.submission import check

    findings = check(paths, gather(against) if against else ())
    for finding in findings:
        typer.echo("\n".join(finding.lines()))
    refused = sum(bool(finding.refused) for finding in findings)
    if refused:
        raise Refused(f"{refused} of {len(findings)} records cannot go on a board")


def _diff_boards(paths: list[str]) -> None:
    from fatbench.changes import diff

    if len(paths) != 2:
        raise Refused("leaderboard diff takes two boards: diff OLD NEW, each a board.json or its folder")
    lines = diff(Path(paths[0]), Path(paths[1]))
    typer.echo("\n".join(lines) or "no row differs")


def compare(
    contestants: Annotated[
        list[str], typer.Argument(metavar="A B [C ...]", help="Records: paths or ids; seeds of one joined by commas.")
    ],
    records: Annotated[Path, typer.Option("--records", help="Where ids are looked for.")] = Path("records"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say whether contestants differ: on the same samples, by paired tests, per attack and class, over seeds."""
    import json

    from fatbench import compare as pairs
    from fatbench import verdict

    compared = pairs.compare([pairs.find(text, records) for text in contestants])
    typer.echo(json.dumps(verdict.as_json(compared), indent=1) if as_json else verdict.markdown(compared), nl=as_json)


def plot(
    records: Annotated[Path, typer.Argument(help="A folder of records.")] = Path("records"),
    out: Out = Path("plots"),
    kinds: Annotated[str | None, typer.Option("--kinds", help="curves,eps,tau,classes; all unless given.")] = None,
) -> None:
    """Draw records as PNG and SVG: training curves, robustness against eps, the tau trade-off, classes."""
    from fatbench import plots
    from fatbench.leaderboard import gather

    asked = [kind.strip() for kind in (kinds or "").split(",") if kind.strip()]
    for path in plots.draw(gather(records), records, out, asked):
        typer.echo(path)


def print_table(key: tuple[str, ...], table: pd.DataFrame) -> None:
    """A table as a terminal shows it, with its notes."""
    from rich.markup import escape
    from rich.table import Table

    from fatbench import faces
    from fatbench.console import stdout

    shown, said = faces.folded(faces.cells(table, brief=True))  # a terminal is narrow
    printed = Table(
        title=escape(faces.heading(key)), title_justify="left", caption=escape(said), caption_justify="left"
    )
    for column in shown.columns:
        printed.add_column(escape(column), justify="left" if column in ("defense", "network") else "right")
    for row in shown.itertuples(index=False):
        printed.add_row(*(escape(str(cell)) for cell in row))
    stdout.print(printed)
    for note in faces.notes(table, brief=True):
        stdout.print(escape(note), soft_wrap=True)
