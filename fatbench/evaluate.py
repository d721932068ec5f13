"""Checkpoint x protocol -> record: every attack on the same fixed chunks, every counted example verified.

The chunk is the unit of work, of resume and of sharding: (chunk, attack) outcomes are appended to `ID.partial.jsonl`
as they come, and an examination that was killed goes on from there to the same `result`.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from fatbench import __version__, console
from fatbench.attacks import crafting
from fatbench.checkpoint import Subject
from fatbench.data import Data, balanced_order
from fatbench.devices import named
from fatbench.errors import Refused, first_line
from fatbench.evaluation import Attacked, Chunk, Evaluation, examiner
from fatbench.files import append_line, canonical, digest, disk, locked, read_lines, write_text
from fatbench.protocol import Protocol, budget_of
from fatbench.quantities import number
from fatbench.record import Record, count, outcomes_hash, read, write
from fatbench.stats import wilson

# The form of what is kept of an examination under way; raised when an entry says something else.
LEDGER = 1
# How far outside the ball float32 may put an honest example: two units in the last place at 1.0.
TOLERANCE = 2.0**-22


@dataclass(frozen=True)
class Examination:
    """All that decides a result: subject, data, protocol, budget, which examples, seed.

    Attributes:
        eps: As published.
        n: The first n test examples; as many as the protocol says where None, and all where that is silent.
        balanced: A class-balanced draw of n instead.
        chunk: Examples attacked together.
    """

    subject: Subject
    data: Data
    protocol: Protocol
    eps: str
    n: int | None = None
    balanced: bool = False
    seed: int = 0
    chunk: int = 250

    def rows(self) -> np.ndarray:
        """The test examples' places, ascending."""
        total = len(self.data.y_test)
        n = min(self.protocol.n or total, total) if self.n is None else self.n
        if not 1 <= n <= total:
            raise Refused(f"--n {n}: {self.data.info.name} has {total} test examples")
        if not self.balanced or n == total:
            return np.arange(n)
        return np.sort(balanced_order(self.data.y_test.numpy(), "examined")[:n])

    def examiners(self) -> dict[str, Evaluation]:
        return {name: examiner(name, self.protocol.settings_for(name)) for name in self.protocol.attacks}

    def eps_of(self, attack: str) -> float:
        return number(budget_of(attack) or self.eps)

    def meant(self) -> dict[str, dict[str, Any]]:
        """Every setting of every attack, as the record tells it."""
        told = {name: {"family": e.name, **asdict(e)} for name, e in self.examiners().items()}
        for before, name in pairwise(("clean", *told) if self.protocol.standing else ()):
            told[name]["standing_after"] = before
        return told

    def plan(self) -> dict[str, Any]:
        """Everything the result depends on, as plain JSON: its digest is the record's id."""
        protocol = self.protocol.model_dump(mode="json", include={"name", "version", "source"})
        rows = self.rows()
        rule = "all" if len(rows) == len(self.data.y_test) else "balanced" if self.balanced else "first"
        samples = {
            "name": self.data.info.name, "fingerprint": self.data.fingerprint("test"), "shape": self.data.shape,
            "classes": self.data.classes, "n": len(rows), "of": len(self.data.y_test), "rule": rule,
        }  # fmt: skip
        return {
            "protocol": {**protocol, "attacks": self.meant()}, "network": _network(self.subject), "data": samples,
            "eps": self.eps, "eps_value": number(self.eps), "seed": self.seed, "chunk": self.chunk, "norm": "linf",
        }  # fmt: skip


def _network(subject: Subject) -> dict[str, Any]:
    meta, settings = subject.meta, subject.meta.get("settings") or {}
    return {
        "fingerprint": subject.fingerprint, "arch": meta["arch"], "defense": settings.get("defense"),
        "fields": settings.get("fields", {}), "settings": settings, "seed": settings.get("seed"),
        "eps_train": settings.get("eps"), "selection": meta.get("selection"), "epoch": meta.get("epoch"),
        "epochs": meta.get("epochs"), "status": meta.get("status", "done"),
    }  # fmt: skip


def evaluate(task: Examination, out: Path, *, device: torch.device | str = "cpu") -> Record:
    """Carries out an examination, or what is left of it, and writes its record into `out`.

    A finished record of the same examination is returned as it is.

    Raises:
        Refused: a network that does not fit the data, or files in `out` that belong to another examination.
    """
    plan = task.plan()
    name = plan["network"]["defense"] or Path(str(plan["network"]["arch"]).partition(":")[0]).stem
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{name}-{task.data.info.name}-{task.protocol.name}").lstrip("-._")
    ident = f"{readable}-{digest(plan)[:12]}"
    finished, partial = out / f"{ident}.json", out / f"{ident}.partial.jsonl"
    if finished.exists():
        record = _same(finished, plan)
        partial.unlink(missing_ok=True)  # of a kill between the record and the clearing away
        return record
    if plan["network"]["status"].startswith("failed"):
        return write(out, _said(ident, plan, None, {}), None)
    model = task.subject.model.to(device, torch.float32)
    _fits(model, task.data, device)
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / f".{ident}.lock", f"on {finished}"):
        ledger, began = Ledger(partial, digest(plan)), time.perf_counter()
        with _exact(), crafting(model):
            _examine(task, model, ledger, device)
        found = _findings(task, ledger)
        run = _run(device, time.perf_counter() - began, found, ledger)
        run |= {"training": task.subject.training} if task.subject.training else {}
        record = write(out, _said(ident, plan, found, run), found.table)
        partial.unlink()
        return record


def _said(ident: str, plan: dict[str, Any], found: Findings | None, run: dict[str, Any]) -> dict[str, Any]:
    """A record's content; `found` is None of a network that failed in training: it has no number."""
    settled = {key: value for key, value in plan.items() if key != "protocol"}
    right = count(found.table, list(plan["protocol"]["attacks"])) if found else {}
    result = {
        **settled, "correct": right, "accuracies": {name: k / plan["data"]["n"] for name, k in right.items()},
        "stages": found.stages if found else {}, "outcomes": outcomes_hash(found.table) if found else "",
        "collapsed": collapsed(found.table) if found else False, "warnings": found.warnings if found else (),
    }  # fmt: skip
    return {"id": ident, "protocol": plan["protocol"], "result": result, "run": run}


def _same(path: Path, plan: dict[str, Any]) -> Record:
    record = read(path)
    said = record.model_dump(mode="json")
    theirs = {"protocol": said["protocol"], **{key: said["result"].get(key) for key in plan if key != "protocol"}}
    if digest(theirs) != digest(plan):
        raise Refused(f"{path} is the record of another examination: choose another --out")
    return record


def _fits(model: nn.Module, loaded: Data, device: torch.device | str) -> None:
    """One image through the network: shape, number of classes, finite logits."""
    try:
        with crafting(model), torch.no_grad():
            logits = model(loaded.x_test[:1].to(device))
    except Exception as error:  # the network may be anybody's code
        raise Refused(
            f"the network cannot take {loaded.info.name}'s images {loaded.shape}: {first_line(error)}"
        ) from None
    if not isinstance(logits, Tensor):
        raise Refused(
            f"the network answers {loaded.info.name}'s images with a {type(logits).__name__}, not with logits"
        )
    if logits.ndim != 2 or logits.shape[1] != loaded.classes:
        answers = " x ".join(map(str, logits.shape[1:]))
        raise Refused(f"the network answers with {answers} classes, {loaded.info.name} has {loaded.classes}")
    if not torch.isfinite(logits).all():
        raise Refused("the network's logits are not finite: its weights are broken")


@contextmanager
def _exact() -> Iterator[None]:
    """float32 means float32: no TF32, or two GPUs would differ in the third digit of a logit."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


class Ledger:
    """What has been done, a JSON line for each (chunk, attack), behind a line that says for which plan."""

    def __init__(self, path: Path, plan: str) -> None:
        self.path = path
        lines = read_lines(path)
        head = {"plan": plan, "format": LEDGER}
        if lines and lines[0] != head:
            raise Refused(f"{path} belongs to another examination or fatbench: choose another --out, or remove it")
        self.entries: dict[tuple[int, str], dict[str, Any]] = {(e["chunk"], e["attack"]): e for e in lines[1:]}
        self.resumed = len(self.entries)
        # Where a kill cut a line off, what can be read is what was done.
        write_text(path, "".join(canonical(line) + "\n" for line in (lines or [head])))

    def add(self, entry: dict[str, Any]) -> None:
        append_line(self.path, entry)
        self.entries[entry["chunk"], entry["attack"]] = entry


def _examine(task: Examination, model: nn.Module, ledger: Ledger, device: torch.device | str) -> None:
    rows, examiners = task.rows(), task.examiners()
    before = dict(pairwise(reversed(("clean", *examiners))))
    parts = [rows[first : first + task.chunk] for first in range(0, len(rows), task.chunk)]
    todo = [(c, attack) for c in range(len(parts)) for attack in ("clean", *examiners)]
    if ledger.resumed:
        console.stderr.print(f"resuming: {ledger.resumed} of {len(todo)} steps are done", soft_wrap=True)
    chunk: Chunk | None = None
    current = -1
    with console.waiting(f"examining {task.data.info.name}", len(todo), done=ledger.resumed) as bar:
        for c, attack in todo:
            if (c, attack) in ledger.entries:
                continue
            if chunk is None or current != c:
                chunk, current = _chunk(task, parts[c], device), c
            run = partial(_attacked, model, examiner=examiners.get(attack), eps=task.eps_of(attack))
            if task.protocol.standing and attack != "clean":
                former = ledger.entries[c, before[attack]]
                entry = _on_standing(chunk, former, run)
            else:
                entry = run(chunk)
            ledger.add({"chunk": c, "attack": attack, **entry})
            bar.advance(f"{attack}, chunk {c + 1} of {len(parts)}")


def _chunk(task: Examination, rows: np.ndarray, device: torch.device | str) -> Chunk:
    x = task.data.x_test[rows].contiguous().to(device)
    return Chunk(x, task.data.y_test[rows].to(device), rows, task.data.classes, task.seed)


def _attacked(model: nn.Module, chunk: Chunk, examiner: Evaluation | None, eps: float) -> dict[str, Any]:
    """One attack on one chunk: predictions, and whom it broke."""
    began = time.perf_counter()
    attacked = Attacked(chunk.x, 0, 0) if examiner is None else examiner.attack(model, chunk, eps)
    x_adv, forwards, backwards, warnings, stages = attacked
    predictions, broken, invalid = verified(model, chunk.x, x_adv, chunk.y, eps)
    if invalid:
        warnings = (*warnings, f"{invalid} examples lay outside the ball or [0, 1] and were not counted")
    return {
        "pred": predictions.tolist(), "broken": broken.tolist(), "forwards": forwards + len(chunk.x),
        "backwards": backwards, "warnings": list(warnings), "stages": stages,
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip


def _on_standing(chunk: Chunk, former: dict[str, Any], run: Callable[[Chunk], dict[str, Any]]) -> dict[str, Any]:
    """An attack on whom the former left standing; the others stay as fallen as they were."""
    predictions, broken = np.asarray(former["pred"]), np.asarray(former["broken"])
    standing = np.flatnonzero(~broken)
    entry = {"forwards": 0, "backwards": 0, "warnings": [], "stages": {}, "seconds": 0.0, "pred": [], "broken": []}
    if len(standing):
        entry = run(chunk.part(standing))
    predictions[standing], broken[standing] = entry["pred"], entry["broken"]
    return {**entry, "pred": predictions.tolist(), "broken": broken.tolist()}


@torch.no_grad()
def verified(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """What an attack truly achieved: predictions (N,), broken (N,), and how many examples were not allowed.

    Broken means misclassified by this very model in float32, at a point within eps of x (l-inf) and within [0, 1].
    """
    x_adv = x_adv.to(x)
    predictions: Tensor = model(x_adv).argmax(dim=1)
    far = (x_adv.double() - x.double()).abs().flatten(1).amax(dim=1)
    low, high = x_adv.flatten(1).amin(dim=1), x_adv.flatten(1).amax(dim=1)
    allowed = (far <= eps + TOLERANCE) & (low >= 0) & (high <= 1)  # NaN is in no interval
    return predictions, (predictions != y) & allowed, int((~allowed).sum())


@dataclass(frozen=True)
class Findings:
    """What the ledger's entries say together.

    Attributes:
        table: One row an example: index, label, clean_pred, `<attack>.pred`, `<attack>.broken`.
        stages: For each attack in several stages, how many examples each broke first.
        warnings: Reasons for doubt.
        costs: Forwards, backwards and seconds of each attack.
    """

    table: pd.DataFrame
    stages: dict[str, dict[str, int]]
    warnings: tuple[str, ...]
    costs: dict[str, dict[str, float]]


def _findings(task: Examination, ledger: Ledger) -> Findings:
    rows = task.rows()
    columns: dict[str, Any] = {"index": rows, "label": task.data.y_test[rows].numpy()}
    stages: dict[str, dict[str, int]] = {}
    warnings: dict[str, None] = {}
    costs: dict[str, dict[str, float]] = {}
    for attack in ("clean", *task.protocol.attacks):
        entries = [ledger.entries[c, attack] for c in range(-(-len(rows) // task.chunk))]
        predictions = np.concatenate([np.asarray(e["pred"], dtype=np.int64) for e in entries])
        if attack == "clean":
            columns["clean_pred"] = predictions
            continue
        columns[f"{attack}.pred"] = predictions
        columns[f"{attack}.broken"] = np.concatenate([np.asarray(e["broken"], dtype=bool) for e in entries])
        costs[attack] = {key: sum(e[key] for e in entries) for key in ("forwards", "backwards", "seconds")}
        warnings |= dict.fromkeys(f"{attack}: {w}" for e in entries for w in e["warnings"])
        if named := dict.fromkeys(stage for e in entries for stage in e["stages"]):
            stages[attack] = {stage: sum(e["stages"].get(stage, 0) for e in entries) for stage in named}
    table = pd.DataFrame(columns)
    return Findings(table, stages, (*warnings, *_black_box(stages, len(rows))), costs)


def _black_box(stages: dict[str, dict[str, int]], n: int) -> list[str]:
    """Square, which sees no gradient, breaking what gradients left: AutoAttack's own sign of masking (0.2 points)."""
    more = {attack: broke["square"] for attack, broke in stages.items() if broke.get("square", 0) > max(1, 0.002 * n)}
    return [
        f"{attack}: Square broke {k} of {n} that white-box attacks left: gradients may be masked"
        for attack, k in more.items()
    ]


def collapsed(table: pd.DataFrame) -> bool:
    """Whether the network is no better, on clean examples, than always giving one answer: no defense, whatever stands.

    A constant answer is right for the examples of its class under every attack, and would rank by that.
    """
    right, n = int((table["clean_pred"] == table["label"]).sum()), len(table)
    commonest = table["label"].value_counts().iloc[0] / n
    one_answer = table["clean_pred"].value_counts().iloc[0] / n > 0.99
    return bool(n >= 50 and commonest < 0.9 and (one_answer or wilson(right, n)[0] <= commonest))


def _run(device: torch.device | str, seconds: float, found: Findings, ledger: Ledger) -> dict[str, Any]:
    packages = ("torch", "numpy", "pyautoattack")
    return {
        "fatbench": __version__, "python": platform.python_version(), **{p: version(p) for p in packages},
        "device": named(device), "threads": torch.get_num_threads(), "precision": "float32, TF32 off",
        "seconds": round(seconds, 3), "resumed_steps": ledger.resumed, "attacks": found.costs,
    }  # fmt: skip
