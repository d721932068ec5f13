"""A network as crafting wants it: each BatchNorm folded into the convolution before it, channels last, in one type.

In eval mode BatchNorm is a scale and a shift a channel, which the convolution before it can do itself:
w' = w g / s, b' = (b - m) g / s + c, with running mean m, s = sqrt(variance + 1e-5), weight g and bias c. The logits
are the network's own to rounding, and neither pass pays for BatchNorm. It is done for the networks of
fatbench/models.py alone: anybody else's code may do what tracing cannot see, and is run as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fatbench import models
from fatbench.pixels import seeing

_KNOWN = (models.DigitsCNN, models.SmallCNN, models.TradesMnistCNN, models.ResNet18, models.WideResNet)


def folded(model: nn.Module) -> Callable[..., Tensor]:
    """The model in eval mode, made fast for input gradients; the model itself where it is none of ours.

    Under autocast the copy is of autocast's type, so that no weight is cast anew in every pass. Weights are taken over
    each time.
    """
    net = models.inner(model)
    if not _plain(net):
        return model
    weight = next(net.parameters())
    kind = weight.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    copies, key = _COPIES.setdefault(net, {}), (weight.device, weight.dtype, cast)
    copy = copies.get(key)
    if copy is None:
        copy = copies[key] = _Folded(net, weight.device, cast)
    copy.follow(net)
    if not isinstance(model, models.Normalised):
        return copy
    mean, std = model.mean, model.std
    return lambda x: copy((x - mean) / std)


def held(net: nn.Module) -> list[Tensor]:
    """The tensors of all copies of a network, which lie in memory beside it."""
    copies = _COPIES.get(models.inner(net), {}).values()
    return [tensor for copy in copies for tensor in chain(copy.graph.parameters(), copy.graph.buffers())]


def layout(device: torch.device, cast: torch.dtype | None) -> torch.memory_format:
    """How weights had best lie: channels last is what oneDNN computes in. A GPU's float32 was not measured."""
    return torch.channels_last if device.type == "cpu" or cast is not None else torch.preserve_format


# Pixels for each of at most two threads, here of 32 images of 32x32: on a CPU what a layer leaves of so many is still
# in the cache when the next one reads it, and not so large that the system's allocator gives it back at once. Smaller
# images go more at a time, for every call has its price.
PIECE = 32 * 32 * 32


def in_pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Images (N, C, H, W) as a CPU had best take them: about so many pixels at a time, evenly."""
    if x.device.type != "cpu":
        return (x,)
    most = PIECE * min(2, torch.get_num_threads())
    return torch.chunk(x, max(1, round(len(x) * x.shape[2:].numel() / most)))


def in_place(graph: fx.GraphModule) -> fx.GraphModule:
    """The graph itself; a ReLU writes over what it is given where nobody else reads that and no gradient needs it."""
    layers = dict(graph.named_modules())

    def is_a(node: fx.Node, kinds: tuple[type[nn.Module], ...], *functions: Callable[..., Any]) -> bool:
        return isinstance(layers[node.target], kinds) if node.op == "call_module" else node.target in functions

    for node in graph.graph.nodes:
        if not is_a(node, (nn.ReLU,), F.relu, torch.relu):
            continue
        given = node.all_input_nodes[0]
        if len(given.users) == 1 and is_a(given, (nn.Conv2d, nn.Linear, nn.BatchNorm2d), operator.add, torch.add):
            node.op, node.target, node.args, node.kwargs = "call_function", F.relu, (given,), {"inplace": True}
    graph.recompile()
    return graph


def _plain(net: nn.Module) -> bool:
    """Whether it is one of ours, whole: nobody hooked into it or put other layers in."""
    return type(net) in _KNOWN and not any(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module)
        for module in net.modules()
    )


class _Folded:
    """A folded copy, and how its tensors follow from the network's."""

    def __init__(self, net: nn.Module, device: torch.device, cast: torch.dtype | None) -> None:
        self.graph = fx.symbolic_trace(deepcopy(net).eval().requires_grad_(False))
        self.pairs = dict(_fold(self.graph))
        self.cast = cast
        self.graph.to(device=device, dtype=cast)
        seeing(in_place(self.graph)).to(memory_format=layout(device, cast))

    def __call__(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            parts = [self.graph(part) for part in in_pieces(x if self.cast is None else x.to(self.cast))]
        logits: Tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits if self.cast is None else logits.float()

    @torch.no_grad()
    def follow(self, net: nn.Module) -> None:
        """Takes the network's tensors over.

        Always: what is written through `.data`, as AWP's perturbations are, no version tells of, and once an attack it
        is cheap.
        """
        theirs = dict(_tensors(net))
        for name, mine in _tensors(self.graph):
            layer, _, which = name.rpartition(".")
            if layer not in self.pairs:
                mine.copy_(theirs[name])
                continue
            norm = self.pairs[layer]
            scale = theirs[f"{norm}.weight"] / torch.sqrt(theirs[f"{norm}.running_var"] + 1e-5)
            if which == "weight":
                mine.copy_(theirs[name] * scale[:, None, None, None])
            else:
                bias = theirs.get(name, torch.zeros_like(scale))
                mine.copy_((bias - theirs[f"{norm}.running_mean"]) * scale + theirs[f"{norm}.bias"])


# The copies of each network, by device, type and autocast's type; they go when it goes.
_Key = tuple[torch.device, torch.dtype, torch.dtype | None]
_COPIES: WeakKeyDictionary[nn.Module, dict[_Key, _Folded]] = WeakKeyDictionary()


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from ((name, value) for name, value in module.named_buffers() if value.is_floating_point())


def _fold(graph: fx.GraphModule) -> Iterator[tuple[str, str]]:
    """Takes out every BatchNorm behind a convolution that nobody else listens to; (convolution, BatchNorm) names."""
    layers = dict(graph.named_modules())
    for node in list(graph.graph.nodes):
        if node.op != "call_module" or not isinstance(layers[node.target], nn.BatchNorm2d):
            continue
        before = node.args[0]
        if before.op != "call_module" or len(before.users) != 1:
            continue
        convolution = layers[before.target]
        if not isinstance(convolution, nn.Conv2d):
            continue
        if convolution.bias is None:
            zeros = convolution.weight.new_zeros(convolution.out_channels)
            convolution.bias = nn.Parameter(zeros, requires_grad=False)
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
        yield before.target, node.target
    graph.delete_all_unused_submodules()
    graph.recompile()
