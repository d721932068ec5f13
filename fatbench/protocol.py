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
from fatbench.quantities import Eps, published


class Protocol(BaseModel):
    """What a protocol file says.

    `families` holds, for each attack family, the settings its examiner gets; an attack `pgd-20` is the family `pgd`
    with 20 steps. An attack with a budget of its own is written `pgd-20@16/255`: it is examined beside the others and
    is no part of the worst case, which is at the protocol's eps.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$", description="as tables show it")
    version: int = Field(ge=1, description="raised whenever a number could change")
    summary: str = Field(description="one line")
    source: str = Field(description="the table, page or file that it is taken from")
    eps: Eps | None = Field(default=None, description="as published; the checkpoint's own where it is left out")
    n: int | None = Field(
        default=None, ge=1, description="the first n test examples, or all where there are fewer; all unless given"
    )
    attacks: tuple[str, ...] = Field(min_length=1, description="in the order they run")
    standing: bool = Field(
        default=False,
        description="each attack is given only whom the former left standing: only the worst case means anything then",
    )
    families: dict[str, dict[str, Any]] = Field(default_factory=dict, description="settings of each attack family")

    @field_validator("attacks")
    @classmethod
    def _named(cls, attacks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(_as_registered(attack) for attack in attacks))

    @model_validator(mode="after")
    def _no_idle_settings(self) -> Protocol:
        asked = {part for attack in self.attacks for part in _family_of(attack)}
        if idle := sorted(self.families.keys() - asked):
            raise ValueError(f"families.{idle[0]} says settings of a family that no attack belongs to")
        return self

    @model_validator(mode="after")
    def _one_budget_standing(self) -> Protocol:
        if self.standing and (own := [attack for attack in self.attacks if budget_of(attack)]):
            raise ValueError(f"standing attacks share one budget, and {own[0]} has its own")
        return self

    def settings_for(self, attack: str) -> dict[str, Any]:
        """What the file says of an attack's family; nothing where it is silent."""
        name, family = _family_of(attack)
        return self.families.get(name, self.families.get(family, {}))

    def only(self, attacks: Sequence[str]) -> Protocol:
        """The same protocol with other attacks, each once."""
        try:
            wanted = self._named(tuple(attack for attack in attacks if attack.strip()))
        except ValueError as error:
            raise Refused(f"--attacks {','.join(attacks)}: {error}") from None
        if not wanted:
            raise Refused("no attack named: --attacks takes names such as fgsm,pgd-20,autoattack")
        return self.model_copy(update={"attacks": wanted})


def budget_of(attack: str) -> str | None:
    """The eps that an attack's name carries, as published: 16/255 of `pgd-20@16/255`; None where it carries none."""
    return attack.partition("@")[2] or None


def _as_registered(attack: str) -> str:
    name, at, eps = attack.strip().partition("@")
    return name.strip().lower().replace("_", "-") + (f"@{published(eps)}" if at else "")


def _family_of(attack: str) -> tuple[str, str]:
    """What its settings may stand under: `pgd-20` and `pgd` of `pgd-20@16/255`."""
    name = attack.partition("@")[0]
    return name, name.rpartition("-")[0]


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
