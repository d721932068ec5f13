"""What a run would cost here: parameters, steps, and time and memory from a few updates that are really done.

The updates are the trainer's own, on made-up pixels where the dataset is not the user's: nothing is read, downloaded or
written. Time is linear in examples and in attack steps, so a small batch is timed with no attack step and with two.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fatbench import data
from fatbench.catalogue import described
from fatbench.defense import Defense, settings_of
from fatbench.devices import fabric_on
from fatbench.errors import Refused
from fatbench.footprint import memory, saving
from fatbench.quantities import Progress
from fatbench.recipe import Settings
from fatbench.team import Team
from fatbench.trainer import Run
from fatbench.world import world

STEPS = 2  # of the attack, in the longer of the two timed updates
REPEATS = 20  # at most, within SECONDS; the fastest counts: others may be at work on this machine
SECONDS = 1.0  # for an update, on a CPU, and to repeat within
CPU_EXAMPLES = 512
# Assumed, not measured: a third of an A100's data sheet in bfloat16 (312), a fifth of an H100's in TF32 (495).
PAPER_PACE, PACE_TOLD = 100e12, "100 TFLOP/s"


@dataclass(frozen=True)
class Estimate:
    """A run's cost.

    Attributes:
        parameters, used: All of the network's, and those that its forward uses.
        examples, held: To train on and to validate on.
        updates: Of the weights, an epoch.
        steps: (low, high) attack steps an example; equal where everybody takes all.
        seconds: (low, high) an epoch, validated.
        flop: (low, high) floating-point operations of the run, two a multiply-add of its convolutions and products.
        memory: part -> bytes, all held at once in an update of a whole batch; a library's workspace comes on top.
        timed: What was timed, and how it was scaled.
    """

    parameters: int
    used: int
    examples: int
    held: int
    updates: int
    epochs: int
    steps: tuple[int, int]
    seconds: tuple[float, float]
    flop: tuple[float, float]
    memory: dict[str, int]
    timed: str

    @property
    def on_paper(self) -> tuple[float, float]:
        """(low, high) hours of the run at PAPER_PACE."""
        low, high = (flop / PAPER_PACE / 3600 for flop in self.flop)
        return low, high

    def __str__(self) -> str:
        used = "all of them" if self.used == self.parameters else f"{self.used:,} of them"
        low, high = self.steps
        taken = f"{high} attack steps an example"
        if low < high:
            taken = f"{low} to K = {high} attack steps an example, K where nobody is stopped (tau = K)"
        total = _between([seconds * self.epochs for seconds in self.seconds])
        parts = ", ".join(f"{part} {_bytes(size)}" for part, size in self.memory.items())
        return "\n".join(
            (
                f"parameters  {self.parameters:,}, {used} used in the forward",
                f"examples    {self.examples:,} to train on, {self.held:,} to validate on",
                f"updates     {self.updates:,} an epoch, {self.updates * self.epochs:,} in {self.epochs} epochs",
                f"time        {total} in all, {_between(self.seconds)} an epoch: {taken}",
                f"arithmetic  {_between_hours(self.on_paper)} in all on a GPU at {PACE_TOLD}: on paper, not measured",
                f"memory      {_bytes(sum(self.memory.values()))}: {parts}; workspace comes on top",
                f"how known   {self.timed}",
            )
        )


def estimate(settings: Settings, *, device: str = "auto") -> Estimate:
    """The cost of a run on this device; takes some seconds and writes nothing.

    Raises:
        Refused: what the run itself would be refused for; or this is one of several processes, each timing the others.
    """
    if world().started:
        raise Refused("a dry run times one process: leave torchrun or srun out; --devices and --nodes say how many")
    loaded = data.take(_stand_in(settings.dataset), settings.n_train)
    run = Run(settings, Path(), loaded, Team(fabric_on(device, settings.precision)))
    examples, held, fewest, most = len(run.rows), len(run.held), *_steps_an_example(run.defense, settings.epochs)
    batch = min(settings.batch_size, examples)
    n, activations = _rehearsed(run, batch)
    bare, attacked = _fastest(run, n, 0), _fastest(run, n, STEPS)
    more = (attacked[1] - bare[1]) * n  # steps that the longer update took
    step = max(attacked[0] - bare[0], 0.0) / more if more else 0.0
    validation = 11 * step * held  # PGD-10 and two forwards, each about half a step
    low, high = (examples * (bare[0] / n + k * step) + validation for k in (fewest, most))
    work = _counted(run, min(2, batch))
    flop = (settings.epochs * (examples * (work[0] + k * work[1]) + 11 * held * work[1]) for k in (fewest, most))
    parameters = list(run.net.parameters())
    return Estimate(
        parameters=sum(p.numel() for p in parameters),
        used=sum(p.numel() for p in parameters if p.requires_grad),
        examples=examples,
        held=held,
        updates=-(-examples // settings.batch_size),
        epochs=settings.epochs,
        steps=(fewest, most),
        seconds=(low, high),
        flop=(next(flop), next(flop)),
        memory=memory(run, activations),
        timed=(
            f"updates of {n} examples on {_named(run.device)} took {bare[0]:.3g} s without an attack and "
            f"{attacked[0]:.3g} s with {STEPS} steps of one (the fastest of a few); scaled by examples and "
            f"steps. Memory was counted, for a batch of {batch}."
            + (f" The pixels were made up, in {_shape(loaded)}." if loaded.info.shape else "")
            + (f" All this is for one process alone; {settings.ranks} would share it." if settings.ranks > 1 else "")
        ),
    )


# ------------------------------------------------------------------------------------------------ the updates


def _stand_in(name: str) -> data.Data:
    """A known dataset's shape and size with made-up pixels; a user's own as it is."""
    info = described(name)
    if info.shape is None:
        return data.load(name)
    n = info.examples
    x, y = torch.rand(CPU_EXAMPLES, *info.shape), torch.arange(n) % info.classes
    return data.Data(info, x.repeat(-(-n // len(x)), 1, 1, 1)[:n], y, x[:1], y[:1], info.classes)


def _pinned(defense: Defense, k: int) -> Defense:
    """The same defense with everybody taking k steps: nobody is stopped, and a curriculum stands at k."""
    cls = type(defense)
    everybody = {"steps_at": lambda self, progress: k, "stop": lambda self, progress, y: None}
    twin: Defense = type(cls.__name__, (cls,), everybody)(**{name: getattr(defense, name) for name in settings_of(cls)})
    return twin


def _update(run: Run, n: int, k: int) -> tuple[float, float]:
    """(seconds, steps an example) of one update of n examples with k attack steps."""
    whole = run.rows, run.defense
    run.rows, run.defense = run.rows[:n], _pinned(run.defense, k)
    _settle(run.device)
    began = time.perf_counter()
    tally = run.learn(Progress(run.settings.epochs // 2, run.settings.epochs))
    _settle(run.device)
    seconds = time.perf_counter() - began
    run.rows, run.defense = whole
    return seconds, tally.figures()["steps_per_example"]


def _rehearsed(run: Run, batch: int) -> tuple[int, int]:
    """(examples to time at once, bytes of activations of a whole batch); warms the device up.

    All of a batch on a GPU; on a CPU as many as take about a second, at least the two that BatchNorm needs.
    """
    n = min(2, batch) if run.device.type == "cpu" else batch
    with saving(run) as saved:
        seconds, _ = _update(run, n, STEPS)
    if run.device.type != "cpu":
        return batch, saved.most
    if seconds < SECONDS:
        seconds, _ = _update(run, n, STEPS)  # again, warm: small networks would be timed on too few
    return min(batch, CPU_EXAMPLES, n * max(1, int(SECONDS / seconds))), saved.most * batch // n


def _fastest(run: Run, n: int, k: int) -> tuple[float, float]:
    """The fastest of a few updates; of one, where that takes long."""
    tries = [_update(run, n, k)]
    while len(tries) < REPEATS and sum(seconds for seconds, _ in tries) < SECONDS:
        tries.append(_update(run, n, k))
    return min(tries)


class _Everywhere(nullcontext[None]):
    """In place of the counter's tracker of modules, whose hooks bear no gradient of an attack's images, a leaf."""

    parents = ("Global",)


def _counted(run: Run, n: int) -> tuple[float, float]:
    """Floating-point operations an example: of an update without an attack, and of one step of it more."""
    found = []
    for k in (0, STEPS):
        counter = FlopCounterMode(display=False)
        counter.mod_tracker = _Everywhere()  # type: ignore[assignment]
        with counter:
            _, steps = _update(run, n, k)
        found.append(counter.get_total_flops() / n)
    return found[0], (found[1] - found[0]) / steps if steps else 0.0


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _steps_an_example(defense: Defense, epochs: int) -> tuple[int, int]:
    """(low, high) attack steps that an example may take; 0 is the low end wherever a rule stops or a lesson grows."""
    y, fixed, most = torch.zeros(1, dtype=torch.int64), True, defense.steps
    for now in (Progress(done, epochs) for done in range(epochs)):
        fixed &= defense.stop(now, y) is None and defense.steps_at(now) == most
    return (most if fixed else 0), most


# ------------------------------------------------------------------------------------------------ words


def _between(seconds: Any) -> str:
    low, high = (_span(s) for s in seconds)
    return low if low == high else f"{low} to {high}"


def _between_hours(hours: tuple[float, float]) -> str:
    return _between([3600 * each for each in hours])


def _span(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _bytes(size: int) -> str:
    unit, scale = next(((u, s) for u, s in (("GB", 1e9), ("MB", 1e6)) if size >= s), ("kB", 1e3))
    return f"{size / scale:.3g} {unit}"


def _named(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"the CPU ({threads} thread{'s' * (threads > 1)})"


def _shape(loaded: data.Data) -> str:
    return f"{loaded.info.name}'s shape {'x'.join(map(str, loaded.shape))}"
