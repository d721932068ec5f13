"""Checkpoints: safetensors with plain metadata for ours; anybody else's weights, strictly, and never their code.

A pickle is only ever read by torch.load(weights_only=True), which builds tensors and containers and runs nothing.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import importlib.util
import json
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fatbench import models, runs
from fatbench.catalogue import network
from fatbench.errors import Refused, first_line
from fatbench.files import canonical, head, read_json, write_atomic
from fatbench.protocol import told

SCHEMA = 1
State = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """A network to be examined.

    Attributes:
        model: In eval mode, on the CPU; [0, 1] images to logits.
        meta: What is known of it: arch, classes, channels, size, mean, std, and for our own also settings, epoch,
            epochs, selection, status.
        fingerprint: sha256 of its weights and normalisation, whatever file they came in.
        training: What its run folder tells of the training; None where there is none.
    """

    model: nn.Module
    meta: dict[str, Any]
    fingerprint: str
    training: dict[str, Any] | None = None


def save(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes the inner network's weights and the metadata, in one step."""
    state = {key: value.detach().cpu().contiguous() for key, value in models.inner(model).state_dict().items()}
    _write(path, state, {"schema": SCHEMA, **meta})


def _write(path: Path, state: State, meta: Mapping[str, Any]) -> None:
    def write(to: Path) -> None:
        try:
            save_file(state, to, metadata={"fatbench": canonical(meta)})
        except SafetensorError as error:  # how safetensors passes on what the disk said
            raise OSError(errno.EIO, first_line(error)) from error

    write_atomic(path, write)


def relabel(path: Path, **meta: Any) -> None:
    """Changes metadata of one of our checkpoints, its weights untouched."""
    state, said = _read(path)
    _write(path, state, {**said, **meta})


def fingerprint(model: nn.Module) -> str:
    """sha256 of names, shapes, dtypes and bytes of the weights, and of mean and std where there is a normalisation."""
    sha = hashlib.sha256()
    for name, value in sorted(_everything(model).items()):
        value = value.detach().cpu().contiguous()
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        sha.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return sha.hexdigest()


def _everything(model: nn.Module) -> State:
    state = dict(models.inner(model).state_dict())
    if isinstance(model, models.Normalised):
        state |= {"normalised.mean": model.mean, "normalised.std": model.std}
    return state


# ------------------------------------------------------------------------------------------------ reading


def load(
    source: Path,
    *,
    arch: str | None = None,
    factory: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    size: int = 32,
) -> Subject:
    """A network from our own checkpoint or run folder, or from anybody's weights.

    Args:
        source: A run folder (its last checkpoint), a .safetensors, or a .pt/.pth holding a state_dict, plain or inside
            the dicts that trainers save.
        arch: What to build, where the weights do not say.
        factory: `path.py:function`, a function of no arguments that builds the network; the user's own code, run.
        mean, std: Normalisation to wrap around foreign weights.
        size: Side of the images, for foreign small-cnn weights.

    Raises:
        Refused: nothing there, an unfinished or failed run, a file of another kind, weights that do not fit.
    """
    if arch and factory:
        raise Refused(f"--model {factory} builds the network itself: leave --arch out")
    if source.is_dir():
        source = _of_run(source)
    if not source.is_file():
        raise Refused(f"no checkpoint at {source}")
    state, meta = _read(source)
    if meta and not factory:
        _agrees(source, meta, arch, mean, std)
        arch, mean, std = meta["arch"], meta["mean"], meta["std"]
        network = models.build(meta["arch"], meta["classes"], meta["channels"], meta["size"])
    elif factory:
        network = _made_by(factory)
    else:
        arch, network = _recognised(state, arch, size, source)
    _fill(network, state, source, factory or str(arch))
    if mean and std:
        channels = next((value.shape[1] for value in network.state_dict().values() if value.ndim == 4), len(mean))
        if len(mean) != channels:
            raise Refused(f"--mean has {len(mean)} numbers, and the network in {source} takes {channels} channels")
        network = models.Normalised(network, mean, std)
    # A user's network may do other things with the weights of ours: it goes by its own name.
    described = {**(meta or {"mean": mean, "std": std}), "arch": factory or arch}
    if factory:
        described["code"] = hashlib.sha256(Path(factory.rpartition(":")[0]).read_bytes()).hexdigest()
    return Subject(network.eval(), described, fingerprint(network), runs.told(source.parent) if meta else None)


def _agrees(
    path: Path, meta: dict[str, Any], arch: str | None, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> None:
    """Our own checkpoints say what they are; nobody is let to say otherwise and not be heard."""
    if arch and arch.replace("_", "-") != meta["arch"]:
        raise Refused(f"{path} holds a {meta['arch']}, not a {arch}: leave --arch out")
    if mean and std and [list(mean), list(std)] != [meta["mean"], meta["std"]]:
        raise Refused(
            f"{path} carries its own normalisation ({meta['mean']}, {meta['std']}): leave --mean and --std out"
        )


def _of_run(folder: Path) -> Path:
    if not (folder / "settings.toml").exists():
        raise Refused(f"{folder} is no run folder: it has no settings.toml; name a checkpoint file")
    if not (folder / "done").exists():
        raise Refused(
            f"the run in {folder} is not finished: go on with fatbench train --resume --out {folder}, "
            f"or name {folder / 'last.safetensors'}, whose row will say so"
        )
    mark = read_json(folder / "done", "end-of-run mark")
    if not isinstance(mark, dict) or mark.get("status") not in ("done", "failed"):
        raise Refused(f"{folder / 'done'} is no end-of-run mark: begin the run again with --force")
    if mark["status"] == "failed":
        # A failed run is examined from what it last saved; its record carries the failure and no number.
        return folder / "failed.safetensors"
    return folder / "last.safetensors"


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    begins = head(path, 512)
    if not begins:
        raise Refused(f"{path} is empty: copy or download it again")
    if re.match(rb"(\xef\xbb\xbf)?\s*<[!?a-zA-Z]", begins):
        raise Refused(f"{path} is a web page, not weights (a download page saved under that name?): download it again")
    if begins.startswith(b"version https://git-lfs"):
        raise Refused(f"{path} is a Git LFS pointer, not weights: run git lfs pull where it came from")
    return _read_safetensors(path) if path.suffix == ".safetensors" else (_read_pickle(path), {})


def _read_safetensors(path: Path) -> tuple[State, dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise Refused(f"{path} is truncated or no safetensors file: {first_line(error)}; copy it again") from None
    if "fatbench" not in header:
        return state, {}
    try:
        meta = json.loads(header["fatbench"])
        if meta["schema"] != SCHEMA:
            raise Refused(
                f"{path} has checkpoint schema {meta['schema']}, this fatbench reads {SCHEMA}: update fatbench"
            )
        Described.model_validate({key: meta[key] for key in Described.model_fields})
    except ValidationError as error:
        raise Refused(f"{path} has broken fatbench metadata: {told(error)}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} has broken fatbench metadata: {type(error).__name__} {first_line(error)}") from None
    return state, meta


class Described(BaseModel):
    """What our own metadata must say of a network for it to be built again."""

    model_config = ConfigDict(strict=True)

    arch: str
    classes: int = Field(ge=2)
    channels: int = Field(ge=1)
    size: int = Field(ge=1)
    mean: list[float] | None
    std: list[float] | None


def _inert() -> list[Any]:
    """What trainers leave beside weights, that builds a value and runs nothing: arguments, and figures of numpy's."""
    scalar = np.float64(0).__reduce__()[0]
    assert not isinstance(scalar, str)
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before numpy 2 and since
    return [
        argparse.Namespace,
        np.dtype,
        *((scalar, name) for name in names),
        *map(type, map(np.dtype, "?bhilqBHILQefd")),
    ]


def _read_pickle(path: Path) -> State:
    try:
        with torch.serialization.safe_globals(_inert()):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise Refused(
                f"{path} holds pickled code or is no checkpoint, and is not opened: save model.state_dict()"
            ) from None
        raise Refused(f"{path} is corrupt: {first_line(error)}; copy it again") from None
    except Exception as error:  # a damaged file makes torch raise almost anything
        raise Refused(f"{path} is truncated, corrupt or no checkpoint: {first_line(error)}; copy it again") from None
    return _unwrapped(found, path)


def _unwrapped(found: Any, path: Path) -> State:
    """The state_dict inside what trainers save, without the prefixes that wrappers leave."""
    for key in ("state_dict", "model_state_dict", "model", "ema", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise Refused(f"{path} holds no state_dict: save model.state_dict() and give that")
    return {str(key): value for key, value in found.items()}


def _variants(state: State) -> Iterator[State]:
    """The state as it is, and without the prefixes that wrappers leave on every key."""
    yield state
    for prefix in ("module.", "model.", "module.", "net."):
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
            yield state


def _shapes(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items()}


def _recognised(state: State, arch: str | None, size: int, path: Path) -> tuple[str, nn.Module]:
    """The network that these weights are of, freshly built: `arch`, or the one whose keys and shapes are theirs."""
    rows = [value.shape[0] for value in state.values() if value.ndim == 2]
    channels = [value.shape[1] for value in state.values() if value.ndim == 4]
    if not rows or not channels:
        raise Refused(f"{path} holds no convolution and linear layer: give the network with --model file.py:factory")
    # No network here has fewer channels anywhere than in its image; its classes are the rows of one of its matrices.
    theirs = [_shapes(variant) for variant in _variants(state)]
    wide = next(filter(None, map(models.recognised, theirs)), None)
    names = [network(arch)] if arch else [*models.ARCHITECTURES, *([wide] if wide else [])]
    for name, classes in product(names, dict.fromkeys(reversed(rows))):
        if _imagined(name, classes, min(channels), size) in theirs:
            return name, models.build(name, classes, min(channels), size)
    if arch:
        return names[0], models.build(names[0], rows[-1], min(channels), size)
    raise Refused(
        f"{path}: its {len(state)} tensors fit none of {', '.join(models.ARCHITECTURES)}: give --arch, or the network "
        "with --model file.py:factory"
    )


def _imagined(name: str, classes: int, channels: int, size: int) -> dict[str, torch.Size] | None:
    """The keys and shapes that a network would have; None where it takes no images of this size."""
    try:
        with torch.device("meta"):
            return _shapes(models.build(name, classes, channels, size).state_dict())
    except Refused:
        return None


def _made_by(factory: str) -> nn.Module:
    name, _, function = factory.rpartition(":")
    path = Path(name)
    if not name or not path.is_file():
        raise Refused(f"--model {factory}: write path.py:function; there is no file {name or factory}")
    spec = importlib.util.spec_from_file_location(f"fatbench_model_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Refused(f"--model {factory}: {path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except Exception as error:  # the user's own code; whatever it raises is the reason
        raise Refused(f"--model {factory} failed: {type(error).__name__}: {first_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise Refused(f"--model {factory} returned {type(made).__name__}, not a torch.nn.Module")
    return made


def _fill(network: nn.Module, state: State, path: Path, what: str) -> None:
    """Loads weights, every key and shape or not at all."""
    own = network.state_dict()
    state = next((variant for variant in _variants(state) if variant.keys() == own.keys()), list(_variants(state))[-1])
    lacking, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if lacking or extra or shaped:
        wrong = [f"lacks {lacking[0]} and {len(lacking) - 1} more"] if lacking else []
        wrong += [f"has {extra[0]} and {len(extra) - 1} more that it should not"] if extra else []
        wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in sorted(shaped)[:1]]
        raise Refused(f"{path} does not fit {what}: it {'; '.join(wrong)}: check --arch and the number of classes")
    try:
        network.load_state_dict(state)
    except Exception as error:  # sparse, quantised or meta tensors, say
        raise Refused(f"{path} holds tensors that cannot be loaded: {first_line(error)}") from None
