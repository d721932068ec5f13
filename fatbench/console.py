"""What a person sees while waiting: a bar with the time left on a terminal, plain lines where there is none."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


def speaks() -> bool:
    """Whether this process talks for its group: rank 0, as torchrun and SLURM number those they start."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0))) == 0


# A pipe has no width: a table that goes into one is not folded.
stdout = Console(highlight=False, width=None if sys.stdout.isatty() else 200, quiet=not speaks())
stderr = Console(stderr=True, highlight=False, quiet=not speaks())


class Waiting(Protocol):
    """A task under way."""

    def advance(self, note: str = "", left: float | None = None) -> None:
        """One unit done; `note` is what can be said of it, `left` the seconds left where they are known better."""


@contextmanager
def waiting(title: str, total: int, *, done: int = 0, every: float = 10.0) -> Iterator[Waiting]:
    """Shows `total` units of work. Without a terminal: lines, one in `every` seconds and the last."""
    if not stderr.is_terminal:
        yield _Lines(title, total, done, every)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               _Left(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done, note="", left=None)
        yield _Bar(bar, task)


class _Left(TimeRemainingColumn):
    """The time left: by the units done, or as it was said."""

    def render(self, task: Task) -> Text:
        left = task.fields["left"]
        return super().render(task) if left is None else Text(str(timedelta(seconds=round(left))))


class _Bar:
    def __init__(self, bar: Progress, task: object) -> None:
        self.bar, self.task = bar, task

    def advance(self, note: str = "", left: float | None = None) -> None:
        self.bar.update(self.task, advance=1, left=left, **({"note": note} if note else {}))  # type: ignore[arg-type]


class _Lines:
    def __init__(self, title: str, total: int, done: int, every: float) -> None:
        self.title, self.total, self.done, self.every = title, total, done, every
        self.first, self.began, self.said = done, time.monotonic(), -every

    def advance(self, note: str = "", left: float | None = None) -> None:
        self.done += 1
        spent = time.monotonic() - self.began
        if self.done < self.total and spent - self.said < self.every:
            return
        self.said = spent
        left = spent / (self.done - self.first) * (self.total - self.done) if left is None else left
        stderr.print(
            f"{self.title} {self.done}/{self.total} {note} ({left:.0f} s left)".replace("  ", " "), soft_wrap=True
        )
