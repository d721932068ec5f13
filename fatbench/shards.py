"""An examination by several processes: chunks dealt out by index, a ledger for each rank, one record in the end.

Nothing is padded, no example is attacked twice, and nobody waits for anybody while attacking. A chunk's outcome does
not depend on who attacks it, so the `result` is that of one process; how many there were is told under `run`.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

from fatbench.asked import Network, asked
from fatbench.evaluate import State, evaluate
from fatbench.examination import Examination
from fatbench.examine import examine, fitting
from fatbench.files import disk, locked, read_lines
from fatbench.ledger import Ledger, Step
from fatbench.record import Record
from fatbench.team import Team

# Ranks meet when the slowest has attacked its last chunk, which may be days after the first.
PATIENCE = timedelta(days=30)


def examine_as_asked(
    fabric: Fabric, network: Network, options: dict[str, Any], out: Path, keep_examples: bool = False
) -> Record:
    """What every rank does: its chunks; the first one merges them and writes the record.

    Args:
        network, options: As fatbench.asked takes them: every rank loads its own.
        out, keep_examples: As `evaluate` takes them; all nodes see `out`.

    Raises:
        Refused: what `asked` and `evaluate` refuse, on every rank alike.
    """
    team, began = Team(fabric), time.perf_counter()
    with team.together():
        wanted = team.in_turn(partial(asked, network, **options))
    if team.size > 1:
        _share_out(team, wanted.task, out, keep_examples)
    record: Record | None = None
    with team.together():
        if team.first:
            shared = {"ranks": team.size, "seconds": round(time.perf_counter() - began, 3)} if team.size > 1 else {}
            record = evaluate(
                wanted.task, out, device=fabric.device, keep_examples=keep_examples, source=wanted.source, shared=shared
            )
    record = fabric.broadcast(record)
    assert record is not None
    return record


def _share_out(team: Team, task: Examination, out: Path, keep_examples: bool) -> None:
    """Carries out all steps into one ledger, from which the record can be written."""
    state = State.of(task, out)
    if team.fabric.broadcast(bool(state.failed or state.finished(keep_examples))):  # one look, or ranks might differ
        return
    with ExitStack() as held:
        with team.together():
            model = fitting(task, team.fabric.device)
            if team.first:
                with disk(out):
                    out.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(out / f".{state.name}.ranks.lock", f"on {out / state.name}.json"))
                _merge(state, keep_examples)  # what an earlier attempt left, on however many ranks
        with team.together():
            mine = Ledger(_part(state.ledger, team.rank), state.digest, evidence=keep_examples)
            mine.entries |= {Step(e["chunk"], e["attack"], e["stage"]): e for e in read_lines(state.ledger)[1:]}
            examine(task, model, mine, team.fabric.device, share=(team.rank, team.size))
        with team.together():
            if team.first:
                _merge(state, keep_examples)


def _part(ledger: Path, rank: int | str) -> Path:
    return ledger.with_name(f"{ledger.stem}-{rank}.jsonl")


def _merge(state: State, keep_examples: bool) -> None:
    """The ranks' ledgers into one; they are gone afterwards."""
    whole = Ledger(state.ledger, state.digest, evidence=keep_examples)
    for path in sorted(state.ledger.parent.glob(_part(state.ledger, "*").name)):
        part = Ledger(path, state.digest, evidence=keep_examples)
        for step, entry in part.entries.items():
            if step not in whole.entries:
                kept = keep_examples and entry.get("fell")
                whole.add(step, entry, part.examples(step) if kept else torch.empty(0))
        part.close()
