"""The gradient of a first convolution is the convolution's own, however it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fatbench import pixels
from fatbench.folding import in_place
from fatbench.pixels import Pixels, seeing, seen

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 1e-10}


def gradient(layer: nn.Module, x: Tensor, towards: Tensor) -> Tensor:
    point = x.clone().requires_grad_()
    return torch.autograd.grad(layer(point), point, towards)[0]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    ("channels", "kernel", "size"),
    [(3, 3, (8, 8)), (1, 3, (28, 28)), (4, 5, (6, 10)), (3, (3, 5), (8, 4)), (3, 1, (4, 4)), (3, 3, (7, 8))],
)
def test_the_gradient_is_the_convolutions_own(
    channels: int, kernel: int | tuple[int, int], size: tuple[int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, 16, kernel, padding="same").requires_grad_(False).to(dtype)
    layer.padding = tuple(k // 2 for k in layer.kernel_size)
    x = torch.rand(5, channels, *size).to(dtype)
    towards = torch.randn(5, 16, *size).to(dtype)
    expected, answer = gradient(layer, x, towards), layer(x)
    assert type(seeing(layer)) is Pixels
    torch.testing.assert_close(gradient(layer, x, towards), expected, rtol=CLOSE[dtype], atol=CLOSE[dtype])
    assert torch.equal(layer(x), answer)


def test_it_is_done_by_blocks_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(pixels, "_by_blocks", lambda grad, *_: asked.append(grad.dtype) or grad[:, :3])
    layer = seeing(nn.Conv2d(3, 16, 3, padding=1).requires_grad_(False))
    assert isinstance(layer, nn.Conv2d)
    gradient(layer, torch.rand(1, 3, 8, 8), torch.rand(1, 16, 8, 8))
    gradient(layer, torch.rand(1, 3, 7, 8), torch.rand(1, 16, 7, 8))  # no whole blocks
    gradient(layer.double(), torch.rand(1, 3, 8, 8).double(), torch.rand(1, 16, 8, 8).double())
    assert asked == [torch.float32]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(3, 8, 3, padding=2, dilation=2),
        nn.Conv2d(3, 9, 3, padding=1, groups=3),
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 8, 3, padding="same"),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.Conv2d(3, 8, 2, padding=1),
    ],
)
def test_other_convolutions_stay_as_they_are(layer: nn.Conv2d) -> None:
    assert type(seeing(layer)) is nn.Conv2d
    if pixels.plain(layer):  # and their gradient in another type is right all the same
        x = torch.rand(2, layer.in_channels, 8, 8)
        towards = torch.randn_like(layer.requires_grad_(False)(x))
        point = x.clone().requires_grad_()
        found = torch.autograd.grad(seen(point, layer, torch.bfloat16), point, towards.bfloat16())[0]
        torch.testing.assert_close(found, gradient(layer, x, towards), rtol=0.1, atol=0.1)


def test_a_gradient_may_come_back_in_another_type() -> None:
    layer = nn.Conv2d(3, 8, 3, padding=1).requires_grad_(False)
    point = torch.rand(2, 3, 8, 8, requires_grad=True)
    answer = seen(point, layer, torch.bfloat16)
    assert answer.dtype == torch.bfloat16
    assert torch.equal(answer, layer(point).bfloat16())
    towards = torch.randn_like(answer)
    found = torch.autograd.grad(answer, point, towards)[0]
    assert found.dtype == torch.float32
    expected = gradient(layer, point.detach(), towards.float())
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


class Branches(nn.Module):
    """ReLUs that may write over what they are given, and two that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        first = self.one(x)
        second = self.relu(first)  # `first` is read again below
        third = F.relu(self.two(second) + first)
        return F.relu(third.sigmoid()) + torch.relu(self.two(third))  # sigmoid's gradient needs its answer


def test_a_relu_writes_over_only_what_nobody_needs() -> None:
    torch.manual_seed(0)
    net = Branches().requires_grad_(False)
    x, towards = torch.rand(2, 3, 8, 8), torch.randn(2, 4, 8, 8)
    made = in_place(fx.symbolic_trace(net))
    assert [node.kwargs.get("inplace", False) for node in made.graph.nodes if "relu" in node.name] == [
        False, True, False, True,
    ]  # fmt: skip
    assert torch.equal(made(x), net(x))
    assert torch.equal(gradient(made, x, towards), gradient(net, x, towards))
