"""A training step and an epoch against a textbook implementation, from the same starts, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.textbook import earlystop
from benchmarks.timing import over, row, turns
from benchmarks.worlds import BATCHES, EPS, STEP, STEPS, pictures, trained
from fatbench.attacks import Friendly, cross_entropy, kl, pgd, uniform
from fatbench.defense import build
from fatbench.folding import layout
from fatbench.quantities import Progress
from fatbench.registry import defenses

World = list[tuple[Tensor, Tensor, Tensor]]  # batches: images, labels, starts
# The friendly defense, and what its inner search climbs.
FAMILY = {"fat": cross_entropy, "fat-trades": kl, "fat-mart": cross_entropy}


@dataclass
class Learner:
    """A network under one defense, which can take one step on a batch our way or the textbook's."""

    name: str
    net: nn.Module
    tau: int
    half: bool = False

    def __post_init__(self) -> None:
        self.defense = build(defenses[self.name], {"eps": EPS, "step_size": STEP, "steps": STEPS, "tau": self.tau})
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=1e-3, momentum=0.9)
        self.steps = 0.0
        self.backwards = 0

    def ours(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        rule = Friendly(self.tau, y) if self.tau < STEPS else None
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            made = pgd(
                self.net, x, y, eps=EPS, step_size=STEP, steps=STEPS, objective=FAMILY[self.name], stop=rule,
                start=lambda x, eps: start,
            )  # fmt: skip
            self.steps, self.backwards = made.steps.double().mean().item(), self.backwards + made.backwards
            self.update(x, made.x_adv, y)
        return made.x_adv

    def theirs(self, x: Tensor, y: Tensor, start: Tensor) -> Tensor:
        kind = "kl" if FAMILY[self.name] is kl else "ce"
        x_adv, labels, natural = earlystop(
            self.net, x, y, start, eps=EPS, step_size=STEP, steps=STEPS, tau=self.tau, loss=kind
        )
        self.update(natural, x_adv, labels)
        return x_adv

    def update(self, x: Tensor, x_adv: Tensor, y: Tensor) -> None:
        self.net.train()
        self.sgd.zero_grad()
        torch.autograd.backward(self.defense.loss(self.net, x, x_adv, y, Progress(0, 1)))
        self.sgd.step()


def learners(name: str, net: nn.Module, tau: int, half: bool) -> tuple[Learner, Learner]:
    """(theirs, ours), each with a copy of the network, ours laid out as the trainer lays it out."""
    mine = deepcopy(net).to(memory_format=layout(torch.device("cpu"), None))
    return Learner(name, deepcopy(net), tau), Learner(name, mine, tau, half)


def _compared(
    arch: str, name: str, net: nn.Module, tau: int, world: World, rounds: int, note: str
) -> Iterator[dict[str, Any]]:
    """The textbook against ours in float32 and in bfloat16, on the same batches from the same starts."""
    (theirs, ours), (_, half) = learners(name, net, tau, False), learners(name, net, tau, True)
    ways = {"textbook": theirs.theirs, "float32": ours.ours, "bf16": half.ours}
    for step in ways.values():  # to warm up
        x, y, start = world[0]
        step(x[:16], y[:16], start[:16])
    times = turns({way: partial(_all, step, world) for way, step in ways.items()}, rounds)
    for precision in ("float32", "bf16"):
        pace = sum(len(x) for x, _, _ in world) / median(times[precision])
        told = f"{note} of {name}, {ours.steps:.1f} attack steps, {pace:.0f} images a second"
        found = over(times["textbook"], times[precision])
        yield row("train", "textbook", arch, found, tau=tau, precision=precision, note=told)


def _all(step: Callable[[Tensor, Tensor, Tensor], Tensor], world: World) -> None:
    for x, y, start in world:
        step(x, y, start)


def _world(arch: str, batches: int) -> World:
    """Batches with their starts."""
    drawn = [pictures(BATCHES[arch], 2000 + i) for i in range(batches)]
    return [(x, y, uniform(x, EPS)) for x, y in drawn]


def steps(arch: str, rounds: int, taus: Sequence[int]) -> Iterator[dict[str, Any]]:
    """One step of FAT, TRADES and MART."""
    net, world = trained(arch), _world(arch, 1)
    for name in FAMILY:
        for tau in taus:
            yield from _compared(arch, name, net, tau, world, rounds, "step")


def epochs(arch: str, rounds: int, batches: int = 3) -> Iterator[dict[str, Any]]:
    """Some consecutive batches of FAT."""
    net, world = trained(arch), _world(arch, batches)
    for tau in (0, STEPS):
        yield from _compared(arch, "fat", net, tau, world, rounds, f"{batches} batches")


def friendly(arch: str, rounds: int, batches: int = 3) -> Iterator[dict[str, Any]]:
    """Madry's time over FAT's at tau 0, beside the ratio of their executed backward passes, the updates' included."""
    net, world = trained(arch), _world(arch, batches)
    madry, fat = (learners("fat", net, tau, False)[1] for tau in (STEPS, 0))
    ways = {"madry": madry.ours, "fat": fat.ours}
    times = turns({way: partial(_all, step, world) for way, step in ways.items()}, rounds)
    examples = BATCHES[arch] * batches * rounds
    passes = (madry.backwards + examples) / (fat.backwards + examples)
    found = over(times["madry"], times["fat"])
    yield row("cost", "madry", arch, found, tau=0, precision="float32", note=f"backward passes {passes:.2f} to 1")
