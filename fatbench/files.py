"""Files that survive a kill: whole or absent, never half; and hashes of what they hold."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fatbench.errors import Refused, first_line


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


@contextlib.contextmanager
def disk(path: Path) -> Iterator[None]:
    """Turns what a disk may answer (full, read-only, not allowed) into one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or first_line(error)
        raise Refused(f"cannot write {path}: {reason}; what was there before is untouched") from error


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Lets `write` fill a neighbour of `path`, then moves it into place in one step.

    Raises:
        Refused: the disk refused; `path` is as it was, and the neighbour is gone.
    """
    neighbour = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(neighbour)
            with neighbour.open("rb") as written:
                os.fsync(written.fileno())
            neighbour.replace(path)
        finally:
            neighbour.unlink(missing_ok=True)


# Seconds. Whoever only asks whether a lock is held, `fatbench status`, holds it for less.
MOMENT = 0.5


@contextlib.contextmanager
def locked(path: Path, where: str) -> Iterator[None]:
    """Holds a lock file; a killed process lets go of it. Clears what killed writers left beside it.

    Raises:
        Refused: another process holds it.
    """
    lock = FileLock(path)
    with disk(path):
        try:
            lock.acquire(timeout=MOMENT)
        except Timeout:  # an OSError, but no fault of the disk's
            raise Refused(f"another process is at work {where}: wait for it, or choose another --out") from None
    try:
        for left in path.parent.glob(f"{path.name.removesuffix('lock')}*.tmp"):
            left.unlink(missing_ok=True)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: later it may be the next holder's
        lock.release()


def write_text(path: Path, text: str) -> None:
    write_atomic(path, lambda to: to.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def append_line(path: Path, value: Any) -> None:
    """Adds one JSON line and sees it on the disk; a line that did not fit is taken back."""
    line = (json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n").encode()
    # Unbuffered: what a failed write leaves in a buffer would be written after all when the file is closed.
    with disk(path), path.open("ab", buffering=0) as log:
        end = log.tell()
        try:
            while line:  # a full disk takes a part, and says why at the next
                line = line[log.write(line) :]
            os.fsync(log.fileno())
        except OSError:
            os.truncate(path, end)
            raise


def head(path: Path, n: int) -> bytes:
    """The first bytes of a file, however long it is."""
    with path.open("rb") as file:
        return file.read(n)


def read_json(path: Path, what: str) -> Any:
    """Raises Refused, naming the file, where there is none or it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Refused(f"no {what} at {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is no {what}: {first_line(error)}") from None


def read_lines(path: Path) -> list[Any]:
    """The JSON lines of a log; a last line cut off by a kill is left out."""
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries
