"""One network: train, evaluate, verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fatbench.commands.options import DatasetName, Device, Devices, Eps, Layout, Nodes, Out, Precision, Tier, numbers
from fatbench.console import speaks
from fatbench.errors import Refused, RunFailed


def train(
    defense: Annotated[str | None, typer.Argument(help="A registered defense (list defenses).")] = None,
    dataset: DatasetName = None,
    arch: Annotated[str | None, typer.Option(help="The network (list models).")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training examples.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    lr: Annotated[str | None, typer.Option(help="Learning rate of SGD at the start.")] = None,
    eps: Eps = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, order, crops and noise.")] = None,
    n_train: Annotated[int | None, typer.Option(help="So many training examples, each class at its share.")] = None,
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


def evaluate(
    ckpt: Annotated[str, typer.Argument(metavar="CKPT", help="A run folder, a checkpoint file, or robustbench:ID.")],
    dataset: DatasetName = None,
    protocol: Annotated[str | None, typer.Option(help="A protocol (list protocols) or a .toml.")] = None,
    attacks: Annotated[str | None, typer.Option(help="fgsm,pgd-20,cw-inf,autoattack under the house protocol.")] = None,
    eps: Eps = None,
    n: Annotated[int | None, typer.Option("--n", help="The first N test examples.")] = None,
    balanced: Annotated[bool, typer.Option("--balanced", help="N test examples, each class at its share.")] = False,
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

    network = Network(ckpt, arch, model, numbers(mean, "--mean"), numbers(std, "--std"), str(model_dir))
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
