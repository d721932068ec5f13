"""Checkpoint x protocol -> record: every attack on the same fixed chunks, every counted example verified.

The chunk is the unit of work and of sharding, a step (an attack on a chunk, or one stage of it) that of resume:
outcomes go to `ID.partial.jsonl` as they come, and an examination that was killed goes on to the same `result`.
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
import torch
from torch import Tensor, nn

from fatbench import __version__, console
from fatbench.attacks import crafting
from fatbench.checkpoint import Subject
from fatbench.data import Data, balanced_order
from fatbench.errors import Refused, first_line
from fatbench.evaluation import Attacked, Chunk, Evaluation, Staged, examiner, verified
from fatbench.files import digest, disk, locked
from fatbench.findings import Findings, collapsed, gathered
from fatbench.ledger import Ledger, Step
from fatbench.protocol import Protocol, budget_of
from fatbench.quantities import number
from fatbench.record import Record, count, outcomes_hash, read, write


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

    def course(self) -> list[tuple[str, str]]:
        """The (attack, stage) of each step on a chunk, in order; the first looks at the clean images."""
        attacks = {name: one.stages(self.data.classes) or ("",) for name, one in self.examiners().items()}
        return [(attack, stage) for attack, stages in {"clean": ("",), **attacks}.items() for stage in stages]

    def former(self, step: Step) -> Step | None:
        """The step whose survivors this one is given; None where it is given everyone."""
        course = self.course()
        here = course.index((step.attack, step.stage))
        if not here or not (step.stage or self.protocol.standing):
            return None
        first = step.stage and course[here - 1][0] != step.attack and not self.protocol.standing
        return Step(step.chunk, *course[0 if first else here - 1])

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
        record = write(out, _said(ident, plan, found, run), found.table)
        ledger.close()
        return record


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


def _examine(task: Examination, model: nn.Module, ledger: Ledger, device: torch.device | str) -> None:
    rows, examiners = task.rows(), task.examiners()
    parts = [rows[first : first + task.chunk] for first in range(0, len(rows), task.chunk)]
    steps = [Step(c, *what) for c in range(len(parts)) for what in task.course()]
    left = [step for step in steps if step not in ledger.entries]
    if ledger.resumed and left:
        console.stderr.print(f"resuming at {left[0]}: {ledger.resumed} of {len(steps)} steps are done", soft_wrap=True)
    chunk: Chunk | None = None
    current = -1
    with console.waiting(f"examining {task.data.info.name}", len(steps), done=len(steps) - len(left)) as bar:
        for step in left:
            if chunk is None or current != step.chunk:
                chunk, current = _chunk(task, parts[step.chunk], device), step.chunk
            run = partial(
                _attacked, model, examiner=examiners.get(step.attack), step=step, eps=task.eps_of(step.attack)
            )
            former = task.former(step)
            ledger.add(step, *(run(chunk) if former is None else _on_standing(chunk, ledger.entries[former], run)))
            bar.advance(f"{step} (of {len(parts)})")


def _chunk(task: Examination, rows: np.ndarray, device: torch.device | str) -> Chunk:
    x = task.data.x_test[rows].contiguous().to(device, torch.float32)
    return Chunk(x, task.data.y_test[rows].to(device, torch.int64), rows, task.data.classes, task.seed)


Outcome = tuple[dict[str, Any], Tensor]


def _attacked(model: nn.Module, chunk: Chunk, examiner: Evaluation | None, step: Step, eps: float) -> Outcome:
    """One step on one chunk: its entry (predictions, whom it broke), and the examples that did."""
    began = time.perf_counter()
    if examiner is None:
        attacked = Attacked(chunk.x, 0, 0)
    elif isinstance(examiner, Staged):
        attacked = examiner.stage(step.stage, model, chunk, eps)
    else:
        attacked = examiner.attack(model, chunk, eps)
    x_adv, forwards, backwards, warnings = attacked
    predictions, broken, invalid = verified(model, chunk.x, x_adv, chunk.y, eps)
    if invalid:
        warnings = (*warnings, f"{invalid} examples lay outside the ball or [0, 1] and were not counted")
    entry = {
        "pred": predictions.tolist(), "broken": broken.tolist(), "fell": broken.nonzero().squeeze(1).tolist(),
        "forwards": forwards + len(chunk.x), "backwards": backwards, "warnings": list(warnings),
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    return entry, x_adv[broken]


def _on_standing(chunk: Chunk, former: dict[str, Any], run: Callable[[Chunk], Outcome]) -> Outcome:
    """A step on whom the former left standing; the others stay as fallen as they were."""
    predictions, broken = np.asarray(former["pred"]), np.asarray(former["broken"])
    standing = np.flatnonzero(~broken)
    if not len(standing):
        idle = {"fell": [], "forwards": 0, "backwards": 0, "warnings": [], "seconds": 0.0}
        return {"pred": former["pred"], "broken": former["broken"], **idle}, chunk.x[:0]
    entry, examples = run(chunk.part(standing))
    predictions[standing], broken[standing] = entry["pred"], entry["broken"]
    fell = standing[entry["fell"]].tolist()
    return {**entry, "pred": predictions.tolist(), "broken": broken.tolist(), "fell": fell}, examples


def _findings(task: Examination, ledger: Ledger) -> Findings:
    rows = task.rows()
    stages = {name: one.stages(task.data.classes) for name, one in task.examiners().items()}
    return gathered(ledger, rows, task.data.y_test[rows].numpy(), stages)


def _run(device: torch.device | str, seconds: float, found: Findings, ledger: Ledger) -> dict[str, Any]:
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or platform.machine()
    packages = ("torch", "numpy", "pyautoattack")
    return {
        "fatbench": __version__, "python": platform.python_version(), **{p: version(p) for p in packages},
        "device": f"{kind.type} ({name})", "threads": torch.get_num_threads(), "precision": "float32, TF32 off",
        "seconds": round(seconds, 3), "resumed_steps": ledger.resumed, "attacks": found.costs,
    }  # fmt: skip
