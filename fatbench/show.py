"""What `fatbench show` tells of one thing."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from itertools import groupby
from pathlib import Path
from typing import Any

from fatbench import protocol, recipe
from fatbench.catalogue import DATASETS, NETWORKS, network
from fatbench.errors import unknown
from fatbench.quantities import Progress, value_at
from fatbench.recipe import Settings
from fatbench.registry import defenses, evaluations


def show(kind: str, name: str) -> str:
    """The text for one thing of a kind.

    Raises:
        Refused: unknown kind or name, or a file that cannot be read.
    """
    key = kind.rstrip("s")
    if key not in _TELL:
        raise unknown("kind", kind, _TELL)
    return _TELL[key](name)


def _plugin(registry: Any) -> Callable[[str], str]:
    def tell(name: str) -> str:
        cls = registry[name]
        lines = [f"{cls.name} ({registry.entry(name).origin})", "", inspect.getdoc(inspect.getmodule(cls)) or "", ""]
        lines += [inspect.getdoc(cls) or "", "", "fields (--set NAME=VALUE):"]
        comments = _comments(cls)
        for f in fields(cls):
            if f.init:
                default = "required" if f.default is MISSING else repr(f.default)
                lines.append(f"  {f.name} = {default}" + (f"  # {comments[f.name]}" if f.name in comments else ""))
        return "\n".join(lines)

    return tell


def _comments(cls: type[Any]) -> dict[str, str]:
    """The comment behind each field, or on the lines above it, as the source has it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        try:
            lines = inspect.getsource(base).splitlines()
        except (OSError, TypeError):
            continue
        above: list[str] = []
        for line in lines:
            text = line.strip()
            if text.startswith("#"):
                above.append(text.lstrip("# "))
                continue
            head, _, comment = text.partition("  # ")
            name = head.partition(":")[0]
            if ":" in head and "=" in head and name.isidentifier() and (comment or above):
                found[name] = comment or " ".join(above)
            above = []
    return found


def _model(name: str) -> str:
    import torch

    from fatbench import models

    name = network(name)
    channels, size = (1, 28) if name == "trades-mnist-cnn" else (3, 32)
    with torch.device("meta"):
        net = models.build(name, 10, channels, size)
    parameters = list(net.parameters())
    total, used = sum(p.numel() for p in parameters), sum(p.numel() for p in parameters if p.requires_grad)
    rows = [f"  {key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    said = f"{total:,} parameters, {used:,} of them in use (10 classes, {channels} x {size} x {size} images)"
    return "\n".join([f"{name}: {NETWORKS.get(name, 'a wide ResNet')}", said, *rows])


def _dataset(name: str) -> str:
    info = DATASETS.get(name.replace("_", "-"))
    if info is None:
        raise unknown("dataset", name, DATASETS)
    shape = "x".join(str(side) for side in info.shape or ())
    lines = [f"{info.name}: {info.summary}", f"  images {shape}, {info.classes} classes", f"  default eps {info.eps}"]
    return "\n".join([*lines, f"  default network {info.arch}", f"  default augmentation {info.augment}"])


def _protocol(name: str) -> str:
    protocol.load(name)
    path = Path(name) if name.endswith(".toml") else protocol.shelf()[name.replace("_", "-")]
    return path.read_text(encoding="utf-8").rstrip()


def _recipe(name: str) -> str:
    """The file as it is, sources and all, and what follows from it."""
    page, runs = recipe.load(name), recipe.points(name)
    one = next(iter(runs.values()))
    said = {*page.settings, *page.sweep, *page.settings.get("fields", {}), "fields", "source"}
    silent = {k: v for k, v in one.model_dump(mode="json").items() if k not in said and v is not None}
    silent |= {f"fields.{k}": v for k, v in one.fields.items() if k not in said and v is not None}
    lines = [recipe.file_of(name).read_text(encoding="utf-8").rstrip(), "", "# What follows from it"]
    lines += [f"{key:<9} {text}" for key, text in schedules(one).items() if key not in page.sweep]
    lines += [f"defaults  {', '.join(f'{k} = {v}' for k, v in silent.items())}"] if silent else []
    how = " ".join(recipe.chosen_by(key, values[0]) for key, values in page.sweep.items())
    lines += [f"runs      {len(runs)}, one of them: fatbench train --recipe {name} {how}".rstrip()]
    return "\n".join(lines)


def told_settings(settings: Settings) -> str:
    """A run's settings a line each, the defense's fields indented, then what changes over the run."""
    said = settings.model_dump(mode="json", exclude_none=True, exclude={"fields"})
    lines = [f"{key} = {json.dumps(value)}" for key, value in said.items()]
    lines += [f"  {key} = {json.dumps(value)}" for key, value in settings.fields.items() if value is not None]
    return "\n".join([*lines, "", *(f"{key:<11} {text}" for key, text in schedules(settings).items())])


def schedules(settings: Settings) -> dict[str, str]:
    """What changes over a run, epoch by epoch: `{"lr": "0.1 epochs 1-59, 0.01 epochs 60-89", ...}`."""
    defense, epochs = recipe.contestant(settings), settings.epochs
    told: dict[str, Callable[[Progress], Any]] = {"lr": settings.lr_at, "eps": defense.eps_at}
    told |= {"tau": lambda now: value_at(defense.tau, now)} if hasattr(defense, "tau") else {}
    told |= {"threshold": defense.threshold} if hasattr(defense, "threshold") else {}
    return {key: _segments([at(Progress(done, epochs)) for done in range(epochs)]) for key, at in told.items()}


def _segments(values: Sequence[float]) -> str:
    """Equal neighbours together, epochs counted from 1; of a long row the two ends."""
    parts, first = [], 1
    for value, equal in groupby(values):
        last = first + len(list(equal)) - 1
        parts.append(f"{value:.6g} epoch{f's {first}-{last}' if last > first else f' {first}'}")
        first = last + 1
    return ", ".join(parts if len(parts) <= 8 else [*parts[:2], "...", *parts[-2:]])


def _record(name: str) -> str:
    from fatbench.record import read

    return json.dumps(read(Path(name)).said(), indent=1, ensure_ascii=False)


def _checkpoint(name: str) -> str:
    from fatbench.checkpoint import load

    subject = load(Path(name))
    return json.dumps({"fingerprint": subject.fingerprint, **subject.meta}, indent=1, ensure_ascii=False)


_TELL: dict[str, Callable[[str], str]] = {
    "defense": _plugin(defenses),
    "evaluation": _plugin(evaluations),
    "model": _model,
    "dataset": _dataset,
    "protocol": _protocol,
    "recipe": _recipe,
    "record": _record,
    "checkpoint": _checkpoint,
}
