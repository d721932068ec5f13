"""How far crafting is from the least it could take: multiply-adds over this machine's measured matrix peak."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import row, timed
from benchmarks.worlds import BATCHES, EPS, STEP, begun, pictures, trained
from fatbench.attacks import pgd

# Multiply-adds of one forward of one 32x32 image; the backward to the input takes as many again.
MACS = {"small-cnn": 133.5e6, "resnet-18": 555.4e6}


def peak(dtype: torch.dtype, size: int = 2048, seconds: float = 2.0) -> float:
    """Multiply-adds a second of a square matrix product, the best of some."""
    a, b = torch.rand(size, size).to(dtype), torch.rand(size, size).to(dtype)
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        best = min(best, timed(lambda: a @ b))
    return size**3 / best


def distances(arch: str, rounds: int, steps: int = 4) -> Iterator[dict[str, Any]]:
    """Crafting's time over the floor, the other way round than elsewhere: 1 is the least."""
    net, (x, y) = trained(arch), pictures(BATCHES[arch], 999)
    for half, dtype in ((False, torch.float32), (True, torch.bfloat16)):

        def craft(half: bool = half) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                pgd(net, x, y, eps=EPS, step_size=STEP, steps=steps)

        craft()
        least = 2 * MACS[arch] * len(x) * steps
        found = [timed(craft) / (least / peak(dtype)) for _ in range(rounds)]
        yield row("floor", "matrix peak", arch, found, precision="bf16" if half else "float32", note="ours / floor")


def memory(arch: str) -> dict[str, Any]:
    """Bytes that autograd keeps for the backward of one crafting step, the textbook's over ours."""
    net, (x, y) = begun(arch), pictures(BATCHES[arch], 999)
    ours = _kept(lambda: pgd(net, x, y, eps=EPS, step_size=STEP, steps=1))

    def theirs() -> None:
        torch.autograd.backward(nn.functional.cross_entropy(net(x.clone().requires_grad_()), y))

    kept = _kept(theirs)
    note = f"{kept / 2**20:.0f} against {ours / 2**20:.0f} MiB kept for a backward"
    return row("memory", "textbook", arch, [kept / ours], precision="float32", note=note)


def _kept(run: Callable[[], object]) -> int:
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(seen.values())
