"""The time left is estimated before a run starts, and told by its own pace once it goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fatbench import pace
from fatbench.evaluation import Work
from fatbench.pace import Pace, human, timed
from fatbench.registry import evaluations


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    return now


def test_what_is_left_follows_the_pace_so_far(clock: list[float]) -> None:
    going = Pace([10.0, 10.0, 20.0, 60.0], began=100.0)
    assert (going.total, going.left(0)) == (100.0, 100.0)
    clock[0] = 105.0  # the first step took half of what was expected
    assert going.left(1) == 45.0
    clock[0] = 180.0
    assert (going.left(3), going.left(4)) == (120.0, 0.0)


def test_a_beginning_says_nothing_yet(clock: list[float]) -> None:
    going = Pace([1.0, 99.0], began=100.0)
    clock[0] = 150.0
    assert going.left(1) == 99.0


def test_work_of_which_nobody_can_say_anything_is_left_out(clock: list[float]) -> None:
    assert Pace([0.0, 0.0]).left(1) == 0.0


def test_passes_are_timed_with_and_without_a_gradient() -> None:
    seen: list[tuple[int, bool]] = []

    class Watched(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((len(x), torch.is_grad_enabled()))
            return x.flatten(1)

    seconds = timed(Watched(), torch.rand(50, 1, 2, 2))
    assert seen == [(32, False)] * 3 + [(32, True)] * 3
    assert seconds(Work(0, 0)) == 0.0
    assert seconds(Work(10, 0)) < seconds(Work(10, 10))


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.4, "4 s"), (89, "89 s"), (91, "2 min"), (5399, "90 min"), (9000, "2.5 h")]
)
def test_people_are_told_in_their_own_units(seconds: float, said: str) -> None:
    assert human(seconds) == said


@pytest.mark.parametrize(
    ("attack", "settings", "stage", "work"),
    [
        ("pgd", {"steps": 20, "restarts": 3}, "", Work(2, 60)),
        ("autoattack", {}, "apgd-ce", Work(0, 101)),
        ("autoattack", {}, "apgd-t", Work(0, 909)),
        ("autoattack", {}, "fab-t", Work(900, 900)),
        ("autoattack", {}, "square", Work(5000, 0)),
        ("autoattack", {"version": "plus"}, "apgd-dlr", Work(0, 505)),
        ("autoattack", {"version": "plus"}, "fab", Work(500, 5000)),
        ("autoattack", {"version": "rand"}, "apgd-ce", Work(0, 2020)),
        ("multitargeted", {"steps": 10, "targets": 2, "restarts": 20, "nearest": 0.1}, "", Work(5, 50)),
    ],
)
def test_an_attack_says_what_it_costs_at_most(attack: str, settings: Any, stage: str, work: Work) -> None:
    assert evaluations[attack](**settings).work(stage, 10) == work
