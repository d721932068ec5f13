"""What there is: list, show, check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated

import typer

from fatbench.commands.options import Kind
from fatbench.errors import Refused, RunFailed


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
        from fatbench.paper import names

        return {name: partial(names.summary, name) for name in names.names()}
    known = NETWORKS if kind is Kind.models else {name: info.summary for name, info in DATASETS.items()}
    return {name: partial(str, text) for name, text in known.items()}


def _said(tell: Callable[[str], object], name: str) -> str:
    return str(tell(name))


def show(
    kind: Annotated[
        str, typer.Argument(help="defense, evaluation, model, dataset, protocol, recipe, record or checkpoint.")
    ],
    name: Annotated[str, typer.Argument(help="Its name, or a file.")],
) -> None:
    """Show one thing whole: a defense's fields, a protocol's settings, a record, a checkpoint's metadata."""
    from fatbench.show import show as tell

    typer.echo(tell(kind, name))


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
