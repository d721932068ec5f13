"""FAB's projection onto a hyperplane within the box [0, 1] (Croce & Hein, ICML 2020, section 2.2), without its sort."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def quick_projection() -> Iterator[None]:
    """Lends the library a projection that does not sort: a fifth of FAB's time on a small network."""
    from pyautoattack import fab_base

    stock = fab_base.projection_linf
    fab_base.projection_linf = projected
    try:
        yield
    finally:
        fab_base.projection_linf = stock


def projected(t: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """(N, D) the least l-inf move of points t (N, D) in [0, 1] onto the hyperplanes w.x = b, w (N, D), b (N,).

    Each pixel moves by min(lambda, its way to 0 or 1) against w, and what is gained, sum |w| min(lambda, way), is
    concave in lambda: Newton's steps from 0 come to it from below, and stop once no further pixel reaches its end.
    """
    side = torch.where((w * t).sum(dim=1) >= b, 1.0, -1.0)[:, None]
    w = side * w
    gap = ((w * t).sum(dim=1) - side[:, 0] * b)[:, None]
    way, weight = torch.where(w < 0, 1 - t, t), w.abs()
    ended = torch.zeros_like(weight, dtype=torch.bool)
    size = torch.zeros_like(gap)
    for _ in range(w.shape[1]):
        free = torch.where(ended, 0.0, weight)
        slope = free.sum(dim=1, keepdim=True)
        rest = gap - ((weight - free) * way).sum(dim=1, keepdim=True)
        size = torch.where(slope > 0, torch.maximum(size, rest / slope.clamp_min(1e-30)), size)
        now = way <= size
        if torch.equal(now, ended):
            break
        ended = now
    return -torch.sign(w) * torch.minimum(way, size)
