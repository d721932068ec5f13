"""The ranks of one run, in step: who takes which examples, what is summed over all, and that nobody falls behind.

With one rank everything here leaves things as they are. Between two collective calls ranks may do different amounts of
work (a friendly attack stops earlier on one than on the other): nothing here is called while crafting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fatbench.errors import Refused, RunFailed

T = TypeVar("T")


class Share(NamedTuple):
    """A rank's part of a global batch.

    Attributes:
        rows: (n,) its examples.
        weight: What its mean loss counts, so that the ranks' mean is the global batch's mean.
        counts: Whether its examples are to be counted.
    """

    rows: np.ndarray
    weight: float
    counts: bool


class Team:
    """All ranks, as one of them sees them."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.rank, self.size = fabric.global_rank, fabric.world_size
        self.first = self.rank == 0

    def share(self, rows: np.ndarray) -> Share:
        """This rank's consecutive part of a batch. A batch too small to give each two is taken whole by all."""
        if self.size == 1 or len(rows) < 2 * self.size:  # BatchNorm cannot train on one example
            return Share(rows, 1.0, self.first)
        mine = np.array_split(rows, self.size)[self.rank]
        return Share(mine, len(mine) * self.size / len(rows), True)

    def total(self, figures: Tensor) -> Tensor:
        """The sum over ranks."""
        summed = self.fabric.all_reduce(figures, reduce_op="sum")
        assert isinstance(summed, Tensor)
        return summed

    def least(self, figure: Tensor) -> Tensor:
        """The smallest over ranks."""
        smallest = self.fabric.all_reduce(figure, reduce_op="min")
        assert isinstance(smallest, Tensor)
        return smallest

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank refuses within, all refuse, in the words of the lowest: nobody waits for one who has left."""
        if self.size == 1:
            yield
            return
        mine: Refused | RunFailed | None = None
        try:
            yield
        except (Refused, RunFailed) as error:
            mine = error
        said: list[Refused | RunFailed | None] = [None] * self.size
        torch.distributed.all_gather_object(said, mine)
        if reason := next((error for error in said if error is not None), None):
            raise reason from mine

    def in_turn(self, load: Callable[[], T]) -> T:
        """load() on every rank, on each node by one rank first: the others find what it has downloaded."""
        mine: list[T] = []
        for turn in (True, False):
            with self.together():
                if turn == (self.fabric.local_rank == 0):
                    mine.append(load())
        return mine[0]

    @torch.no_grad()
    def level(self, net: nn.Module) -> None:
        """Makes BatchNorm's running statistics the mean over ranks, so that all attack and judge the same network.

        Frozen layers are left alone: a mean of three equal numbers need not be that number.
        """
        moving = [m for m in net.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
        buffers = [buffer for module in moving for buffer in module.buffers(recurse=False)]
        if self.size == 1 or not buffers:
            return
        flat = torch.cat([buffer.double().flatten() for buffer in buffers])
        mean = self.total(flat) / self.size
        parts = torch.split(mean, [buffer.numel() for buffer in buffers])
        for buffer, part in zip(buffers, parts, strict=True):
            buffer.copy_(part.view_as(buffer))

    def compare(self, net: nn.Module, when: str) -> None:
        """Holds the ranks' networks against each other, bit for bit.

        Raises:
            RunFailed: they have come apart; it names the ranks, on every rank alike.
        """
        if self.size == 1:
            return
        sums = torch.stack([_bits(value) for value in net.state_dict().values()])
        every = [torch.empty_like(sums) for _ in range(self.size)]
        torch.distributed.all_gather(every, sums)
        apart = [rank for rank, theirs in enumerate(every) if not torch.equal(theirs, every[0])]
        if apart:
            who = f"rank {apart[0]} has" if len(apart) == 1 else f"ranks {', '.join(map(str, apart))} have"
            raise RunFailed(
                f"{who} another network than rank 0 {when}: an update went past the others, or a device is faulty; "
                "--resume goes on from the last epoch saved"
            )


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(value: Tensor) -> Tensor:
    """The sum of a tensor's bit patterns, int64; no rounding hides a difference."""
    words = value.detach().contiguous().flatten().view(_WORDS[value.element_size()])
    return words.sum(dtype=torch.int64)
