"""How fatbench says no: one line that tells what, why and what to do, and an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class Refused(Exception):
    """The request cannot honestly be carried out; nothing was written or lost. Exit code 2."""


class Unknown(Refused, KeyError):
    """A name that nobody has; a KeyError too, so that a registry is a proper mapping."""

    __str__ = Exception.__str__  # KeyError's own would put it in quotes


class RunFailed(Exception):
    """A run was carried out and failed, by a loss that is not finite, say. Exit code 1."""


def first_line(error: BaseException) -> str:
    """What an exception says, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def unknown(kind: str, name: str, known: Iterable[str], listed_by: str = "") -> Unknown:
    """The refusal of a name nobody knows, with the closest that exist, and all of them or the command that lists them.

    >>> str(unknown("defense", "trade", ["trades", "mart"]))
    "unknown defense 'trade': did you mean trades? (known: mart, trades)"
    """
    known = sorted(known)
    close = get_close_matches(name.lower().replace("_", "-"), known, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(close)}?" if close else ""
    return Unknown(f"unknown {kind} {name!r}{hint} ({listed_by or 'known: ' + (', '.join(known) or 'none')})")
