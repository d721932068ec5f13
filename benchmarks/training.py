"""A training step and an epoch against a textbook implementation, from the same starts, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.textbook import earlystop
from benchmarks.timing import ratios, row
from benchmarks.worlds import BATCHES, EPS, STEP, STEPS, pictures, trained
from fatbench.attacks import Friendly, cross_entropy, kl, pgd, uniform
from fatbench.defense import build
from fatbench.folding import layout
from fatbench.quantities import Progress
from fatbench.registry import defenses

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


def steps(arch: str, rounds: int) -> Iterator[dict[str, Any]]:
    """One step of FAT, TRADES and MART at tau 0, 1 and K."""
    net, (x, y) = trained(arch), pictures(BATCHES[arch], 999)
    start = uniform(x, EPS)
    for name in FAMILY:
        for tau in (0, 1, STEPS):
            for half in (False, True):
                theirs, ours = learners(name, net, tau, half)
                found = ratios(partial(theirs.theirs, x, y, start), partial(ours.ours, x, y, start), rounds)
                yield row(
                    "train", "textbook", arch, found, tau=tau, precision="bf16" if half else "float32",
                    note=f"step of {name}, {ours.steps:.1f} attack steps",
                )  # fmt: skip


def epochs(arch: str, rounds: int, batches: int = 4) -> Iterator[dict[str, Any]]:
    """Some consecutive batches of FAT, fresh starts and all."""
    net, batch = trained(arch), BATCHES[arch]
    world = [pictures(batch, 2000 + i) for i in range(batches)]
    for tau in (0, STEPS):
        for half in (False, True):
            theirs, ours = learners("fat", net, tau, half)
            found = ratios(partial(_epoch, theirs.theirs, world), partial(_epoch, ours.ours, world), rounds)
            yield row(
                "train", "textbook", arch, found, tau=tau, precision="bf16" if half else "float32",
                note=f"{batches} batches of fat, {ours.steps:.1f} attack steps",
            )  # fmt: skip


def friendly(arch: str, rounds: int, batches: int = 4) -> Iterator[dict[str, Any]]:
    """Madry's time over FAT's at tau 0, beside the ratio of their executed backward passes, the updates' included."""
    net, batch = trained(arch), BATCHES[arch]
    world = [pictures(batch, 2000 + i) for i in range(batches)]
    _, madry = learners("fat", net, STEPS, False)
    _, fat = learners("fat", net, 0, False)
    found = ratios(partial(_epoch, madry.ours, world), partial(_epoch, fat.ours, world), rounds)
    examples = batch * batches * (rounds + 1)
    passes = (madry.backwards + examples) / (fat.backwards + examples)
    yield row("cost", "madry", arch, found, tau=0, precision="float32", note=f"backward passes {passes:.2f} to 1")


def _epoch(step: Callable[[Tensor, Tensor, Tensor], Tensor], world: list[tuple[Tensor, Tensor]]) -> None:
    for x, y in world:
        step(x, y, uniform(x, EPS))
