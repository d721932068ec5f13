"""Many networks: demo, sweep and its jobs, reproduce."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from fatbench.commands.boards import derive, print_table
from fatbench.commands.options import DatasetName, Device, Out, Scale, published_eps
from fatbench.errors import Refused, RunFailed


def demo(
    out: Out = Path("demo"),
    eps: Annotated[str, typer.Option(help="l-inf budgets, 0.3 or 0.1,0.2,0.3.")] = "0.3",
    epochs: Annotated[int | None, typer.Option(help="Of each run; a short budget unless given.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds, from 0.")] = 1,
    defenses: Annotated[str | None, typer.Option(help="madry,fat or all; five unless given.")] = None,
    best: Annotated[bool, typer.Option("--best", help="Examine the best epoch on validation beside the last.")] = False,
    device: Device = "auto",
) -> None:
    """Train standard, madry, trades, fat and fat-trades on digits, examine them, print the leaderboard."""
    from fatbench import demo as main_job
    from fatbench import leaderboard as boards
    from fatbench.registry import defenses as registered

    names = list(registered) if defenses == "all" else (defenses or ",".join(main_job.DEFENSES)).split(",")
    budgets = [published_eps(one.strip()) for one in eps.split(",")]
    main_job.demo(
        out, defenses=[name.strip() for name in names], eps=budgets, seeds=seeds, best=best, device=device,
        epochs=main_job.EPOCHS if epochs is None else epochs,
    )  # fmt: skip
    for key, table in boards.tables(boards.board(boards.gather(out / "records"))).items():
        print_table(key, table)
    typer.echo(f"written: {out / 'index.md'} and {out / 'index.html'}")


def sweep(
    grid: Annotated[str, typer.Argument(metavar="GRID.toml", help="A grid of runs, or a recipe that sweeps.")],
    out: Out = Path("sweep"),
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    device: Annotated[str, typer.Option(help="As in train; with commas between, one for each worker.")] = "auto",
    only_print: Annotated[
        bool, typer.Option("--print", help="Only list the commands of what is to be done, for a cluster's scheduler.")
    ] = False,
) -> None:
    """Do every run of a grid that is not done yet, and examine it; what failed or was killed is launched again."""
    from fatbench import sweep as sweeps

    folders = sweeps.prepare(sweeps.expand(grid), out)
    if only_print:
        typer.echo(sweeps.printed(folders, device))
        return
    failed = None
    try:
        sweeps.work_through(folders, workers, device.split(","))
    except RunFailed as some:  # of the others there is a board all the same, and of these a row
        failed = some
    finally:
        typer.echo(sweeps.report(folders))
    if (out / "records").is_dir():
        derive(out / "records", out / "board", None)
    if failed:
        raise failed


def status(out: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.")] = Path("sweep")) -> None:
    """Tell how a sweep stands: what is not launched, running, failed and why, done."""
    from fatbench import sweep as sweeps

    typer.echo(sweeps.report(sweeps.jobs_in(out)))


def job(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Of a sweep's jobs/.")],
    device: Device = "auto",
) -> None:
    """Do one run of a sweep, what `sweep --print` lists, or several in turn, each telling its own log.txt."""
    from fatbench.job import carry_out, in_turn, train_and_examine

    work = partial(train_and_examine, device=device)
    if len(folders) == 1:
        carry_out(folders[0], work)
    else:
        in_turn(folders, work)


def reproduce(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="table1, fig4, ... (list experiments), or all.")
    ],
    scale: Annotated[
        Scale, typer.Option(help="laptop: digits or CIFAR-10, reduced; paper: the paper's recipes.")
    ] = Scale.laptop,
    dataset: DatasetName = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training runs of each contestant; 3 unless given.")] = None,
    out: Out = Path("reproduction"),
    records: Annotated[
        list[Path] | None, typer.Option("--records", help="What is recorded elsewhere is not done again; repeatable.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    device: Annotated[str, typer.Option(help="As in sweep.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done, and what it costs.")] = False,
    tell: Annotated[bool, typer.Option("--tell", help="Train nothing: judge what is recorded.")] = False,
) -> None:
    """Run the paper's experiments again and judge its claims; writes OUT.md, and goes on where it was stopped."""
    from fatbench.paper.contestants import WORLDS, world
    from fatbench.paper.names import asked

    if out.name in ("", ".."):
        raise Refused(f"--out {out}: the page is written beside the folder, under its name: give a folder a name")
    if scale is Scale.paper and (tell or records):
        raise Refused("--tell and --records judge what was made at --scale laptop; the paper's recipes are only run")
    here = None if tell or scale is Scale.paper else world(dataset or "digits")
    said, folders = asked(names, here), [out, *(records or [])]
    from fatbench.paper import reproduce as paper  # torch, for which a misspelt name need not wait

    if scale is Scale.paper:
        said = [name for name in said if "all" not in names or paper.in_the_paper(name)]
        _at_paper_scale(said, dataset, seeds, out, workers, device, dry_run)
    elif here is None:
        worlds = [world(dataset)] if dataset else WORLDS
        _tell(said, [paper.pooled(one, folders) for one in worlds], folders, out)
    elif dry_run:
        todo = paper.missing(said, paper.pooled(here, folders), seeds or paper.SEEDS)
        typer.echo("\n".join([f"{len(todo)} runs to train and examine", *todo]))
    else:
        paper.lay(here, dataset or here.dataset)
        todo = paper.missing(said, paper.pooled(here, folders), seeds or paper.SEEDS)
        paper.carry_out(todo, here, out, workers, device.split(","))
        paper.measure(said, here.dataset, "laptop", seeds, out, workers)
        _tell(said, [paper.pooled(here, folders)], folders, out)


def _tell(said: list[str], pools: list[Any], folders: list[Path], out: Path) -> None:
    from fatbench.paper import report

    found = report.publish(said, pools, folders, out)
    for finding in found:
        typer.echo(
            f"{finding.verdict:<14} {finding.claim.place}, {finding.budget}: {finding.claim.text}: {finding.said}"
        )
    typer.echo(f"{report.told(found)}; written: {out.with_name(out.name + '.md')}")


def _at_paper_scale(
    said: list[str], dataset: str | None, seeds: int | None, out: Path, workers: int, device: str, dry_run: bool
) -> None:
    from fatbench.paper import report
    from fatbench.paper import reproduce as paper

    runs = paper.at_paper_scale(said, dataset, seeds or paper.SEEDS)
    pictures = paper.pictures(said)
    for line in paper.costs(runs, device.split(",")[0]):
        typer.echo(line)
    if pictures:
        typer.echo(f"{', '.join(pictures)}: networks of their own, trained on the CPU as they are measured; not timed")
    if dry_run:
        return
    if runs:
        paper.carry_out_recipes(runs, out, workers, device.split(","))
    paper.measure(pictures, dataset or "cifar10", "paper", seeds, out, workers)
    for finding in report.measured(pictures, [out], out):
        typer.echo(f"{finding.verdict:<14} {finding.claim.place}: {finding.claim.text}: {finding.said}")
