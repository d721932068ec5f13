"""The networks, with the state_dict keys of the official code, so that released weights load as they are.

digits-cnn is ours. small-cnn, resnet-18 and the wide ResNets are those of FAT (ICML 2020), which took them from TRADES
and MART; wrn-32-10 is what FAT's code calls Madry's network, trades-mnist-cnn what TRADES's calls SmallCNN.
Inputs are (N, channels, H, W) in [0, 1], unnormalised; `Normalised` wraps a network where a dataset or checkpoint asks
for mean and standard deviation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.catalogue import WIDE, network
from fatbench.errors import Refused


class DigitsCNN(nn.Sequential):
    """Four 3x3 convolutions of width 16, one pooling: 8x8 digits in seconds. Takes any image of at least 2x2."""

    def __init__(self, classes: int = 10, channels: int = 3, width: int = 16) -> None:
        def conv(inputs: int) -> list[nn.Module]:
            return [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]

        body = [*conv(channels), *conv(width), nn.MaxPool2d(2), *conv(width), *conv(width)]
        super().__init__(*body, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))


class SmallCNN(nn.Module):
    """FAT's "Small CNN": six convolutions of 64-64-128-128-196-196 and two linear layers, or of other widths."""

    def __init__(
        self, classes: int = 10, channels: int = 3, size: int = 32, widths: tuple[int, int, int] = (64, 128, 196)
    ) -> None:
        super().__init__()
        if size < 8:
            raise Refused(f"small-cnn halves its input three times: images of at least 8x8, not {size}x{size}")
        inputs = channels
        for block, outputs in enumerate(widths, start=1):
            self.add_module(f"block{block}_conv1", nn.Conv2d(inputs, outputs, 3, padding=1))
            self.add_module(f"block{block}_conv2", nn.Conv2d(outputs, outputs, 3, padding=1))
            self.add_module(f"batchnorm{block}_1", nn.BatchNorm2d(outputs))
            self.add_module(f"batchnorm{block}_2", nn.BatchNorm2d(outputs))
            inputs = outputs
        self.fc1 = nn.Linear(inputs * (size // 8) ** 2, 256)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in (1, 2, 3):
            for layer in (1, 2):
                x = self.get_submodule(f"block{block}_conv{layer}")(x)
                x = F.relu(self.get_submodule(f"batchnorm{block}_{layer}")(x))
            x = F.max_pool2d(x, 2)
        hidden: Tensor = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc2(hidden)
        return logits


class TradesMnistCNN(nn.Module):
    """TRADES's network for MNIST: four unpadded 3x3 convolutions of 32-32-64-64, three linear layers, no BatchNorm."""

    def __init__(self, classes: int = 10, channels: int = 1, size: int = 28) -> None:
        super().__init__()
        side = ((size - 4) // 2 - 4) // 2
        if side < 1:
            raise Refused(f"trades-mnist-cnn pads nothing: images of at least 16x16, not {size}x{size}")
        self.feature_extractor = nn.Sequential()
        widths = (channels, 32, 32, 64, 64)
        for i, (inputs, outputs) in enumerate(pairwise(widths), start=1):
            self.feature_extractor.add_module(f"conv{i}", nn.Conv2d(inputs, outputs, 3))
            self.feature_extractor.add_module(f"relu{i}", nn.ReLU())
            if i in (2, 4):
                self.feature_extractor.add_module(f"maxpool{i // 2}", nn.MaxPool2d(2))
        self.classifier = nn.Sequential()
        for i, (inputs, outputs) in enumerate(pairwise((64 * side**2, 200, 200, classes)), start=1):
            self.classifier.add_module(f"fc{i}", nn.Linear(inputs, outputs))
            if i < 3:
                self.classifier.add_module(f"relu{i}", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits


class _BasicBlock(nn.Module):
    """ResNet's post-activation basic block (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32x32 images: a 3x3 stem of stride 1 and no max-pooling."""

    def __init__(self, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for layer, (width, stride) in enumerate(((64, 1), (128, 2), (256, 2), (512, 2)), start=1):
            blocks = nn.Sequential(_BasicBlock(inputs, width, stride), _BasicBlock(width, width, 1))
            self.add_module(f"layer{layer}", blocks)
            inputs = width
        self.linear = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for layer in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{layer}")(x)
        logits: Tensor = self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class _WideBlock(nn.Module):
    """Pre-activation basic block; where channels change, the branch and the 1x1 shortcut share the activation."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.convShortcut: nn.Module | None = (
            None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        if self.convShortcut is None:
            return x + out
        shortcut: Tensor = self.convShortcut(active)
        return shortcut + out


class _WideGroup(nn.Module):
    def __init__(self, blocks: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        rest = [_WideBlock(outputs, outputs, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(_WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN (Zagoruyko & Komodakis 2016), `blocks` to a group, widths 16, 16k, 32k, 64k.

    `sub_block1` is TRADES's: built, saved, counted in its published size, and never used by forward; so it never
    learns. Without it this is what FAT's code calls Madry's network: same logits from the same weights.
    """

    def __init__(self, blocks: int, width: int, *, sub_block1: bool, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        widths = [16, 16 * width, 32 * width, 64 * width]
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = _WideGroup(blocks, widths[0], widths[1], 1)
        if sub_block1:
            self.sub_block1 = _WideGroup(blocks, widths[0], widths[1], 1).requires_grad_(False)
        self.block2 = _WideGroup(blocks, widths[1], widths[2], 2)
        self.block3 = _WideGroup(blocks, widths[2], widths[3], 2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        logits: Tensor = self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


class Normalised(nn.Module):
    """(x - mean) / std a channel in front of a network, so that attacks stay in pixel units."""

    mean: Tensor
    std: Tensor

    def __init__(self, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(s > 0 for s in std):
            raise Refused(f"mean {list(mean)} and std {list(std)} must be as many, one a channel, and std positive")
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits


def inner(model: nn.Module) -> nn.Module:
    """The network whose keys a checkpoint holds: without its normalisation."""
    return model.net if isinstance(model, Normalised) else model


# name -> builder of (classes, channels, size). wrn-D-W with sub_block1 has (D - 4) / 6 blocks a group; wrn-32-10, the
# "Madry" class, counts its depth as (D - 2) / 6.
ARCHITECTURES: dict[str, Callable[[int, int, int], nn.Module]] = {
    "digits-cnn": lambda n, c, s: DigitsCNN(n, c),
    "small-cnn": lambda n, c, s: SmallCNN(n, c, s),
    "narrow-cnn": lambda n, c, s: SmallCNN(n, c, s, (16, 32, 64)),
    "resnet-18": lambda n, c, s: ResNet18(n, c),
    "wrn-32-10": lambda n, c, s: _wide(5, 10, False, n, c),
    "wrn-34-10": lambda n, c, s: _wide(5, 10, True, n, c),
    "wrn-40-4": lambda n, c, s: _wide(6, 4, True, n, c),
    "wrn-58-10": lambda n, c, s: _wide(9, 10, True, n, c),
    "trades-mnist-cnn": lambda n, c, s: TradesMnistCNN(n, c, s),
}


def _wide(blocks: int, width: int, sub_block1: bool, classes: int, channels: int) -> WideResNet:
    return WideResNet(blocks, width, sub_block1=sub_block1, classes=classes, channels=channels)


def build(arch: str, classes: int = 10, channels: int = 3, size: int = 32) -> nn.Module:
    """A freshly initialised network, from torch's own random stream.

    Args:
        arch: A name of ARCHITECTURES, or another wide ResNet, wrn-28-10; underscores are accepted.
        classes: Logits.
        channels: Of the image.
        size: Side of the square image; the linear layers of the Small CNNs and of trades-mnist-cnn depend on it.

    Raises:
        Refused: unknown name, with the closest.
    """
    name = network(arch)
    if name in ARCHITECTURES:
        return ARCHITECTURES[name](classes, channels, size)
    wide = WIDE.fullmatch(name)
    assert wide is not None  # `network` lets nothing else through
    return _wide((int(wide["depth"]) - 4) // 6, int(wide["width"]), wide["block"] == "sub-block1", classes, channels)


def recognised(keys: Mapping[str, Sequence[int]]) -> str | None:
    """The name of the wide ResNet, listed or not, whose state_dict has these keys and shapes; None if it is none."""
    blocks = {key.split(".")[2] for key in keys if key.startswith("block1.layer.")}
    first = keys.get("block1.layer.0.conv1.weight", ())
    if not blocks or len(first) != 4 or first[0] % 16:
        return None
    plain = f"wrn-{6 * len(blocks) + 4}-{first[0] // 16}"
    dead = any(key.startswith("sub_block1.") for key in keys)
    if plain in ARCHITECTURES:  # a listed name means the network of its paper, with the unused block
        return plain if dead else f"{plain}-plain"
    return f"{plain}-sub-block1" if dead else plain
