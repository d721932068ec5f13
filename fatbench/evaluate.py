"""Checkpoint x protocol -> record: every attack on the same fixed chunks, every counted example verified.

The chunk is the unit of work and of sharding, a step (an attack on a chunk, or one stage of it) that of resume:
outcomes go to `ID.partial.jsonl` as they come, and an examination that was killed goes on to the same `result`.
"""

from __future__ import annotations

import platform
import re
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fatbench import __version__, evidence
from fatbench.devices import named
from fatbench.errors import Refused
from fatbench.examination import Examination
from fatbench.examine import examine, fitting
from fatbench.files import digest, disk, locked
from fatbench.findings import Findings, collapsed, gathered
from fatbench.ledger import Ledger
from fatbench.record import IN_BF16, Record, count, outcomes_hash, read, write

__all__ = ["Examination", "evaluate"]


def evaluate(
    task: Examination,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    keep_examples: bool = False,
    source: dict[str, Any] | None = None,
    shared: dict[str, Any] | None = None,
) -> Record:
    """Carries out an examination, or what is left of it, and writes its record into `out`.

    A finished record of the same examination is returned as it is, and instead of a bound the whole one. What a bound
    leaves undone a later, whole examination goes on with.

    Args:
        keep_examples: Also write `ID.adversarial.safetensors`: for each example the one that broke it.
        source: Where network and data were taken from, for `run`.
        shared: What `run` says of several processes that have done the steps (fatbench/shards.py).

    Raises:
        Refused: a network that does not fit the data, or files in `out` that belong to another examination.
    """
    state = State.of(task, out)
    plan, ident = state.plan, state.ident
    if record := state.finished(keep_examples):
        return record
    if state.failed:
        return write(out, _said(ident, plan, None, {}), None)
    model = fitting(task, device)
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / f".{state.name}.lock", f"on {out / state.name}.json"):
        ledger, began = Ledger(state.ledger, state.digest, evidence=keep_examples), time.perf_counter()
        examine(task, model, ledger, device)
        rows = task.rows()
        found = gathered(ledger, rows, task.data.y_test[rows].numpy(), task.stages(), checked=bool(plan.get("checked")))
        run = _run(task, device, time.perf_counter() - began, found, ledger, source)
        said = _said(ident, plan, found, run | (shared or {}))
        if keep_examples:
            evidence.save(evidence.path(out, ident), task, ledger, said["result"])
        record = write(out, said, found.table)
        if ident == state.name:
            ledger.close()
        return record


@dataclass(frozen=True)
class State:
    """Where an examination's record and its ledger lie in `out`.

    Attributes:
        plan, ident: Of the examination itself.
        whole, name: Of the whole one that it is a part of, whose ledger it shares.
    """

    out: Path
    plan: dict[str, Any]
    ident: str
    whole: dict[str, Any]
    name: str

    @classmethod
    def of(cls, task: Examination, out: Path) -> State:
        plan = task.plan()
        whole = plan if task.tier == "full" else task.whole().plan()
        return cls(out, plan, _ident(task, plan), whole, _ident(task, whole))

    @property
    def ledger(self) -> Path:
        return self.out / f"{self.name}.partial.jsonl"

    @property
    def digest(self) -> str:
        return digest(self.whole)

    @property
    def failed(self) -> bool:
        """Whether the network failed in training."""
        return bool(self.plan["network"]["status"].startswith("failed"))

    def finished(self, keep_examples: bool) -> Record | None:
        """The record, where there is one already."""
        for name, one in {self.name: self.whole, self.ident: self.plan}.items():
            path = self.out / f"{name}.json"
            if path.exists() and (not keep_examples or evidence.path(self.out, name).exists()):
                record = _same(path, one)
                if name == self.name:
                    self.ledger.unlink(missing_ok=True)  # of a kill between the record and the clearing away
                return record
        return None


def _ident(task: Examination, plan: dict[str, Any]) -> str:
    arch = str(plan["network"]["arch"]).removeprefix("robustbench:")
    name = plan["network"]["defense"] or Path(arch.partition(":")[0]).stem
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{task.data.info.name}-{task.protocol.name}").lstrip("-._")
    return f"{readable}-{digest(plan)[:12]}"


def _said(ident: str, plan: dict[str, Any], found: Findings | None, run: dict[str, Any]) -> dict[str, Any]:
    """A record's content; `found` is None of a network that failed in training: it has no number."""
    settled = {key: value for key, value in plan.items() if key != "protocol"}
    right = count(found.table, list(plan["protocol"]["attacks"])) if found else {}
    result = {
        **settled, "correct": right, "accuracies": {name: k / plan["data"]["n"] for name, k in right.items()},
        "stages": found.stages if found else {}, "after": found.after if found else {},
        "outcomes": outcomes_hash(found.table) if found else "",
        "collapsed": collapsed(found.table) if found else False, "warnings": found.warnings if found else (),
    }  # fmt: skip
    if found and found.doubts:
        result |= {"doubts": found.doubts, "masking": [name for name, doubt in found.doubts.items() if doubt["fired"]]}
    if plan.get("attack_precision"):
        result["warnings"] = (*result["warnings"], IN_BF16)
    return {"id": ident, "protocol": plan["protocol"], "result": result, "run": run}


def _same(path: Path, plan: dict[str, Any]) -> Record:
    record = read(path)
    said = record.said()
    theirs = {"protocol": said["protocol"], **{key: said["result"].get(key) for key in plan if key != "protocol"}}
    if digest(theirs) != digest(plan):
        raise Refused(f"{path} is the record of another examination: choose another --out")
    return record


def _run(
    task: Examination,
    device: torch.device | str,
    seconds: float,
    found: Findings,
    ledger: Ledger,
    source: dict[str, Any] | None,
) -> dict[str, Any]:
    packages = ("torch", "numpy", "pyautoattack")
    origin = {"source": source, "training": task.subject.training}
    return {
        "fatbench": __version__, "python": platform.python_version(), **{p: version(p) for p in packages},
        "device": named(device), "threads": torch.get_num_threads(), "precision": "float32, TF32 off",
        "crafted_in": task.attack_precision, "layout": task.layout, "seconds": round(seconds, 3),
        "resumed_steps": ledger.resumed, "attacks": found.costs,
        **{key: value for key, value in origin.items() if value},
    }  # fmt: skip
