"""Attacks on whom the former left standing, budgets of their own, best iterates, and multi-targeted PGD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fatbench import checkpoint, data, examination, record
from fatbench.checkpoint import Subject
from fatbench.defense import build
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Attacked, Chunk, Evaluation, Staged, examiner
from fatbench.protocol import Protocol
from fatbench.record import read_outcomes
from fatbench.registry import evaluations

Attack = Callable[[nn.Module, Chunk, float], Attacked]


def said(*attacks: str, **more: Any) -> Protocol:
    return Protocol(name="mine", version=1, summary="cheap", source="these tests", attacks=attacks, **more)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


@pytest.fixture(scope="module")
def net(digits: data.Data) -> nn.Module:
    """A network trained for a moment: right on most digits, and some attacks break more of them than others."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(60):
        sgd.zero_grad()
        nn.functional.cross_entropy(net(digits.x_train), digits.y_train).backward()
        sgd.step()
    return net.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def wavy(net: nn.Module) -> nn.Module:
    """The network with ripples in its logits: the last of many steps is no better than one in between."""

    class Wavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.mix = net, nn.Linear(64, 10).requires_grad_(False)
            nn.init.normal_(self.mix.weight, std=6)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits + self.mix(x.flatten(1)).sin()

    torch.manual_seed(0)
    return Wavy().eval()


def task(net: nn.Module, digits: data.Data, protocol: Protocol, eps: str = "0.1", **more: Any) -> Examination:
    meta = {"arch": "mine", "mean": None, "std": None}
    return Examination(Subject(net, meta, checkpoint.fingerprint(net)), digits, protocol, eps, **{"n": 60, **more})


def chunk_of(digits: data.Data, n: int = 60, seed: int = 0) -> Chunk:
    return Chunk(digits.x_test[:n].contiguous(), digits.y_test[:n], np.arange(n), 10, seed)


def fallen(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return net(x).argmax(dim=1) != y


# ------------------------------------------------------------------------------------------------ budgets of their own


def test_an_attack_with_its_own_budget_uses_it_and_is_no_part_of_the_worst_case(
    net: nn.Module, digits: data.Data, tmp_path: Path
) -> None:
    both = evaluate(task(net, digits, said("pgd-5", "pgd-5@0.2", families={"pgd": {"step_size": "0.05"}})), tmp_path)
    far = evaluate(task(net, digits, said("pgd-5", families={"pgd": {"step_size": "0.05"}}), "0.2"), tmp_path)
    assert both.result.correct["pgd-5@0.2"] == far.result.correct["pgd-5"] < both.result.correct["pgd-5"]
    assert both.result.correct["worst"] <= both.result.correct["pgd-5"]
    assert both.result.correct["worst"] > both.result.correct["pgd-5@0.2"]
    assert record.read(tmp_path / f"{both.id}.json") == both


def test_a_protocols_n_is_the_first_n_or_all_there_are(net: nn.Module, digits: data.Data) -> None:
    assert list(task(net, digits, said("fgsm", n=7), n=None).rows()) == list(range(7))
    assert len(task(net, digits, said("fgsm", n=10_000), n=None).rows()) == len(digits.y_test)
    assert len(task(net, digits, said("fgsm", n=7), n=9).rows()) == 9


# ------------------------------------------------------------------------------------------------ whom is left standing


class Seen(Evaluation):
    """An examiner that breaks who has one of some places in the test set, and notes whom it was shown."""

    name = "seen"

    def __init__(self, breaks: set[int], shown: list[list[int]]) -> None:
        self.breaks, self.shown = breaks, shown

    def attack(self, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        self.shown.append(chunk.indices.tolist())
        hit = torch.tensor([int(i) in self.breaks for i in chunk.indices])[:, None, None, None]
        return Attacked(torch.where(hit, chunk.x + eps, chunk.x), len(chunk.x), 0)


class Above(nn.Module):
    """Two classes: is the mean of an image above one half?"""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Protocol, dict[str, list[list[int]]]]]:
    """(protocol, whom each attack was shown) of attacks that break given places: scripted(a={1}, b={2})."""

    def make(standing: bool = True, **breaks: set[int]) -> tuple[Protocol, dict[str, list[list[int]]]]:
        shown: dict[str, list[list[int]]] = {name: [] for name in breaks}
        made = {name: Seen(places, shown[name]) for name, places in breaks.items()}
        monkeypatch.setattr(examination, "examiner", lambda name, settings: made[name])
        return said(*breaks, standing=standing), shown

    return make


def grey(values: list[float], y: list[int]) -> data.Data:
    from fatbench.catalogue import Dataset

    x = torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    return data.Data(Dataset("grey", "one grey value an image"), x, torch.tensor(y), x, torch.tensor(y), 2)


def test_each_attack_is_shown_only_whom_the_former_left_standing(scripted: Any, tmp_path: Path) -> None:
    protocol, shown = scripted(first={1, 2}, second={0, 1}, third=set())
    # Places 0-3 are right, 4 is wrong; chunks of three.
    world = grey([0.45, 0.45, 0.45, 0.45, 0.55], [0, 0, 0, 0, 0])
    done = evaluate(task(Above(), world, protocol, n=None, chunk=3), tmp_path)
    assert shown == {"first": [[0, 1, 2], [3]], "second": [[0], [3]], "third": [[3]]}
    assert done.result.correct == {"clean": 4, "first": 2, "second": 1, "third": 1, "worst": 1}
    assert done.protocol.attacks["second"]["standing_after"] == "first"
    table = read_outcomes(tmp_path / f"{done.id}.parquet")
    assert table["third.broken"].tolist() == [True, True, True, False, True]
    assert table["third.pred"].tolist() == [1, 1, 1, 0, 1]


def test_an_attack_in_stages_begins_with_whom_the_former_attack_left_standing(
    digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(name: str) -> Evaluation:
        return Seen({"first": {0}, "one": {0, 1}, "two": {3}}[name], shown[name])

    class Two(Staged):
        name = "two-stages"

        def stages(self, classes: int) -> tuple[str, ...]:
            return ("one", "two")

        def stage(self, stage: str, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
            return made(stage).attack(model, chunk, eps)

    shown: dict[str, list[list[int]]] = {"first": [], "one": [], "two": []}
    monkeypatch.setattr(examination, "examiner", lambda name, settings: made("first") if name == "first" else Two())
    world = grey([0.45, 0.45, 0.45, 0.45, 0.55], [0, 0, 0, 0, 0])
    for standing, one, two in ((True, [[1, 2, 3]], [[2, 3]]), (False, [[0, 1, 2, 3]], [[2, 3]])):
        protocol = said("first", "staged", standing=standing)
        done = evaluate(task(Above(), world, protocol, n=None, chunk=5), tmp_path / str(standing))
        assert (shown["one"], shown["two"]) == (one, two)
        assert done.result.correct == {"clean": 4, "first": 3, "staged": 1, "worst": 1}
        assert done.result.stages == {"staged": {"one": 1 + (not standing), "two": 1}}
        assert done.result.after == {"staged": {"one": 2, "two": 1}}
        table = read_outcomes(tmp_path / str(standing) / f"{done.id}.parquet")
        assert table["staged.stage"].tolist() == [0 if standing else 1, 1, -1, 2, 0]
        for seen in shown.values():
            seen.clear()


def test_without_standing_everyone_is_shown_to_everyone(scripted: Any, tmp_path: Path) -> None:
    protocol, shown = scripted(standing=False, first={1, 2}, second={0})
    done = evaluate(task(Above(), grey([0.45] * 4, [0] * 4), protocol, n=None, chunk=4), tmp_path)
    assert shown == {"first": [[0, 1, 2, 3]], "second": [[0, 1, 2, 3]]}
    assert "standing_after" not in done.protocol.attacks["second"]


def test_a_part_of_a_chunk_keeps_every_examples_own_start(digits: data.Data) -> None:
    whole, which = chunk_of(digits, 10), np.array([2, 5, 9])
    part = whole.part(which)
    assert torch.equal(part.x, whole.x[which]) and torch.equal(part.y, whole.y[which])
    drawn = whole.draws(3).uniform(whole.x, "start")
    assert torch.equal(part.draws(3).uniform(part.x, "start"), drawn[torch.as_tensor(which)])


# ------------------------------------------------------------------------------------------------ best iterates


def test_the_best_iterate_breaks_whom_the_last_does_and_more(wavy: nn.Module, digits: data.Data) -> None:
    net, chunk, how = wavy, chunk_of(digits, 200), {"step_size": "0.09", "steps": 9}
    last, best = (build(evaluations["pgd"], {**how, "iterate": which}) for which in ("last", "best"))
    by_last = fallen(net, last.attack(net, chunk, 0.06).x_adv, chunk.y)
    made = best.attack(net, chunk, 0.06)
    by_best = fallen(net, made.x_adv, chunk.y)
    assert (by_best >= by_last).all()
    assert by_best.sum() > by_last.sum()
    assert made.backwards < 9 * len(chunk.x)  # who is misled has no more steps to pay


def test_paths_of_different_budgets_and_iterates_are_not_mixed(net: nn.Module, digits: data.Data) -> None:
    chunk = chunk_of(digits)
    for attack, settings, eps in [
        ("pgd-3", {}, 0.1), ("pgd-5", {"step_size": "0.025"}, 0.2), ("pgd-5", {"iterate": "best"}, 0.1),
        ("pgd-5", {"step_size": "0.025"}, 0.1),
    ]:  # fmt: skip
        shared = examiner(attack, settings).attack(net, chunk, eps).x_adv
        alone = examiner(attack, settings).attack(net, chunk_of(digits), eps).x_adv
        assert torch.equal(shared, alone)


def test_pgd_on_the_margin_is_cw(net: nn.Module, digits: data.Data) -> None:
    chunk = chunk_of(digits)
    margin = examiner("pgd-30", {"loss": "cw-margin", "kappa": 50}).attack(net, chunk, 0.1)
    assert torch.equal(margin.x_adv, examiner("cw-inf", {}).attack(net, chunk_of(digits), 0.1).x_adv)


# ------------------------------------------------------------------------------------------------ multi-targeted


def multitargeted(**settings: Any) -> Any:
    return build(evaluations["multitargeted"], settings)


def test_the_margin_is_how_far_the_best_rival_leads() -> None:
    module = __import__(type(multitargeted()).__module__, fromlist=["margin"])
    logits, y = torch.tensor([[3.0, 1.0, 2.0], [-5.0, -4.0, -9.0]]), torch.tensor([0, 0])
    assert module.margin(logits, y).tolist() == [-1.0, 1.0]
    assert module.lead(logits, torch.tensor([[2, 0], [2, 0]])).tolist() == [-1.0, -4.0]


def test_it_breaks_more_than_a_constant_step_and_stays_within_the_ball(net: nn.Module, digits: data.Data) -> None:
    chunk = chunk_of(digits, 250)
    made = multitargeted(restarts=8).attack(net, chunk, 0.06)
    assert (made.x_adv - chunk.x).abs().max() <= 0.06 + 1e-6
    assert made.x_adv.min() >= 0
    assert made.x_adv.max() <= 1
    mine = fallen(net, made.x_adv, chunk.y)
    theirs = fallen(net, examiner("pgd-40", {"step_size": "0.015"}).attack(net, chunk, 0.06).x_adv, chunk.y)
    assert (mine >= theirs).all()
    assert torch.equal(made.x_adv[~mine], chunk.x[~mine])  # the clean image where nothing was found


def test_restarts_break_more_and_are_spent_on_the_nearest(wavy: nn.Module, digits: data.Data) -> None:
    net, chunk = wavy, chunk_of(digits, 250)
    few, many = (multitargeted(steps=3, targets=0, restarts=r, nearest=0.1).attack(net, chunk, 0.05) for r in (0, 12))
    assert (fallen(net, many.x_adv, chunk.y) >= fallen(net, few.x_adv, chunk.y)).all()
    assert fallen(net, many.x_adv, chunk.y).sum() > fallen(net, few.x_adv, chunk.y).sum()
    # A tenth of the chunk, rounded up, for at most three steps and two looks, twelve times.
    assert 12 * 25 < many.forwards - few.forwards <= 12 * 25 * 4


def test_each_target_is_climbed_alone(net: nn.Module, digits: data.Data) -> None:
    """A network that hides the likeliest rival's gradient is broken by the others."""

    class Masked(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = net(x)
            top = z.topk(2, dim=1).indices[:, 1:]
            return z.scatter(1, top, z.gather(1, top).detach())

    chunk, masked = chunk_of(digits, 250), Masked().eval()
    without = multitargeted(targets=0, restarts=0).attack(masked, chunk, 0.12)
    targeted = multitargeted(targets=3, restarts=0).attack(masked, chunk, 0.12)
    assert fallen(masked, targeted.x_adv, chunk.y).sum() > fallen(masked, without.x_adv, chunk.y).sum()


def test_two_classes_and_a_batch_of_one_are_examined() -> None:
    chunk = Chunk(torch.full((1, 1, 2, 2), 0.45), torch.tensor([0]), np.arange(1), 2, 0)
    made = multitargeted(steps=4, restarts=2).attack(Above().eval(), chunk, 0.1)
    assert fallen(Above(), made.x_adv, chunk.y).all()


def test_the_same_examples_give_the_same_result_wherever_the_chunk_begins(net: nn.Module, digits: data.Data) -> None:
    whole = chunk_of(digits, 40)
    part = whole.part(np.arange(10, 20))
    how = multitargeted(restarts=0)
    torch.testing.assert_close(how.attack(net, part, 0.08).x_adv, how.attack(net, whole, 0.08).x_adv[10:20])
