"""Random numbers that belong to an example: keyed by seed, purpose and the example's index, never by batch or rank.

Results then do not depend on the order of the examples, on how they are batched, on a resume or on the number of
devices. Everything is drawn on the CPU, so a GPU gets the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

_MASK32 = np.uint64(0xFFFFFFFF)


def hashed(indices: np.ndarray, *key: object) -> np.ndarray:
    """(N,) uint64, one well-mixed word for each index under a key: the finaliser of splitmix64 (Steele et al. 2014)."""
    base = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")
    with np.errstate(over="ignore"):
        z = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: np.ndarray = z ^ (z >> np.uint64(31))
        return mixed


def seed_of(*key: object) -> int:
    """A seed for torch's own stream, of 32 bits, for what cannot be keyed by example: dropout, a noisy network."""
    return int(hashed(np.zeros(1), *key)[0] >> np.uint64(32))


def shuffled(n: int, *key: object) -> np.ndarray:
    """(n,) int64: the order of n things under a key, the same on every platform and version."""
    return np.argsort(hashed(np.arange(n), "order", *key), kind="stable")


def balanced_order(y: np.ndarray, *key: object) -> np.ndarray:
    """(N,) an order of the examples in which each class comes at even intervals: at its share of every beginning."""
    order = shuffled(len(y), *key)
    place = np.empty(len(y))
    for label in np.unique(y):
        mine = order[y[order] == label]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return order[np.argsort(place[order], kind="stable")]


@dataclass(frozen=True)
class Draws:
    """The random numbers of one batch.

    Attributes:
        key: What the numbers depend on beside the example: (seed, epoch) in training, (seed, restart) in evaluation.
        indices: (N,) the examples' places in their dataset.
    """

    key: tuple[object, ...]
    indices: Sequence[int] | np.ndarray
    _generator: torch.Generator = field(default_factory=torch.Generator, repr=False, compare=False)

    def rows(self, which: slice | Sequence[int] | np.ndarray) -> Draws:
        """The same source for some rows of the batch."""
        return Draws(self.key, np.asarray(self.indices)[which], self._generator)

    def restart(self, number: int) -> Draws:
        """A source whose numbers are independent of this one's, for another start at the same examples."""
        return Draws((*self.key, "restart", number), self.indices, self._generator)

    def uniform(self, like: Tensor, purpose: str) -> Tensor:
        """U(-1, 1) of the shape, dtype and device of `like` (N, ...)."""
        return self._fill(like, purpose, lambda row, generator: row.uniform_(-1.0, 1.0, generator=generator))

    def normal(self, like: Tensor, purpose: str) -> Tensor:
        """N(0, 1) of the shape, dtype and device of `like` (N, ...)."""
        return self._fill(like, purpose, lambda row, generator: row.normal_(generator=generator))

    def scalar(self, purpose: str) -> float:
        """One U(0, 1) for the whole batch, keyed by its first example."""
        first = np.asarray(self.indices)[:1] if len(self.indices) else np.zeros(1)
        return float(hashed(first, *self.key, purpose)[0] >> np.uint64(11)) / 2.0**53

    def _fill(self, like: Tensor, purpose: str, fill: object) -> Tensor:
        # One generator, reseeded for each row; torch looks at the low 32 bits of a seed alone, so the key is hashed
        # into them. float32 whatever the network's dtype: the start is then the same in float64.
        noise = torch.empty(like.shape, dtype=torch.float32)
        seeds = hashed(np.asarray(self.indices), *self.key, purpose) & _MASK32
        for row, seed in zip(noise, seeds.tolist(), strict=True):
            fill(row, self._generator.manual_seed(seed))  # type: ignore[operator]
        return noise.to(like)
