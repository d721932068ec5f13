"""A network's logits for images that differ from known ones in one window, computed from what the window changes.

Square's queries change a few pixels each. What they change of a map grows by a kernel a layer, so that the first
layers, whose maps are large, need to be computed in a small window alone; once it holds half of a map, the rest is
computed whole. The numbers are the network's own, to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fatbench.swift import Cast, ChannelsLast, agreement, alike

# What treats each value by itself, or each channel's.
_EACH = (nn.ReLU, nn.BatchNorm2d, nn.Identity, nn.Dropout, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.ELU, nn.Softplus)
_EACH_FUNCTION = (F.relu, torch.relu, F.silu, F.gelu)
_POOLS: dict[Any, type[nn.Module]] = {F.max_pool2d: nn.MaxPool2d, F.avg_pool2d: nn.AvgPool2d}
_SUM = (operator.add, operator.iadd, torch.add)
SHARE = 0.7  # of a map: a larger window is not worth its bookkeeping
MEMORY = 2**30  # bytes that may be kept of known images


class Window(NamedTuple):
    """Rows and columns of a map, half-open."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        """That part of maps x (N, C, H, W)."""
        return x[:, :, self.top : self.bottom, self.left : self.right]

    def union(self, other: Window) -> Window:
        top, left = min(self.top, other.top), min(self.left, other.left)
        return Window(top, max(self.bottom, other.bottom), left, max(self.right, other.right))

    def common(self, other: Window) -> Window:
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Window(top, max(top, min(self.bottom, other.bottom)), left, max(left, min(self.right, other.right)))

    def within(self, outer: Window) -> Window:
        """Its place as counted from the corner of another."""
        return Window(self.top - outer.top, self.bottom - outer.top, self.left - outer.left, self.right - outer.left)

    def small(self, height: int, width: int) -> bool:
        return (self.bottom - self.top) * (self.right - self.left) <= SHARE * height * width


class Part(NamedTuple):
    """New values (N, C, h, w) inside a window; outside it a map is as it was."""

    window: Window
    inner: Tensor


Value = Tensor | Part


class Patches:
    """Answers to one batch of images that is asked again and again with small changes.

    `ask` compares with the images known so far; `keep` says which of those just asked are known from now on, and who
    is asked again. What is kept decides how much is computed, never what is answered.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.layers, self.run = dict(network.named_modules()), fx.Interpreter(network)
        self.nodes = list(network.graph.nodes)
        self.last = {given: node for node in self.nodes for given in node.all_input_nodes}  # the last to use it
        maps = [node for node in self.nodes if node.op == "placeholder" or self._each(node) or self._joins(node)]
        self.kept = [node for node in maps if not all(map(self._each, node.users))]
        self.known: dict[fx.Node, Tensor] = {}
        self.asked: dict[fx.Node, Value] = {}
        self.x = self.now = torch.empty(0)
        self.window: Window | None = None

    @property
    def bytes(self) -> int:
        """What is kept of the images known."""
        return sum(value.nbytes for value in self.known.values())

    def ask(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W)."""
        self.now = x
        if x.shape != self.x.shape:
            self.known = {}
        self.window = self._changed(x) if self.known else None
        values: dict[fx.Node, Value] = {}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = _last(x) if self.window is None else Part(self.window, _last(self.window.of(x)))
            elif node.op == "output":
                break
            else:
                part = self._part(node, values)
                values[node] = self._computed(node, values) if part is None else part
            for given in node.all_input_nodes:
                if self.last[given] is node and given not in self.kept:
                    del values[given]
        self.asked = {node: value for node in self.kept if isinstance(value := values[node], Part) or value.ndim == 4}
        logits = values[self.nodes[-1].all_input_nodes[0]]
        assert isinstance(logits, Tensor)
        return logits.float()

    def keep(self, which: Tensor, going: Tensor) -> None:
        """Of those just asked, `which` (N,) bool replace what was known; `going` (N,) bool are asked again."""
        if not self.known:  # nothing to replace: all are new
            self.x = self.now.clone()
            self.known = {node: value.clone() for node, value in self.asked.items() if isinstance(value, Tensor)}
        elif which.any():
            rows = which.nonzero().squeeze(1)
            place = self.window or _all(self.now)
            place.of(self.x)[rows] = place.of(self.now)[rows]
            for node, value in self.asked.items():
                window, inner = value if isinstance(value, Part) else (_all(value), value)
                window.of(self.known[node])[rows] = inner[rows]
        if not going.all():
            self.x, self.known = self.x[going], {node: value[going] for node, value in self.known.items()}

    def _changed(self, x: Tensor) -> Window | None:
        """The window that holds every change of every image; None where it is too large to help."""
        changed = (x != self.x).flatten(0, 1).any(dim=0)
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        if not len(rows):
            return Window(0, 1, 0, 1)
        window = Window(int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1)
        return window if window.small(*x.shape[2:]) else None

    # -------------------------------------------------------------------------------------------- layer by layer

    def _each(self, node: fx.Node) -> bool:
        """Whether a layer treats each value by itself."""
        if len(node.all_input_nodes) != 1:
            return False
        if node.op == "call_module":
            return isinstance(self.layers[str(node.target)], _EACH)
        return node.target in _EACH_FUNCTION or (node.op == "call_method" and node.target == "relu")

    def _joins(self, node: fx.Node) -> bool:
        """Whether it is a sum of two maps, or slides a kernel over one."""
        if node.op == "call_function" and node.target in _SUM:
            return len(node.all_input_nodes) == 2 and not node.kwargs
        return (layer := self._layer(node)) is not None and _slides(_uncast(layer)) is not None

    def _layer(self, node: fx.Node) -> nn.Module | None:
        """The layer that a node is; None of one that is none."""
        if node.op == "call_module":
            layer: nn.Module = self.layers[str(node.target)]
            return layer
        pool = _POOLS.get(node.target) if node.op == "call_function" else None
        return pool(*node.args[1:], **node.kwargs) if pool else None

    def _part(self, node: fx.Node, values: dict[fx.Node, Value]) -> Part | None:
        """A layer's answer inside the window that its input changes; None where all of it must be computed."""
        given = [values[source] for source in node.all_input_nodes]
        parts = [value for value in given if isinstance(value, Part)]
        if not parts or len(parts) < len(given):
            return None
        if self._each(node):
            args = fx.node.map_arg(node.args, lambda source: parts[0].inner)
            return Part(parts[0].window, getattr(self.run, node.op)(node.target, args, node.kwargs))
        if not self._joins(node):
            return None
        if (layer := self._layer(node)) is not None:
            return self._slid(layer, node.all_input_nodes[0], parts[0])
        window = parts[0].window.union(parts[1].window)
        if not window.small(*self.known[node.all_input_nodes[0]].shape[2:]):
            return None
        one, other = (self._around(*pair, window) for pair in zip(node.all_input_nodes, parts, strict=True))
        return Part(window, one + other)

    def _slid(self, layer: nn.Module, source: fx.Node, part: Part) -> Part | None:
        """A convolution's or a pool's answer where its kernel meets the part."""
        slide = _slides(_uncast(layer))
        assert slide is not None
        sizes = self.known[source].shape[2:]
        spans = [slide.meets(part.window[2 * i], part.window[2 * i + 1], sizes[i], i) for i in (0, 1)]
        out = Window(*spans[0], *spans[1])
        if not out.small(*(slide.size(sizes[i], i) for i in (0, 1))):
            return None
        (top, bottom), (left, right) = (slide.sees(*spans[i], i) for i in (0, 1))
        inside = Window(max(top, 0), min(bottom, sizes[0]), max(left, 0), min(right, sizes[1]))
        seen = self._around(source, part, inside)
        beyond = (inside.left - left, right - inside.right, inside.top - top, bottom - inside.bottom)
        return Part(out, _applied(layer, F.pad(seen, beyond) if any(beyond) else seen))

    def _around(self, source: fx.Node, part: Part, window: Window) -> Tensor:
        """A map's values in a window, the part's where it lies in it."""
        if part.window == window:
            return part.inner
        values = window.of(self.known[source]).clone()
        common = part.window.common(window)
        common.within(window).of(values).copy_(common.within(part.window).of(part.inner))
        return values

    def _computed(self, node: fx.Node, values: dict[fx.Node, Value]) -> Any:
        def whole(source: fx.Node) -> Any:
            value = values[source]
            return self._around(source, value, _all(self.known[source])) if isinstance(value, Part) else value

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), whole)
        return getattr(self.run, node.op)(node.target, args, kwargs)


class _Slide(NamedTuple):
    """How a kernel slides over a map, by axis."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]

    def size(self, length: int, axis: int) -> int:
        return (length + 2 * self.padding[axis] - self.kernel[axis]) // self.stride[axis] + 1

    def meets(self, first: int, end: int, length: int, axis: int) -> tuple[int, int]:
        """The answers, half-open, whose kernel meets [first, end); at least one."""
        stride, padding, last = self.stride[axis], self.padding[axis], self.size(length, axis) - 1
        low = min(last, max(0, -((self.kernel[axis] - 1 - padding - first) // stride)))
        return low, max(low, min(last, (end - 1 + padding) // stride)) + 1

    def sees(self, first: int, end: int, axis: int) -> tuple[int, int]:
        """What the kernel sees, half-open, for the answers [first, end); beyond the map too."""
        low = first * self.stride[axis] - self.padding[axis]
        return low, (end - 1) * self.stride[axis] - self.padding[axis] + self.kernel[axis]


def _slides(layer: nn.Module) -> _Slide | None:
    if isinstance(layer, nn.Conv2d):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and set(layer.dilation) == {1}
        return _Slide(layer.kernel_size, layer.stride, layer.padding) if plain else None  # type: ignore[arg-type]
    if isinstance(layer, (nn.MaxPool2d, nn.AvgPool2d)):
        plain = _two(layer.padding) == (0, 0) and not layer.ceil_mode and _two(getattr(layer, "dilation", 1)) == (1, 1)
        plain = plain and not getattr(layer, "return_indices", False)
        return _Slide(_two(layer.kernel_size), _two(layer.stride), (0, 0)) if plain else None
    return None


def _two(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


def _uncast(layer: nn.Module) -> nn.Module:
    return layer.layer if isinstance(layer, Cast) else layer


def _applied(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer on a map that has its padding already."""
    if isinstance(layer, Cast):
        return _applied(layer.layer, x.to(layer.takes)).to(layer.gives)
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, layer.weight, layer.bias, layer.stride, groups=layer.groups)
    answer: Tensor = layer(x)
    return answer


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _all(x: Tensor) -> Window:
    return Window(0, x.shape[2], 0, x.shape[3])


@torch.no_grad()
def patches(craft: nn.Module, x: Tensor) -> Patches | None:
    """Patches of a network's swift copy for images like x (N, C, H, W); None where they cannot be, or would not fit."""
    if not isinstance(craft, ChannelsLast) or not isinstance(craft.network, fx.GraphModule):
        return None
    few = x[:4]
    changed = few.clone()
    changed[:, :, 1:3, -3:] = 1 - changed[:, :, 1:3, -3:]
    expected = craft(changed)
    made = Patches(_nothing_in_place(deepcopy(craft.network)))
    everyone = torch.ones(len(few), dtype=torch.bool, device=x.device)
    made.ask(few)
    made.keep(everyone, everyone)
    fits = made.bytes * len(x) <= MEMORY * len(few)
    return made if fits and alike(made.ask(changed), expected, agreement(craft)) else None


def _nothing_in_place(network: fx.GraphModule) -> fx.GraphModule:
    """The network itself: what is kept must not be written over by a later layer."""
    for layer in network.modules():
        if getattr(layer, "inplace", False):
            layer.inplace = False  # type: ignore[assignment]
    for node in network.graph.nodes:
        if node.target is operator.iadd:
            node.target = operator.add
        node.kwargs = {**node.kwargs, "inplace": False} if node.kwargs.get("inplace") else node.kwargs
    network.recompile()
    return network
