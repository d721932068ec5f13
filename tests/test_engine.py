"""Holds the engine, PGD-K-tau, to the law of FAT's Algorithms 1 and 3, to DAT's criterion and to its own promises."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from copy import deepcopy
from functools import partial, reduce
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fatbench.attacks import (
    Converged,
    Crafted,
    Friendly,
    Now,
    Objective,
    cross_entropy,
    cw_margin,
    gaussian,
    kl,
    natural,
    pgd,
    uniform,
)
from fatbench.draws import Draws
from fatbench.models import DigitsCNN

Lab = tuple[nn.Module, Tensor, Tensor]
EPS, ALPHA, K = 0.1, 0.04, 8
OBJECTIVES = {"ce": cross_entropy, "kl": kl, "margin": cw_margin}
every_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
few = settings(
    max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def wavy(x: Tensor, eps: float) -> Tensor:
    """A start off x that depends on the image alone, not on its place in a batch."""
    return (x + eps * torch.sin(999 * x)).clamp(0, 1)


def attack(net: nn.Module, x: Tensor, y: Tensor, **changed: Any) -> Crafted:
    return pgd(net, x, y, **{"eps": EPS, "step_size": ALPHA, "steps": K, "start": wavy} | changed)


def wrong(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return net(x).argmax(dim=1) != y


def path(net: nn.Module, x: Tensor, y: Tensor, **changed: Any) -> Tensor:
    """(K + 1, N, ...) the iterates of plain PGD-K."""
    return torch.stack([attack(net, x, y, **changed | {"steps": k}).x_adv for k in range(K + 1)])


def rule(
    y: Tensor, *, tau: int | None = None, c: float | None = None, origin: Any = "clean", first: int = 1
) -> Callable[[Now], Tensor] | None:
    rules: list[Any] = [] if tau is None else [Friendly(tau, y)]
    rules += [] if c is None else [Converged(c, EPS, origin=origin, first=first)]
    return reduce(operator.or_, rules) if rules else None


def assert_same(a: Crafted, x_adv: Tensor, steps: Tensor) -> None:
    assert torch.equal(a.steps, steps)
    torch.testing.assert_close(a.x_adv, x_adv, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------ the law


def climbed(loss: str, z: Tensor, p: Tensor, y: int) -> Tensor:
    """One example's objective written out: z (classes,) its logits, p its clean probabilities."""
    if loss == "ce":
        return z.logsumexp(0) - z[y]
    if loss == "kl":
        return (p * (p.log() - z.log_softmax(0))).sum()
    return -torch.relu(z[y] - torch.cat([z[:y], z[y + 1 :]]).max() + 50)


def alone(
    net: nn.Module, x: Tensor, y: int, loss: str, tau: int | None, c: float | None, origin: str, first: int
) -> tuple[Tensor, int]:
    """The law for one image x (C, H, W), word for word."""
    start = point = wavy(x, EPS)
    left = tau
    p = net(x[None])[0].softmax(0).detach()
    for k in range(K):
        point = point.detach().requires_grad_()
        z = net(point[None])[0]
        (g,) = torch.autograd.grad(climbed(loss, z, p, y), point)
        point = point.detach()
        fosc = EPS * g.abs().sum() - ((point - (x if origin == "clean" else start)) * g).sum()
        fooled = int(z.argmax()) != y
        if (fooled and left == 0) or (c is not None and k >= first and float(fosc) <= c):
            return point, k
        if fooled and left:
            left -= 1
        moved = (point + ALPHA * g.sign()).clamp(x - EPS, x + EPS)
        point = moved.clamp(0, 1)
    return point, K


@pytest.mark.parametrize("loss", OBJECTIVES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"tau": 0},
        {"tau": 2},
        {"c": 1.0},
        {"c": 1.0, "origin": "start"},
        {"c": 1.0, "first": 0},
        {"c": 0.05, "tau": 2},
    ],
    ids=lambda how: "-".join(f"{key}{value}" for key, value in how.items()) or "plain",
)
def test_a_batch_gives_what_each_example_gives_alone(lab: Lab, loss: str, how: dict[str, Any]) -> None:
    net, x, y = lab[0], lab[1][:14], lab[2][:14]
    given_ = {"tau": None, "c": None, "origin": "clean", "first": 1} | how
    points, steps = zip(*(alone(net, x[i], int(y[i]), loss, **given_) for i in range(len(x))), strict=True)
    crafted = attack(net, x, y, objective=OBJECTIVES[loss], stop=rule(y, **how))
    assert_same(crafted, torch.stack(points), torch.tensor(steps))
    assert not how or crafted.steps.unique().numel() > 2, "the world does not try the rule"


@every_objective
@pytest.mark.parametrize("tau", [K, K + 3])
def test_tau_of_k_or_more_is_plain_pgd_bit_for_bit(lab: Lab, objective: Objective, tau: int) -> None:
    plain = attack(*lab, objective=objective)
    friendly = attack(*lab, objective=objective, stop=Friendly(tau, lab[2]))
    assert torch.equal(friendly.x_adv, plain.x_adv)
    assert torch.equal(friendly.steps, plain.steps)
    assert (plain.steps == K).all()
    assert (friendly.forwards, friendly.backwards) == (plain.forwards, plain.backwards)


def test_tau_of_k_minus_1_spares_one_step_to_those_wrong_at_all_checks(lab: Lab) -> None:
    net, _, y = lab
    always = torch.stack([wrong(net, point, y) for point in path(*lab)[:K]]).all(dim=0)
    plain, friendly = attack(*lab), attack(*lab, stop=Friendly(K - 1, y))
    assert torch.equal(friendly.steps, K - always.long())
    assert torch.equal(friendly.x_adv[~always], plain.x_adv[~always])
    assert 0 < always.sum() < len(y)


@every_objective
def test_tau_only_selects_an_iterate_of_the_path_and_later_ones_for_larger_tau(lab: Lab, objective: Objective) -> None:
    iterates, before = path(*lab, objective=objective), torch.zeros_like(lab[2])
    for tau in range(K + 1):
        crafted = attack(*lab, objective=objective, stop=Friendly(tau, lab[2]))
        assert_same(crafted, iterates[crafted.steps, torch.arange(len(before))], crafted.steps)
        assert (crafted.steps >= before).all()
        before = crafted.steps


@every_objective
@pytest.mark.parametrize("tau", [0, 1, 3])
def test_who_is_stopped_is_wrong_there_after_exactly_tau_wrong_checks(lab: Lab, objective: Objective, tau: int) -> None:
    net, _, y = lab
    crafted = attack(*lab, objective=objective, stop=Friendly(tau, y))
    mistakes = torch.stack([wrong(net, point, y) for point in path(*lab, objective=objective)])
    for i, steps in enumerate(crafted.steps.tolist()):
        if steps < K:
            assert mistakes[steps, i]
            assert mistakes[:steps, i].sum() == tau
        else:
            assert mistakes[:K, i].sum() <= tau
    assert 0 < (crafted.steps < K).sum() < len(y)


def test_with_tau_0_who_is_wrong_at_the_start_returns_it_untouched(lab: Lab) -> None:
    net, x, y = lab
    for start in (natural, wavy):
        first = start(x, EPS)
        lost = wrong(net, first, y)
        crafted = attack(*lab, start=start, stop=Friendly(0, y))
        assert lost.any()
        assert (crafted.steps[lost] == 0).all()
        assert torch.equal(crafted.x_adv[lost], first[lost])
        assert (crafted.steps[~lost] > 0).all()


def test_nobody_is_asked_after_the_last_step(lab: Lab) -> None:
    asked: list[int] = []

    def never(now: Now) -> Tensor:
        asked.append(now.k)
        return torch.zeros_like(now.y, dtype=torch.bool)

    attack(*lab, stop=never)
    assert asked == list(range(K))


class Told(nn.Module):
    """Images (N, 1, 1, 2): pixel 0 climbs by 1/16 a step, pixel 1 names a row of `right`, which says who is right when.

    Class 0 is the truth, class 2 is what the attack climbs.
    """

    def __init__(self, right: list[list[bool]]) -> None:
        super().__init__()
        self.right = torch.tensor(right)

    def images(self) -> Tensor:
        names = torch.arange(len(self.right)) / 64
        return torch.stack([torch.zeros_like(names), names], dim=1)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        place, name = x.flatten(1).unbind(1)
        right = self.right[(64 * name).round().long(), (16 * place).round().long()].to(x.dtype)
        return torch.stack([right, 1 - right, place - 10], dim=1)


def told(right: list[list[bool]], steps: int, stop: Callable[[Tensor], Any]) -> Crafted:
    net = Told(right)
    x = net.images()
    y = torch.zeros(len(x), dtype=torch.int64)
    climb = Objective(lambda logits, y: logits[:, 2])
    crafted = pgd(net, x, y, eps=1.0, step_size=1 / 16, steps=steps, objective=climb, start=natural, stop=stop(y))
    assert torch.equal(16 * crafted.x_adv[:, 0, 0, 0], crafted.steps.float())
    assert torch.equal(crafted.x_adv[..., 1], x[..., 1]), "sign(0) is 0"
    return crafted


def lawful(right: list[bool], tau: int, steps: int) -> int:
    """How many steps Algorithm 1 lets an example take whose checks say this."""
    for k in range(steps):
        if not right[k]:
            if tau == 0:
                return k
            tau -= 1
    return steps


def test_turning_right_again_spends_and_refunds_nothing() -> None:
    flips_back = [False, True, True, False, True, False, False, False]
    crafted = told([flips_back], 7, lambda y: Friendly(1, y))
    first_flip_plus_tau = 0 + 1
    assert crafted.steps.tolist() == [3] != [first_flip_plus_tau]
    assert told([flips_back], 7, lambda y: Friendly(2, y)).steps.tolist() == [5]


@few
@given(st.data(), st.integers(0, 8), st.integers(0, 9))
def test_every_story_of_rights_and_wrongs_is_counted_as_the_law_says(data: st.DataObject, steps: int, tau: int) -> None:
    right = data.draw(st.lists(st.lists(st.booleans(), min_size=9, max_size=9), min_size=1, max_size=8))
    crafted = told(right, steps, lambda y: Friendly(tau, y))
    assert crafted.steps.tolist() == [lawful(row, tau, steps) for row in right]
    stopped = int((crafted.steps < steps).sum())
    assert crafted.forwards == int(crafted.steps.sum()) + stopped
    assert crafted.backwards == int(crafted.steps.sum())


@few
@given(st.data(), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_each_example_may_have_its_own_tau(data: st.DataObject, taus: list[int]) -> None:
    row = st.lists(st.booleans(), min_size=9, max_size=9)
    right = data.draw(st.lists(row, min_size=len(taus), max_size=len(taus)))
    crafted = told(right, 8, lambda y: Friendly(torch.tensor(taus), y))
    assert crafted.steps.tolist() == [lawful(row, tau, 8) for row, tau in zip(right, taus, strict=True)]


# ------------------------------------------------------------------------------------------------ rules together


@few
@given(st.data(), st.integers(0, 3), st.booleans())
def test_a_union_stops_whom_either_stops_and_neither_loses_count(data: st.DataObject, tau: int, swap: bool) -> None:
    row = st.lists(st.booleans(), min_size=9, max_size=9)
    right = data.draw(st.lists(row, min_size=1, max_size=8))
    ends = data.draw(st.lists(st.integers(0, 9), min_size=len(right), max_size=len(right)))

    class Ends(Friendly):
        def __call__(self, now: Now) -> Tensor:
            return now.k >= torch.tensor(ends)[now.which]

    def both(y: Tensor) -> Any:
        a, b = Friendly(tau, y), Ends(0, y)
        return b | a if swap else a | b

    expected = [min(lawful(row, tau, 8), end, 8) for row, end in zip(right, ends, strict=True)]
    assert told(right, 8, both).steps.tolist() == expected


def test_a_union_asks_both_rules_every_time_about_everybody(lab: Lab) -> None:
    asked: dict[str, list[tuple[int, list[int]]]] = {"a": [], "b": []}

    class Spy(Converged):
        def __call__(self, now: Now) -> Tensor:
            asked["a" if self.c < 0 else "b"].append((now.k, now.which.tolist()))
            return (now.which % 2 == 0) if now.k == 2 else torch.full_like(now.y, now.k == 4, dtype=torch.bool)

    attack(*lab, stop=Spy(-1, EPS) | Spy(1, EPS))
    odd, everyone = list(range(1, 24, 2)), list(range(24))
    assert asked["a"] == asked["b"] == [(0, everyone), (1, everyone), (2, everyone), (3, odd), (4, odd)]


def test_a_rule_used_again_begins_anew(lab: Lab) -> None:
    y = lab[2]
    for stop in (Friendly(2, y), Friendly(1, y) | Converged(0.5, EPS), Friendly(torch.arange(24) % 4, y)):
        first, again = (attack(*lab, stop=stop) for _ in range(2))
        assert torch.equal(first.steps, again.steps)
        assert torch.equal(first.x_adv, again.x_adv)


def test_a_rule_is_shown_the_rows_still_moving(lab: Lab) -> None:
    net, x, y = lab
    shown: list[int] = []

    def each_in_turn(now: Now) -> Tensor:
        rows = torch.arange(now.k, 24)
        assert torch.equal(now.which, rows)
        assert torch.equal(now.x, x[rows])
        assert torch.equal(now.y, y[rows])
        assert torch.equal(now.start, wavy(x, EPS)[rows])
        torch.testing.assert_close(now.logits, net(now.x_adv))
        torch.testing.assert_close(now.target, net(x).softmax(1)[rows])
        shown.append(now.k)
        return now.which == now.k

    crafted = attack(*lab, objective=kl, stop=each_in_turn)
    assert shown == list(range(K))
    assert crafted.steps.tolist() == list(range(K)) + [K] * (24 - K)
    iterates = path(*lab, objective=kl)
    assert_same(crafted, iterates[crafted.steps, torch.arange(24)], crafted.steps)


# ------------------------------------------------------------------------------------------------ FOSC


def foscs(lab: Lab, **how: Any) -> Tensor:
    """(K, N) the criterion at each iterate of the path, x^(0) first."""
    net, x, y = lab
    values: list[Tensor] = []
    criterion = Converged(0, how.get("eps", EPS), origin=how.pop("origin", "clean"))

    def look(now: Now) -> Tensor:
        values.append(criterion.fosc(now))
        return torch.zeros_like(now.y, dtype=torch.bool)

    attack(net, x, y, stop=look, **how)
    return torch.stack(values)


@pytest.mark.parametrize(
    ("c", "first", "steps"), [(-torch.inf, 1, K), (0.0, 1, K), (torch.inf, 1, 1), (torch.inf, 0, 0)]
)
def test_the_extreme_thresholds_take_all_steps_or_as_few_as_may_be(lab: Lab, c: float, first: int, steps: int) -> None:
    crafted = attack(*lab, stop=Converged(c, EPS, first=first))
    assert (crafted.steps == steps).all()
    assert torch.equal(crafted.x_adv, attack(*lab, steps=steps).x_adv)


def test_a_larger_threshold_never_takes_more_steps(lab: Lab) -> None:
    taken = torch.stack([attack(*lab, stop=Converged(c, EPS)).steps for c in (0.0, 0.2, 0.5, 1.0, 2.0, 8.0)])
    assert (taken.diff(dim=0) <= 0).all()
    assert taken[0].sum() > taken[3].sum() > taken[-1].sum()


def test_an_example_stops_at_its_first_fosc_at_or_below_the_threshold(lab: Lab) -> None:
    for origin in ("clean", "start"):
        for first in (0, 1):
            small = foscs(lab, origin=origin) <= 1.0
            small[:first] = False
            expected = torch.where(small.any(dim=0), small.long().argmax(dim=0), K)
            crafted = attack(*lab, stop=Converged(1.0, EPS, origin=origin, first=first))  # type: ignore[arg-type]
            assert torch.equal(crafted.steps, expected)


def test_who_is_exactly_at_the_threshold_has_converged(lab: Lab) -> None:
    net, x, y = lab
    falls = (foscs(lab)[:3].diff(dim=0) < 0).all(dim=0)
    one = slice(int(falls.long().argmax()), int(falls.long().argmax()) + 1)
    threshold = foscs((net, x[one], y[one]))[2].item()
    assert falls.any()
    assert attack(net, x[one], y[one], stop=Converged(threshold, EPS)).steps.item() == 2


def test_fosc_from_the_clean_image_is_never_negative_inside_the_box(lab: Lab) -> None:
    assert foscs(lab, start=natural).min() >= 0
    assert foscs(lab).min() >= 0


def test_fosc_does_not_depend_on_who_else_is_in_the_batch(lab: Lab) -> None:
    net, x, y = lab
    together = foscs(lab)
    apart = torch.cat([foscs((net, x[i : i + 1], y[i : i + 1])) for i in range(6)], dim=1)
    torch.testing.assert_close(together[:, :6], apart, rtol=1e-9, atol=0)


# ------------------------------------------------------------------------------------------------ a linear model


class Linear(nn.Module):
    """Two classes, z_1 - z_0 = <w, x> + b."""

    def __init__(self, w: Tensor, b: float) -> None:
        super().__init__()
        self.w, self.b = w, b

    def lead(self, x: Tensor) -> Tensor:
        return (x * self.w).flatten(1).sum(dim=1) + self.b

    def forward(self, x: Tensor) -> Tensor:
        lead = self.lead(x)
        return torch.stack([-0.5 * lead, 0.5 * lead], dim=1)


def linear(seed: int = 0, n: int = 40) -> tuple[Linear, Tensor, Tensor, Tensor]:
    """(model, x, y, direction): the sign that raises the loss of each example, 0 where w is 0."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 3, 3, generator=rng, dtype=torch.float64)
    w = torch.randn(1, 1, 3, 3, generator=rng, dtype=torch.float64)
    w[0, 0, 1, 1] = 0
    model = Linear(w, -float((x * w).flatten(1).sum(dim=1).median()))
    y = (model.lead(x) > 0.1).long()
    return model, x, y, w.sign() * (1 - 2 * y)[:, None, None, None]


def between(x: Tensor, eps: float, point: Tensor) -> Tensor:
    return point.clamp(x - eps, x + eps).clamp(0, 1)


@few
@given(st.floats(0, 0.6), st.floats(0, 0.2), st.integers(0, 7), st.integers(0, 99), st.sampled_from(["ce", "margin"]))
def test_on_a_linear_model_the_final_point_is_known(eps: float, alpha: float, steps: int, seed: int, loss: str) -> None:
    model, x, y, direction = linear(seed)
    for start in (natural, wavy):
        crafted = pgd(model, x, y, eps=eps, step_size=alpha, steps=steps, start=start, objective=OBJECTIVES[loss])
        expected = between(x, eps, start(x, eps) + steps * alpha * direction)
        torch.testing.assert_close(crafted.x_adv, expected, rtol=0, atol=1e-12)


def test_on_a_linear_model_a_step_of_eps_reaches_the_corner() -> None:
    model, x, y, direction = linear()
    crafted = pgd(model, x, y, eps=0.1, step_size=0.1, steps=1, start=natural)
    assert torch.equal(crafted.x_adv, (x + 0.1 * direction).clamp(0, 1))


@pytest.mark.parametrize("tau", [0, 1, 2])
def test_on_a_linear_model_the_friendly_steps_are_those_to_the_boundary_plus_tau(tau: int) -> None:
    model, x, y, direction = linear()
    leads = torch.stack([model.lead(between(x, 0.5, x + 0.03 * k * direction)) for k in range(K)])
    mistakes = (leads > 0).long() != y
    first = torch.where(mistakes.any(dim=0), mistakes.long().argmax(dim=0), K)
    crafted = pgd(model, x, y, eps=0.5, step_size=0.03, steps=K, start=natural, stop=Friendly(tau, y))
    assert torch.equal(crafted.steps, (first + tau).clamp(max=K))
    assert crafted.steps.unique().numel() > 3


def test_on_a_linear_model_fosc_is_the_gradient_times_the_way_left() -> None:
    model, x, y, direction = linear()
    x = 0.3 + 0.4 * x  # so that [0, 1] is never met
    seen: list[Tensor] = []
    criterion = Converged(0, 0.2)

    def look(now: Now) -> Tensor:
        seen.append(criterion.fosc(now))
        return torch.zeros_like(now.y, dtype=torch.bool)

    pgd(model, x, y, eps=0.2, step_size=0.05, steps=6, start=natural, stop=look)
    for k, value in enumerate(seen):
        gone = min(0.05 * k, 0.2)
        p_wrong = torch.sigmoid((1 - 2 * y) * model.lead(x + gone * direction))
        torch.testing.assert_close(value, p_wrong * model.w.abs().sum() * (0.2 - gone), rtol=0, atol=1e-12)


def test_on_a_linear_model_kl_flees_the_clean_prediction_whatever_the_label() -> None:
    model, x, y, _ = linear()
    away = 0.01 * torch.where(torch.arange(len(x)) % 2 == 0, 1.0, -1.0)[:, None, None, None] * model.w.sign()
    crafted = pgd(model, x, y, eps=0.1, step_size=0.05, steps=4, objective=kl, start=lambda x, eps: x + away)
    torch.testing.assert_close(crafted.x_adv, between(x, 0.1, x + 0.1 * away.sign()), rtol=0, atol=1e-12)


def test_kl_pushes_a_wrong_example_until_it_is_right_and_it_goes_on() -> None:
    model = Linear(torch.full((1, 1, 1, 1), 10.0, dtype=torch.float64), -5.0)
    x, y = torch.tensor([[[[0.47]]]], dtype=torch.float64), torch.tensor([1])
    crafted = pgd(
        model, x, y, eps=0.2, step_size=0.02, steps=K, objective=kl, start=lambda x, eps: x + 0.015, stop=Friendly(1, y)
    )
    assert not wrong(model, crafted.x_adv, y)
    assert crafted.steps.item() == K  # "first flip + tau" would have taken 1


def test_the_margin_stops_climbing_once_beaten_by_kappa() -> None:
    model, x, y, direction = linear()
    x = 0.3 + 0.4 * x
    objective = Objective(partial(cw_margin.loss, kappa=0.2))
    crafted = pgd(model, x, y, eps=0.3, step_size=0.02, steps=9, start=natural, objective=objective)
    margin = torch.stack([(2 * y - 1) * model.lead(x + 0.02 * k * direction) for k in range(9)])
    climbs = (margin > -0.2).sum(dim=0)[:, None, None, None]
    torch.testing.assert_close(crafted.x_adv, x + 0.02 * climbs.double() * direction, rtol=0, atol=1e-12)
    assert (crafted.steps == 9).all()
    assert climbs.unique().numel() > 2


def test_the_step_may_depend_on_k() -> None:
    model, x, y, direction = linear()
    sizes = [0.01, 0.0, 0.05, 0.02]
    crafted = pgd(model, x, y, eps=0.5, step_size=lambda k: sizes[k], steps=4, start=natural)
    torch.testing.assert_close(crafted.x_adv, between(x, 0.5, x + 0.08 * direction), rtol=0, atol=1e-12)


def test_without_projection_the_ball_is_left_and_the_range_kept() -> None:
    model, x, y, direction = linear()
    crafted = pgd(model, x, y, eps=0.05, step_size=0.1, steps=4, start=natural, project=False)
    torch.testing.assert_close(crafted.x_adv, (x + 0.4 * direction).clamp(0, 1), rtol=0, atol=1e-12)
    assert (crafted.x_adv - x).abs().max() > 0.3
    assert crafted.x_adv.min() == 0
    assert crafted.x_adv.max() == 1


# ------------------------------------------------------------------------------------------------ the ball


@few
@given(
    st.floats(0, 0.4),
    st.floats(0, 0.2),
    st.integers(0, 5),
    st.integers(0, 6),
    st.sampled_from([0.0, 1.0, 5.0]),
    st.sampled_from(sorted(OBJECTIVES)),
    st.booleans(),
)
def test_whoever_moved_lies_in_the_ball_and_in_range_wherever_it_began(
    lab: Lab, eps: float, alpha: float, steps: int, tau: int, off: float, loss: str, converging: bool
) -> None:
    net, x, y = lab
    stop = Friendly(tau, y) | Converged(0.5, eps) if converging else Friendly(tau, y)
    crafted = pgd(
        net,
        x,
        y,
        eps=eps,
        step_size=alpha,
        steps=steps,
        objective=OBJECTIVES[loss],
        stop=stop,
        start=lambda x, eps: x + off * (eps + 0.1) * torch.sin(999 * x),
        noise=0.05,
    )
    moved = crafted.steps > 0
    far, low, high = ((crafted.x_adv - x)[moved], crafted.x_adv[moved], crafted.x_adv[moved])
    assert (far.abs() <= eps + 2.3e-16).all()
    assert (low >= 0).all()
    assert (high <= 1).all()
    assert ((crafted.steps >= 0) & (crafted.steps <= steps)).all()


def test_no_steps_no_size_or_no_room_returns_the_start(lab: Lab) -> None:
    net, x, y = lab
    start = wavy(x, EPS)
    right = ~wrong(net, start, y)
    none = attack(*lab, steps=0, stop=Friendly(0, y))
    assert torch.equal(none.x_adv, start)
    assert none.steps.tolist() == [0] * 24
    assert (none.forwards, none.backwards) == (0, 0)
    still = attack(*lab, step_size=0.0, stop=Friendly(1, y))
    torch.testing.assert_close(still.x_adv, start, rtol=0, atol=1e-15)
    assert torch.equal(still.steps, torch.where(right, K, 1))
    shut = attack(*lab, eps=0.0, stop=Friendly(1, y))
    assert torch.equal(shut.x_adv, x)
    assert torch.equal(shut.steps, torch.where(wrong(net, x, y), 1, K))


def test_the_box_is_around_the_clean_image_not_around_the_start(lab: Lab) -> None:
    x = lab[1]
    crafted = attack(*lab, start=lambda x, eps: x + eps, objective=Objective(lambda z, y: z[:, 0] * 0 + z[:, 1]))
    assert (crafted.x_adv - x).max() <= EPS + 1e-15


# ------------------------------------------------------------------------------------------------ the batch


@few
@given(st.permutations(range(24)), st.integers(1, 23), st.integers(0, 4), st.sampled_from(sorted(OBJECTIVES)))
def test_order_split_and_company_change_nobody(lab: Lab, order: list[int], cut: int, tau: int, loss: str) -> None:
    net, x, y = lab

    def run(rows: list[int]) -> Crafted:
        stop = rule(y[rows], tau=tau, c=0.5)
        return attack(net, x[rows], y[rows], stop=stop, objective=OBJECTIVES[loss])

    whole = run(list(range(24)))
    assert_same(run(order), whole.x_adv[order], whole.steps[order])
    part = run(order[:cut])
    assert_same(part, whole.x_adv[order[:cut]], whole.steps[order[:cut]])


def test_the_mean_climbs_as_the_sum_does(lab: Lab) -> None:
    summed = attack(*lab, stop=Friendly(1, lab[2]))
    averaged = attack(
        *lab, stop=Friendly(1, lab[2]), objective=lambda z, y: F.cross_entropy(z, y).expand(len(z)) / len(z)
    )
    assert_same(averaged, summed.x_adv, summed.steps)


@every_objective
def test_a_batch_of_none_and_of_one_are_batches(lab: Lab, objective: Objective) -> None:
    net, x, y = lab
    none = attack(net, x[:0], y[:0], objective=objective, stop=rule(y[:0], tau=0, c=1.0))
    assert none.x_adv.shape == (0, 1, 8, 8)
    assert none.steps.shape == (0,)
    assert none.steps.dtype == torch.int64
    assert (none.forwards, none.backwards) == (0, 0)
    whole = attack(*lab, objective=objective, stop=Friendly(0, y))
    one = attack(net, x[3:4], y[3:4], objective=objective, stop=Friendly(0, y[3:4]))
    assert_same(one, whole.x_adv[3:4], whole.steps[3:4])


def test_what_comes_back_is_laid_out_like_x() -> None:
    net = DigitsCNN(classes=3, channels=3, width=8).double().eval()
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3
    plain = attack(net, x, y, stop=Friendly(1, y))
    last = attack(net, x.to(memory_format=torch.channels_last), y, stop=Friendly(1, y))
    assert plain.x_adv.is_contiguous()
    assert last.x_adv.is_contiguous(memory_format=torch.channels_last)
    assert last.x_adv.stride() != plain.x_adv.stride()
    assert_same(last, plain.x_adv, plain.steps)
    turned = attack(net, x, y, start=lambda x, eps: wavy(x, eps).to(memory_format=torch.channels_last))
    assert turned.x_adv.is_contiguous()
    assert attack(net.float(), x.float(), y).x_adv.dtype == torch.float32


# ------------------------------------------------------------------------------------------------ starts


def test_a_longer_attack_goes_on_from_a_shorter_one(lab: Lab) -> None:
    short = attack(*lab, steps=20, step_size=0.01)
    on = attack(*lab, steps=80, step_size=0.01, start=lambda x, eps: short.x_adv)
    assert torch.equal(on.x_adv, attack(*lab, steps=100, step_size=0.01).x_adv)


def test_a_caller_s_start_is_taken_as_it_is_and_left_as_it_is(lab: Lab) -> None:
    x = lab[1]
    mine = x + 3.0
    kept = mine.clone()
    assert torch.equal(attack(*lab, steps=0, start=lambda x, eps: mine).x_adv, mine)
    assert attack(*lab, start=lambda x, eps: mine).x_adv.max() <= 1
    assert torch.equal(mine, kept)
    images = x.clone()
    crafted = attack(*lab, start=lambda x, eps: x)
    assert torch.equal(x, images)
    assert crafted.x_adv.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("draws", [None, Draws(("starts",), np.arange(4))], ids=["stream", "draws"])
def test_the_built_in_starts_are_what_they_are_called(draws: Draws | None) -> None:
    grey, edge = torch.full((4, 3, 16, 16), 0.5), torch.ones(4, 3, 16, 16)
    spread = (uniform(grey, 0.2, draws=draws) - grey) / 0.2
    assert 0.95 < spread.abs().max() <= 1 + 1e-6
    assert abs(spread.mean()) < 0.05
    assert abs(spread.std() - 3**-0.5) < 0.02
    small = (gaussian(grey, 0.2, draws=draws) - grey) / 0.001
    assert abs(small.mean()) < 0.08
    assert abs(small.std() - 1) < 0.05
    assert small.abs().max() > 2
    for start in (uniform, gaussian):
        assert start(edge, 0.2, draws=draws).max() == 1
        assert start(1 - edge, 0.2, draws=draws).min() == 0
        assert start(edge, 0.2, draws=draws, clamp=False).max() > 1
        assert start(1 - edge, 0.2, draws=draws, clamp=False).min() < 0
    same = natural(grey, 0.2, draws=draws)
    assert torch.equal(same, grey)
    assert same.data_ptr() != grey.data_ptr()


def test_the_start_is_uniform_unless_another_is_asked_for(lab: Lab) -> None:
    torch.manual_seed(3)
    expected = uniform(lab[1], EPS)
    torch.manual_seed(3)
    assert torch.equal(pgd(*lab, eps=EPS, step_size=ALPHA, steps=0).x_adv, expected)


# ------------------------------------------------------------------------------------------------ noise


def test_noise_given_as_a_function_is_added_to_each_step_of_its_example() -> None:
    model, x, y, direction = linear()
    x = 0.3 + 0.4 * x
    noise = 0.002 * torch.sin(torch.arange(3 * len(x) * 9.0, dtype=torch.float64)).view(3, len(x), 1, 3, 3)
    steps = torch.arange(len(x)) % 4
    crafted = pgd(
        model,
        x,
        y,
        eps=0.5,
        step_size=0.01,
        steps=3,
        start=natural,
        stop=lambda now: now.k >= steps[now.which],
        noise=lambda k, which: noise[k, which],
    )
    total = torch.stack([noise[: steps[i], i].sum(dim=0) for i in range(len(x))])
    expected = x + 0.01 * steps.double()[:, None, None, None] * direction + total
    torch.testing.assert_close(crafted.x_adv, expected, rtol=0, atol=1e-12)


def test_noise_comes_before_the_box() -> None:
    model, x, y, _ = linear()
    crafted = pgd(model, x, y, eps=0.1, step_size=0.0, steps=1, start=natural, noise=lambda k, which: 9 * x[which] - 3)
    torch.testing.assert_close(crafted.x_adv, between(x, 0.1, 10 * x - 3))


def test_noise_given_as_a_number_is_its_standard_deviation(lab: Lab) -> None:
    _, x, y = lab
    torch.manual_seed(5)
    number = attack(*lab, noise=0.01, stop=Friendly(0, y))
    torch.manual_seed(5)
    called = attack(*lab, noise=lambda k, which: 0.01 * torch.randn_like(x[which]), stop=Friendly(0, y))
    assert torch.equal(number.x_adv, called.x_adv)
    assert not torch.equal(number.x_adv, attack(*lab, stop=Friendly(0, y)).x_adv)


# ------------------------------------------------------------------------------------------------ objectives


def test_an_objective_may_be_a_bare_function(lab: Lab) -> None:
    bare = attack(*lab, objective=lambda z, y: F.cross_entropy(z, y, reduction="none"), stop=Friendly(1, lab[2]))
    assert_same(bare, attack(*lab, stop=Friendly(1, lab[2])).x_adv, bare.steps)
    assert bare.forwards == attack(*lab, stop=Friendly(1, lab[2])).forwards


def test_an_objective_s_tensor_target_keeps_to_its_examples(lab: Lab) -> None:
    net, x, y = lab
    teacher = torch.rand(24, 3, dtype=torch.float64).softmax(dim=1)
    together = attack(*lab, objective=Objective(kl.loss, teacher), stop=Friendly(0, y))
    for i in (1, 4, 11, 20):
        mine = slice(i, i + 1)
        objective = Objective(kl.loss, teacher[mine])
        one = attack(net, x[mine], y[mine], objective=objective, stop=Friendly(0, y[mine]))
        assert_same(one, together.x_adv[mine], together.steps[mine])
    assert together.forwards == int(together.steps.sum() + (together.steps < K).sum())


def test_an_objective_s_target_function_is_called_once_on_the_clean_batch_in_the_crafting_mode(lab: Lab) -> None:
    net, x, y = lab
    calls: list[tuple[Any, ...]] = []

    def target(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        calls.append((model, x, y, model.training))
        return model(x).softmax(dim=1).detach()

    mine = attack(net.train(), x, y, objective=Objective(kl.loss, target), stop=Friendly(1, y))
    assert len(calls) == 1
    assert calls[0][0] is net
    assert torch.equal(calls[0][1], x)
    assert torch.equal(calls[0][2], y)
    assert calls[0][3] is False
    assert_same(mine, attack(*lab, objective=kl, stop=Friendly(1, y)).x_adv, mine.steps)


def test_the_target_of_kl_is_the_clean_probabilities(lab: Lab) -> None:
    net, x, y = lab
    assert callable(kl.target)
    p = kl.target(net, x, y)
    torch.testing.assert_close(p, net(x).softmax(dim=1).detach())
    assert not p.requires_grad
    z = torch.randn(24, 3, dtype=torch.float64)
    torch.testing.assert_close(kl(z, p), (p * (p.log() - z.log_softmax(dim=1))).sum(dim=1))
    torch.testing.assert_close(kl(p.log() + 3, p), torch.zeros(24, dtype=torch.float64))


def test_the_margin_is_the_lead_plus_kappa_and_flat_beyond_it() -> None:
    z = (40 * torch.randn(200, 5, dtype=torch.float64) - 60).requires_grad_()
    y = torch.arange(200) % 5
    for kappa in (0.0, 50.0):
        value = cw_margin(z, y, kappa=kappa)
        margin = torch.stack([z[i, y[i]] - max(z[i, j] for j in range(5) if j != y[i]) for i in range(200)])
        torch.testing.assert_close(value, -torch.relu(margin + kappa))
        (grad,) = torch.autograd.grad(value.sum(), z)
        (free,) = torch.autograd.grad(-margin.sum(), z)
        beaten = margin < -kappa
        assert beaten.any()
        assert (grad[beaten] == 0).all()
        assert torch.equal(grad[~beaten], free[~beaten])
    assert torch.equal(cw_margin(z, y), cw_margin(z, y, kappa=50.0))


# ------------------------------------------------------------------------------------------------ the model's own


def traces(net: nn.Module) -> dict[str, Any]:
    numpy_stream = np.random.get_state()[1]  # noqa: NPY002
    return {
        "state": {key: value.clone() for key, value in net.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "learning": [p.requires_grad for p in net.parameters()],
        "flags": [module.training for module in net.modules()],
        "streams": [torch.get_rng_state(), torch.tensor(numpy_stream), torch.tensor(random.getstate()[1])],
    }


def inhabited(net: nn.Module) -> nn.Module:
    """In training, with a frozen BatchNorm, a frozen weight, and gradients that wait for the optimizer."""
    net.train()
    net[1].eval()  # type: ignore[index]
    for i, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(i != 2)
        parameter.grad = torch.full_like(parameter, i) if i % 2 else None
    return net


@every_objective
@pytest.mark.parametrize("how", [{"tau": 0}, {"c": 1.0}, {"tau": 1, "c": 1.0}], ids=["friendly", "converged", "either"])
def test_crafting_in_eval_mode_leaves_no_trace(lab: Lab, objective: Objective, how: dict[str, Any]) -> None:
    net, x, y = inhabited(lab[0]), lab[1], lab[2]
    before, images, labels = traces(net), x.clone(), y.clone()
    draws = Draws(("trace",), np.arange(24))
    crafted = attack(net, x, y, objective=objective, stop=rule(y, **how), start=partial(uniform, draws=draws))
    torch.testing.assert_close(traces(net), before, rtol=0, atol=0)
    assert torch.equal(x, images)
    assert torch.equal(y, labels)
    assert not crafted.x_adv.requires_grad
    assert torch.is_grad_enabled()


def test_a_model_that_fails_is_left_as_it_was(lab: Lab) -> None:
    net, x, y = inhabited(lab[0]), lab[1], lab[2]
    before = traces(net)

    def fails(now: Now) -> Tensor:
        assert now.k < 2, "far enough"
        return torch.zeros_like(now.y, dtype=torch.bool)

    with pytest.raises(AssertionError, match="far enough"):
        attack(net, x, y, stop=fails)
    torch.testing.assert_close(traces(net), before, rtol=0, atol=0)


def test_eval_crafting_sees_the_running_statistics_whatever_mode_the_model_is_in(lab: Lab) -> None:
    net, x, y = lab
    calm = attack(net.eval(), x, y, stop=Friendly(0, y))
    training = attack(net.train(), x, y, stop=Friendly(0, y))
    assert torch.equal(calm.x_adv, training.x_adv)
    assert torch.equal(calm.steps, training.steps)


def test_crafting_in_train_mode_moves_batchnorm_and_nothing_else(lab: Lab) -> None:
    net, x, y = lab
    for objective, passes in ((cross_entropy, 3), (kl, 4)):
        own = deepcopy(net)
        before = traces(own)
        crafted = attack(own, x, y, objective=objective, steps=3, mode="train")
        after = traces(own)
        moved = {key for key in before["state"] if not torch.equal(before["state"][key], after["state"][key])}
        assert moved == {key for key in before["state"] if "running" in key or "num_batches" in key}
        tracked = "1.num_batches_tracked"
        assert after["state"][tracked] - before["state"][tracked] == passes
        assert after["flags"] == before["flags"] == [False] * len(after["flags"])
        assert not torch.equal(crafted.x_adv, attack(net, x, y, objective=objective, steps=3).x_adv)


def test_it_crafts_where_gradients_are_switched_off(lab: Lab) -> None:
    expected = attack(*lab)
    with torch.no_grad():
        crafted = attack(*lab)
        assert not torch.is_grad_enabled()
    assert torch.equal(crafted.x_adv, expected.x_adv)


# ------------------------------------------------------------------------------------------------ what is paid


class Counted(nn.Module):
    """A network that counts, by itself, the examples that go forwards and those whose gradient comes back."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.forwards = self.backwards = self.calls_back = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.net(x)
        if logits.requires_grad:
            logits.register_hook(self.back)
        return logits

    def back(self, grad: Tensor) -> None:
        self.backwards += int((grad != 0).any(dim=1).sum())
        self.calls_back += 1


@every_objective
@pytest.mark.parametrize("tau", [0, 1, K])
def test_a_logit_rule_pays_a_backward_for_each_step_and_no_other(lab: Lab, objective: Objective, tau: int) -> None:
    net, (x, y) = Counted(lab[0]), lab[1:]
    crafted = attack(net, x, y, objective=objective, stop=Friendly(tau, y))
    stopped = int((crafted.steps < K).sum())
    assert net.backwards == crafted.backwards == int(crafted.steps.sum())
    clean = 24 if objective is kl else 0
    assert net.forwards == crafted.forwards == clean + int(crafted.steps.sum()) + stopped


@pytest.mark.parametrize("first", [0, 1])
def test_fosc_pays_for_those_it_stops_and_its_gradient_is_the_step_s_own(lab: Lab, first: int) -> None:
    net, (x, y) = Counted(lab[0]), lab[1:]
    crafted = attack(net, x, y, stop=Converged(1.0, EPS, first=first))
    stopped = crafted.steps < K
    assert 0 < stopped.sum() < 24
    assert net.backwards == crafted.backwards == int(crafted.steps.sum() + stopped.sum())
    assert net.calls_back == K
    assert net.forwards == crafted.forwards == int(crafted.steps.sum() + stopped.sum())


def test_in_a_union_whom_the_logits_stop_before_fosc_is_asked_costs_no_backward(lab: Lab) -> None:
    net, (x, y) = Counted(lab[0]), lab[1:]
    crafted = attack(net, x, y, stop=Friendly(0, y) | Converged(1.0, EPS, first=1))
    later = (crafted.steps < K) & (crafted.steps > 0)
    assert (crafted.steps == 0).any()
    assert net.backwards == crafted.backwards == int(crafted.steps.sum() + later.sum())


def test_where_all_stop_at_once_only_a_rule_that_looked_pays(lab: Lab) -> None:
    for stop, paid in ((lambda now: torch.ones_like(now.y, dtype=torch.bool), 0), (Converged(99.0, EPS, first=0), 24)):
        net = Counted(lab[0])
        crafted = attack(net, *lab[1:], stop=stop)
        assert net.backwards == crafted.backwards == paid
        assert net.calls_back == (paid > 0)
        assert crafted.forwards == 24
        assert not crafted.steps.any()


def test_only_examples_still_moving_go_through_the_network(lab: Lab) -> None:
    sizes: list[int] = []
    handle = lab[0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    crafted = attack(*lab, stop=Friendly(1, lab[2]))
    handle.remove()
    assert sizes == [int((crafted.steps >= k).sum()) for k in range(K)]
    assert sizes[-1] < sizes[0]


# ------------------------------------------------------------------------------------------------ an outside oracle


def test_it_agrees_with_foolbox(lab: Lab) -> None:
    foolbox = pytest.importorskip("foolbox")
    net, x, y = lab[0].float(), lab[1].float(), lab[2]
    theirs = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    for oracle, size, steps in (
        (foolbox.attacks.LinfPGD(abs_stepsize=0.03, steps=6, random_start=False), 0.03, 6),
        (foolbox.attacks.FGSM(random_start=False), EPS, 1),
    ):
        expected = oracle(theirs, x, y, epsilons=EPS)[0]
        ours = attack(net, x, y, step_size=size, steps=steps, start=natural)
        torch.testing.assert_close(ours.x_adv, expected, rtol=0, atol=1e-6)
