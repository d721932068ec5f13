"""What each change to crafting gave: one forward and input gradient, each change on top of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import over, row, turns
from benchmarks.worlds import BATCHES, begun, pictures
from fatbench import folding, pixels
from fatbench.attacks import cross_entropy


def gradient(network: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> None:
    """Of the loss at x, for whatever asks for one: the parameters too, unless they are frozen."""
    torch.autograd.backward(cross_entropy(network(x.detach().requires_grad_()), y).sum())


@contextmanager
def _with(module: ModuleType, **settings: int) -> Iterator[None]:
    """Other values of a module's constants."""
    before = {name: getattr(module, name) for name in settings}
    vars(module).update(settings)
    try:
        yield
    finally:
        vars(module).update(before)


def _folded(network: nn.Module, x: Tensor, y: Tensor, piece: int = folding.PIECE, lanes: int = pixels.LANES) -> None:
    """The folded copy, so many pixels at a time; with no lanes, the first layer's gradient as torch computes it."""
    with _with(folding, PIECE=piece), _with(pixels, LANES=lanes):
        gradient(folding.folded(network), x, y)


def _cast(network: nn.Module, x: Tensor, y: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        copy = folding.folded(network)
    gradient(copy, x, y)


def steps(arch: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Each change over what came before it, and the whole over the textbook's."""
    net, (x, y) = begun(arch), pictures(BATCHES[arch], 999)
    frozen = deepcopy(net).requires_grad_(False)
    last = deepcopy(frozen).to(memory_format=torch.channels_last)
    ways: dict[str, Callable[[], None]] = {
        "textbook": partial(gradient, net, x, y),
        "input gradients only": partial(gradient, frozen, x, y),
        "channels last": partial(gradient, last, x.contiguous(memory_format=torch.channels_last), y),
        "BatchNorm folded, ReLU in place": partial(_folded, frozen, x, y, x.numel(), 0),
        "a few images at a time": partial(_folded, frozen, x, y, lanes=0),
        "the first layer's gradient by blocks": partial(_folded, frozen, x, y),
        "bfloat16": partial(_cast, frozen, x, y),
    }
    for way in ways.values():
        way()
    times = turns(ways, rounds)
    names = list(ways)
    for before, name in pairwise(names):
        precision = "bf16" if name == "bfloat16" else "float32"
        yield row("change", before, arch, over(times[before], times[name]), precision=precision, note=f"+ {name}")
    yield row("change", "textbook", arch, over(times["textbook"], times[names[-2]]), precision="float32", note="all")
    yield row("change", "textbook", arch, over(times["textbook"], times[names[-1]]), precision="bf16", note="all")
