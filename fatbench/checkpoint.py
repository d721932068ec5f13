"""Checkpoints: safetensors with plain metadata for ours; anybody else's weights, strictly, and never their code.

A pickle is only ever read by torch.load(weights_only=True), which builds tensors and containers and runs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fatbench import models
from fatbench.errors import Refused, first_line
from fatbench.files import canonical, read_json, write_atomic

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
    """

    model: nn.Module
    meta: dict[str, Any]
    fingerprint: str


def save(path: Path, model: nn.Module, meta: Mapping[str, Any]) -> None:
    """Writes the inner network's weights and the metadata, in one step."""
    state = {key: value.detach().cpu().contiguous() for key, value in models.inner(model).state_dict().items()}
    header = {"fatbench": canonical({"schema": SCHEMA, **meta})}
    write_atomic(path, lambda to: save_file(state, to, metadata=header))


def relabel(path: Path, **meta: Any) -> None:
    """Changes metadata of one of our checkpoints, its weights untouched."""
    state, said = _read(path)
    header = {"fatbench": canonical({**said, **meta})}
    write_atomic(path, lambda to: save_file(state, to, metadata=header))


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
    if source.is_dir():
        source = _of_run(source)
    if not source.is_file():
        raise Refused(f"no checkpoint at {source}")
    state, meta = _read(source)
    if meta and not factory:
        arch, mean, std = meta["arch"], meta["mean"], meta["std"]
        network = models.build(meta["arch"], meta["classes"], meta["channels"], meta["size"])
    elif factory:
        network = _made_by(factory)
    else:
        arch = (arch or _recognised(state, size, source)).replace("_", "-")
        classes, channels = _ends(state, source)
        network = models.build(arch, classes, channels, size)
    _fill(network, state, source, arch or factory or "")
    model = models.Normalised(network, mean, std) if mean and std else network
    described = meta or {"arch": arch or factory, "mean": mean, "std": std}
    return Subject(model.eval(), described, fingerprint(model))


def _of_run(folder: Path) -> Path:
    if not (folder / "settings.toml").exists():
        raise Refused(f"{folder} is no run folder: it has no settings.toml; name a checkpoint file")
    if not (folder / "done").exists():
        raise Refused(
            f"the run in {folder} is not finished: go on with fatbench train --resume --out {folder}, "
            f"or name {folder / 'last.safetensors'}, whose row will say so"
        )
    mark = read_json(folder / "done", "end-of-run mark")
    if mark.get("status") != "done":
        # A failed run is examined from what it last saved; its record carries the failure and no number.
        return folder / "failed.safetensors"
    return folder / "last.safetensors"


def _read(path: Path) -> tuple[State, dict[str, Any]]:
    head = path.read_bytes()[:512]
    if not head:
        raise Refused(f"{path} is empty: copy or download it again")
    if head.lstrip()[:1] == b"<" or b"<html" in head.lower():
        raise Refused(f"{path} is a web page, not weights (a download page saved under that name?): download it again")
    if head.startswith(b"version https://git-lfs"):
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
        for key in ("arch", "classes", "channels", "size", "mean", "std"):
            meta[key]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} has broken fatbench metadata: {type(error).__name__} {first_line(error)}") from None
    return state, meta


def _read_pickle(path: Path) -> State:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Weights only load failed" in str(error) or "Unsupported" in str(error):
            raise Refused(
                f"{path} holds pickled code or is no checkpoint, and is not opened: save model.state_dict()"
            ) from None
        raise Refused(f"{path} is corrupt: {first_line(error)}; copy it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise Refused(f"{path} is truncated, corrupt or no checkpoint: {first_line(error)}; copy it again") from None
    return _unwrapped(found, path)


def _unwrapped(found: Any, path: Path) -> State:
    """The state_dict inside what trainers save, without the prefixes that wrappers leave."""
    for key in ("state_dict", "model_state_dict", "model", "ema", "net"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise Refused(f"{path} holds no state_dict: save model.state_dict() and give that")
    state = {str(key): value for key, value in found.items()}
    for prefix in ("module.", "model.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _ends(state: State, path: Path) -> tuple[int, int]:
    """(classes, channels) as the last and the first layer have them."""
    matrices = [value for value in state.values() if value.ndim == 2]
    kernels = [value for value in state.values() if value.ndim == 4]
    if not matrices or not kernels:
        raise Refused(f"{path} holds no convolution and linear layer: give the network with --model file.py:factory")
    return matrices[-1].shape[0], kernels[0].shape[1]


def _recognised(state: State, size: int, path: Path) -> str:
    classes, channels = _ends(state, path)
    shapes = {key: value.shape for key, value in state.items()}
    for name in models.ARCHITECTURES:
        with torch.device("meta"):
            candidate = models.build(name, classes, channels, max(size, 8)).state_dict()
        if {key: value.shape for key, value in candidate.items()} == shapes:
            return name
    raise Refused(
        f"{path}: its {len(state)} tensors fit none of {', '.join(models.ARCHITECTURES)}: give --arch, or the network "
        "with --model file.py:factory"
    )


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
    lacking, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if lacking or extra or shaped:
        wrong = [f"lacks {lacking[0]} and {len(lacking) - 1} more"] if lacking else []
        wrong += [f"has {extra[0]} and {len(extra) - 1} more that it should not"] if extra else []
        wrong += [f"{k} is {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in sorted(shaped)[:1]]
        raise Refused(f"{path} does not fit {what}: it {'; '.join(wrong)}: check --arch and the number of classes")
    network.load_state_dict(state)
