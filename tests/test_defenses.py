"""The contestants hold to their papers' formulas and to what the official code computed (Zhang et al., ICML 2020)."""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fatbench.attacks import natural, pgd
from fatbench.defense import Verdict, build, eval_logits
from fatbench.draws import Draws
from fatbench.quantities import Progress
from fatbench.registry import defenses, evaluations

World = tuple[nn.Module, Tensor, Tensor]
START, MIDDLE, END = Progress(0, 120), Progress(60, 120), Progress(119, 120)
TWINS = {"fat": "madry", "fat-trades": "trades", "fat-mart": "mart", "fat-dat": "dat", "fat-cat": "cat"}
K = 10


def made(name: str, **values: Any) -> Any:
    """A contestant at the golden arrays' budget, unless told otherwise."""
    return build(defenses[name], {"eps": 0.031, "step_size": 0.007, "steps": K, **values})


def starting(name: str, x_init: np.ndarray, normals: Tensor | None = None, **values: Any) -> Any:
    """A contestant whose attack begins at a given point, and adds given (N, K, ...) noise, in place of random ones."""
    point = torch.as_tensor(x_init)
    given: dict[str, Any] = {"start_at": lambda self, draws: lambda x, eps: point}
    if normals is not None:
        given["step_noise"] = lambda self, x, draws: lambda k, which: self.omega * normals[which, k]
    cls = type("Given", (defenses[name],), given)
    return build(cls, {"eps": 0.031, "step_size": 0.007, "steps": K, **values})


def noise(n: int) -> Draws:
    return Draws(("test",), np.arange(n))


def lesson(one: Any, strength: int) -> Any:
    """A curriculum defense put at a lesson."""
    one.memory["strength"] = strength
    return one


def tracked(net: nn.Module) -> int:
    """How many batches BatchNorm has seen: the same in every layer."""
    (seen,) = {int(v) for key, v in net.state_dict().items() if key.endswith("num_batches_tracked")}
    return seen


def watched(net: nn.Module, **named: Tensor) -> list[str]:
    """Fills with the names of the batches that pass through the network, '*' for others, in order."""
    order: list[str] = []

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        order.append(next((name for name, batch in named.items() if batch is inputs[0]), "*"))

    net.register_forward_pre_hook(look)
    return order


# ------------------------------------------------------------------------------------ losses on given logits


@pytest.mark.parametrize(
    ("case", "name", "beta"),
    [
        ("trades_beta1", "trades", 1), ("trades_beta6", "trades", 6), ("trades_beta6", "fat-trades", 6),
        ("mart_beta5", "mart", 5), ("mart_beta6", "mart", 6), ("mart_beta6", "fat-mart", 6),
        ("mart_beta0_bce_only", "mart", 0), ("ce_mean", "madry", None), ("ce_mean", "fat", None),
        ("ce_mean", "dat", None), ("ce_mean", "cat", None),
    ],
)  # fmt: skip
def test_a_loss_is_the_official_one_with_its_gradients(
    golden: Callable[[str], Any], case: str, name: str, beta: int | None
) -> None:
    arrays = golden("losses")
    nat, adv = (torch.as_tensor(arrays[f"{which}_logits"]).requires_grad_() for which in ("nat", "adv"))
    one = made(name, **({} if beta is None else {"beta": beta}))
    value = one.loss(nn.Identity(), nat, adv, torch.as_tensor(arrays["y"]), MIDDLE)
    grads = torch.autograd.grad(value, (nat, adv), allow_unused=True)
    assert value.item() == pytest.approx(float(arrays[f"{case}/value"]), abs=1e-9)
    for which, grad in zip(("nat", "adv"), grads, strict=True):
        found = np.zeros((12, 10)) if grad is None else grad.numpy()
        np.testing.assert_allclose(found, arrays[f"{case}/grad_{which}"], rtol=0, atol=1e-9)


def logits(n: int = 6, classes: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """(clean logits, adversarial logits, labels) in float64: with nn.Identity as the network, a loss of these."""
    return (
        torch.randn(n, classes, dtype=torch.float64) * 2,
        torch.randn(n, classes, dtype=torch.float64) * 2,
        torch.arange(n) % classes,
    )


@pytest.mark.parametrize("name", [name for name in defenses if name != "standard"])
def test_a_batch_twice_over_has_the_same_loss(name: str) -> None:
    nat, adv, y = logits()
    once = made(name).loss(nn.Identity(), nat, adv, y, MIDDLE)
    twice = made(name).loss(nn.Identity(), nat.repeat(2, 1), adv.repeat(2, 1), y.repeat(2), MIDDLE)
    assert twice.item() == pytest.approx(once.item(), abs=1e-12)


@pytest.mark.parametrize("beta", [1.0, 6.0])
def test_trades_at_the_clean_image_itself_is_cross_entropy_alone(world: World, beta: float) -> None:
    net, x, y = world
    loss = made("trades", beta=beta).loss(net, x, x, y, START)
    assert loss.item() == pytest.approx(F.cross_entropy(net(x), y).item(), abs=1e-12)


def test_trades_adds_beta_times_the_divergence_from_clean_to_adversarial() -> None:
    nat, adv, y = logits()
    p, p_adv = nat.softmax(1), adv.softmax(1)
    extra = made("trades", beta=3.0).loss(nn.Identity(), nat, adv, y, START) - F.cross_entropy(nat, y)
    forth = (p * (p.log() - p_adv.log())).sum(1).mean()
    back = (p_adv * (p_adv.log() - p.log())).sum(1).mean()
    assert extra.item() == pytest.approx(3 * forth.item(), abs=1e-12)
    assert abs(forth - back) > 0.01


@pytest.mark.parametrize("forwards", ["nat-adv", "nat-adv-nat"])
def test_the_divergence_of_trades_pulls_at_the_clean_logits_too(forwards: str) -> None:
    nat, adv, y = logits()
    nat.requires_grad_()
    loss = made("trades", forwards=forwards).loss(nn.Identity(), nat, adv, y, START)
    (grad,) = torch.autograd.grad(loss, nat)
    of_cross_entropy = (nat.softmax(1) - F.one_hot(y, 4)).detach() / len(y)
    assert (grad - of_cross_entropy).abs().max() > 0.01


def mart_by_hand(nat: Tensor, adv: Tensor, y: Tensor, beta: float, detach: bool = False) -> Tensor:
    """MART's loss an example at a time, as section 3 of its paper prints it, with the constants of its code."""
    total = torch.zeros((), dtype=nat.dtype)
    for z, z_adv, label in zip(nat, adv, y.tolist(), strict=True):
        p, q = z.exp() / z.exp().sum(), z_adv.exp() / z_adv.exp().sum()
        others = torch.cat([q[:label], q[label + 1 :]])
        boosted = -q[label].log() - (1.0001 - others.max() + 1e-12).log()
        weight = 1.0000001 - p[label]
        weight = weight.detach() if detach else weight
        total = total + boosted + beta * weight * (p * (p.log() - (q + 1e-12).log())).sum()
    return total / len(y)


@pytest.mark.parametrize("forwards", ["nat-adv", "adv-nat"])
@pytest.mark.parametrize("beta", [0.0, 5.0, 6.0])
def test_mart_is_its_formula_to_twelve_digits(beta: float, forwards: str) -> None:
    nat, adv, y = logits()
    loss = made("mart", beta=beta, forwards=forwards).loss(nn.Identity(), nat, adv, y, START)
    assert loss.item() == pytest.approx(mart_by_hand(nat, adv, y, beta).item(), abs=1e-12)


def test_the_gradient_of_mart_flows_through_its_weight() -> None:
    nat, adv, y = logits()
    nat.requires_grad_()
    (grad,) = torch.autograd.grad(made("mart").loss(nn.Identity(), nat, adv, y, START), nat)
    through, around = (torch.autograd.grad(mart_by_hand(nat, adv, y, 6.0, detach), nat)[0] for detach in (False, True))
    torch.testing.assert_close(grad, through, rtol=0, atol=1e-12)
    assert (grad - around).abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_margin_of_mart_is_bounded_however_sure_the_network_is(dtype: torch.dtype) -> None:
    adv, y = torch.tensor([[0.0, 1e4, 0.0]], dtype=dtype, requires_grad=True), torch.tensor([0])
    loss = made("mart", beta=0).loss(nn.Identity(), adv.detach(), adv, y, START)
    assert (loss - F.cross_entropy(adv, y)).item() == pytest.approx(9.2103, abs=2e-3)
    assert torch.isfinite(torch.autograd.grad(loss, adv)[0]).all()


def test_the_rival_of_mart_is_never_the_label_itself() -> None:
    tied, y = torch.zeros(1, 4, dtype=torch.float64), torch.tensor([0])
    sure = torch.tensor([[50.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    one = made("mart", beta=0)
    assert one.loss(nn.Identity(), tied, tied, y, START).item() == pytest.approx(np.log(4) - np.log(1.0001 - 0.25))
    assert one.loss(nn.Identity(), sure, sure, y, START).item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("name", ["trades", "mart", "fat-trades", "fat-mart"])
def test_the_gradient_stays_finite_where_a_probability_underflows(name: str) -> None:
    nat, adv = torch.tensor([[300.0, 0.0, -300.0]] * 2), torch.tensor([[-300.0, 0.0, 300.0], [300.0, 0.0, -300.0]])
    pair = nat.requires_grad_(), adv.requires_grad_()
    loss = made(name).loss(nn.Identity(), *pair, torch.tensor([0, 0]), START)
    assert all(torch.isfinite(grad).all() for grad in (loss, *torch.autograd.grad(loss, pair)))


# ------------------------------------------------------------------------------------ the margin of C&W


@pytest.mark.parametrize(("case", "kappa"), [("cw_conf50_sum", 50), ("cw_conf0_sum", 0)])
def test_the_margin_that_cw_climbs_is_the_official_one(golden: Callable[[str], Any], case: str, kappa: int) -> None:
    arrays = golden("losses")
    z = torch.as_tensor(arrays["adv_logits"]).requires_grad_()
    value = build(evaluations["cw-inf"], {"kappa": kappa}).objective()(z, torch.as_tensor(arrays["y"])).sum()
    assert value.item() == pytest.approx(float(arrays[f"{case}/value"]), abs=1e-9)
    (grad,) = torch.autograd.grad(value, z)
    np.testing.assert_allclose(grad.numpy(), arrays[f"{case}/grad_adv"], rtol=0, atol=1e-9)


def test_the_margin_of_cw_takes_the_label_out_where_every_logit_is_negative(golden: Callable[[str], Any]) -> None:
    arrays = golden("losses")
    z = torch.as_tensor(arrays["cw_negative/logits"]).requires_grad_()
    value = evaluations["cw-inf"]().objective()(z, torch.as_tensor(arrays["cw_negative/y"])).sum()
    assert value.item() == pytest.approx(float(arrays["cw_negative/conf50_sum_value"]), abs=1e-9)
    grad = torch.autograd.grad(value, z)[0].numpy()
    np.testing.assert_allclose(grad, arrays["cw_negative/grad"], rtol=0, atol=1e-9)


def test_the_margin_of_cw_is_flat_only_where_the_wrong_class_leads_by_more_than_kappa() -> None:
    margins = torch.tensor([-60.0, -50.5, -49.5, 0.0, 60.0], dtype=torch.float64)
    rival, least = torch.full_like(margins, -100), torch.full_like(margins, -200)
    z = torch.stack([margins - 100, rival, least], dim=1).requires_grad_()
    (grad,) = torch.autograd.grad(evaluations["cw-inf"]().objective()(z, torch.zeros(5).long()).sum(), z)
    assert grad.abs().sum(1).bool().tolist() == [False, False, True, True, True]
    assert grad[2:].tolist() == [[-1.0, 1.0, 0.0]] * 3


# ------------------------------------------------------------------------------------ forwards and BatchNorm


@pytest.mark.parametrize(
    ("name", "values", "order"),
    [
        ("standard", {}, ["adv"]), ("madry", {}, ["adv"]), ("fat", {}, ["adv"]),
        ("cat", {}, ["adv"]), ("dat", {}, ["adv"]), ("fat-cat", {}, ["adv"]), ("fat-dat", {}, ["adv"]),
        ("fat-margin", {}, ["adv"]),
        ("trades", {}, ["nat", "adv"]), ("fat-trades", {}, ["nat", "adv"]),
        ("trades", {"forwards": "nat-adv-nat"}, ["nat", "adv", "nat"]),
        ("mart", {}, ["nat", "adv"]), ("fat-mart", {"forwards": "adv-nat"}, ["adv", "nat"]),
    ],
)  # fmt: skip
def test_the_update_passes_its_batches_in_order_and_batchnorm_sees_each_once(
    world: World, name: str, values: dict[str, Any], order: list[str]
) -> None:
    net, x, y = world
    one = made(name, **values)
    x_adv = one.craft(net, x, y, START, draws=noise(24)).x_adv
    before, passed = tracked(net), watched(net, nat=x, adv=x_adv)
    one.loss(net.train(), x, x_adv, y, START)
    assert passed == order
    assert tracked(net) - before == len(order)


def test_passing_the_clean_images_twice_changes_the_loss_of_trades_by_nothing_in_eval_mode(world: World) -> None:
    net, x, y = world
    x_adv = made("trades").craft(net, x, y, START, draws=noise(24)).x_adv
    once, twice = (made("trades", forwards=f).loss(net, x, x_adv, y, START) for f in ("nat-adv", "nat-adv-nat"))
    assert once.item() == pytest.approx(twice.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("name", "values", "moves"),
    [
        ("fat", {}, 1), ("madry", {}, 1), ("dat", {}, 1), ("trades", {}, 2), ("mart", {}, 2), ("fat-trades", {}, 2),
        ("fat-mart", {}, 2), ("trades", {"forwards": "nat-adv-nat"}, 3), ("madry", {"mode": "train"}, K + 1),
        ("cat", {}, 1 + 2 + 3 + 1), ("cat", {"mode": "eval"}, 1),
    ],
)  # fmt: skip
def test_a_whole_step_moves_batchnorm_as_often_as_the_official_code(
    world: World, name: str, values: dict[str, Any], moves: int
) -> None:
    net, x, y = world
    one = made(name, **values)
    if "cat" in name:
        lesson(one, 3)
    before = tracked(net.train())
    x_adv = one.craft(net, x, y, START, draws=noise(24)).x_adv
    one.loss(net, x, x_adv, y, START)
    assert tracked(net) - before == moves


# ------------------------------------------------------------------------------------ friendly twins


def step_gradients(one: Any, world: World, x_adv: Tensor, progress: Progress) -> list[Tensor]:
    net, x, y = world
    return list(torch.autograd.grad(one.loss(net, x, x_adv, y, progress), list(net.parameters())))


@pytest.mark.parametrize("tau", [K, K + 5])
@pytest.mark.parametrize(("friendly", "base"), TWINS.items())
def test_a_friendly_defense_with_tau_of_k_is_its_base_bit_for_bit(
    golden_world: World, friendly: str, base: str, tau: int
) -> None:
    net, x, y = golden_world
    pair = [made(friendly, tau=tau), made(base)]
    if base == "cat":
        pair = [lesson(one, 4) for one in pair]
    for progress in (START, MIDDLE, END):
        crafted = [one.craft(net, x, y, progress, draws=noise(16)) for one in pair]
        assert torch.equal(crafted[0].x_adv, crafted[1].x_adv)
        assert torch.equal(crafted[0].steps, crafted[1].steps)
        assert (crafted[0].forwards, crafted[0].backwards) == (crafted[1].forwards, crafted[1].backwards)
        gradients = [step_gradients(one, golden_world, crafted[0].x_adv, progress) for one in pair]
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(("friendly", "base"), TWINS.items())
def test_a_friendly_defense_with_tau_of_nought_stops_at_the_first_mistake(
    golden_world: World, friendly: str, base: str
) -> None:
    net, x, y = golden_world
    one, plain = made(friendly, tau=0, mode="eval"), made(base, mode="eval")
    if base == "cat":
        one, plain = lesson(one, 4), lesson(plain, 4)
    early, full = (d.craft(net, x, y, START, draws=noise(16)) for d in (one, plain))
    stopped = early.steps < full.steps
    assert stopped.any()
    assert (eval_logits(net, early.x_adv[stopped]).argmax(1) != y[stopped]).all()
    assert torch.equal(early.x_adv[~stopped], full.x_adv[~stopped])


def test_fat_dat_stops_whom_either_rule_stops(golden_world: World) -> None:
    net, x, y = golden_world
    both, friendly, dynamic = (
        starting(name, x.numpy(), **values).craft(net, x, y, START).steps
        for name, values in (("fat-dat", {"tau": 1}), ("fat", {"tau": 1}), ("dat", {}))
    )
    assert torch.equal(both, torch.minimum(friendly, dynamic))
    assert (friendly < dynamic).any() and (dynamic < friendly).any()


# ------------------------------------------------------------------------------------ the official runs


def test_fat_trains_as_the_official_code_does_over_three_epochs(
    golden: Callable[[str], Any], golden_world: World
) -> None:
    arrays, (net, x, y) = golden("official_fat_train"), golden_world
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    for call, tau in enumerate((0, 1, 10)):
        losses, counts = [], []
        for half, rows in enumerate((slice(0, 8), slice(8, 16))):
            one = starting("fat", arrays[f"batch{2 * call + half}/x_init"], tau=tau)
            crafted = one.craft(net.train(), x[rows], y[rows], START)
            loss = one.loss(net, x[rows], crafted.x_adv, y[rows], START)
            sgd.zero_grad()
            torch.autograd.backward(loss)
            sgd.step()
            losses.append(loss.item())
            counts.append(int(crafted.steps.sum()))
        assert counts == [int(arrays[f"batch{2 * call + half}/count"]) for half in (0, 1)]
        assert sum(losses) == pytest.approx(float(arrays[f"call{call}/loss_sum"]), abs=1e-9)
        for key, value in net.state_dict().items():
            np.testing.assert_allclose(value.numpy(), arrays[f"call{call}/state/{key}"], rtol=0, atol=1e-9)


def test_trades_takes_the_step_that_the_official_code_takes(golden: Callable[[str], Any], golden_world: World) -> None:
    arrays, (net, x, y) = golden("official_trades_step"), golden_world
    one = starting("trades", arrays["x_init"], beta=6, forwards="nat-adv-nat")
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=2e-4)
    crafted = one.craft(net.train(), x, y, START)
    passed = watched(net, nat=x, adv=crafted.x_adv)
    loss = one.loss(net, x, crafted.x_adv, y, START)
    torch.autograd.backward(loss)
    found = {f"grad/{key}": parameter.grad.clone() for key, parameter in net.named_parameters()}
    sgd.step()
    found |= {f"buf/{key}": buffer for key, buffer in net.named_buffers()}
    found |= {f"param_after/{key}": parameter.detach() for key, parameter in net.named_parameters()}
    assert passed == arrays["train_forward_order"].tolist()
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-9)
    np.testing.assert_allclose(crafted.x_adv.numpy(), arrays["x_adv"], rtol=0, atol=1e-9)
    assert found.keys() == {key for key in arrays.files if key.startswith(("grad/", "buf/", "param_after/"))}
    for key, value in found.items():
        np.testing.assert_allclose(value.numpy(), arrays[key], rtol=0, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("c", ["0.5", "0.25", "0.1", "0.02", "0"])
def test_dat_crafts_as_the_official_code_does(golden: Callable[[str], Any], golden_world: World, c: str) -> None:
    arrays, (net, x, y) = golden("dat_perturb"), golden_world
    one = starting("dat", arrays["x_init"], step_size=None, c_max=float(c), origin="start")
    crafted = one.craft(net, x, y, START)
    assert crafted.steps.tolist() == arrays[f"cri{c}/steps"].tolist()
    np.testing.assert_allclose(crafted.x_adv.numpy(), arrays[f"cri{c}/adv"], rtol=0, atol=1e-9)


# ------------------------------------------------------------------------------------ DAT


def test_the_threshold_of_dat_falls_as_the_official_code_has_it(golden: Callable[[str], Any]) -> None:
    found = [made("dat").threshold(Progress(epoch, 120)) for epoch in range(120)]
    np.testing.assert_allclose(found, golden("dat_perturb")["fosc_schedule"], rtol=0, atol=1e-12)
    assert found[99] > 0 and found[100:] == [0.0] * 20


@pytest.mark.parametrize(("until", "expected"), [("0", [0, 0, 0]), ("1/2", [0.3, 0.15, 0]), ("1", [0.3, 0.225, 0.15])])
def test_the_threshold_of_dat_reaches_nought_when_it_is_told_to(until: str, expected: list[float]) -> None:
    one = made("dat", c_max=0.3, until=until)
    assert [one.threshold(Progress(done, 8)) for done in (0, 2, 4)] == pytest.approx(expected)


def test_dat_at_threshold_nought_is_madry(golden_world: World) -> None:
    net, x, y = golden_world
    dynamic, plain = (made(name).craft(net, x, y, END, draws=noise(16)) for name in ("dat", "madry"))
    assert dynamic.steps.tolist() == [K] * 16
    assert torch.equal(dynamic.x_adv, plain.x_adv)


@pytest.mark.parametrize("first", [0, 1])
def test_dat_at_a_huge_threshold_takes_the_first_step_only(golden_world: World, first: int) -> None:
    net, x, y = golden_world
    assert made("dat", c_max=1e9, first=first).craft(net, x, y, START, draws=noise(16)).steps.tolist() == [first] * 16


@pytest.mark.parametrize("origin", ["clean", "start"])
def test_dat_takes_fewer_steps_the_higher_its_threshold(golden_world: World, origin: str) -> None:
    net, x, y = golden_world
    steps = torch.stack([
        made("dat", c_max=c, origin=origin).craft(net, x, y, START, draws=noise(16)).steps
        for c in (0.0, 0.02, 0.1, 0.25, 0.5, 2.0, 10.0)
    ])  # fmt: skip
    assert (steps.diff(dim=0) <= 0).all()
    assert len({int(total) for total in steps.sum(dim=1)}) > 4


def fosc_along(one: Any, world: World, start: Callable[[Tensor, float], Tensor]) -> Tensor:
    """(N, K - 1) the condition's value after each of the first K - 1 steps of the whole path."""
    net, x, y = world
    rule, seen = one.stop(START, y), []

    def look(now: Any) -> Tensor:
        seen.append(rule.fosc(now))
        return torch.zeros_like(now.which, dtype=torch.bool)

    pgd(net, x, y, eps=0.031, step_size=0.00775, steps=K, start=start, stop=look)
    return torch.stack(seen[1:], dim=1)


def test_the_condition_of_dat_has_the_official_values_and_no_batch_size(
    golden: Callable[[str], Any], golden_world: World
) -> None:
    arrays, (net, x, y) = golden("dat_perturb"), golden_world
    one, x_init = made("dat", origin="start"), torch.as_tensor(arrays["x_init"])
    values = fosc_along(one, golden_world, lambda x, eps: x_init)
    np.testing.assert_allclose(values.numpy(), arrays["cri0/fosc"][:, : K - 1], rtol=0, atol=1e-9)
    alone = fosc_along(one, (net, x[2:3], y[2:3]), lambda x, eps: x_init[2:3])
    np.testing.assert_allclose(alone.numpy(), values[2:3].numpy(), rtol=0, atol=1e-9)


def test_the_condition_of_dat_is_never_negative_about_the_clean_image(golden_world: World) -> None:
    values = fosc_along(made("dat"), golden_world, natural)
    assert values.min() >= -1e-12 and values.max() > 0.1


@pytest.mark.parametrize(("done", "weighs"), [(0, False), (1, True), (119, True)])
def test_dat_weighs_each_example_by_its_own_loss_from_the_second_epoch_on(
    world: World, done: int, weighs: bool
) -> None:
    net, x, y = world
    weight = F.cross_entropy(net.eval()(x), y, reduction="none").detach()
    net.train()
    net[1].eval()  # a layer that its owner froze
    modes, before = [module.training for module in net.modules()], net[4].num_batches_tracked.item()
    loss = made("dat", weighted=True).loss(net, x, x, y, Progress(done, 120))
    assert [module.training for module in net.modules()] == modes
    assert net[4].num_batches_tracked.item() - before == 1
    each = F.cross_entropy(net(x), y, reduction="none")
    assert loss.item() == pytest.approx(((weight if weighs else 1) * each).mean().item(), abs=1e-12)
    expected = torch.autograd.grad(((weight if weighs else 1) * each).mean(), net[0].weight)[0]
    torch.testing.assert_close(torch.autograd.grad(loss, net[0].weight)[0], expected, rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------ CAT


class Line(nn.Module):
    """A linear network, for what does not depend on one."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def batch(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 2, 2) * 0.4 + 0.3, torch.arange(n) % 2


@pytest.mark.parametrize("name", ["cat", "fat-cat"])
@pytest.mark.parametrize(
    ("n", "strength", "sizes"),
    [
        (200, 0, [200]), (200, 2, [66, 66, 68]), (200, 5, [33] * 5 + [35]), (200, 6, [28] * 6 + [32]),
        (7, 6, [1] * 7), (80, 6, [11] * 6 + [14]),
    ],
)  # fmt: skip
def test_cat_cuts_the_batch_in_order_into_a_chunk_for_each_strength(
    name: str, n: int, strength: int, sizes: list[int]
) -> None:
    x, y = batch(n)
    one = lesson(made(name, **({"tau": K} if name == "fat-cat" else {})), strength)
    crafted = one.craft(Line(), x, y, START, draws=noise(n))
    assert crafted.steps.tolist() == [k for k, size in enumerate(sizes) for _ in range(size)]
    assert torch.equal(crafted.x_adv[: sizes[0]], x[: sizes[0]]), "strength 0 is the clean image"
    assert ((crafted.x_adv - x)[sizes[0] :].abs().flatten(1).amax(1) > 0).all()
    assert crafted.backwards == int(crafted.steps.sum())


def test_a_batch_smaller_than_the_lessons_gets_the_present_strength() -> None:
    x, y = batch(3)
    crafted = lesson(made("cat"), 5).craft(Line(), x, y, START, draws=noise(3))
    assert crafted.steps.tolist() == [5, 5, 5]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[dict[str, Any]]]:
    """Fills with what CAT asks of each attack that it runs, by strength."""
    seen: dict[int, list[dict[str, Any]]] = {}

    def spy(*given: Any, **how: Any) -> Any:
        seen.setdefault(how["steps"], []).append(how)
        return pgd(*given, **how)

    monkeypatch.setattr(sys.modules[defenses["cat"].__module__], "pgd", spy)
    return seen


@pytest.mark.parametrize(("u", "low", "high"), [(0.0, 1, 0), (1.0, 0, 1), (0.25, 0.75, 0.25)])
def test_the_step_of_cat_lies_between_two_eps_over_k_and_ten_over_k_times_that(
    asked: dict[int, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, u: float, low: float, high: float
) -> None:
    monkeypatch.setattr(Draws, "scalar", lambda self, purpose: u)
    x, y = batch(13)
    lesson(made("cat", step_size=None), 12).craft(Line(), x, y, START, draws=noise(13))
    for k in range(1, 13):
        nominal, (attack,) = 2 * 0.031 / k, asked[k]
        assert attack["step_size"] == pytest.approx(low * nominal + high * nominal * 10 / k, abs=1e-12)


def test_each_attack_of_cat_draws_one_step_for_all_its_examples(asked: dict[int, list[dict[str, Any]]]) -> None:
    x, y = batch(12)
    for epoch in range(5):
        lesson(made("cat", step_size=None), 2).craft(Line(), x, y, START, draws=Draws((epoch,), np.arange(12)))
    ratios = [attack["step_size"] * k / (2 * 0.031) for k in (1, 2) for attack in asked[k]]
    assert len(set(ratios)) == 10
    assert all(1 <= ratio <= 10 for ratio in ratios)


@pytest.mark.parametrize(("step_size", "nominal"), [(None, 2 * 0.031), (0.05, 0.05), (0.0, 0.0)])
def test_without_jitter_the_step_of_cat_is_its_nominal_one_over_k(
    asked: dict[int, list[dict[str, Any]]], step_size: float | None, nominal: float
) -> None:
    x, y = batch(30)
    lesson(made("cat", jitter=False, step_size=step_size), 5).craft(Line(), x, y, START, draws=noise(30))
    assert {k: attacks[0]["step_size"] for k, attacks in asked.items() if k} == {k: nominal / k for k in range(1, 6)}


@pytest.mark.parametrize("clamp_start", [False, True])
def test_cat_begins_uniformly_around_the_image_and_outside_the_pixels_unless_told(
    asked: dict[int, list[dict[str, Any]]], clamp_start: bool
) -> None:
    x, y = torch.zeros(400, 1, 2, 2), torch.zeros(400).long()
    one = made("cat", **({"clamp_start": True} if clamp_start else {}))
    lesson(one, 1).craft(Line(), x, y, START, draws=noise(400))
    point = asked[1][0]["start"](x[200:], 0.031)
    assert point.max().item() == pytest.approx(0.031, abs=1e-3)
    assert point.min().item() == pytest.approx(0 if clamp_start else -0.031, abs=1e-3)


class Measured:
    """A validation split with scripted accuracies; keeps the attack it was asked to measure under."""

    def __init__(self, accuracies: Sequence[float], train_accuracy: float | Sequence[float] = 1.0) -> None:
        self.script = list(accuracies)
        self.train = [train_accuracy] * len(self.script) if isinstance(train_accuracy, float) else list(train_accuracy)
        self.train_accuracy = self.train[0]
        self.attack: Any = None

    def __call__(self, craft: Any) -> float:
        self.attack = craft
        return self.script.pop(0)


def lessons(one: Any, measure: Measured, total: int = 120) -> list[tuple[str, int]]:
    """(what the verdict asks, the strength afterwards) for each epoch of a script."""
    told = []
    for done in range(1, len(measure.script) + 1):
        measure.train_accuracy = measure.train.pop(0)
        verdict = one.after_epoch(Progress(done, total), nn.Identity(), measure)
        said = {Verdict(): "-", Verdict(remember=True): "remember", Verdict(reload_best=True): "reload"}[verdict]
        told.append((said, one.memory["strength"]))
    return told


def test_cat_advances_after_ten_epochs_of_120_without_a_rise_and_reloads_the_best() -> None:
    told = lessons(made("cat"), Measured([0.5, *[0.5] * 10, 0.1]))
    assert told == [("remember", 0), *[("-", 0)] * 9, ("reload", 1), ("remember", 1)]


@pytest.mark.parametrize(("start", "moved"), [("natural", False), ("uniform", True), ("gaussian", True)])
def test_cat_starts_where_it_is_told_to(start: str, moved: bool) -> None:
    x, y = torch.full((4, 1, 8, 8), 0.5), torch.zeros(4, dtype=torch.int64)
    cat = made("cat", start=start)
    crafted = cat.attack(torch.nn.Flatten(), x, y, 1, 0.1, None, 0.0)  # steps of no size
    assert bool((crafted.x_adv != x).any()) == moved


@pytest.mark.parametrize(("total", "patience"), [(120, 10), (60, 5), (24, 2), (12, 1), (5, 1), (1, 1)])
def test_the_patience_of_cat_is_a_twelfth_of_the_run(total: int, patience: int) -> None:
    told = lessons(made("cat"), Measured([0.5, *[0.4] * patience]), total)
    assert [said for said, _ in told] == ["remember", *["-"] * (patience - 1), "reload"]


def test_cat_waits_anew_after_every_rise_and_every_lesson() -> None:
    told = lessons(made("cat", patience=2), Measured([0.5, 0.4, 0.6, 0.6, 0.59, 0.1, 0.2, 0.2, 0.1, 0.05, 0.05]))
    assert told == [
        ("remember", 0), ("-", 0), ("remember", 0), ("-", 0), ("reload", 1), ("remember", 1), ("remember", 1),
        ("-", 1), ("reload", 2), ("remember", 2), ("-", 2),
    ]  # fmt: skip


def test_cat_stays_at_its_top_strength() -> None:
    told = lessons(made("cat", patience=1, steps=2), Measured([0.5] * 8))
    assert told == [("remember", 0), ("reload", 1), ("remember", 1), ("reload", 2), ("remember", 2), *[("-", 2)] * 3]


def test_cat_can_wait_for_the_training_accuracy_too() -> None:
    train = [0.95, 0.8, 0.9, 0.91, 0.95]
    assert lessons(made("cat", patience=1, train_above=0.9), Measured([0.5] * 5, train)) == [
        ("remember", 0), ("-", 0), ("-", 0), ("reload", 1), ("remember", 1),
    ]  # fmt: skip


@settings(max_examples=30, deadline=None, derandomize=True)
@given(script=st.lists(st.sampled_from([0.2, 0.3, 0.4, 0.5]), min_size=2, max_size=30), data=st.data())
def test_cat_resumed_from_its_memory_as_json_decides_the_same(script: list[float], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(script) - 1))
    whole = lessons(made("cat", patience=2), Measured(script))
    first = made("cat", patience=2)
    told = lessons(first, Measured(script[:cut]))
    second = made("cat", patience=2)
    second.memory.update(json.loads(json.dumps(first.memory)))
    assert told + lessons(second, Measured(script[cut:])) == whole


def test_the_lessons_of_one_cat_are_not_those_of_another() -> None:
    one, other = made("cat"), made("cat")
    lessons(one, Measured([0.5, *[0.5] * 10]))
    assert (one.memory["strength"], other.memory["strength"]) == (1, 0)
    assert one == other, "memory is no setting"


@pytest.mark.parametrize("name", ["cat", "fat-cat"])
@pytest.mark.parametrize("strength", [0, 1, 3])
@pytest.mark.parametrize("levels", [0, 16])
def test_cat_validates_under_its_present_strength_with_a_fixed_step_and_quantised_images(
    golden_world: World, name: str, strength: int, levels: int
) -> None:
    net, x, y = golden_world
    measure = Measured([0.5])
    one = lesson(made(name, step_size=None, levels=levels), strength)
    one.after_epoch(START, net, measure)
    before = tracked(net)
    found = measure.attack(net, x, y, noise(16))
    start = made("madry", clamp_start=False).start_at(noise(16))
    plain = pgd(net, x, y, eps=0.031, step_size=2 * 0.031 / max(strength, 1), steps=strength, start=start).x_adv
    expected = plain if strength else x
    if levels and strength:
        expected = (16 * expected).floor().clamp(max=15) / 15
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert tracked(net) == before


# ------------------------------------------------------------------------------------ schedules and fields


@pytest.mark.parametrize(
    ("name", "golden_name"), [("fat", "FAT"), ("fat-trades", "FAT_for_TRADES"), ("fat-mart", "FAT_for_MART")]
)
def test_tau_rises_at_the_epochs_of_the_official_schedule(
    shared: Path, golden_world: World, name: str, golden_name: str
) -> None:
    said = json.loads((shared / "golden" / "schedules.json").read_text())[golden_name]
    expected = [tau for first, last, tau in said["tau_segments_first_last_value"] for _ in range(first, last + 1)]
    y, total = golden_world[2], said["epochs"]
    rules = [build(defenses[name], {}).stop(Progress(epoch - 1, total), y) for epoch in range(1, total + 1)]
    assert [rule.tau for rule in rules] == expected


@pytest.mark.parametrize("name", [name for name in defenses if name not in ("standard", "cat", "fat-cat")])
def test_the_step_is_a_quarter_of_the_present_eps_unless_given(world: World, name: str) -> None:
    net, x, y = world
    growing = (("0", "2/255"), ("1/2", "8/255"))
    one = made(name, eps_schedule=growing, step_size=None, steps=1, start="natural", **unstopped(name))
    inside = (x > 0.1) & (x < 0.9)
    for progress, eps in ((START, 2 / 255), (Progress(59, 120), 2 / 255), (MIDDLE, 8 / 255), (END, 8 / 255)):
        assert one.eps_at(progress) == eps
        assert one.step_at(progress) == eps / 4
        moved = (one.craft(net, x, y, progress).x_adv - x).abs()[inside].max().item()
        assert moved == pytest.approx(eps / 4, abs=1e-9)
    assert made(name, step_size=0.003).step_at(END) == 0.003
    share = made(name, eps_schedule=growing, step_size="eps/10")
    assert [share.step_at(now) for now in (START, END)] == pytest.approx([0.2 / 255, 0.8 / 255])


def unstopped(name: str) -> dict[str, Any]:
    if name == "fat-margin":
        return {"rho": 2}
    return {"tau": K} if name.startswith("fat") else {}


@pytest.mark.parametrize("name", ["fat", "dat", "cat", "trades"])
def test_eps_growing_over_training_bounds_the_examples(world: World, name: str) -> None:
    net, x, y = world
    growing = (("0", "2/255"), ("1/2", "8/255"))
    one = made(name, eps_schedule=growing, step_size=None, **unstopped(name))
    if name == "cat":
        lesson(one, 3)
    early, late = ((one.craft(net, x, y, p, draws=noise(24)).x_adv - x).abs().max().item() for p in (START, END))
    assert early == pytest.approx(2 / 255, abs=1e-9)
    assert late == pytest.approx(8 / 255, abs=1e-9)


def test_the_condition_of_dat_uses_the_present_eps(golden_world: World) -> None:
    one = made("dat", eps_schedule=(("0", "2/255"), ("1/2", "8/255")))
    assert [one.stop(p, golden_world[2]).eps for p in (START, END)] == [2 / 255, 8 / 255]


def test_omega_adds_the_official_noise_to_each_step(golden: Callable[[str], Any], golden_world: World) -> None:
    arrays, (net, x, y) = golden("earlystop_ce_uniform_omega"), golden_world
    normals = torch.as_tensor(arrays["randn_f32"], dtype=torch.float64)
    crafted = starting("fat", arrays["x_init"], normals, tau=0, omega=0.001).craft(net, x, y, START)
    assert crafted.steps.tolist() == arrays["steps"].tolist()
    np.testing.assert_allclose(crafted.x_adv.numpy(), arrays["adv"], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["fat", "madry", "trades"])
def test_omega_draws_belong_to_the_example_not_to_the_batch(golden_world: World, name: str) -> None:
    net, x, y = golden_world
    one = made(name, omega=0.005)
    whole = one.craft(net, x, y, START, draws=noise(16))
    turned = torch.arange(16).flip(0)
    other = one.craft(net, x[turned], y[turned], START, draws=noise(16).rows(turned.numpy()))
    torch.testing.assert_close(other.x_adv[turned], whole.x_adv, rtol=0, atol=1e-12)
    assert torch.equal(other.steps[turned], whole.steps)
    assert (whole.x_adv - x).abs().max() <= 0.031 + 1e-12
    silent = made(name).craft(net, x, y, START, draws=noise(16))
    assert not torch.allclose(silent.x_adv, whole.x_adv, atol=1e-4)


def test_omega_is_the_scale_of_the_noise_and_new_at_each_step(golden_world: World) -> None:
    x = golden_world[1]
    steps = [made("fat", omega=0.02).step_noise(x, noise(16))(k, torch.arange(16)) for k in range(3)]
    assert [step.std().item() for step in steps] == pytest.approx([0.02] * 3, rel=0.02)
    assert not any(torch.equal(a, b) for a, b in pairwise(steps))
    assert made("fat").step_noise(x, noise(16)) == 0


def test_without_projection_the_examples_leave_the_ball_and_keep_to_pixels(golden_world: World) -> None:
    net, x, y = golden_world
    x_adv = made("fat", tau=K, project=False, start="natural").craft(net, x, y, START).x_adv
    assert (x_adv - x).abs().max() > 0.06
    assert 0 <= x_adv.min() <= x_adv.max() <= 1


@pytest.mark.parametrize(
    ("name", "start"),
    [("fat", "uniform"), ("madry", "uniform"), ("dat", "uniform"), ("trades", "gaussian"), ("mart", "gaussian"),
     ("fat-trades", "gaussian"), ("fat-mart", "gaussian")],
)  # fmt: skip
def test_each_attack_begins_where_its_official_code_begins(world: World, name: str, start: str) -> None:
    x = world[1]
    moved = made(name).start_at(noise(24))(x, 0.031) - x
    reach = {"uniform": 0.031, "gaussian": 0.005}[start]
    spread = {"uniform": 0.031 / 3**0.5, "gaussian": 0.001}[start]
    assert moved.abs().max() <= reach
    assert moved[(x > 0.1) & (x < 0.9)].std().item() == pytest.approx(spread, rel=0.1)


def test_standard_training_sees_the_images_as_they_are(world: World) -> None:
    net, x, y = world
    crafted = build(defenses["standard"], {}).craft(net, x, y, START, draws=noise(24))
    assert torch.equal(crafted.x_adv, x)
    assert crafted.steps.tolist() == [0] * 24
    assert (crafted.forwards, crafted.backwards) == (0, 0)


@pytest.mark.parametrize("name", list(defenses))
def test_every_field_has_a_default_and_memory_is_not_one_to_set(name: str) -> None:
    one = defenses[name]()
    assert {f.name for f in fields(one) if not f.init} == {"memory"}
    assert one.average(START) is None
    if "cat" not in name:
        assert one.after_epoch(START, nn.Identity(), Measured([0.5])) == Verdict()
