"""The margin rule of FAT's Appendix A stops where its definition says, between tau = 0 and the whole search."""

from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench.attacks import Crafted, Friendly, Margin, cross_entropy, kl, natural, pgd
from fatbench.defense import build
from fatbench.draws import Draws
from fatbench.errors import Refused
from fatbench.quantities import Progress
from fatbench.registry import defenses

Lab = tuple[nn.Module, Tensor, Tensor]
EPS, ALPHA, K = 0.1, 0.02, 10
PROGRESS = Progress(3, 12)
both_gaps = pytest.mark.parametrize("gap", ["probability", "loss"])
both_objectives = pytest.mark.parametrize("objective", [cross_entropy, kl], ids=["ce", "kl"])


def attack(net: nn.Module, x: Tensor, y: Tensor, **changed: Any) -> Crafted:
    return pgd(net, x, y, **{"eps": EPS, "step_size": ALPHA, "steps": K, "start": natural} | changed)


def gaps(net: nn.Module, point: Tensor, y: Tensor, gap: str) -> Tensor:
    """(N,) by the definition, class by class: the loss of y less the least of the others', or the probabilities'."""
    with torch.no_grad():
        logits = net(point)
    found = []
    for z, label in zip(logits, y.tolist(), strict=True):
        losses = [F.cross_entropy(z, torch.tensor(j)).item() for j in range(len(z))]
        chances = z.softmax(0).tolist()
        others = [j for j in range(len(z)) if j != label]
        by = {
            "loss": losses[label] - min(losses[j] for j in others),
            "probability": max(chances[j] for j in others) - chances[label],
        }
        found.append(by[gap])
    return torch.tensor(found, dtype=torch.float64)


@both_gaps
@pytest.mark.parametrize("rho", [0.05, 0.3, 0.9])
def test_who_is_stopped_stands_at_the_first_point_of_the_path_whose_gap_reaches_rho(
    lab: Lab, gap: Any, rho: float
) -> None:
    path = [attack(*lab, steps=k).x_adv for k in range(K + 1)]
    reached = torch.stack([gaps(lab[0], point, lab[2], gap) >= rho for point in path[:K]])
    crafted = attack(*lab, stop=Margin(rho, gap))
    for i, steps in enumerate(crafted.steps.tolist()):
        expected = int(reached[:, i].long().argmax()) if reached[:, i].any() else K
        assert steps == expected
        torch.testing.assert_close(crafted.x_adv[i], path[steps][i], rtol=0, atol=1e-12)
    assert crafted.steps.unique().numel() > 2, "the world does not try the rule"


def test_the_two_gaps_are_two_rules(lab: Lab) -> None:
    assert not torch.equal(*(attack(*lab, stop=Margin(0.4, gap)).steps for gap in ("probability", "loss")))


@both_gaps
@both_objectives
def test_a_margin_of_nought_is_fat_with_tau_of_nought_bit_for_bit(lab: Lab, gap: Any, objective: Any) -> None:
    margin, friendly = (attack(*lab, objective=objective, stop=rule) for rule in (Margin(0, gap), Friendly(0, lab[2])))
    assert torch.equal(margin.x_adv, friendly.x_adv)
    assert torch.equal(margin.steps, friendly.steps)
    assert (margin.forwards, margin.backwards) == (friendly.forwards, friendly.backwards)
    assert 0 < (margin.steps < K).sum() < len(lab[2])


@both_gaps
@both_objectives
def test_an_infinite_margin_is_plain_pgd_bit_for_bit(lab: Lab, gap: Any, objective: Any) -> None:
    margin, plain = attack(*lab, objective=objective, stop=Margin(np.inf, gap)), attack(*lab, objective=objective)
    assert torch.equal(margin.x_adv, plain.x_adv)
    assert (margin.steps == K).all()
    assert (margin.forwards, margin.backwards) == (plain.forwards, plain.backwards)


class Even(nn.Module):
    """Two classes whose scores are always equal: the prediction is the first."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        score = self.weight * x.flatten(1).sum(1, keepdim=True)
        return torch.cat([score, score], dim=1)


@both_gaps
def test_a_tie_goes_to_the_first_class_as_in_fat(gap: Any) -> None:
    x, y = torch.full((2, 1, 2, 2), 0.5), torch.tensor([0, 1])
    assert attack(Even(), x, y, stop=Margin(0, gap)).steps.tolist() == [K, 0]
    assert attack(Even(), x, y, stop=Friendly(0, y)).steps.tolist() == [K, 0]


@both_gaps
def test_a_larger_margin_lets_nobody_stop_earlier(lab: Lab, gap: Any) -> None:
    taken = torch.stack([attack(*lab, stop=Margin(rho, gap)).steps for rho in (0, 0.1, 0.4, 0.8, 3.0)])
    assert (taken.diff(dim=0) >= 0).all()
    assert (taken[-1] > taken[0]).any()


# ------------------------------------------------------------------------------------------------ the contestant


def update(name: str, lab: Lab, **values: Any) -> tuple[Crafted, list[Tensor]]:
    """What a contestant crafts of its own draws, and the gradients of its loss there."""
    net, x, y = deepcopy(lab[0]), lab[1], lab[2]
    one = build(defenses[name], {"eps": EPS, "steps": K, **values})
    crafted = one.craft(net, x, y, PROGRESS, draws=Draws(("test",), np.arange(len(x))))
    torch.autograd.backward(one.loss(net.train(), x, crafted.x_adv, y, PROGRESS))
    return crafted, [p.grad for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize(
    ("rho", "other", "values"), [(0, "fat", {"tau": 0}), (1.5, "madry", {})], ids=["rho=0", "rho>1"]
)
def test_fat_margin_is_fat_at_one_end_and_madry_at_the_other(
    lab: Lab, rho: float, other: str, values: dict[str, Any]
) -> None:
    (crafted, gradients), (same, theirs) = update("fat-margin", lab, rho=rho), update(other, lab, **values)
    assert torch.equal(crafted.x_adv, same.x_adv) and torch.equal(crafted.steps, same.steps)
    assert all(torch.equal(a, b) for a, b in zip(gradients, theirs, strict=True))


def test_fat_margin_hands_its_own_fields_to_the_rule(lab: Lab) -> None:
    one = build(defenses["fat-margin"], {"rho": "3/4", "gap": "loss"})
    assert one.stop(PROGRESS, lab[2]) == Margin(0.75, "loss")


@pytest.mark.parametrize("values", [{"rho": -0.1}, {"rho": "inf"}, {"gap": "logit"}, {"tau": 1}])
def test_a_margin_that_means_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(Refused, match="fat-margin"):
        build(defenses["fat-margin"], values)
