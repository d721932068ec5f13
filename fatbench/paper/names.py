"""What can be reproduced, by name. No torch: `fatbench list experiments` and a misspelt name wait for nothing."""

from __future__ import annotations

from collections.abc import Sequence

from fatbench.errors import Refused, unknown
from fatbench.paper.contestants import World
from fatbench.paper.experiments import EXPERIMENTS, SAME

# Those that are pictures, which fatbench/paper/pictures.py measures and draws, and their places in the paper.
PICTURED = {"fig1": "Figure 1", "fig3": "Figure 3", "fig11": "Figure 11", "fig12": "Figure 12", "theorem1": "Theorem 1"}


def names() -> list[str]:
    """Everything that can be asked for, in the paper's order, then what is beyond it."""
    known = [*EXPERIMENTS, *SAME, *PICTURED]
    return sorted(known, key=lambda name: (_kind(name), number(name), name))


def _kind(name: str) -> int:
    return next((at for at, kind in enumerate(("table", "fig", "theorem")) if name.startswith(kind)), 3)


def number(name: str) -> int:
    """4 of fig4."""
    digits = "".join(c for c in name if c.isdigit())
    return int(digits) if digits else 0


def asked(said: Sequence[str], here: World | None = None) -> list[str]:
    """The experiments that names mean; `all` is every one, or every one that is set up in a world.

    Raises:
        Refused: an unknown name, or one that is not set up there.
    """
    for name in said:
        if name not in (*names(), "all"):
            raise unknown("experiment", name, names(), listed_by="fatbench list experiments")
        if here and name != "all" and not here.has(name):
            raise Refused(
                f"{name} is not set up on {here.title}, but {', '.join(here.tells or ())} are: leave --dataset out, or "
                "use --scale paper"
            )
    known = [name for name in names() if here is None or here.has(name)]
    return known if "all" in said else list(dict.fromkeys(said))


def summary(name: str) -> str:
    """Its one line."""
    if name in PICTURED:
        return f"{PICTURED[name]}: measured and drawn"
    own = EXPERIMENTS[SAME.get(name, name)]
    if name in SAME:
        return f"Figure {number(name)}: on a laptop the same as {SAME[name]}"
    return f"{own.place}: {own.summary}"
