"""AutoAttack standard at full budget, stock pyautoattack beside ours, chunk by chunk in one process.

    python -m benchmarks.autoattack path/to/cifar10.npz --n 512 --chunk 256 [--undefended]

A small CNN is trained for a minute (FGSM with random starts, after Wong et al., ICLR 2020), then each chunk is examined
three times: by the library as it is, by ours in float32, by ours crafting in bfloat16. Printed: robust accuracy, flags
that differ, CPU seconds and their ratio to stock's. A ratio of CPU times taken while others compute is not to be
trusted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import row
from benchmarks.worlds import EPS, pictures
from fatbench import data
from fatbench.evaluation import Chunk, verified
from fatbench.registry import evaluations
from fatbench.swift import swift


def network(width: int) -> nn.Sequential:
    """Six convolutions in three sizes and a linear layer; 0.28 million parameters at width 32."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs in (width, 2 * width, 4 * width):
        for stride in (1, 2):
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16 * width, 10))


def trained(x: Tensor, y: Tensor, seconds: float, width: int, eps: float) -> nn.Module:
    """A network under FGSM from a random start with a step of 10/255, for so long; natural training where eps is 0."""
    torch.manual_seed(0)
    net = network(width)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        for group in sgd.param_groups:
            group["lr"] = 0.2 * min(spent / seconds * 4, 1.02 - spent / seconds)
        rows = torch.randint(len(x), (128,))
        flip = torch.rand(128)[:, None, None, None] < 0.5
        images = torch.where(flip, x[rows].flip(3), x[rows])
        if eps:
            delta = torch.empty_like(images).uniform_(-eps, eps).requires_grad_()
            grad = torch.autograd.grad(F.cross_entropy(net.train()(images + delta), y[rows]), delta)[0]
            images = (images + (delta.detach() + 10 / 255 * grad.sign()).clamp(-eps, eps)).clamp(0, 1)
        sgd.zero_grad()
        F.cross_entropy(net.train()(images), y[rows]).backward()
        sgd.step()
    return net.eval()


def stock(net: nn.Module, chunk: Chunk) -> Tensor:
    """(N,) whom the library breaks."""
    import pyautoattack

    adversary = pyautoattack.AutoAttack(net, eps=EPS, seed=chunk.seed)
    _, predicted = adversary.run_standard_evaluation(chunk.x, chunk.y, batch_size=len(chunk.x))
    return predicted != chunk.y


def ours(net: nn.Module, chunk: Chunk, craft: nn.Module | None) -> Tensor:
    """(N,) whom ours breaks, verified on the network."""
    frozen = [parameter.requires_grad_(False) for parameter in net.parameters()]
    found = evaluations["autoattack"]().attack(net, replace(chunk, craft=craft), EPS)
    broken = verified(net, chunk.x, found.x_adv, chunk.y, EPS)[1]
    for parameter in frozen:
        parameter.requires_grad_(True)
    return broken


def compared(net: nn.Module, x: Tensor, y: Tensor, size: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Whom each way breaks, (N,), and its CPU seconds; chunk by chunk of so many images, all ways on each."""
    probe = x[:32].contiguous()
    ways: dict[str, Callable[[Chunk], Tensor]] = {
        "stock": lambda chunk: stock(net, chunk),
        "float32": lambda chunk: ours(net, chunk, swift(net, probe)),
        "bf16": lambda chunk: ours(net, chunk, swift(net, probe, "bf16")),
    }
    flags: dict[str, list[Tensor]] = {name: [] for name in ways}
    cpu = dict.fromkeys(ways, 0.0)
    for first in range(0, len(x), size):
        index = np.arange(first, min(first + size, len(x)))
        chunk = Chunk(x[index].contiguous(), y[index], index, 10, 0)
        for name, way in ways.items():
            began = time.process_time()
            flags[name].append(way(chunk))
            cpu[name] += time.process_time() - began
            print(f"chunk {first // size + 1}, {name}: {cpu[name]:.1f} CPU s so far", file=sys.stderr, flush=True)
    return {name: torch.cat(parts) for name, parts in flags.items()}, cpu


def rows(n: int = 48, seconds: float = 20) -> Iterator[dict[str, Any]]:
    """On made-up pictures, for the table of all benchmarks: a few images, one round."""
    net = trained(*pictures(4000), seconds, 32, EPS)
    broken, cpu = compared(net, *pictures(n, 999), n)
    for precision in ("float32", "bf16"):
        differ = int((broken[precision] != broken["stock"]).sum())
        note = f"{n} images, {int((~broken['stock']).sum())} robust, {differ} flags differ, CPU time"
        ratio = [cpu["stock"] / cpu[precision]]
        yield row("autoattack", "pyautoattack", "six convolutions", ratio, precision=precision, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", help="CIFAR-10 as path.npz")
    parser.add_argument("--n", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=250, help="examples attacked together; 250 in both")
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds of training")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--undefended", action="store_true", help="train without an attack")
    given = parser.parse_args()
    loaded = data.load(given.data)
    eps = 0.0 if given.undefended else EPS
    net = trained(loaded.x_train, loaded.y_train, given.seconds, given.width, eps)
    report(*compared(net, loaded.x_test[: given.n], loaded.y_test[: given.n], given.chunk))


def report(broken: dict[str, Tensor], cpu: dict[str, float]) -> None:
    """The table."""
    print(f"\n{torch.get_num_threads()} threads, torch {torch.__version__}, n {len(broken['stock'])}, eps 8/255\n")
    print("| | robust | of n | flags that differ | CPU s | of stock's |\n|---|---|---|---|---|---|")
    for name, fell in broken.items():
        differ = int((fell != broken["stock"]).sum())
        standing = int((~fell).sum())
        share = cpu[name] / cpu["stock"]
        print(f"| {name} | {standing / len(fell):.1%} | {standing} | {differ} | {cpu[name]:.1f} | {share:.3f} |")


if __name__ == "__main__":
    main()
