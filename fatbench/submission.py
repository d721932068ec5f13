"""An outside record, looked through before it goes on a board: what is wrong with it, and what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fatbench import protocol
from fatbench.compare import held
from fatbench.errors import Refused
from fatbench.leaderboard import as_on_the_shelf
from fatbench.quantities import TOLERANCE
from fatbench.record import Record, read, read_outcomes


@dataclass(frozen=True)
class Finding:
    """What was found of one file: refused with its reason, or what is missing and what is to be known."""

    path: Path
    refused: str = ""
    missing: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """One line for the file, and one for each thing to say of it."""
        head = f"refused {self.path}: {self.refused}" if self.refused else f"ok      {self.path}"
        return [head, *(f"        missing: {m}" for m in self.missing), *(f"        note: {n}" for n in self.notes)]


def check(paths: Sequence[Path], published: Sequence[Record] = ()) -> list[Finding]:
    """Looks through records: files, or folders of them; and through the adversarial examples kept beside them.

    Args:
        paths: What was submitted.
        published: The records that are on the board already.

    Raises:
        Refused: nothing there to check.
    """
    files = [found for path in paths for found in (sorted(path.rglob("*.json")) if path.is_dir() else [path])]
    if not files:
        raise Refused("no record to check: give .json files that fatbench evaluate wrote, or folders of them")
    known = list(published)
    findings = []
    for path in files:
        try:
            record = read(path)
            as_on_the_shelf(record)
            _is_no_copy(record, known)
            checked = _examples(record, path)
        except Refused as refusal:
            findings.append(Finding(path, refused=str(refusal)))
            continue
        known.append(record)
        findings.append(Finding(path, missing=_missing(record), notes=[*checked, *_notes(record)]))
    return findings


def _is_no_copy(record: Record, known: Sequence[Record]) -> None:
    def about(one: Record) -> tuple[object, ...]:
        network, said = one.result.network, one.protocol
        examined = said.name, said.version, one.result.eps, one.result.data.fingerprint
        return network.fingerprint, network.selection, *examined

    for other in known:
        if other.id == record.id:
            raise Refused(f"a record called {record.id} is on the board" + (", the same" if other == record else ""))
        if about(other) == about(record) and other.result.outcomes == record.result.outcomes:
            raise Refused(f"{other.id} is the same network under the same protocol, with the same outcomes")


def _missing(record: Record) -> list[str]:
    """What keeps a row from standing beside the others, or a reader from judging it."""
    result, lacking = record.result, []
    if result.data.n < result.data.of:
        lacking.append(f"{result.data.of - result.data.n} of {result.data.of} test examples: examine without --n")
    if record.protocol.name in protocol.shelf():
        known = protocol.load(record.protocol.name)
        absent = [attack for attack in known.attacks if attack not in record.protocol.attacks]
        lacking += [f"{', '.join(absent)}, which {known.name} has: such a row is not ranked"] if absent else []
    else:
        lacking.append(f"a protocol that others can follow: {record.protocol.name} is none of fatbench list protocols")
    if result.bound:
        lacking.append("what its upper bound left out: examine with --tier full; such a row is not ranked")
    if "autoattack" not in record.attacks:
        lacking.append("AutoAttack: the only check of masked gradients")
    if not result.network.settings:
        lacking.append("how it was trained: defense, settings and seed are unknown, and it is its own contestant")
    elif record.training is None:
        lacking.append("what training took: examine the run's folder, which holds its metrics.jsonl")
    return lacking


def _notes(record: Record) -> list[str]:
    result, said = record.result, list(record.result.warnings)
    if record.protocol.name in protocol.shelf():
        theirs, ours = record.protocol.version, protocol.load(record.protocol.name).version
        if ours != theirs:
            said.append(f"its protocol is {record.protocol.name} v{theirs}, today's v{ours}: a table of its own")
    if result.network.status != "done" or result.collapsed:
        said.append("it will stand as failed or unfinished, without a number")
    return said


def _examples(record: Record, path: Path) -> list[str]:
    """Holds the adversarial examples beside a record to it: who counts as broken lies in the ball and in [0, 1]."""
    from fatbench import data, evidence

    kept = evidence.path(path.parent, record.id)
    if not kept.exists():
        return []
    tensors, header = evidence.read(kept)
    if record.result.outcomes not in header.get("fatbench", "") or not {"x_adv", "index"} <= tensors.keys():
        raise Refused(f"{kept} holds the examples of another record, or none")
    try:
        loaded = data.load(record.result.data.name)
    except Refused as absent:
        return [f"its adversarial examples were not looked at: {absent}"]
    outcomes = read_outcomes(path.with_suffix(".parquet"))
    if loaded.fingerprint("test") != record.result.data.fingerprint:
        raise Refused(f"{path} was examined on another {record.result.data.name} than the one here")
    if not outcomes["index"].between(0, len(loaded.x_test) - 1).all():
        raise Refused(f"{path} tells of test examples that {record.result.data.name} does not have")
    x_adv, clean = tensors["x_adv"].numpy(), loaded.x_test.numpy()[outcomes["index"]]
    if x_adv.shape != clean.shape or tensors["index"].tolist() != outcomes["index"].tolist():
        raise Refused(f"{kept} holds {x_adv.shape}, and not one example for each of the record's {clean.shape}")
    broken = ~held(record, outcomes, record.attacks)["worst"].to_numpy()
    if not _allowed(x_adv[broken].astype(np.float64), clean[broken].astype(np.float64), record.result.eps_value):
        raise Refused(f"{kept}: who counts as broken lies outside the ball of {record.result.eps} or [0, 1]")
    return ["its adversarial examples lie in the ball and in [0, 1]; fatbench verify counts them again"]


def _allowed(x: np.ndarray, clean: np.ndarray, eps: float) -> bool:
    inside = (x >= 0) & (x <= 1) & (np.abs(x - clean) <= eps + TOLERANCE)  # NaN is in no interval
    return bool(inside.all())
