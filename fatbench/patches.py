"""A network's logits for images that differ from known ones in one window, computed from what the window changes.

Square's queries change a few pixels each. What they change of a map grows by a kernel a layer, so that the first
layers, whose maps are large, need to be computed in a small window alone; once it holds half of a map, the rest is
computed whole. The numbers are the network's own, to rounding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
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


@dataclass(frozen=True)
class _Step:
    """One layer of a traced network, and what can be told of it before any image is seen.

    Attributes:
        node: Its place in the graph.
        given: The layers whose answers it takes.
        whole: Its answer from all that it takes.
        part: Its answer from a part of the one map that it takes, padded already; None where it has none.
        slide: How its kernel slides; None where it has none.
        adds: Whether it adds two maps.
        done: Those whose answers nobody needs after it.
    """

    node: fx.Node
    given: tuple[fx.Node, ...]
    whole: Callable[[dict[fx.Node, Any]], Any]
    part: Callable[[Tensor], Tensor] | None
    slide: _Slide | None
    adds: bool
    done: tuple[fx.Node, ...]


class Patches:
    """Answers to one batch of images that is asked again and again with small changes.

    `ask` compares with the images known so far; `keep` says which of those just asked are known from now on, and who
    is asked again. What is kept decides how much is computed, never what is answered.
    """

    def __init__(self, network: fx.GraphModule) -> None:
        self.network = network
        self.images, *nodes, answer = network.graph.nodes
        self.logits = answer.all_input_nodes[0]
        layers = {node: _layer(node, network) for node in nodes}
        each = {node for node in nodes if _each(node, layers[node])}
        maps = [n for n in nodes if n in each or _adds(n) or _slides(_uncast(layers[n]))]
        self.kept = {node for node in (self.images, *maps) if not each.issuperset(node.users)}
        last = {given: node for node in nodes for given in node.all_input_nodes}  # the last to use it
        gone = {node: [n for n in node.all_input_nodes if last[n] is node and n not in self.kept] for node in nodes}
        self.steps = [self._step(node, layers[node], node in each, gone[node]) for node in nodes]
        self.known: dict[fx.Node, Tensor] = {}
        self.asked: dict[fx.Node, Value] = {}
        self.x = self.now = torch.empty(0)
        self.window: Window | None = None

    def _step(self, node: fx.Node, layer: nn.Module | None, each: bool, done: Sequence[fx.Node]) -> _Step:
        given, slide = tuple(node.all_input_nodes), _slides(_uncast(layer))
        whole = partial(_run, fx.Interpreter(self.network), node)
        part: Callable[[Tensor], Tensor] | None = None
        if each:
            part = lambda inner: whole({given[0]: inner})  # noqa: E731
        elif layer is not None and slide is not None:
            part = partial(_applied, layer)
        return _Step(node, given, whole, part, slide, _adds(node), tuple(n for n in done if n is not self.logits))

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
        first = _last(x) if self.window is None else Part(self.window, _last(self.window.of(x)))
        values: dict[fx.Node, Value] = {self.images: first}
        for step in self.steps:
            part = self._part(step, values)
            values[step.node] = self._whole(step, values) if part is None else part
            for node in step.done:
                del values[node]
        self.asked = {node: value for node in self.kept if isinstance(value := values[node], Part) or value.ndim == 4}
        logits = values[self.logits]
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
        rows, columns = (changed.any(dim=axis).nonzero().squeeze(1).tolist() for axis in (1, 0))
        if not rows:
            return Window(0, 1, 0, 1)
        window = Window(rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
        return window if window.small(*x.shape[2:]) else None

    def _part(self, step: _Step, values: dict[fx.Node, Value]) -> Part | None:
        """A layer's answer inside the window that its input changes; None where all of it must be computed."""
        given = [values[source] for source in step.given]
        if step.adds and isinstance(given[0], Part) and isinstance(given[1], Part):
            return self._added(step.given, given[0], given[1])
        if step.part is None or not isinstance(given[0], Part):
            return None
        if step.slide is None:
            return Part(given[0].window, step.part(given[0].inner))
        return self._slid(step.slide, step.part, step.given[0], given[0])

    def _added(self, sources: Sequence[fx.Node], one: Part, other: Part) -> Part | None:
        """The sum of two maps where either changes."""
        window = one.window.union(other.window)
        if not window.small(*self.known[sources[0]].shape[2:]):
            return None
        return Part(window, self._around(sources[0], one, window) + self._around(sources[1], other, window))

    def _slid(self, slide: _Slide, layer: Callable[[Tensor], Tensor], source: fx.Node, part: Part) -> Part | None:
        """A convolution's or a pool's answer where its kernel meets the part."""
        height, width = self.known[source].shape[2:]
        meets = slide.around(part.window, height, width)
        if meets is None:
            return None
        out, inside, beyond = meets
        seen = self._around(source, part, inside)
        return Part(out, layer(F.pad(seen, beyond) if any(beyond) else seen))

    def _around(self, source: fx.Node, part: Part, window: Window) -> Tensor:
        """A map's values in a window, the part's where it lies in it."""
        if part.window == window:
            return part.inner
        values = window.of(self.known[source]).clone()
        common = part.window.common(window)
        common.within(window).of(values).copy_(common.within(part.window).of(part.inner))
        return values

    def _whole(self, step: _Step, values: dict[fx.Node, Value]) -> Any:
        """A layer's answer from all that it takes, with what is known around a part."""
        given: dict[fx.Node, Any] = {}
        for source in step.given:
            value = values[source]
            given[source] = self._around(source, value, _all(self.known[source])) if isinstance(value, Part) else value
        return step.whole(given)


def _run(interpreter: fx.Interpreter, node: fx.Node, given: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), given.__getitem__)
    return getattr(interpreter, node.op)(node.target, args, kwargs)


def _each(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a layer treats each value by itself."""
    if len(node.all_input_nodes) != 1:
        return False
    if node.op == "call_module":
        return isinstance(layer, _EACH)
    return node.target in _EACH_FUNCTION or (node.op == "call_method" and node.target == "relu")


def _adds(node: fx.Node) -> bool:
    return node.target in _SUM and len(node.all_input_nodes) == 2 and not node.kwargs


def _layer(node: fx.Node, network: fx.GraphModule) -> nn.Module | None:
    """The layer that a node is; None of one that is none."""
    if node.op == "call_module":
        return network.get_submodule(str(node.target))
    pool = _POOLS.get(node.target) if node.op == "call_function" else None
    return pool(*node.args[1:], **node.kwargs) if pool else None


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

    @lru_cache(2**14)  # noqa: B019  a kernel is a few numbers, and windows come back
    def around(self, window: Window, height: int, width: int) -> tuple[Window, Window, tuple[int, ...]] | None:
        """Where the kernel meets a window, what it sees of the map for that, and beyond it; None of most of the map."""
        rows = self.meets(window.top, window.bottom, height, 0)
        columns = self.meets(window.left, window.right, width, 1)
        out = Window(*rows, *columns)
        if not out.small(self.size(height, 0), self.size(width, 1)):
            return None
        (top, bottom), (left, right) = self.sees(*rows, 0), self.sees(*columns, 1)
        inside = Window(max(top, 0), min(bottom, height), max(left, 0), min(right, width))
        return out, inside, (inside.left - left, right - inside.right, inside.top - top, bottom - inside.bottom)


def _slides(layer: nn.Module | None) -> _Slide | None:
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


def _uncast(layer: nn.Module | None) -> nn.Module | None:
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
