"""The command line: parse, call, print. Heavy imports wait until a command needs them.

Exit codes: 0 done, 1 a run failed, 2 refused (one line: what, why, what to do), 130 interrupted and resumable.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from fatbench import __version__
from fatbench.console import speaks
from fatbench.errors import Refused, RunFailed, first_line

if TYPE_CHECKING:
    import pandas as pd

app = typer.Typer(
    name="fatbench",
    help="Train adversarial-training defenses by one loop, examine networks under one protocol, publish the table.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


class Kind(StrEnum):
    """What `list` and `show` know."""

    defenses = "defenses"
    evaluations = "evaluations"
    models = "models"
    datasets = "datasets"
    protocols = "protocols"
    recipes = "recipes"
    experiments = "experiments"
    robustbench = "robustbench"


class Scale(StrEnum):
    """How large an experiment is."""

    laptop = "laptop"
    paper = "paper"


class Tier(StrEnum):
    """How much of a protocol is carried out."""

    quick = "quick"
    bound = "bound"
    full = "full"


class Precision(StrEnum):
    """What attacks are made in."""

    float32 = "float32"
    bf16 = "bf16"


class Layout(StrEnum):
    """What AutoAttack crafts on."""

    swift = "swift"
    given = "given"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fatbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and stop.")
    ] = False,
) -> None:
    pass


# Options that several commands share.
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, or cuda:1.")]
Devices = Annotated[
    int | None, typer.Option(min=1, help="Processes on each node; as torchrun or SLURM has started them, or 1.")
]
Nodes = Annotated[int | None, typer.Option(min=1, help="Machines; each runs this same command.")]
Eps = Annotated[str | None, typer.Option(help="l-inf budget in pixel units, 8/255 or 0.031.")]
DatasetName = Annotated[str | None, typer.Option("--dataset", help="A name (list datasets), path.npz, or a folder.")]
Out = Annotated[Path, typer.Option("--out", help="Folder to write into.")]


@app.command()
def train(
    defense: Annotated[str | None, typer.Argument(help="A registered defense (list defenses).")] = None,
    dataset: DatasetName = None,
    arch: Annotated[str | None, typer.Option(help="The network (list models).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training examples.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate of SGD at the start.")] = None,
    eps: Eps = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, crops and noise.")] = None,
    n_train: Annotated[int | None, typer.Option(help="So many class-balanced training examples.")] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting or a field; repeatable.")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="Settings from a recipe (list recipes) or a .toml.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; runs/DEFENSE-DATASET-seedN unless given.")] = None,
    device: Device = "auto",
    precision: Annotated[str | None, typer.Option(help="32-true, bf16-mixed or 64-true.")] = None,
    devices: Devices = None,
    nodes: Nodes = None,
    sync_bn: Annotated[bool, typer.Option("--sync-bn", help="BatchNorm over all processes; GPUs only.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Throw away the run in --out.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the settings and what they would cost; needs no data.")
    ] = False,
) -> None:
    """Train a defense into a run folder: settings, metrics, last and best checkpoint."""
    from fatbench.recipe import resolve
    from fatbench.world import world

    options = {"dataset": dataset, "arch": arch, "epochs": epochs, "batch_size": batch_size, "lr": lr, "eps": eps}
    options |= {"seed": seed, "n_train": n_train, "precision": precision, "ranks": world(devices, nodes).size}
    options |= {"sync_bn": True} if sync_bn else {}
    if resume and out and not (defense or recipe) and (out / "settings.toml").exists():
        recipe = str(out / "settings.toml")
    settings = resolve(defense, recipe=recipe, sets=sets or (), **options)
    if dry_run:
        from fatbench.estimate import estimate
        from fatbench.show import told_settings

        typer.echo(f"{told_settings(settings)}\n\n{estimate(settings, device=device)}")
        return
    folder = out or Path("runs") / f"{settings.defense}-{Path(settings.dataset).stem}-seed{settings.seed}"

    from fatbench import trainer

    trainer.train(settings, folder, device=device, devices=devices, nodes=nodes, resume=resume, force=force)
    if speaks():
        typer.echo(f"done: {folder}; next: fatbench evaluate {folder}")


@app.command()
def evaluate(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="A run folder, a checkpoint file, or robustbench:ID.")],
    dataset: DatasetName = None,
    protocol: Annotated[str | None, typer.Option(help="A protocol (list protocols) or a .toml.")] = None,
    attacks: Annotated[str | None, typer.Option(help="fgsm,pgd-20,cw-inf,autoattack under the house protocol.")] = None,
    eps: Eps = None,
    n: Annotated[int | None, typer.Option("--n", help="The first N test examples.")] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="N class-balanced test examples instead.")] = False,
    seed: Annotated[int, typer.Option(help="Of random starts.")] = 0,
    arch: Annotated[str | None, typer.Option(help="The network of foreign weights.")] = None,
    model: Annotated[
        str | None, typer.Option(metavar="FILE.PY:FACTORY", help="Your own network; the file is run.")
    ] = None,
    mean: Annotated[
        str | None, typer.Option(help="Normalisation of foreign weights, one number a channel, 0.49,0.48,0.45.")
    ] = None,
    std: Annotated[str | None, typer.Option(help="As --mean.")] = None,
    tier: Annotated[
        Tier, typer.Option(help="quick: PGD-20 alone; bound: AutoAttack up to APGD-T, an upper bound; full.")
    ] = Tier.full,
    attack_precision: Annotated[
        Precision, typer.Option(help="What attacks are made in; what they find is verified in float32.")
    ] = Precision.float32,
    layout: Annotated[
        Layout, typer.Option(help="swift: AutoAttack crafts on a folded copy; given: on the network as it is.")
    ] = Layout.swift,
    checks: Annotated[
        bool | None, typer.Option("--checks/--no-checks", help="For gradient masking; with autoattack unless given.")
    ] = None,
    surrogate: Annotated[str | None, typer.Option(metavar="CKPT", help="Another network to transfer from.")] = None,
    save_adversarial: Annotated[
        bool, typer.Option("--save-adversarial", help="Keep the worst example of each image beside the record.")
    ] = False,
    external: Annotated[
        Path | None, typer.Option(metavar="ADV.SAFETENSORS", help="Judge somebody else's examples instead.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Who made the examples of --external, and how.")] = None,
    model_dir: Annotated[Path, typer.Option(help="Where RobustBench's models lie.")] = Path("models"),
    device: Device = "auto",
    devices: Devices = None,
    nodes: Nodes = None,
    out: Out = Path("records"),
) -> None:
    """Examine a network under a protocol; writes a record with per-example evidence."""
    from fatbench import devices as places
    from fatbench.asked import Network
    from fatbench.shards import PATIENCE, examine_as_asked

    network = Network(ckpt, arch, model, _numbers(mean, "--mean"), _numbers(std, "--std"), str(model_dir))
    options = {
        "dataset": dataset, "protocol": protocol, "attacks": attacks, "eps": eps, "external": external,
        "source": source, "surrogate": surrogate, "n": n, "checked": checks, "tier": tier.value,
        "attack_precision": attack_precision.value, "layout": layout.value, "balanced": balanced, "seed": seed,
    }  # fmt: skip
    fabric = places.fabric_on(device, devices=devices, nodes=nodes, patience=PATIENCE)
    record = places.launched(fabric, examine_as_asked, network, options, out, save_adversarial)
    if speaks():
        _show_record(record)
        if save_adversarial:
            typer.echo(f"examples: {out / record.id}.adversarial.safetensors; fatbench verify counts them again")
        typer.echo(f"record: {out / record.id}.json; next: fatbench leaderboard {out}")


@app.command()
def verify(
    record: Annotated[Path, typer.Argument(help="A record whose examples were kept (--save-adversarial).")],
    ckpt: Annotated[str | None, typer.Argument(help="Its network; where the record took it from unless given.")] = None,
    dataset: DatasetName = None,
    device: Device = "auto",
) -> None:
    """Count a record again: reloads network, data and examples, and recomputes its row."""
    from fatbench import data, evidence
    from fatbench import devices as places
    from fatbench.asked import Network
    from fatbench.record import read

    said = read(record)
    origin = said.run.get("source") or {}
    if not (ckpt or origin) or not (dataset or origin):
        raise Refused(f"{record} does not say where its network and data lie: give CKPT and --dataset")
    network = Network(
        **{**{key: v for key, v in origin.items() if key != "dataset"}, **({"checkpoint": ckpt} if ckpt else {})}
    )
    loaded = data.load(dataset or origin["dataset"])
    found = evidence.verify(said, record, network.load(loaded), loaded, places.fabric_on(device).device)
    n = said.result.data.n
    typer.echo(f"clean {found.clean} of {n}, worst case {found.robust} of {n}; {found.differ} differ from the record")
    if found.differ:
        raise RunFailed(f"{found.differ} of {n} examples are not what {record} says of them")


@app.command()
def leaderboard(
    asked: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECORDS | check FILE... | diff OLD NEW]", help="A folder; ./records unless given."),
    ] = None,
    out: Out = Path("board"),
    beside: Annotated[
        str | None,
        typer.Option("--with", metavar="SOURCES", help="Published rows beside ours: reported,robustbench."),
    ] = None,
    against: Annotated[Path | None, typer.Option(help="check: the records that are on the board already.")] = None,
) -> None:
    """Derive the tables from records: one for each dataset, norm, eps class and protocol.

    `check FILE...` looks through outside records and says what is wrong or missing; `diff OLD NEW` tells what changed
    between two boards.
    """
    words = asked or []
    if words[:1] == ["check"]:
        _check_submission([Path(word) for word in words[1:]], against)
    elif words[:1] == ["diff"]:
        _diff_boards(words[1:])
    elif len(words) > 1:
        raise Refused(f"leaderboard takes one folder of records, not {len(words)}; or check FILE..., or diff OLD NEW")
    else:
        _derive(Path(words[0]) if words else None, out, beside)


def _derive(records: Path | None, out: Path, beside: str | None) -> None:
    from fatbench import beside as published
    from fatbench import faces
    from fatbench import leaderboard as boards
    from fatbench.publish import publish

    others = published.lines([name.strip() for name in (beside or "").split(",") if name.strip()])
    folder = records or Path("records")
    # With published rows a board may do without records; a folder that was named must hold some all the same.
    found = [] if others and not records and not folder.is_dir() else boards.gather(folder)
    for key, table in publish(found, out, others).items():
        if (table["source"] == "measured").any():
            _print_table(key, table)
        else:
            typer.echo(f"{faces.heading(key)}: {len(table)} published rows, none measured")
    typer.echo(f"written: {out / 'index.md'} and {out / 'index.html'}")


def _check_submission(paths: list[Path], against: Path | None) -> None:
    from fatbench.leaderboard import gather
    from fatbench.submission import check

    findings = check(paths, gather(against) if against else ())
    for finding in findings:
        typer.echo("\n".join(finding.lines()))
    refused = sum(bool(finding.refused) for finding in findings)
    if refused:
        raise Refused(f"{refused} of {len(findings)} records cannot go on a board")


def _diff_boards(paths: list[str]) -> None:
    from fatbench.changes import diff

    if len(paths) != 2:
        raise Refused("leaderboard diff takes two boards: diff OLD NEW, each a board.json or its folder")
    lines = diff(Path(paths[0]), Path(paths[1]))
    typer.echo("\n".join(lines) or "no row differs")


@app.command()
def compare(
    contestants: Annotated[
        list[str], typer.Argument(metavar="A B [C ...]", help="Records: paths or ids; seeds of one joined by commas.")
    ],
    records: Annotated[Path, typer.Option("--records", help="Where ids are looked for.")] = Path("records"),
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Say whether contestants differ: on the same samples, by paired tests, per attack and class, over seeds."""
    import json

    from fatbench import compare as pairs
    from fatbench import verdict

    compared = pairs.compare([pairs.find(text, records) for text in contestants])
    typer.echo(json.dumps(verdict.as_json(compared), indent=1) if as_json else verdict.markdown(compared), nl=as_json)


@app.command()
def plot(
    records: Annotated[Path, typer.Argument(help="A folder of records.")] = Path("records"),
    out: Out = Path("plots"),
    kinds: Annotated[str | None, typer.Option("--kinds", help="curves,eps,tau,classes; all unless given.")] = None,
) -> None:
    """Draw records as PNG and SVG: training curves, robustness against eps, the tau trade-off, classes."""
    from fatbench import plots
    from fatbench.leaderboard import gather

    asked = [kind.strip() for kind in (kinds or "").split(",") if kind.strip()]
    for path in plots.draw(gather(records), records, out, asked):
        typer.echo(path)


@app.command(name="list")
def list_(
    kind: Annotated[Kind, typer.Argument(help="What to list.")],
    names: Annotated[bool, typer.Option("--names", help="Bare names, for scripts.")] = False,
) -> None:
    """List what is registered, a line each; a plugin that cannot be used is named with its reason."""
    known = _catalogue(kind)
    width = max((len(name) for name in known), default=0)
    for name, tell in known.items():
        try:
            typer.echo(name if names else f"{name:<{width}}  {tell()}".rstrip())
        except Refused as refusal:
            typer.echo(f"{name:<{width}}  UNUSABLE: {refusal}")


def _catalogue(kind: Kind) -> dict[str, Callable[[], str]]:
    """name -> its one line, told when asked for; imports no torch."""
    from fatbench import protocol, recipe
    from fatbench.catalogue import DATASETS, NETWORKS
    from fatbench.registry import defenses, evaluations

    if kind in (Kind.defenses, Kind.evaluations):
        registry = defenses if kind is Kind.defenses else evaluations
        return {name: partial(registry.summary, name) for name in registry}
    if kind is Kind.protocols:
        return {name: partial(_said, lambda name: protocol.load(name).summary, name) for name in protocol.shelf()}
    if kind is Kind.recipes:
        return {name: partial(_said, lambda name: recipe.load(name).summary, name) for name in recipe.shelf()}
    if kind is Kind.robustbench:
        from fatbench import zoo

        return {name: partial(str, boards) for name, boards in zoo.ids().items()}
    if kind is Kind.experiments:
        from fatbench.paper import reproduce

        return {name: partial(reproduce.summary, name) for name in reproduce.names()}
    known = NETWORKS if kind is Kind.models else {name: info.summary for name, info in DATASETS.items()}
    return {name: partial(str, text) for name, text in known.items()}


def _said(tell: Callable[[str], object], name: str) -> str:
    return str(tell(name))


@app.command()
def show(
    kind: Annotated[
        str, typer.Argument(help="defense, evaluation, model, dataset, protocol, recipe, record or checkpoint.")
    ],
    name: Annotated[str, typer.Argument(help="Its name, or a file.")],
) -> None:
    """Show one thing whole: a defense's fields, a protocol's settings, a record, a checkpoint's metadata."""
    from fatbench.show import show as tell

    typer.echo(tell(kind, name))


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Defenses or evaluations; all unless given.")] = None,
) -> None:
    """Run the contract over registered defenses and evaluations, plugins included."""
    from fatbench.contract import check as rules
    from fatbench.errors import unknown
    from fatbench.registry import defenses, evaluations

    asked = names or [*defenses, *evaluations]
    broken = 0
    for name in asked:
        if name not in defenses and name not in evaluations:
            raise unknown("defense or evaluation", name, [*defenses, *evaluations])
        kind = "defense" if name in defenses else "evaluation"
        try:
            wrong = {rule: reason for rule, reason in rules(kind, name) if reason}
        except Refused as refusal:
            wrong = {"loads": str(refusal)}
        broken += bool(wrong)
        typer.echo(
            f"{'broken' if wrong else 'ok':<7} {kind} {name}" + "".join(f"\n        {r}: {w}" for r, w in wrong.items())
        )
    if broken:
        raise RunFailed(f"{broken} of {len(asked)} break the contract")


@app.command()
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
    budgets = [_published(one.strip()) for one in eps.split(",")]
    main_job.demo(
        out, defenses=[name.strip() for name in names], eps=budgets, seeds=seeds, best=best, device=device,
        epochs=main_job.EPOCHS if epochs is None else epochs,
    )  # fmt: skip
    for key, table in boards.tables(boards.board(boards.gather(out / "records"))).items():
        _print_table(key, table)
    typer.echo(f"written: {out / 'index.md'} and {out / 'index.html'}")


@app.command()
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
    try:
        sweeps.work_through(folders, workers, device.split(","))
    finally:
        typer.echo(sweeps.report(folders))
    if (out / "records").is_dir():
        _derive(out / "records", out / "board", None)


@app.command()
def status(out: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder.")] = Path("sweep")) -> None:
    """Tell how a sweep stands: what is not launched, running, failed and why, done."""
    from fatbench import sweep as sweeps

    typer.echo(sweeps.report(sweeps.jobs_in(out)))


@app.command()
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


@app.command()
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
    from fatbench.paper import reproduce as paper
    from fatbench.paper.contestants import WORLDS, world

    folders = [out, *(records or [])]
    if scale is Scale.paper:
        _at_paper_scale(paper.asked(names), dataset, seeds or paper.SEEDS, out, workers, device, dry_run)
        return
    if tell:
        worlds = [world(dataset)] if dataset else WORLDS
        _tell(paper.asked(names), [paper.pooled(one, folders) for one in worlds], folders, out)
        return
    here = world(dataset or "digits")
    said = paper.asked(names, here)
    todo = paper.missing(said, paper.pooled(here, folders), seeds or paper.SEEDS)
    if dry_run:
        typer.echo("\n".join([f"{len(todo)} runs to train and examine", *todo]))
        return
    paper.lay(here, dataset or here.dataset)
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
    said: list[str], dataset: str | None, seeds: int, out: Path, workers: int, device: str, dry_run: bool
) -> None:
    from fatbench.paper import reproduce as paper

    runs = paper.at_paper_scale(said, dataset, seeds)
    for line in paper.costs(runs, device.split(",")[0]):
        typer.echo(line)
    if not dry_run:
        paper.carry_out_recipes(runs, out, workers, device.split(","))


# ------------------------------------------------------------------------------------------------ helpers


def _published(eps: str) -> str:
    from fatbench.quantities import published

    try:
        return published(eps)
    except ValueError as error:
        raise Refused(f"--eps {eps}: {error}") from None


def _numbers(text: str | None, option: str) -> tuple[float, ...] | None:
    from fatbench.quantities import number

    try:
        return None if text is None else tuple(number(part.strip()) for part in text.split(","))
    except ValueError as error:
        raise Refused(f"{option} {text}: {error}") from None


def _print_table(key: tuple[str, ...], table: pd.DataFrame) -> None:
    from rich.markup import escape
    from rich.table import Table

    from fatbench import faces
    from fatbench.console import stdout

    shown, said = faces.folded(faces.cells(table, brief=True))  # a terminal is narrow
    printed = Table(
        title=escape(faces.heading(key)), title_justify="left", caption=escape(said), caption_justify="left"
    )
    for column in shown.columns:
        printed.add_column(escape(column), justify="left" if column in ("defense", "network") else "right")
    for row in shown.itertuples(index=False):
        printed.add_row(*(escape(str(cell)) for cell in row))
    stdout.print(printed)
    for note in faces.notes(table, brief=True):
        stdout.print(escape(note), soft_wrap=True)


def _show_record(record: Any) -> None:
    from fatbench.stats import wilson

    result = record.result
    typer.echo(
        f"{result.network.defense or result.network.arch} on {result.data.n} of {result.data.name}, eps {result.eps}"
    )
    if not result.correct:
        typer.echo(f"  {result.network.status}: no number")
    if result.collapsed:
        typer.echo("  collapsed: no better on clean examples than always giving one answer; a table shows it as failed")
    if result.bound:
        typer.echo("  an upper bound: the same command with --tier full goes on from here")
    for attack, right in result.correct.items():
        low, high = wilson(right, result.data.n)
        typer.echo(f"  {attack:<12} {100 * right / result.data.n:6.2f} %  [{100 * low:.2f}, {100 * high:.2f}]")
    for attack, after in result.after.items():
        typer.echo(f"  {attack}: " + ", ".join(f"{stage} leaves {right}" for stage, right in after.items()))
    for warning in result.warnings:
        typer.echo(f"  warning: {warning}")
    if result.masking is not None:
        typer.echo(f"  gradient masking: {', '.join(result.masking) or 'no sign'} ({len(result.doubts)} checks)")


def _stop(code: int, text: str) -> NoReturn:
    if speaks():
        typer.echo(f"fatbench: {' '.join(text.split())}", err=True)
    sys.exit(code)


def main() -> None:
    """The console script."""
    usage = typer.BadParameter.__mro__[2]  # ClickException, which typer vendors and does not export
    try:
        code = app(standalone_mode=False)
        if code == 130:  # typer turns Ctrl-C into an exit code
            raise KeyboardInterrupt
    except (KeyboardInterrupt, typer.Abort):
        _stop(130, "interrupted; the same command with --resume (train), or as it was (evaluate), goes on")
    except Refused as refusal:
        _stop(2, str(refusal))
    except RunFailed as failure:
        _stop(1, str(failure))
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except Exception as error:
        if isinstance(error, usage):
            _stop(2, f"{error.format_message()} (fatbench COMMAND --help)")  # type: ignore[attr-defined]
        if os.environ.get("FATBENCH_TRACEBACK"):
            raise
        _stop(1, f"this is a bug: {type(error).__name__}: {first_line(error)}; set FATBENCH_TRACEBACK=1 to see where")
    sys.exit(code if isinstance(code, int) else 0)
