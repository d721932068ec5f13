"""A record: what one examination found, in `ID.json` {schema, protocol, result, run, hash} and `ID.parquet`.

`result` is hashed with the protocol: it is the same however often the examination was killed and on however many
processes it ran. `run` tells when and on what. The parquet holds one row an example: index, label, clean_pred, and for
each attack `<attack>.pred` and `<attack>.broken`, and of one in stages `<attack>.stage`, which broke it first (from 1;
0: it was wrong before; -1: it stands).

Fields that came later have a default, and what a record does not say is not hashed: records of schema 1, which know no
`<attack>.stage` and none of those fields, stay what they were.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fatbench.errors import Refused, first_line
from fatbench.files import digest, read_json, write_atomic, write_json
from fatbench.protocol import budget_of, told
from fatbench.quantities import Eps, Precision

SCHEMA = 2
Outcomes = pd.DataFrame | dict[str, np.ndarray]  # a column a name, a row an example


# What a record says beside its warnings of attacks that were made in bfloat16: no doubt, but how it was examined.
IN_BF16 = "crafted in bfloat16; every success was verified in float32"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Network(Strict):
    """The network that was examined."""

    fingerprint: str = Field(description="sha256 of weights and normalisation")
    arch: str = Field(description="as models are named; a user's own is file.py:factory")
    defense: str | None = Field(description="registered name; null where it is not known")
    fields: dict[str, Any] = Field(description="the defense's hyper-parameters")
    settings: dict[str, Any] = Field(description="the training run's settings; empty for foreign weights")
    seed: int | None = Field(description="of training")
    eps_train: Eps | None = Field(description="as published")
    selection: str | None = Field(description="last, or best on validation")
    epoch: int | None = Field(description="epochs trained")
    epochs: int | None = Field(description="of so many")
    status: str = Field(description="done, unfinished, or failed: why; only done has a place on a table")
    code: str | None = Field(
        default=None, description="sha256 of the user's file that builds it, where one does; not of what that imports"
    )


class Examined(Strict):
    """The protocol, as it was carried out."""

    name: str
    version: int
    source: str
    attacks: dict[str, dict[str, Any]] = Field(description="every setting of every attack, in the order they ran")


class Samples(Strict):
    """The test examples."""

    name: str = Field(description="the dataset")
    fingerprint: str = Field(description="sha256 of the whole test split as used")
    shape: tuple[int, int, int] = Field(description="(C, H, W)")
    classes: int = Field(ge=2)
    n: int = Field(ge=1, description="examples examined")
    of: int = Field(ge=1, description="examples in the split")
    rule: Literal["all", "first", "balanced"] = Field(
        description="which: all, the first n, or a draw with each class at its share"
    )


class Doubt(Strict):
    """One check for gradient masking."""

    fired: bool = Field(description="whether robustness is in doubt")
    said: str = Field(description="what was seen, one line")


class Result(Strict):
    """What was found; hashed."""

    network: Network
    data: Samples
    norm: Literal["linf"]
    eps: Eps = Field(description="as published")
    eps_value: float = Field(ge=0, le=1, description="as used, in pixel units")
    seed: int = Field(description="of the examination")
    chunk: int = Field(ge=1, description="examples attacked together; equal bits need equal chunks")
    correct: dict[str, int] = Field(description="examples still classified rightly: clean, each attack, worst")
    accuracies: dict[str, float] = Field(description="correct / n")
    stages: dict[str, dict[str, int]] = Field(description="examples that each stage of an attack broke first")
    outcomes: str = Field(description="sha256 of the per-example columns")
    collapsed: bool = Field(description="no better on clean examples than always giving one answer; never ranked")
    warnings: tuple[str, ...] = Field(description="reasons for doubt, one line each")
    after: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="examples still right after each stage of an attack"
    )
    bound: bool = Field(
        default=False, description="an upper bound: a part of the protocol was left out; never ranked as final"
    )
    checked: bool = Field(default=False, description="whether the network was looked at for gradient masking")
    doubts: dict[str, Doubt] = Field(default_factory=dict, description="the checks for gradient masking, by name")
    masking: tuple[str, ...] | None = Field(
        default=None, description="the verdict: the checks that fired; null where none was made"
    )
    surrogate: str | None = Field(default=None, description="sha256 of the network that attacks were transferred from")
    attack_precision: Precision = Field(
        default="float32", description="what attacks were made in; what they found counts in float32 alone"
    )

    @model_validator(mode="after")
    def _adds_up(self) -> Result:
        for name, right in self.correct.items():
            if not 0 <= right <= self.data.n or abs(self.accuracies.get(name, -1) - right / self.data.n) > 1e-12:
                raise ValueError(f"{name}: {right} of {self.data.n} right is not {self.accuracies.get(name)}")
        if self.correct.keys() != self.accuracies.keys():
            raise ValueError("accuracies and counts name different attacks")
        if self.doubts and set(self.masking or ()) != {name for name, doubt in self.doubts.items() if doubt.fired}:
            raise ValueError("the verdict on masking is not what its checks say")
        return self


class Training(BaseModel):
    """What the run folder told of the training: unsealed, and absent where weights came from elsewhere."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)

    epochs: int = Field(ge=0)
    seconds: float = Field(ge=0)
    backwards_per_example: float | None = Field(default=None, ge=0, description="of crafting, an example and epoch")
    device: str | None = None
    curves: dict[str, list[float | None]] = Field(default_factory=dict, description="a value an epoch")


class Record(Strict):
    """One examination."""

    schema_: Literal[1, 2] = Field(alias="schema")
    id: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    protocol: Examined
    result: Result
    run: dict[str, Any] = Field(description="versions, device, precision, times, forwards, backwards")
    hash: str = Field(description="sha256 of {schema, id, protocol, result}")

    @property
    def attacks(self) -> list[str]:
        return [name for name in self.result.correct if name not in ("clean", "worst")]

    @cached_property
    def training(self) -> Training | None:
        """Raises Refused where `run.training` is of another form."""
        try:
            return Training.model_validate(self.run["training"]) if "training" in self.run else None
        except ValidationError as error:
            raise Refused(f"the record {self.id} has a broken run.training: {told(error)}") from None

    def sealed(self) -> str:
        """The hash that this record must carry."""
        said = self.said()
        return digest({key: said[key] for key in ("schema", "id", "protocol", "result")})

    def said(self) -> dict[str, Any]:
        """Its JSON: what it says itself, without the defaults of what it does not."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True)


def outcomes_hash(table: Outcomes) -> str:
    """sha256 of the per-example columns, independent of how parquet packs them."""
    sha = hashlib.sha256()
    for name, column in table.items():
        values = np.ascontiguousarray(column, dtype=np.int64)
        sha.update(f"{name} {len(values)}\n".encode())
        sha.update(values.data)
    return sha.hexdigest()


def write(folder: Path, said: dict[str, Any], outcomes: pd.DataFrame | None) -> Record:
    """Seals and writes a record: the parquet first, the JSON last, so that a JSON always has its evidence."""
    record = Record.model_validate({**said, "schema": SCHEMA, "hash": ""})
    record = record.model_copy(update={"hash": record.sealed()})
    if outcomes is not None:
        write_atomic(
            folder / f"{record.id}.parquet", lambda path: outcomes.to_parquet(path, index=False, compression="zstd")
        )
    write_json(folder / f"{record.id}.json", record.said())
    return record


def read(path: Path) -> Record:
    """A record, checked: schema, hash, counts, and the per-example evidence beside it.

    Raises:
        Refused: what is wrong with it.
    """
    try:
        record = Record.model_validate(read_json(path, "record"))
    except ValidationError as error:
        raise Refused(f"{path} is no record of schema {SCHEMA}: {told(error)}") from None
    try:
        sealed = record.sealed()
    except UnicodeError as error:
        raise Refused(f"{path} holds text that is no Unicode: {first_line(error)}") from None
    if record.hash != sealed:
        raise Refused(f"{path} was changed after it was written: its hash does not match; examine the network again")
    if record.result.correct:
        _agree(record, path.with_suffix(".parquet"))
    return record


def read_outcomes(path: Path) -> pd.DataFrame:
    """The per-example columns of a record's parquet."""
    return pd.DataFrame(_columns(path))


def _columns(path: Path) -> dict[str, np.ndarray]:
    # A board reads thousands of small files, and pandas' own reader takes several times as long for each.
    try:
        with pq.ParquetFile(path) as file:
            table = file.read(use_threads=False)
        return {name: table[name].to_numpy() for name in table.column_names}
    except FileNotFoundError:
        raise Refused(f"{path} is missing: a record needs its per-example outcomes beside it") from None
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise Refused(f"{path} is corrupt: {first_line(error)}; copy it again") from None


def _agree(record: Record, path: Path) -> None:
    table, stages = _columns(path), record.result.stages if record.schema_ > 1 else {}
    expected = dict.fromkeys(("index", "label", "clean_pred"), "i")
    for attack in record.attacks:
        expected |= {f"{attack}.pred": "i", f"{attack}.broken": "b"}
        expected |= {f"{attack}.stage": "i"} if attack in stages else {}
    kinds = {name: values.dtype.kind for name, values in table.items()}
    if list(table) != list(expected) or kinds != expected or len(table["index"]) != record.result.data.n:
        rows = len(next(iter(table.values()), ()))
        raise Refused(f"{path} is not what its record was made from: {rows} rows of {', '.join(table)}")
    if outcomes_hash(table) != record.result.outcomes:
        raise Refused(f"{path} is not what its record was made from: examine the network again")
    if count(table, record.attacks) != record.result.correct:
        raise Refused(f"{path}: its outcomes do not add up to the record's accuracies")
    for attack in stages.keys() & set(record.attacks):
        broke = stages[attack]
        if [int((table[f"{attack}.stage"] == k).sum()) for k in range(1, len(broke) + 1)] != list(broke.values()):
            raise Refused(f"{path}: its outcomes do not add up to the record's stages of {attack}")


def count(table: Outcomes, attacks: list[str]) -> dict[str, int]:
    """Examples still right: clean, under each attack, and under the worst of all for each example.

    An attack with a budget of its own, `pgd-20@16/255`, is no part of the worst.
    """
    wrong = np.asarray(table["clean_pred"]) != np.asarray(table["label"])
    right = {"clean": int((~wrong).sum())}
    for attack in attacks:
        broken = np.asarray(table[f"{attack}.broken"])
        right[attack] = int((~broken).sum())
        wrong = wrong if budget_of(attack) else wrong | broken
    return {**right, "worst": int((~wrong).sum())}
