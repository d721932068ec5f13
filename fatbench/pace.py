"""How long an examination will take: from a few timed passes before it starts, and from its own pace as it goes on."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fatbench.evaluation import Work

# Examples in a timed pass, and passes; the first is a warm-up.
EXAMPLES, PASSES = 32, 3
# Until so much of the work is done, the estimate says more than the pace.
EARLY = 0.05
# An estimate below this is not worth a line.
WORTH_SAYING = 10.0


@dataclass
class Pace:
    """What is left, in seconds.

    Attributes:
        steps: (S,) what each step would take if nobody falls.
    """

    steps: list[float]
    began: float = field(default_factory=time.perf_counter)

    @property
    def total(self) -> float:
        return sum(self.steps)

    def left(self, done: int) -> float:
        """Seconds left after `done` steps, at the pace so far: who has fallen need not be attacked again."""
        expected = sum(self.steps[:done])
        early = expected < EARLY * self.total
        ratio = 1.0 if early or not expected else (time.perf_counter() - self.began) / expected
        return ratio * (self.total - expected)


def timed(network: nn.Module, x: Tensor) -> Callable[[Work], float]:
    """Seconds that a piece of work takes for one example, on a network that has been timed on a few."""
    few = x[:EXAMPLES]
    forward = _least(lambda: _pass(network, few, backward=False), few) / len(few)
    backward = _least(lambda: _pass(network, few, backward=True), few) / len(few)
    return lambda work: work.forwards * forward + work.backwards * backward


def _pass(network: nn.Module, x: Tensor, *, backward: bool) -> None:
    with torch.set_grad_enabled(backward):
        logits = network(x.detach().clone().requires_grad_(backward))
        if logits.requires_grad:
            torch.autograd.backward(logits.amax(dim=1).sum())


def _least(run: Callable[[], None], x: Tensor) -> float:
    times = []
    for _ in range(PASSES):
        began = time.perf_counter()
        run()
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def human(seconds: float) -> str:
    """
    >>> human(42), human(150), human(9000)
    ('42 s', '3 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
