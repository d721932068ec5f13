"""What a run holds in memory at once, counted while it happens rather than asked of an allocator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fatbench.folding import folded, held
from fatbench.trainer import Run


class Saved:
    """Bytes that autograd holds for the backward, every storage once, without what the run holds anyway."""

    def __init__(self, own: set[int]) -> None:
        self.own, self.holders, self.now, self.most = own, Counter[int](), 0, 0

    def pack(self, tensor: Tensor) -> _Holder:
        return _Holder(self, tensor)

    def change(self, tensor: Tensor, by: int) -> None:
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        self.holders[place] += by
        if place not in self.own and self.holders[place] == max(by, 0):  # the first holder came, or the last one went
            self.now += by * storage.nbytes()
            self.most = max(self.most, self.now)


class _Holder:
    """One of autograd's references to a tensor; gone when the graph is."""

    def __init__(self, saved: Saved, tensor: Tensor) -> None:
        self.saved, self.tensor = saved, tensor
        saved.change(tensor, +1)

    def __del__(self) -> None:
        self.saved.change(self.tensor, -1)


@contextmanager
def saving(run: Run) -> Iterator[Saved]:
    """Counts what autograd holds of whatever is done within."""
    with run.fabric.autocast():
        folded(run.net)  # made now, it is what the run holds, and no part of a batch
    tensors = (*run.net.parameters(), *run.net.buffers(), *held(run.net), run.x)
    own = {t.untyped_storage().data_ptr() for t in tensors}
    saved = Saved(own)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda holder: holder.tensor):
        yield saved


def memory(run: Run, activations: int) -> dict[str, int]:
    """part -> bytes, of all that an update of a whole batch holds at once; `activations` as `saving` counted them."""
    weights = sum(t.nbytes for t in (*run.net.parameters(), *run.net.buffers()))
    learning = sum(p.nbytes for p in run.net.parameters() if p.requires_grad)
    parts = {"weights": weights, "gradients": learning, "momentum": learning if run.settings.momentum else 0}
    parts |= {
        "average": 0 if run.average is None else weights,
        "copy to craft on": sum(t.nbytes for t in held(run.net)),
        "activations": activations,
        "images": run.x.nbytes,
    }
    return {part: size for part, size in parts.items() if size}
