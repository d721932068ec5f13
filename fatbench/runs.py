"""A run's folder: whose it is, and how a run takes it without touching anybody else's.

It holds settings.toml (itself a recipe), metrics.jsonl, last.safetensors, best.safetensors, resume.pt and, written
last, `done` {"status": "done" or "failed"}.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fatbench import recipe
from fatbench.errors import Refused, RunFailed, first_line
from fatbench.files import disk, locked, read_json, read_lines, write_text
from fatbench.recipe import Settings

OWNED = (
    "settings.toml",
    "metrics.jsonl",
    "last.safetensors",
    "best.safetensors",
    "failed.safetensors",
    "resume.pt",
    "done",
)


@contextmanager
def claimed(out: Path, settings: Settings, *, resume: bool, force: bool) -> Iterator[None]:
    """Holds the folder for this run, or says whose it is. Nothing is written where the answer is no.

    Raises:
        Refused: something else is there, a run is and neither `resume` nor `force` was said, the run there has other
            settings, or another process is at work in it.
    """
    if out.exists() and not out.is_dir():
        raise Refused(f"{out} is a file: --out takes a folder")
    if _holds_anything(out) and not (out / "settings.toml").exists():
        raise Refused(f"{out} holds something else and no run: choose another --out")
    if _holds_anything(out) and not force:
        _same_run(out, settings, resume)
    with disk(out):
        out.mkdir(parents=True, exist_ok=True)
    with locked(out / ".lock", f"in {out}"):
        if _holds_anything(out) and not force:
            _same_run(out, settings, resume)  # asked again: another process may have begun one in between
        else:
            # The settings go last and are replaced in one step: a kill in between leaves a run that --force clears.
            for name in OWNED[1:]:
                (out / name).unlink(missing_ok=True)
            write_text(out / "settings.toml", settings.toml())
        yield


def _holds_anything(out: Path) -> bool:
    return out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())


def _same_run(out: Path, settings: Settings, resume: bool) -> None:
    if not resume:
        raise Refused(f"{out} holds a run: --resume goes on with it, --force throws it away, or choose another --out")
    changed = recipe.difference(settings_in(out), settings)
    if changed:
        raise Refused(f"{out} was begun with other settings ({changed}): give those, or choose another --out")


def settings_in(out: Path) -> Settings:
    """The settings that a run folder was begun with."""
    try:
        said = tomllib.loads((out / "settings.toml").read_text(encoding="utf-8"))
        return Settings.model_validate(said)
    except (OSError, ValueError) as error:
        raise Refused(f"{out / 'settings.toml'} is broken: {first_line(error)}; choose another --out") from None


def failed(out: Path) -> bool:
    """Whether the run in `out` has ended in failure."""
    mark = out / "done"
    return mark.exists() and bool(read_json(mark, "end-of-run mark").get("status") == "failed")


def raise_if_failed(out: Path) -> None:
    """Raises RunFailed where the run in `out` has ended in failure."""
    mark = read_json(out / "done", "end-of-run mark")
    if mark.get("status") == "failed":
        raise RunFailed(f"the run in {out} has failed: {mark.get('reason')}; begin again elsewhere, or with --force")


CURVES = ("loss", "train_accuracy", "steps_per_example", "val_natural", "val_pgd-10", "tau", "lr")


def told(out: Path) -> dict[str, Any] | None:
    """What a run folder's metrics tell a record of the training; None where there are none.

    `backwards_per_example` counts the gradients that crafting took, an example and epoch; an update takes one more.
    """
    lines = read_lines(out / "metrics.jsonl") if (out / "settings.toml").exists() else []
    epochs = [line for line in lines if isinstance(line, dict) and {"seconds", "backwards"} <= line.keys()]
    if not epochs:
        return None
    examples = sum(epoch.get("examples", 0) for epoch in epochs)
    curves = {name: [epoch.get(name) for epoch in epochs] for name in CURVES}
    return {
        "epochs": len(epochs),
        "seconds": round(sum(epoch["seconds"] for epoch in epochs), 3),
        "backwards_per_example": sum(e["backwards"] for e in epochs) / examples if examples else None,
        "device": epochs[-1].get("device"),
        "curves": {name: values for name, values in curves.items() if any(v is not None for v in values)},
    }
