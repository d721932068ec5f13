"""A network's first convolution, whose gradient comes back to the pixels in half the time.

An image has three channels, and a vector unit sixteen lanes: most of them idle while a gradient is brought back to
three. With a stride of 1 and a kernel (k, k) that is a convolution with the weights turned round; for each 2x2 block of
pixels at once it is one with four times as many channels, a kernel (k + 1, k + 1) and a stride of 2. That multiplies
more, zeros too, and takes half as long on a CPU.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

LANES = 16  # float32 values of a wide vector unit


class Pixels(nn.Conv2d):
    """A convolution that sees images (N, C, H, W), of its own type and answer."""

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = seen(x, self, x.dtype)
        return answer


def seeing(network: nn.Module) -> nn.Module:
    """The network itself, its convolutions over few channels made `Pixels`; names and tensors stay."""
    for layer in network.modules():
        if type(layer) is nn.Conv2d and _few(layer):
            layer.__class__ = Pixels
    return network


def seen(x: Tensor, layer: nn.Conv2d, gives: torch.dtype) -> Tensor:
    """layer(x) in another type where asked; the gradient of x is computed in that type too.

    The layer is a `plain` one, and its weights are frozen: they get no gradient.
    """
    answer: Tensor = _Seen.apply(x, layer, gives)
    return answer


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Conv2d, gives: torch.dtype) -> Tensor:
        ctx.layer, ctx.size = layer, x.shape
        answer: Tensor = layer._conv_forward(x, layer.weight, layer.bias).to(gives)
        return answer

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layer, weight = ctx.layer, ctx.layer.weight.to(grad.dtype)
        if grad.device.type == "cpu" and grad.dtype != torch.float64 and _few(layer) and _even(ctx.size):
            back = _by_blocks(grad, weight, layer.padding)
        else:
            sliding = layer.stride, layer.padding, layer.dilation, layer.groups
            back = conv2d_input(ctx.size, weight, grad, *sliding)  # type: ignore[no-untyped-call]
        return back, None, None  # autograd turns it into x's type


def _by_blocks(grad: Tensor, weight: Tensor, padding: tuple[int, int]) -> Tensor:
    """The gradient (N, C, H, W) of what weights (outputs, C, k, k) saw, from that of their answer."""
    turned = weight.flip(2, 3).transpose(0, 1)
    four = torch.stack([F.pad(turned, (b, 1 - b, a, 1 - a)) for a in (0, 1) for b in (0, 1)], dim=1).flatten(0, 1)
    blocks = F.conv2d(grad, four.contiguous(memory_format=torch.channels_last), stride=2, padding=padding)
    return F.pixel_shuffle(blocks, 2)


def plain(layer: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that pads with so many zeros: what `seen` can bring a gradient back through."""
    return isinstance(layer, nn.Conv2d) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)


def _few(layer: nn.Conv2d) -> bool:
    """Whether it slides by one over few channels and keeps the size of a map."""
    same = layer.padding == tuple((kernel - 1) / 2 for kernel in layer.kernel_size)
    once = set(layer.stride) == set(layer.dilation) == {layer.groups} == {1}
    return plain(layer) and same and once and 4 * layer.in_channels <= LANES


def _even(size: torch.Size) -> bool:
    return size[2] % 2 == size[3] % 2 == 0
