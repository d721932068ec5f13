"""One run of a sweep: trained, then examined, in a folder that tells its state to whoever looks. No torch.

The folder holds settings.toml (a recipe), examine.json, state.json, log.txt and run/. A job writes its own state, so
that it may be started by a sweep's worker, by a cluster's scheduler or by hand; who it was and that it lives is told by
its process and by the lock it holds.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fatbench import runs
from fatbench.errors import Refused, RunFailed, first_line
from fatbench.files import locked, read_json, read_lines, write_json
from fatbench.quantities import Eps, Precision

STATES = ("not launched", "running", "failed", "done")


class Examine(BaseModel):
    """What a sweep does with a finished run: `[evaluate]`. Nothing where neither protocols nor attacks are named."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    protocols: tuple[str, ...] = Field(default=(), description="by name, or a .toml")
    attacks: tuple[str, ...] = Field(default=(), description="fgsm, pgd-20, ... under the house protocol")
    eps: Eps | None = Field(default=None, description="the protocol's, or the run's, unless given")
    n: int | None = Field(default=None, ge=1, description="the first n test examples")
    balanced: bool = Field(default=False, description="n test examples, each class at its share, instead")
    seed: int = Field(default=0, ge=0, description="of random starts")
    attack_precision: Precision = Field(
        default="float32", description="what attacks are made in; every success is verified in float32"
    )

    @model_validator(mode="after")
    def _draws_some(self) -> Examine:
        if self.balanced and self.n is None:
            raise ValueError("balanced draws n of the test examples: give n too")
        return self


class Standing(NamedTuple):
    """How a job stands.

    Attributes:
        state: One of STATES. A job whose process is gone before it was through has failed.
        said: How far a running one is; why a failed one failed.
    """

    state: str
    said: str = ""


def standing(folder: Path) -> Standing:
    """A job's state, from its folder alone."""
    if not (folder / "state.json").exists():
        return Standing("not launched")
    note = read_json(folder / "state.json", "job's state")
    if note["state"] != "running":
        return Standing(note["state"], note.get("reason", ""))
    far = f"{len(read_lines(folder / 'run' / 'metrics.jsonl'))} of {runs.settings_in(folder).epochs} epochs done"
    if _held(folder / ".lock"):
        return Standing("running", f"process {note['pid']} on {note['host']}, {far}")
    return Standing("failed", f"killed: process {note['pid']} on {note['host']} is gone, {far}")


def examine_in(folder: Path) -> Examine:
    """What is done with a job's run when it is finished."""
    return Examine.model_validate(read_json(folder / "examine.json", "list of examinations"))


def _held(path: Path) -> bool:
    if not path.exists():
        return False
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def noted(folder: Path) -> str:
    """A job's state as it was last written, whether or not its process still lives."""
    path = folder / "state.json"
    return str(read_json(path, "job's state")["state"]) if path.exists() else "not launched"


def note(folder: Path, state: str, **more: Any) -> None:
    """Writes a job's state down."""
    write_json(folder / "state.json", {"state": state, "pid": os.getpid(), "host": socket.gethostname(), **more})


def carry_out(folder: Path, work: Callable[[Path], object]) -> None:
    """Does a job's work and keeps its state; a job that is done already is not done again.

    Raises:
        Refused: another process is at this job, or no job is here. Whatever `work` raises, once it is written down.
    """
    if not (folder / "settings.toml").exists():
        raise Refused(f"{folder} holds no job: fatbench sweep GRID.toml --print lists them")
    with locked(folder / ".lock", f"at the job {folder}"):
        if standing(folder).state == "done":
            return
        note(folder, "running")
        try:
            work(folder)
        except BaseException as error:
            note(folder, "failed", reason=_reason(error))
            raise
        note(folder, "done")


def in_turn(folders: Sequence[Path], work: Callable[[Path], object]) -> None:
    """Several jobs, one after the other, each telling its own log.txt; one that fails stops nobody else.

    Raises:
        RunFailed: some failed, or were refused; each has written down why.
    """
    failed = 0
    for folder in folders:
        with (folder / "log.txt").open("a", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
            try:
                carry_out(folder, work)
            except (Refused, RunFailed) as error:
                failed += 1
                log.write(f"fatbench: {error}\n")
            except Exception:  # the next job is another run: what broke this one need not break it
                failed += 1
                traceback.print_exc()
    if failed:
        raise RunFailed(f"{failed} of {len(folders)} jobs failed: the log.txt of each says why")


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return str(error) if isinstance(error, (Refused, RunFailed)) else f"{type(error).__name__}: {first_line(error)}"


def train_and_examine(folder: Path, device: str) -> None:
    """A job's work: trains, going on where an earlier attempt was stopped; writes records beside the sweep's jobs/.

    A training that failed has its records too, which say so and hold no number: a board without them would show the
    seeds that survived.
    """
    from fatbench import trainer

    run, settings, records = folder / "run", runs.settings_in(folder), folder.resolve().parents[1] / "records"
    # A run that has failed stays failed when it is resumed; who launches its job again wants it tried again.
    again = runs.failed(run)
    try:
        trainer.train(settings, run, device=device, devices=settings.ranks, resume=not again, force=again)
    except RunFailed:
        if runs.failed(run):
            _examine(folder, records, device)
        raise
    _examine(folder, records, device)


def _examine(folder: Path, records: Path, device: str) -> None:
    for examination in _examinations(examine_in(folder), folder / "run"):
        from fatbench import devices, evaluate

        evaluate.evaluate(examination, records, device=devices.fabric_on(device).device)


def _examinations(examine: Examine, run: Path) -> list[Any]:
    from fatbench import checkpoint, data, protocol
    from fatbench.evaluate import Examination

    asked = [protocol.load(name) for name in examine.protocols]
    asked += [protocol.load(protocol.DEFAULT).only(examine.attacks)] if examine.attacks else []
    if not asked:
        return []
    subject = checkpoint.load(run)
    trained = subject.meta["settings"]
    loaded = data.load(trained["dataset"])
    how = examine.model_dump(include={"n", "balanced", "seed", "attack_precision"})
    return [Examination(subject, loaded, said, examine.eps or said.eps or trained["eps"], **how) for said in asked]
