"""Numbers that papers report: fatbench/reported/*.toml, one file a table, percentages to the digit as printed.

They stand beside measured rows, marked with their source, and are never ranked with them.
"""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fatbench.errors import Refused, first_line
from fatbench.protocol import told
from fatbench.quantities import Eps


def parsed(printed: str) -> tuple[float, float | None]:
    """An accuracy and its spread, both in percent; None where no spread is printed.

    >>> parsed("89.34 ± 0.221"), parsed("87.30")
    ((89.34, 0.221), (87.3, None))
    """
    accuracy, _, spread = printed.partition(" ± ")
    return float(accuracy), float(spread) if spread else None


def _percent(printed: str) -> str:
    try:
        accuracy, spread = parsed(printed)
    except ValueError:
        raise ValueError(f"{printed!r} is no percentage: write 89.34 or 89.34 ± 0.221") from None
    if not 0 <= accuracy <= 100 or not 0 <= (spread or 0) <= 100:
        raise ValueError(f"{printed!r} lies outside [0, 100]")
    return printed


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Row(Strict):
    """One row of a printed table."""

    defense: str = Field(description="a registered name")
    arch: str = Field(description="a network's name here")
    eps_train: Eps | None = Field(default=None, description="as published")
    beta: float | None = Field(default=None, description="of TRADES and MART")
    trials: int | None = Field(default=None, ge=1, description="training runs; left out where it is not printed")
    quoted_from: str | None = Field(default=None, description="whose number it is, where the paper took it over")
    accuracy: dict[str, Annotated[str, AfterValidator(_percent)]] = Field(
        min_length=1, description="clean and attacks: the median, ± the standard deviation over the trials"
    )
    note: str = Field(default="", description="where two sources print different numbers, both")


class Printed(Strict):
    """One table of a paper."""

    paper: str = Field(description="authors, venue, year")
    table: str = Field(description="which of its tables")
    dataset: str
    norm: Literal["linf"]
    eps: Eps = Field(description="of the attacks, as published")
    protocol: str = Field(description="the protocol that carries out what the paper says")
    version: int = Field(ge=1, description="of the protocol")
    n: int = Field(ge=1, description="test examples")
    rows: tuple[Row, ...] = Field(min_length=1)


@cache
def shelf() -> dict[str, Path]:
    """The tables known here: name -> file."""
    return {path.stem: path for path in sorted((Path(str(files("fatbench"))) / "reported").glob("*.toml"))}


def read(path: Path) -> Printed:
    """One table.

    Raises:
        Refused: the file is none.
    """
    try:
        return Printed.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"cannot read the reported numbers {path}: {first_line(error)}") from None
    except ValidationError as error:
        raise Refused(f"the reported numbers {path}: {told(error)}") from None
