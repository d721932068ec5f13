"""The examples behind a record: kept exactly, in float32, so that anybody can count again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fatbench.attacks import crafting
from fatbench.checkpoint import Subject
from fatbench.data import Data
from fatbench.errors import Refused, first_line
from fatbench.evaluation import Attacked, Chunk, Evaluation, verified
from fatbench.examination import DOUBTS, Examination
from fatbench.examine import exact
from fatbench.files import canonical, write_atomic
from fatbench.ledger import Ledger
from fatbench.protocol import budget_of
from fatbench.record import Record, read_outcomes

SCHEMA = 1


def path(folder: Path, ident: str) -> Path:
    """Where a record's examples lie, beside it."""
    return folder / f"{ident}.adversarial.safetensors"


def save(where: Path, task: Examination, ledger: Ledger, result: dict[str, Any]) -> None:
    """Writes for each example the one that broke it first, and the clean image where none did or none was needed.

    Tensors: x_adv (n, C, H, W) float32, index (n,) int64 places in the test set, label (n,) int64. The metadata says of
    which network, data, budget and outcomes they are.
    """
    rows = task.rows()
    x_adv, done = task.data.x_test[rows].float().clone(), torch.zeros(len(rows), dtype=torch.bool)
    for step in task.steps():
        entry = ledger.entries[step]
        if step.attack == DOUBTS or budget_of(step.attack):
            continue
        if not entry["fell"]:
            continue
        fell = torch.tensor(entry["fell"], dtype=torch.int64)
        first = ~done[step.chunk * task.chunk + fell]
        places = step.chunk * task.chunk + fell[first]
        x_adv[places], done[places] = ledger.examples(step)[first], True
    tensors = {"x_adv": x_adv.contiguous(), "index": torch.as_tensor(rows), "label": task.data.y_test[rows].long()}
    about = {
        "schema": SCHEMA, "network": result["network"]["fingerprint"], "data": result["data"]["fingerprint"],
        "eps": result["eps"], "norm": result["norm"], "outcomes": result["outcomes"],
    }  # fmt: skip
    write_atomic(where, lambda to: save_file(tensors, to, metadata={"fatbench": canonical(about)}))


# ------------------------------------------------------------------------------------------------ examples from outside


@dataclass(frozen=True)
class External(Evaluation):
    """Somebody else's attack: its examples, taken from a file and judged like any other's.

    Attributes:
        sha256: Of the file.
        source: Who made the examples, and how.
    """

    name: ClassVar[str] = "external"

    sha256: str
    source: str
    examples: dict[int, Tensor] = field(repr=False, compare=False)

    def told(self) -> dict[str, Any]:
        return {"sha256": self.sha256, "source": self.source}

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        return Attacked(torch.stack([self.examples[int(i)] for i in chunk.indices]).to(chunk.x), 0, 0)


def external(file: Path, source: str | None, rows: np.ndarray, shape: tuple[int, ...]) -> External:
    """The attack that a file of examples is: safetensors with x_adv (N, C, H, W), and index (N,) where they are not the
    first N test images. Where the metadata holds a `source`, it need not be given.

    Raises:
        Refused: no such file, other shapes, an image without an example, or nobody said who made them.
    """
    tensors, header = read(file)
    x_adv, index = tensors.get("x_adv"), tensors.get("index")
    if x_adv is None or tuple(x_adv.shape[1:]) != shape or not x_adv.is_floating_point():
        held = "no x_adv" if x_adv is None else f"x_adv {tuple(x_adv.shape)} {x_adv.dtype}"
        raise Refused(f"{file} holds {held}: it must be floating point (N, {', '.join(map(str, shape))}) in [0, 1]")
    places = torch.arange(len(x_adv)) if index is None else index.flatten()
    if len(places) != len(x_adv):
        raise Refused(f"{file} holds {len(places)} places for {len(x_adv)} examples")
    examples = {int(place): example.float() for place, example in zip(places, x_adv, strict=True)}
    if lacking := sorted(set(rows.tolist()) - examples.keys()):
        raise Refused(f"{file} has no example for {len(lacking)} of the images, {lacking[0]} the first: give --n")
    source = source or header.get("source")
    if not source:
        raise Refused(f"{file} does not say who made its examples, and how: give --source")
    return External(hashlib.sha256(file.read_bytes()).hexdigest(), source, examples)


def read(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        Refused: none there, or another kind of file.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            return {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise Refused(f"no adversarial examples at {file}") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{file} is no safetensors file: {first_line(error)}") from None


# ------------------------------------------------------------------------------------------------ counting again


@dataclass(frozen=True)
class Verified:
    """What counting again came to.

    Attributes:
        clean, robust: Examples right on the clean images, and at the examples kept.
        differ: Examples whose clean prediction or worst case is not what the record says.
    """

    clean: int
    robust: int
    differ: int


def verify(record: Record, path_: Path, subject: Subject, loaded: Data, device: torch.device | str) -> Verified:
    """Reloads a record's examples and counts again on the network and the data it is about.

    Raises:
        Refused: another network or other data, or examples that are not this record's or not allowed.
    """
    result, file = record.result, path(path_.parent, record.id)
    if not file.exists():
        raise Refused(f"no examples at {file}: examine with --save-adversarial, and verify that record")
    if subject.fingerprint != result.network.fingerprint:
        raise Refused(f"the record {record.id} is about another network: {_short(result.network.fingerprint, subject)}")
    if loaded.fingerprint("test") != result.data.fingerprint:
        raise Refused(f"the record {record.id} is about other test images than those of {loaded.info.name} here")
    tensors, header = read(file)
    about = json.loads(header.get("fatbench", "{}"))
    if about.get("outcomes") != result.outcomes or about.get("network") != result.network.fingerprint:
        raise Refused(f"{file} is not of the record {record.id}: examine with --save-adversarial again")
    table = read_outcomes(path_.with_suffix(".parquet"))
    if tensors["index"].tolist() != table["index"].tolist():
        raise Refused(f"{file} holds other examples than the record {record.id}")
    x, y, x_adv = loaded.x_test[tensors["index"]], loaded.y_test[tensors["index"]].long(), tensors["x_adv"]
    model = subject.model.to(device, torch.float32)
    right, broken = [], []
    with exact(), crafting(model):
        for part in torch.split(torch.arange(len(y)), result.chunk):
            images, labels = x[part].float().contiguous().to(device), y[part].to(device)
            clean, _, _ = verified(model, images, images, labels, 0.0)
            _, fell, invalid = verified(model, images, x_adv[part].to(device), labels, result.eps_value)
            if invalid:
                raise Refused(f"{file}: {invalid} examples lie outside the ball or [0, 1]")
            right.append((clean == labels).cpu())
            broken.append(fell.cpu())
    stands = torch.cat(right) & ~torch.cat(broken)
    worst = table["clean_pred"] == table["label"]
    clean_then = torch.tensor(worst.to_numpy())
    for attack in record.attacks:
        worst = worst if budget_of(attack) else worst & ~table[f"{attack}.broken"]
    differ = (stands != torch.tensor(worst.to_numpy())) | (torch.cat(right) != clean_then)
    return Verified(int(torch.cat(right).sum()), int(stands.sum()), int(differ.sum()))


def _short(fingerprint: str, subject: Subject) -> str:
    return f"{fingerprint[:12]}, not {subject.fingerprint[:12]}"
