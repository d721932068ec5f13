"""The paper's experiments carried out: what is not recorded yet is trained and examined, then every claim is judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing import get_context
from os import cpu_count
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import set_num_threads

from fatbench import data, recipe, sweep
from fatbench.catalogue import described
from fatbench.console import stderr, waiting
from fatbench.errors import Refused
from fatbench.files import canonical, read_json, write_text
from fatbench.job import Examine
from fatbench.paper.claims import Finding
from fatbench.paper.contestants import World
from fatbench.paper.experiments import EXPERIMENTS, SAME
from fatbench.paper.names import number
from fatbench.paper.pictures import PICTURES
from fatbench.paper.pool import Pool
from fatbench.recipe import Settings

Scale = Literal["laptop", "paper"]
SEEDS = 3
# Its name -> what it trains, what it is examined under, whether that is recorded already.
Points = dict[str, tuple[Settings, tuple[str, ...]]]


# ------------------------------------------------------------------------------------------------ at laptop scale


def missing(said: Sequence[str], pool: Pool, seeds: int) -> Points:
    """The runs that these experiments ask for and no record tells of, by the names of their jobs.

    A run that several of them ask for is trained once, and examined under what any of them wants.
    """
    wanted: dict[tuple[Any, int], dict[str, None]] = {}
    for name in said:
        own = EXPERIMENTS.get(SAME.get(name, name))
        for whom, attacks in own.everybody(pool.world).items() if own else ():
            for seed in range(seeds):
                wanted.setdefault((whom, seed), {}).update(dict.fromkeys(attacks))
    found: Points = {}
    for (whom, seed), asked in wanted.items():
        if left := pool.missing(whom, seed, list(asked)):
            kind = (
                "whole" if "autoattack" in left else "second" if any("@" in attack for attack in left) else "gradient"
            )
            found[f"{whom.slug}-seed{seed}-{kind}"] = whom.settings(pool.world, seed), tuple(left)
    return found


def carry_out(points: Points, here: World, out: Path, workers: int, devices: Sequence[str]) -> None:
    """Trains and examines, `workers` at a time; goes on where it was stopped.

    Raises:
        RunFailed: some failed; the others are done.
    """
    (out / "jobs").mkdir(parents=True, exist_ok=True)
    folders = []
    for attacks in dict.fromkeys(attacks for _, attacks in points.values()):
        own = {name: settings for name, (settings, theirs) in points.items() if theirs == attacks}
        examine = Examine(attacks=attacks, eps=here.eps, attack_precision=here.attack_precision)
        folders += sweep.prepare(sweep.Grid(own, examine), out)
    if folders:
        sweep.work_through(folders, workers, devices)


def lay(here: World, dataset: str) -> None:
    """Lays a user's file by as the world's data, under its name."""
    if described(dataset).shape is None:
        data.keep(here.dataset, dataset)


class _Task(NamedTuple):
    """One seed of a picture."""

    name: str
    seed: int
    dataset: str
    scale: Scale
    path: Path


def measure(said: Sequence[str], dataset: str, scale: Scale, seeds: int | None, out: Path, workers: int = 1) -> None:
    """The experiments that are pictures: a file of evidence for each seed, left alone where it is there."""
    todo = [
        _Task(name, seed, dataset, scale, path)
        for name in said
        if name in PICTURES
        for seed in range(seeds or PICTURES[name].seeds)
        if not (path := out / "evidence" / f"{name}-seed{seed}.json").exists()
    ]
    if not todo:
        return
    with waiting("measuring", len(todo)) as bar, ExitStack() as held:
        found: Iterable[_Task] = map(_measured, todo)
        if workers > 1:
            spawned = get_context("spawn").Pool(workers, set_num_threads, (max(1, (cpu_count() or 1) // workers),))
            found = held.enter_context(spawned).imap_unordered(_measured, todo)
        for task in found:
            bar.advance(f"{task.name}, seed {task.seed}")


def _measured(task: _Task) -> _Task:
    found = PICTURES[task.name].measured(task.dataset, task.seed, task.scale)
    write_text(task.path, canonical(found) + "\n")
    return task


def evidence(name: str, folders: Sequence[Path]) -> list[dict[str, Any]]:
    """What was measured for a picture, of every seed; the first folder that has a seed is taken."""
    found: dict[int, list[dict[str, Any]]] = {}
    for folder in folders:
        for path in sorted((folder / "evidence").glob(f"{name}-seed*.json")):
            found.setdefault(int(path.stem.rpartition("seed")[2]), read_json(path, "evidence"))
    return [one for seed in sorted(found) for one in found[seed]]


# ------------------------------------------------------------------------------------------------ verdicts


def findings(said: Sequence[str], pool: Pool, folders: Sequence[Path]) -> Iterator[Finding]:
    """What is found of every claim of these experiments, at every budget that is recorded."""
    for name in filter(pool.world.has, said):
        if name in PICTURES:
            seen = evidence(name, folders)
            yield from PICTURES[name].found(seen) if seen else ()
            continue
        if name in SAME and SAME[name] in said:
            continue
        own = EXPERIMENTS[SAME.get(name, name)]
        for epochs in own.budgets(pool.world):
            for test in own.tests:
                if finding := test.finding(pool, epochs, f"fatbench reproduce {name}{pool.world.how}"):
                    yield finding


def pooled(here: World, folders: Sequence[Path]) -> Pool:
    """The records of some folders, as far as they are of a world."""
    return Pool([folder for folder in folders if folder.is_dir()], here)


# ------------------------------------------------------------------------------------------------ at the paper's scale


def pictures(said: Sequence[str]) -> list[str]:
    """Those of the experiments that are measured and drawn."""
    return [name for name in said if name in PICTURES]


def in_the_paper(name: str) -> bool:
    """Whether an experiment has a form at the paper's scale."""
    return name in PICTURES or bool(_recipes(name))


def _recipes(name: str) -> list[str]:
    own = EXPERIMENTS[SAME.get(name, name)]
    begins = (f"fig-{number(name)}-",) if name.startswith("fig") and name != "fig5" else own.recipes
    return [one for one in recipe.shelf() if one.startswith(tuple(begins))] if begins else []


def shelved(said: Sequence[str]) -> dict[str, list[str]]:
    """Experiment -> the recipes on the shelf that are it at the paper's scale; without those that are pictures.

    Raises:
        Refused: one has none.
    """
    found = {name: _recipes(name) for name in said if name not in PICTURES}
    for name, recipes in found.items():
        if not recipes:
            raise Refused(f"{name} is not in the paper, and has no recipe: run it at --scale laptop")
    return found


def at_paper_scale(said: Sequence[str], dataset: str | None, seeds: int) -> dict[str, dict[str, Settings]]:
    """Recipe -> its runs, by the names of their jobs."""
    runs: dict[str, dict[str, Settings]] = {}
    for name in dict.fromkeys(one for recipes in shelved(said).values() for one in recipes):
        for seed in range(seeds):
            for label, settings in recipe.points(name, dataset=dataset, seed=seed).items():
                own = "-".join([name, *label.replace("=", "").replace("/", "_").split(), f"seed{seed}"])
                runs.setdefault(name, {})[own] = settings
    return runs


def costs(runs: Mapping[str, Mapping[str, Settings]], device: str) -> Iterator[str]:
    """A line a recipe: its runs, their hours on this device from one timed update of one of them, and on paper."""
    from fatbench.estimate import PACE_TOLD, estimate

    here, paper = [0.0, 0.0], [0.0, 0.0]
    if not runs:
        return
    for name, own in runs.items():
        stderr.print(f"timing {name}")
        seen = estimate(next(iter(own.values())), device=device)
        hours = [len(own) * seconds * seen.epochs / 3600 for seconds in seen.seconds]
        gpu = [len(own) * each for each in seen.on_paper]
        here, paper = ([a + b for a, b in zip(*pair, strict=True)] for pair in ((here, hours), (paper, gpu)))
        yield f"{name}: {len(own)} runs, {_hours(hours)} hours here, {_hours(gpu)} GPU-hours on paper"
    own_device = device if device != "auto" else "device of this machine"
    yield f"in all: {_hours(here)} hours on one {own_device}; {_hours(paper)} GPU-hours on paper, at {PACE_TOLD}"


def _hours(span: Sequence[float]) -> str:
    low, high = (f"{each:,.1f}" for each in span)
    return low if low == high else f"{low} to {high}"


def carry_out_recipes(
    runs: Mapping[str, Mapping[str, Settings]], out: Path, workers: int, devices: Sequence[str]
) -> None:
    """Trains the recipes' runs and examines each under its recipe's protocols."""
    folders = []
    for name, own in runs.items():
        folders += sweep.prepare(sweep.Grid(dict(own), Examine(protocols=recipe.load(name).protocols)), out)
    sweep.work_through(folders, workers, devices)
