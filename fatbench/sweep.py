"""Many runs from one grid: the product of its values, a job each, done by workers here or by a cluster's scheduler.

A grid is a recipe whose `[sweep]` may name defenses too, with `[evaluate]` for what is done with a finished run:

    dataset = "digits"
    epochs = 15
    [sweep]
    defense = ["madry", "fat"]
    seed = [0, 1, 2]
    tau = [0, 1]          # a field of fat alone: madry has one run for each seed
    [evaluate]
    attacks = ["fgsm", "pgd-20"]
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fatbench import console, job, recipe, runs
from fatbench.errors import Refused, RunFailed
from fatbench.files import digest, disk, write_json, write_text
from fatbench.job import STATES, Examine, standing
from fatbench.protocol import told
from fatbench.recipe import Settings

PAUSE = 0.2  # seconds between looks at the workers
TOGETHER = 8  # jobs that a process does at most: to start one takes as long as a short run
Start = Callable[[Sequence[Path], str], list[str]]


class Grid(NamedTuple):
    """A grid's runs by name, and what is done with each when it is finished."""

    points: dict[str, Settings]
    examine: Examine


def expand(grid: str) -> Grid:
    """A grid file's runs, or a recipe's: every combination of the swept values.

    A field that a contestant does not have is left out for it.

    Raises:
        Refused: no such file, a key or value that does not fit, or a swept field that no contestant has.
    """
    path = recipe.file_of(grid)
    said = recipe.said_in(path)
    own = said.pop("evaluate", {})
    swept, fixed = said.get("sweep", {}).pop("defense", None), said.pop("defense", "")
    if swept and fixed:
        raise Refused(f"the grid {path} both sets and sweeps defense: keep one")
    defenses = swept or [fixed]
    page = recipe.page_of(said, path)
    try:
        examine = Examine.model_validate(own or {"protocols": page.protocols})
    except ValidationError as error:
        raise Refused(f"the grid {path}: evaluate: {told(error)}") from None
    points: dict[str, Settings] = {}
    used: set[str] = set()
    for defense in defenses:
        axes = {key: values for key, values in page.sweep.items() if _has(defense, key)}
        used |= axes.keys()
        for values in product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            points[_name(defense, point)] = _settings(defense, page, point)
    if idle := page.sweep.keys() - used:
        raise Refused(f"the grid {path} sweeps {sorted(idle)[0]}, which none of {', '.join(defenses)} has")
    for key in page.settings.get("fields", {}):
        if not any(_has(defense, key) for defense in defenses):
            raise Refused(f"the grid {path} sets the field {key}, which none of {', '.join(defenses)} has")
    return Grid(points, examine)


def _has(defense: str, key: str) -> bool:
    from fatbench.defense import settings_of
    from fatbench.registry import defenses

    return key in Settings.model_fields or key in settings_of(defenses[str(defense).replace("_", "-")])


def _settings(defense: str, page: recipe.Recipe, point: dict[str, Any]) -> Settings:
    options = {key: value for key, value in page.settings.items() if key != "fields"}
    options |= {"source": page.source} if page.source else {}
    fields = {key: value for key, value in page.settings.get("fields", {}).items() if _has(defense, key)}
    for key, value in point.items():
        (options if key in Settings.model_fields else fields)[key] = value
    return recipe.resolve(defense, fields=fields, **options)


def _name(defense: str, point: dict[str, Any]) -> str:
    """A folder's name: fat-seed0-tau1."""
    plain = re.sub(r"[^A-Za-z0-9.-]+", "_", "-".join([defense, *(f"{key}{value}" for key, value in point.items())]))
    return plain if len(plain) <= 80 else f"{plain[:70]}-{digest([defense, list(point.items())])[:8]}"


def prepare(grid: Grid, out: Path) -> list[Path]:
    """A folder for each job in `out`; those that are there already stay as they are.

    Raises:
        Refused: `out` holds something else, or a job of another grid under the same name.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "jobs").is_dir():
        raise Refused(f"{out} holds something else and no sweep: choose another --out")
    folders = {out / "jobs" / name: settings for name, settings in grid.points.items()}
    for folder, settings in folders.items():
        if not (folder / "settings.toml").exists():
            continue
        changed = recipe.difference(runs.settings_in(folder), settings)
        if not changed and job.examine_in(folder) != grid.examine:
            changed = "other examinations"
        if changed:
            raise Refused(f"{folder} is a job of another grid ({changed}): choose another --out")
    for folder, settings in folders.items():
        if (folder / "settings.toml").exists():
            continue
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "examine.json", grid.examine.model_dump(mode="json"))
        write_text(folder / "settings.toml", settings.toml())
    return list(folders)


def jobs_in(out: Path) -> list[Path]:
    """The jobs of a sweep."""
    folders = sorted(path.parent for path in (out / "jobs").glob("*/settings.toml"))
    if not folders:
        raise Refused(f"no sweep at {out}: fatbench sweep GRID.toml --out {out} makes one")
    return folders


def open_jobs(folders: Sequence[Path]) -> list[Path]:
    """Those that are to be launched: neither done nor running."""
    return [folder for folder in folders if standing(folder).state in ("not launched", "failed")]


def command(folders: Sequence[Path], device: str = "auto") -> list[str]:
    """What does some jobs, here or on a cluster."""
    return [
        "fatbench",
        "job",
        *(str(folder.resolve()) for folder in folders),
        *(["--device", device] if device != "auto" else []),
    ]


def printed(folders: Sequence[Path], device: str) -> str:
    """The commands of all that is to be launched, a line each; they go here first, for paths in the grid."""
    here = shlex.quote(str(Path.cwd()))
    return "\n".join(f"cd {here} && {shlex.join(command([folder], device))}" for folder in open_jobs(folders))


class _Process(NamedTuple):
    """A process at its jobs, one after the other; it runs on a device of its own."""

    slot: int
    jobs: list[Path]
    popen: subprocess.Popen[bytes]


def work_through(folders: Sequence[Path], workers: int, devices: Sequence[str], start: Start | None = None) -> None:
    """Does all open jobs, `workers` at a time, in processes of their own, worker i on device i.

    Where many wait a process does several, one after the other.

    Raises:
        RunFailed: some failed; the others are done.
    """
    waiting = open_jobs(folders)
    free, busy = list(range(workers)), list[_Process]()
    done = len(folders) - len(waiting)
    try:
        with console.waiting("sweep", len(folders), done=done, every=0) as bar:
            while waiting or busy:
                while waiting and free:
                    slot, jobs = free.pop(0), _share(waiting, workers)
                    busy.append(
                        _Process(slot, jobs, _launch(start or _here, jobs, devices[slot % len(devices)], workers))
                    )
                time.sleep(PAUSE)
                for process in [process for process in busy if process.popen.poll() is not None]:
                    busy.remove(process)
                    free.append(process.slot)
                    left = _write_off(process)
                    waiting[:0] = left
                    for folder in process.jobs[: len(process.jobs) - len(left)]:
                        bar.advance(f"{folder.name} {standing(folder).state}")
    finally:
        for process in busy:  # of an interruption: each writes down that it was
            process.popen.terminate()  # where a sweep runs in the background, its children are deaf to Ctrl-C
        for process in busy:
            process.popen.wait()
    if left := [folder for folder in folders if standing(folder).state != "done"]:
        raise RunFailed(
            f"{len(left)} of {len(folders)} runs are not done: fatbench status {folders[0].parents[1]} says why; the "
            "same command launches them again"
        )


def _share(waiting: list[Path], workers: int) -> list[Path]:
    """Takes a process's jobs from those that wait: so few that at the end nobody waits long for the last process."""
    many = max(1, min(TOGETHER, len(waiting) // (4 * workers)))
    own, waiting[:] = waiting[:many], waiting[many:]
    return own


def _here(folders: Sequence[Path], device: str) -> list[str]:
    return [sys.executable, "-m", *command(folders, device)]


def _launch(start: Start, folders: Sequence[Path], device: str, workers: int) -> subprocess.Popen[bytes]:
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    own = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}  # not one of SLURM's tasks
    with (folders[0] / "log.txt").open("ab") as log:
        return subprocess.Popen(start(folders, device), stdout=log, stderr=log, env={**threads, **own})


def _write_off(process: _Process) -> list[Path]:
    """Says what the job at which a process died could not say itself; the jobs that the process never came to."""
    code, unsaid = process.popen.returncode, [f for f in process.jobs if job.noted(f) in ("not launched", "running")]
    if not code or not unsaid:
        return []
    log = (process.jobs[0] / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = log[-1] if log else f"exit code {code}"
    job.note(unsaid[0], "failed", reason=f"killed by {signal.Signals(-code).name}" if code < 0 else said)
    return unsaid[1:]


def report(folders: Sequence[Path]) -> str:
    """How a sweep stands: a count of each state, and a line for every job, those that want attention first."""
    found = {folder.name: standing(folder) for folder in folders}
    counts = Counter(one.state for one in found.values())
    order = ("failed", "running", "not launched", "done")
    width = max(map(len, found))
    lines = [
        f"{state:<12}  {name:<{width}}  {one.said}".rstrip()
        for state in order
        for name, one in found.items()
        if one.state == state
    ]
    head = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return "\n".join([f"{len(folders)} runs: {head}", *lines])
