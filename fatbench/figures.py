"""What is measured while a network trains: an epoch's sums, and accuracy on validation; the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fatbench.attacks import Crafted, crafting
from fatbench.defense import Craft
from fatbench.draws import Draws
from fatbench.team import Team

_NEVER = torch.iinfo(torch.int64).max


@dataclass
class Tally:
    """What an epoch adds up, on the device: nothing waits for the GPU before the epoch is over."""

    device: torch.device
    examples: int = 0
    batches: int = 0
    forwards: int = 0
    backwards: int = 0
    sums: Tensor = field(init=False)  # loss, steps, right, seen
    broken: Tensor = field(init=False)  # the first batch whose loss was not finite

    def __post_init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.broken = torch.full((), _NEVER, dtype=torch.int64, device=self.device)

    def add(self, loss: Tensor, crafted: Crafted, right: Tensor, seen: int) -> None:
        """One batch: its mean loss, how it was crafted, how many of `seen` answers were right."""
        n = len(crafted.x_adv)
        loss = loss.detach().double()
        here = torch.where(torch.isfinite(loss), _NEVER, self.batches)
        self.broken = torch.minimum(self.broken, here)
        self.sums += torch.stack(
            [loss * n, crafted.steps.sum().double(), right.double(), right.new_full((), seen).double()]
        )
        self.examples, self.batches = self.examples + n, self.batches + 1
        self.forwards, self.backwards = self.forwards + crafted.forwards, self.backwards + crafted.backwards

    def gather(self, team: Team) -> None:
        """Adds up what all ranks have counted; called once, when the epoch is over."""
        counts = self.sums.new_tensor([self.examples, self.forwards, self.backwards])
        whole = team.total(torch.cat([self.sums, counts]))
        self.sums, self.broken = whole[:4], team.least(self.broken)
        self.examples, self.forwards, self.backwards = (int(count) for count in whole[4:].tolist())

    def first_broken(self) -> int | None:
        """The first batch, from 1, whose loss was not finite."""
        batch = int(self.broken.item())
        return None if batch == _NEVER else batch + 1

    def figures(self) -> dict[str, float]:
        loss, steps, right, seen = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "train_accuracy": right / seen if seen else 0.0,
            "steps_per_example": steps / self.examples,
            "examples": self.examples,
            "forwards": self.forwards,
            "backwards": self.backwards,
        }


@dataclass
class Yardstick:
    """Accuracy on the validation split under an attack: what the harness selects by, and lends to a curriculum.

    Attributes:
        subject: The network that is measured.
        x, y: (N, C, H, W), (N,) all training examples.
        held: The rows held for validation, dealt out to the ranks in chunks.
        key: Of the random numbers, with each example's place.
        train_accuracy: Share of the epoch's examples, as they were trained on, classified rightly.
    """

    team: Team
    subject: nn.Module
    x: Tensor
    y: Tensor
    held: np.ndarray
    key: tuple[object, ...]
    train_accuracy: float

    def __call__(self, craft: Craft | None = None) -> float:
        right = torch.zeros((), dtype=torch.int64, device=self.x.device)
        chunks = np.array_split(self.held, max(1, -(-len(self.held) // 250)))
        for rows in chunks[self.team.rank :: self.team.size]:
            x, y = self.x[rows], self.y[rows]
            with crafting(self.subject), self.team.fabric.autocast():
                point = x if craft is None else craft(self.subject, x, y, Draws(self.key, rows))
                with torch.no_grad():
                    right += (self.subject(point).argmax(dim=1) == y).sum()
        return float(self.team.total(right).item()) / len(self.held)


class answers:
    """How many of the adversarial examples the update's own forwards classify rightly; costs no forward."""

    def __init__(self, net: nn.Module, x_adv: Tensor, y: Tensor) -> None:
        self.x_adv, self.y, self.right = x_adv, y, list[Tensor]()
        self.hook = net.register_forward_hook(self._look)

    def _look(self, net: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> None:
        if inputs[0] is self.x_adv:
            self.right.append((logits.detach().argmax(dim=1) == self.y).sum())

    def __enter__(self) -> list[Tensor]:
        return self.right

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()
