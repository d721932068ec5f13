"""Checkpoint x protocol -> record: every attack on the same fixed chunks, every counted example verified.

The chunk is the unit of work and of sharding, a step (an attack on a chunk, or one stage of it) that of resume:
outcomes go to `ID.partial.jsonl` as they come, and an examination that was killed goes on to the same `result`.
"""

from __future__ import annotations

import platform
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
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
from fatbench.protocol import Protocol
from fatbench.quantities import number
from fatbench.record import Record, count, outcomes_hash, read, write


@dataclass(frozen=True)
class Examination:
    """All that decides a result: subject, data, protocol, budget, which examples, seed.

    Attributes:
        eps: As published.
        n: The first n test examples; all where None.
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
        n = total if self.n is None else self.n
        if not 1 <= n <= total:
            raise Refused(f"--n {n}: {self.data.info.name} has {total} test examples")
        if not self.balanced or n == total:
            return np.arange(n)
        return np.sort(balanced_order(self.data.y_test.numpy(), "examined")[:n])

    def examiners(self) -> dict[str, Evaluation]:
        return {name: examiner(name, self.protocol.settings_for(name)) for name in self.protocol.attacks}

    def plan(self) -> dict[str, Any]:
        """Everything the result depends on, as plain JSON: its digest is the record's id."""
        protocol = self.protocol.model_dump(mode="json", include={"name", "version", "source"})
        attacks = {name: {"family": e.name, **asdict(e)} for name, e in self.examiners().items()}
        rows = self.rows()
        rule = "all" if len(rows) == len(self.data.y_test) else "balanced" if self.balanced else "first"
        samples = {
            "name": self.data.info.name, "fingerprint": self.data.fingerprint("test"), "shape": self.data.shape,
            "classes": self.data.classes, "n": len(rows), "of": len(self.data.y_test), "rule": rule,
        }  # fmt: skip
        return {
            "protocol": {**protocol, "attacks": attacks}, "network": _network(self.subject), "data": samples,
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
    steps = _steps(len(parts), task)
    left = [step for step in steps if step not in ledger.entries]
    if ledger.resumed and left:
        console.stderr.print(f"resuming at {left[0]}: {ledger.resumed} of {len(steps)} steps are done", soft_wrap=True)
    chunk: Chunk | None = None
    current = -1
    with console.waiting(f"examining {task.data.info.name}", len(steps), done=len(steps) - len(left)) as bar:
        for step in left:
            if chunk is None or current != step.chunk:
                chunk, current = _chunk(task, parts[step.chunk], device), step.chunk
            ledger.add(step, *_done(step, model, chunk, examiners.get(step.attack), number(task.eps), ledger))
            bar.advance(f"{step} (of {len(parts)})")


def _steps(chunks: int, task: Examination) -> list[Step]:
    """All that is to be done, in order: chunk by chunk, so that what a kill leaves is whole chunks."""
    attacks = {name: one.stages(task.data.classes) or ("",) for name, one in task.examiners().items()}
    return [Step(c, a, s) for c in range(chunks) for a, stages in {"clean": ("",), **attacks}.items() for s in stages]


def _chunk(task: Examination, rows: np.ndarray, device: torch.device | str) -> Chunk:
    x = task.data.x_test[rows].contiguous().to(device, torch.float32)
    return Chunk(x, task.data.y_test[rows].to(device, torch.int64), rows, task.data.classes, task.seed)


def _done(
    step: Step, model: nn.Module, chunk: Chunk, examiner: Evaluation | None, eps: float, ledger: Ledger
) -> tuple[dict[str, Any], Tensor]:
    """A step's entry, and the examples it broke."""
    if isinstance(examiner, Staged):
        return _staged(model, chunk, examiner, step.stage, _standing(step, chunk, examiner, ledger), eps)
    return _attacked(model, chunk, step.attack, examiner, eps)


def _standing(step: Step, chunk: Chunk, examiner: Staged, ledger: Ledger) -> Tensor:
    """(M,) the positions in a chunk of those whom neither the clean image nor an earlier stage misled."""
    clean = torch.tensor(ledger.entries[Step(step.chunk, "clean")]["pred"], device=chunk.y.device)
    stands = clean == chunk.y
    stages = examiner.stages(chunk.classes)
    for earlier in stages[: stages.index(step.stage)]:
        stands[ledger.entries[step._replace(stage=earlier)]["fell"]] = False
    return stands.nonzero().squeeze(1)


def _attacked(
    model: nn.Module, chunk: Chunk, name: str, examiner: Evaluation | None, eps: float
) -> tuple[dict[str, Any], Tensor]:
    """One attack on one chunk: predictions, and whom it broke."""
    began = time.perf_counter()
    attacked = Attacked(chunk.x, 0, 0) if examiner is None else examiner.attack(model, chunk, eps)
    predictions, broken, said = _judged(model, chunk, attacked, eps, began)
    return {"pred": predictions.tolist(), "broken": broken.tolist(), **said}, attacked.x_adv[broken]


def _staged(
    model: nn.Module, chunk: Chunk, examiner: Staged, stage: str, standing: Tensor, eps: float
) -> tuple[dict[str, Any], Tensor]:
    """One stage on whom the former left standing in a chunk: who fell, and what they are now taken for."""
    began, part = time.perf_counter(), chunk.part(standing)
    attacked = examiner.stage(stage, model, part, eps) if len(standing) else Attacked(part.x, 0, 0)
    predictions, broken, said = _judged(model, part, attacked, eps, began)
    return {"fell": standing[broken].tolist(), "pred": predictions[broken].tolist(), **said}, attacked.x_adv[broken]


def _judged(
    model: nn.Module, chunk: Chunk, attacked: Attacked, eps: float, began: float
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """What an attack achieved, verified: predictions, broken, and what its entry says beside."""
    x_adv, forwards, backwards, warnings = attacked
    if not len(chunk.x):
        nobody = torch.zeros(0, dtype=torch.int64)
        predictions, broken, invalid = nobody, nobody.bool(), 0
    else:
        predictions, broken, invalid = verified(model, chunk.x, x_adv, chunk.y, eps)
    if invalid:
        warnings = (*warnings, f"{invalid} examples lay outside the ball or [0, 1] and were not counted")
    return predictions, broken, {
        "forwards": forwards + len(chunk.x), "backwards": backwards, "warnings": list(warnings),
        "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip


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
