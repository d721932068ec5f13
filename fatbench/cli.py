"""The command line: parse, call, print. Heavy imports wait until a command needs them.

Exit codes: 0 done, 1 a run failed, 2 refused (one line: what, why, what to do), 130 interrupted and resumable.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

from fatbench import __version__
from fatbench.commands import boards, known, many, one
from fatbench.console import speaks
from fatbench.errors import Refused, RunFailed, first_line

app = typer.Typer(
    name="fatbench",
    help="Train adversarial-training defenses by one loop, examine networks under one protocol, publish the table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fatbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    pass


# In the order in which --help lists them.
COMMANDS: tuple[Callable[..., None], ...] = (
    *(one.train, one.evaluate, one.verify, boards.leaderboard, boards.compare, boards.plot, known.list_, known.show),
    *(known.check, many.demo, many.sweep, many.status, many.job, many.reproduce),
)
for command in COMMANDS:
    app.command(name=command.__name__.rstrip("_"))(command)


def _stop(code: int, text: str) -> NoReturn:
    if speaks():
        typer.echo(f"fatbench: {' '.join(text.split())}", err=True)
    sys.exit(code)


def main() -> None:
    """The console script."""
    usage = typer.BadParameter.__mro__[2]  # ClickException, which typer vendors and does not export
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `kill`, or a scheduler at a job's end: as Ctrl-C
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into an exit code
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _stop(130, "interrupted; the same command with --resume (train), or as it was (evaluate), goes on")
    except Refused as refusal:
        _stop(2, str(refusal))
    except RunFailed as failure:
        _stop(1, str(failure))
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Exception as error:
        if isinstance(error, usage):
            _stop(2, f"{error.format_message()} (fatbench COMMAND --help)")  # type: ignore[attr-defined]
        if os.environ.get("FATBENCH_TRACEBACK"):
            raise
        _stop(1, f"this is a bug: {type(error).__name__}: {first_line(error)}; set FATBENCH_TRACEBACK=1 to see where")
    sys.exit(code if isinstance(code, int) else 0)
