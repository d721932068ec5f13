"""The options that several commands share, and what they may say."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fatbench.errors import Refused


class Kind(StrEnum):
    """What `list` and `show` know."""

    defenses = "defenses"
    evaluations = "evaluations"
    models = "models"
    datasets = "datasets"
    protocols = "protocols"
    recipes = "recipes"
    experiments = "experiments"
    robustbench = "robustbench"


class Scale(StrEnum):
    """How large an experiment is."""

    laptop = "laptop"
    paper = "paper"


class Tier(StrEnum):
    """How much of a protocol is carried out."""

    quick = "quick"
    bound = "bound"
    full = "full"


class Precision(StrEnum):
    """What attacks are made in."""

    float32 = "float32"
    bf16 = "bf16"


class Layout(StrEnum):
    """What AutoAttack crafts on."""

    swift = "swift"
    given = "given"


# Options that several commands share.
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:1.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="Processes on each node; as torchrun or SLURM has started them, or 1.")
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines; each runs this same command.")]
Eps = Annotated[str | None, typer.Option(help="l-inf budget in pixel units, 8/255 or 0.031.")]
DatasetName = Annotated[str | None, typer.Option("--dataset", help="A name (list datasets), path.npz, or a folder.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write into.")]


def published_eps(eps: str) -> str:
    """A budget as it is published, 8/255 or 0.031.

    Raises:
        Refused: it is no number.
    """
    from fatbench.quantities import published

    try:
        return published(eps)
    except ValueError as error:
        raise Refused(f"--eps {eps}: {error}") from None


def numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    """`0.49,0.48,0.45` as numbers; None where the option was not given.

    Raises:
        Refused: one of them is none.
    """
    from fatbench.quantities import number

    try:
        return None if text is None else tuple(number(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise Refused(f"{option} {text}: {error}") from None
