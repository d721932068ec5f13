"""Networks and images to time on: made-up colour pictures, and a network that has had some epochs of FAT on them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench import models
from fatbench.attacks import Friendly, pgd

EPS, STEP, STEPS = 8 / 255, 2 / 255, 10
# SmallCNN and ResNet-18 at the batch sizes that they are timed with.
BATCHES = {"small-cnn": 128, "resnet-18": 64}
# Natural updates, and those of FAT after them.
UPDATES = {"small-cnn": (30, 15), "resnet-18": (40, 30)}
# And how many images are examined under 151 steps by each of three libraries.
EXAMINED = {"small-cnn": 128, "resnet-18": 32}


def pictures(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x, y): 32x32 pictures of ten patterns under noise, some far from the border between two classes, some near."""
    stream = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 8, 8, generator=stream).repeat_interleave(4, 2).repeat_interleave(4, 3)
    stream.manual_seed(seed + 1)
    y = torch.arange(n) % 10
    strength = 0.1 + 0.5 * torch.rand(n, 1, 1, 1, generator=stream)
    noise = 0.15 * torch.rand(n, 3, 32, 32, generator=stream)
    return (0.3 + strength * patterns[y] + noise).clamp(0, 1), y


def trained(arch: str) -> nn.Module:
    """The network after some natural updates and some of FAT at tau 0, whose attack then takes 5 or 6 steps of 10."""
    return deepcopy(_updated(arch, *UPDATES[arch]))


def begun(arch: str) -> nn.Module:
    """The network after one update, where it does not matter what it has learnt."""
    return deepcopy(_updated(arch, 1, 0))


@cache
def _updated(arch: str, natural: int, friendly: int) -> nn.Module:
    torch.manual_seed(0)
    net = models.build(arch)
    sgd = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)
    for update in range(natural + friendly):
        x, y = pictures(64, update)
        with torch.autocast("cpu", torch.bfloat16):
            if update >= natural:
                x = pgd(net, x, y, eps=EPS, step_size=STEP, steps=STEPS, stop=Friendly(0, y)).x_adv
            net.train()
            sgd.zero_grad()
            loss = F.cross_entropy(net(x).float(), y)
        torch.autograd.backward(loss)
        sgd.step()
    return net.eval()
