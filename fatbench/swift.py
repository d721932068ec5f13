"""A network's swifter copy, to craft on alone: BatchNorm folded, channels last, in bfloat16 where asked.

What is found on a copy counts only where the network itself, as it was given and in float32, agrees.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from itertools import product

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from fatbench.folding import in_pieces, in_place
from fatbench.pixels import plain, seeing, seen
from fatbench.quantities import Precision

# The most by which a copy's logits, each example's mean taken off, may differ, as a share of the largest: what another
# order of sums may do, and what eight bits may do over many layers.
AGREEMENT = {"float32": 1e-4, "bf16": 0.1}


def swift(model: nn.Module, x: Tensor, precision: Precision = "float32") -> nn.Module | None:
    """A copy that answers images like x (N, C, H, W) as the network does, in float32; None where there is none.

    A network that cannot be traced keeps its BatchNorm. One that cannot be copied, or whose copy answers otherwise (it
    is random, say), is left to itself.
    """
    dtypes: tuple[Callable[[nn.Module], nn.Module], ...] = (
        (_plain,) if precision == "float32" else (_bf16_within, _bf16)
    )
    copying: tuple[Callable[[nn.Module], nn.Module], ...] = (_folded, deepcopy)
    for copied, dtype in product(copying, dtypes):
        try:
            copy = ChannelsLast(dtype(copied(model)))
            if _agrees(copy, model, x, precision):
                return copy
        except Exception:  # anybody's code: what cannot be traced, copied or run in bfloat16 stays as it is
            continue
    return None


class ChannelsLast(nn.Module):
    """A network that lays out its images and weights channels last and answers in float32.

    On a CPU it takes a few images at a time: what a layer leaves is then still in the cache when the next one reads it.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last).eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        parts = [self.network(part) for part in in_pieces(x)]
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits.float()


class Cast(nn.Module):
    """A layer that takes one type and hands on another."""

    def __init__(self, layer: nn.Module, takes: torch.dtype, gives: torch.dtype) -> None:
        super().__init__()
        self.layer, self.takes, self.gives = layer, takes, gives

    def forward(self, x: Tensor) -> Tensor:
        if plain(self.layer) and (self.takes, self.gives) == (torch.float32, torch.bfloat16):
            return seen(
                x, self.layer, self.gives
            )  # float32 as it sees pixels, bfloat16 as it hands their gradient back
        answer: Tensor = self.layer(x.to(self.takes))
        return answer.to(self.gives)


def _folded(model: nn.Module) -> nn.Module:
    """A copy with the BatchNorm behind each convolution in its weights, as torch.fx sees the network."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folded = fuse(model, inplace=False)
    assert isinstance(folded, fx.GraphModule)  # as fuse makes it
    return in_place(folded)


def _plain(network: nn.Module) -> nn.Module:
    return seeing(network)


def _bf16(network: nn.Module) -> nn.Module:
    return Cast(seeing(network).to(torch.bfloat16), torch.bfloat16, torch.float32)


def _bf16_within(network: nn.Module) -> nn.Module:
    """bfloat16 between the first layer, which sees pixels, and the last, whose logits are compared."""
    layers = [(n, m) for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.BatchNorm2d))]
    first, last = layers[0], layers[-1]
    for _, layer in layers[1:-1]:
        layer.to(torch.bfloat16)
    for (name, layer), gives in ((first, torch.bfloat16), (last, torch.float32)):
        parent, _, own = name.rpartition(".")
        setattr(network.get_submodule(parent), own, Cast(layer, torch.float32, gives))
    return network


@torch.no_grad()
def _agrees(copy: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor, precision: Precision) -> bool:
    return alike(copy(x), model(x), AGREEMENT[precision])


def agreement(copy: nn.Module) -> float:
    """By how much the answers of a copy of this type may differ."""
    return AGREEMENT["bf16" if any(p.dtype == torch.bfloat16 for p in copy.parameters()) else "float32"]


def alike(ours: Tensor, theirs: Tensor, agreement: float) -> bool:
    """Whether logits (N, classes) agree, each example's mean taken off, to a share of the largest."""
    if ours.shape != theirs.shape or not torch.isfinite(ours).all():
        return False
    theirs, ours = theirs - theirs.mean(dim=1, keepdim=True), ours - ours.mean(dim=1, keepdim=True)
    return bool((ours - theirs).abs().max() <= agreement * theirs.abs().max())
