"""What is timed side by side does the same: the textbook's step and ours, in float64."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from fatbench import models

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import training
from benchmarks.worlds import EPS


@pytest.mark.parametrize("tau", [0, 1, 10])
@pytest.mark.parametrize("name", list(training.FAMILY))
def test_the_textbooks_step_and_ours_are_one(name: str, tau: int) -> None:
    net = models.build("digits-cnn").double()
    x, y = torch.rand(24, 3, 8, 8, dtype=torch.float64), torch.arange(24) % 10
    start = (x + EPS * (2 * torch.rand_like(x) - 1)).clamp(0, 1)
    theirs, ours = training.learners(name, net, tau, half=False)
    theirs_adv, ours_adv = theirs.theirs(x, y, start), ours.ours(x, y, start)
    # The textbook returns examples in the order in which they stopped.
    assert torch.equal(theirs_adv.flatten(1).sum(dim=1).sort().values, ours_adv.flatten(1).sum(dim=1).sort().values)
    for a, b in zip(theirs.net.parameters(), ours.net.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
