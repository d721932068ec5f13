"""A protocol: how a table's numbers are made, in a versioned TOML of evaluations/protocols or of the user's own."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fatbench.errors import Refused, first_line, unknown
from fatbench.quantities import Eps


class Protocol(BaseModel):
    """What a protocol file says.

    `families` holds, for each attack family, the settings its examiner gets; an attack `pgd-20` is the family `pgd`
    with 20 steps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="as tables show it")
    version: int = Field(ge=1, description="raised whenever a number could change")
    summary: str = Field(description="one line")
    source: str = Field(description="the table, page or file that it is taken from")
    eps: Eps | None = Field(default=None, description="as published; the checkpoint's own where it is left out")
    attacks: tuple[str, ...] = Field(min_length=1, description="in the order they run")
    families: dict[str, dict[str, Any]] = Field(default_factory=dict, description="settings of each attack family")

    @field_validator("attacks")
    @classmethod
    def _as_registered(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(attack.strip().lower().replace("_", "-") for attack in attacks))

    @model_validator(mode="after")
    def _no_idle_settings(self) -> Protocol:
        asked = {part for attack in self.attacks for part in (attack, attack.rpartition("-")[0])}
        if idle := sorted(self.families.keys() - asked):
            raise ValueError(f"families.{idle[0]} says settings of a family that no attack belongs to")
        return self

    def settings_for(self, attack: str) -> dict[str, Any]:
        """What the file says of an attack's family; nothing where it is silent."""
        return self.families.get(attack, self.families.get(attack.rpartition("-")[0], {}))

    def only(self, attacks: Sequence[str]) -> Protocol:
        """The same protocol with other attacks, each once."""
        wanted = self._as_registered(tuple(attack for attack in attacks if attack.strip()))
        if not wanted:
            raise Refused("no attack named: --attacks takes names such as fgsm,pgd-20,autoattack")
        return self.model_copy(update={"attacks": wanted})


DEFAULT = "fatbench-linf"


@cache
def shelf() -> dict[str, Path]:
    """The built-in protocols: name -> file."""
    folder = Path(str(files("fatbench.evaluations"))) / "protocols"
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load(name: str) -> Protocol:
    """A protocol by name, or from a user's own `path.toml`.

    Raises:
        Refused: no such protocol, or a file that is none.
    """
    path = Path(name) if name.endswith(".toml") else shelf().get(name.replace("_", "-"))
    if path is None:
        raise unknown("protocol", name, shelf())
    try:
        protocol = Protocol.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"cannot read the protocol {path}: {first_line(error)}") from None
    except ValidationError as error:
        raise Refused(f"the protocol {path}: {told(error)}") from None
    if not name.endswith(".toml") and protocol.name != path.stem:
        raise Refused(f"the protocol {path} calls itself {protocol.name!r}: its name must be its file's")
    if name.endswith(".toml") and protocol.name in shelf():
        raise Refused(f"the protocol {path} calls itself {protocol.name!r}, as a built-in one does: rename it")
    return protocol


def told(error: ValidationError) -> str:
    """A validation error in one line: each field and what is wrong with it."""
    return "; ".join(
        f"{'.'.join(str(part) for part in e['loc']) or 'file'}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    )
