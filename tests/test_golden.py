"""Holds the engine, its objectives and the defenses' losses to golden arrays that official code gave, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench import protocol as protocols
from fatbench.attacks import STARTS, Converged, Crafted, Friendly, Now, Objective, cross_entropy, cw_margin, kl, pgd
from fatbench.defense import build
from fatbench.evaluation import Chunk, examiner
from fatbench.quantities import Progress, number
from fatbench.registry import defenses

World = tuple[nn.Module, Tensor, Tensor]
Golden = Callable[[str], Any]


def near(mine: Tensor, golden: np.ndarray) -> None:
    torch.testing.assert_close(mine.detach(), torch.as_tensor(golden), rtol=0, atol=1e-9)


def same(mine: Tensor, golden: np.ndarray) -> None:
    assert mine.tolist() == golden.tolist()


def craft(world: World, arrays: Any, *, prefix: str = "", **how: Any) -> Crafted:
    """The attack as the file's eps, alpha and K say, from the start that the official code drew."""
    start = torch.as_tensor(arrays[f"{prefix}x_init"])
    eps, alpha, steps = arrays[f"{prefix}params"] if prefix else (arrays["eps"], arrays["alpha"], arrays["K"])
    return pgd(*world, eps=float(eps), step_size=float(alpha), steps=int(steps), start=lambda x, eps: start, **how)


def test_the_network_gives_the_golden_logits(golden: Golden, golden_world: World) -> None:
    net, x, _ = golden_world
    near(net(x), golden("tiny_model")["logits_eval"])


EARLYSTOP = [("earlystop_ce_uniform", cross_entropy, tau) for tau in (0, 1, 2, 3, 9, 10)]
EARLYSTOP += [("earlystop_kl_normal", kl, tau) for tau in (0, 1, 3, 10)]


@pytest.mark.parametrize(("name", "objective", "tau"), EARLYSTOP, ids=[f"{n}-{t}" for n, _, t in EARLYSTOP])
def test_pgd_k_tau_is_the_official_earlystop(
    golden: Golden, golden_world: World, name: str, objective: Objective, tau: int
) -> None:
    (net, _, y), arrays = golden_world, golden(name)
    assert tau in arrays["taus"]
    crafted = craft(golden_world, arrays, objective=objective, stop=Friendly(tau, y))
    part = {key.split("/")[1]: arrays[key] for key in arrays.files if key.startswith(f"tau{tau}/")}
    near(crafted.x_adv, part["adv"])
    same(crafted.steps, part["steps"])
    assert int(crafted.steps.sum()) == part["count"]
    same(crafted.steps < int(arrays["K"]), part["stopped_early"])
    near(F.cross_entropy(net(crafted.x_adv), y, reduction="none"), part["ce_adv"])
    same(net(crafted.x_adv).argmax(dim=1), part["pred_adv"])


@pytest.mark.parametrize(("name", "objective", "tau"), EARLYSTOP, ids=[f"{n}-{t}" for n, _, t in EARLYSTOP])
def test_the_official_order_is_the_stable_order_of_the_steps_survivors_last(
    golden: Golden, golden_world: World, name: str, objective: Objective, tau: int
) -> None:
    arrays = golden(name)
    crafted = craft(golden_world, arrays, objective=objective, stop=Friendly(tau, golden_world[2]))
    same(crafted.steps.argsort(stable=True), arrays[f"tau{tau}/order"])


@pytest.mark.parametrize(("name", "objective", "tau"), EARLYSTOP, ids=[f"{n}-{t}" for n, _, t in EARLYSTOP])
def test_the_work_logged_is_every_example_passed_forwards_and_a_backward_a_step(
    golden: Golden, golden_world: World, name: str, objective: Objective, tau: int
) -> None:
    arrays = golden(name)
    crafted = craft(golden_world, arrays, objective=objective, stop=Friendly(tau, golden_world[2]))
    count, stopped = int(arrays[f"tau{tau}/count"]), int(arrays[f"tau{tau}/stopped_early"].sum())
    clean = 16 if objective is kl else 0  # only an objective that needs the clean prediction asks for it
    assert crafted.forwards == clean + count + stopped
    assert crafted.backwards == count  # whom a logit rule stops is left out of the last backward


def test_noise_after_each_step_is_the_official_omega(golden: Golden, golden_world: World) -> None:
    arrays = golden("earlystop_ce_uniform_omega")
    normal = torch.as_tensor(arrays["randn_f32"]).double()
    crafted = craft(
        golden_world,
        arrays,
        stop=Friendly(int(arrays["tau"]), golden_world[2]),
        noise=lambda k, which: float(arrays["omega"]) * normal[which, k],
    )
    near(crafted.x_adv, arrays["adv"])
    same(crafted.steps, arrays["steps"])
    assert int(crafted.steps.sum()) == arrays["count"]
    same(crafted.steps.argsort(stable=True), arrays["order"])


class Watched(Converged):
    """DAT's rule, keeping the values it saw: (N, K), NaN where it was not asked."""

    def __init__(self, c: float, eps: float, origin: Any = "start") -> None:
        super().__init__(c, eps, origin=origin)
        self.seen = torch.full((16, 10), torch.nan, dtype=torch.float64)

    def __call__(self, now: Now) -> Tensor:
        if now.k:
            self.seen[now.which, now.k - 1] = self.fosc(now)
        return super().__call__(now)


@pytest.mark.parametrize("c", ["0.5", "0.25", "0.1", "0.02", "0"])
def test_dat_s_criterion_is_the_official_perturb(golden: Golden, golden_world: World, c: str) -> None:
    arrays = golden("dat_perturb")
    rule = Watched(float(c), float(arrays["eps"]))
    crafted = craft(golden_world, arrays, stop=rule)
    near(crafted.x_adv, arrays[f"cri{c}/adv"])
    same(crafted.steps, arrays[f"cri{c}/steps"])
    # The official code goes on asking those it stopped, and asks once more after the last step.
    asked = torch.arange(1, 11) <= crafted.steps[:, None].clamp(max=9)
    assert torch.equal(~rule.seen.isnan(), asked)
    near(rule.seen[asked], arrays[f"cri{c}/fosc"][asked.numpy()])
    stopped = int((crafted.steps < 10).sum())
    assert crafted.forwards == crafted.backwards == int(crafted.steps.sum()) + stopped


def test_from_a_natural_start_both_origins_are_one(golden: Golden, golden_world: World) -> None:
    arrays, x = golden("dat_perturb"), golden_world[1]
    eps, alpha = float(arrays["eps"]), float(arrays["alpha"])
    for origin in ("clean", "start"):
        rule = Watched(0.0, eps, origin)
        crafted = pgd(*golden_world, eps=eps, step_size=alpha, steps=10, start=lambda *_: x, stop=rule)
        near(crafted.x_adv, arrays["natural_start_cri0/adv"])
        near(rule.seen[:, :9], arrays["natural_start_cri0/fosc"][:, :9])
        assert (crafted.steps == 10).all()


def test_dat_s_threshold_falls_as_the_official_one(golden: Golden) -> None:
    dat = build(defenses["dat"], {})
    mine = torch.tensor([dat.threshold(Progress(epoch, 120)) for epoch in range(120)], dtype=torch.float64)
    near(mine, golden("dat_perturb")["fosc_schedule"])


EVALUATED = [
    "fgsm_rs",
    "fgsm_nors",
    "pgd20_dat_rs",
    "cw30_dat_rs",
    "pgd20_trades_nors",
    "cw30_trades_nors",
    "pgd20_trades_rs",
    "pgd10_gaussian_rs",
]


@pytest.mark.parametrize("name", EVALUATED)
def test_the_evaluation_s_attacks_are_the_official_pgd(golden: Golden, golden_world: World, name: str) -> None:
    (net, _, y), arrays = golden_world, golden("pgd_eval")
    assert {key.split("/")[0] for key in arrays.files} == set(EVALUATED)
    objective = cw_margin if name.startswith("cw") else cross_entropy
    crafted = craft(golden_world, arrays, prefix=f"{name}/", objective=objective)
    near(crafted.x_adv, arrays[f"{name}/adv"])
    logits = net(crafted.x_adv)
    near(logits, arrays[f"{name}/logits"])
    same(logits.argmax(dim=1) == y, arrays[f"{name}/correct"])


BY_PROTOCOL = [
    ("fgsm_rs", "dat-2019", "fgsm"),
    ("fgsm_rs", "trades-2019-rs", "fgsm"),
    ("fgsm_rs", "mart-2020-script", "fgsm"),
    ("fgsm_nors", "trades-2019", "fgsm"),
    ("pgd20_dat_rs", "dat-2019", "pgd-20"),
    ("cw30_dat_rs", "dat-2019", "cw-inf"),
    ("pgd20_trades_nors", "trades-2019", "pgd-20"),
    ("cw30_trades_nors", "trades-2019", "cw-inf"),
    ("pgd20_trades_rs", "trades-2019-rs", "pgd-20"),
    ("pgd20_trades_rs", "mart-2020-script", "pgd-20"),
]


@pytest.mark.parametrize(("name", "protocol", "attack"), BY_PROTOCOL)
def test_a_protocol_by_its_name_examines_as_the_official_code_does(
    golden: Golden, golden_world: World, monkeypatch: pytest.MonkeyPatch, name: str, protocol: str, attack: str
) -> None:
    (net, x, y), arrays, said = golden_world, golden("pgd_eval"), protocols.load(protocol)
    drawn = torch.as_tensor(arrays[f"{name}/x_init"])
    if name.endswith("_rs"):  # what the official code drew, where ours would draw its own
        monkeypatch.setitem(STARTS, "uniform", lambda x, eps, **how: drawn)
    made = examiner(attack, said.settings_for(attack))
    chunk = Chunk(x, y, np.arange(len(x)), 10, 0)
    x_adv = made.attack(net, chunk, number(said.eps)).x_adv
    near(x_adv, arrays[f"{name}/adv"])
    same(net(x_adv).argmax(dim=1) == y, arrays[f"{name}/correct"])


def leaves(arrays: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(adversarial logits, natural logits, y), the logits asking for gradients."""
    adv, nat = (torch.as_tensor(arrays[f"{which}_logits"]).requires_grad_() for which in ("adv", "nat"))
    return adv, nat, torch.as_tensor(arrays["y"])


def held_to(loss: Tensor, name: str, arrays: Any, adv: Tensor, nat: Tensor) -> None:
    near(loss, arrays[f"{name}/value"])
    grads = torch.autograd.grad(loss, [adv, nat], allow_unused=True)
    for which, leaf, grad in zip(("adv", "nat"), (adv, nat), grads, strict=True):
        near(torch.zeros_like(leaf) if grad is None else grad, arrays[f"{name}/grad_{which}"])


@pytest.mark.parametrize("kappa", [50, 0])
def test_the_margin_is_the_official_cw_loss(golden: Golden, kappa: int) -> None:
    arrays = golden("losses")
    adv, nat, y = leaves(arrays)
    held_to(cw_margin(adv, y, kappa=float(kappa)).sum(), f"cw_conf{kappa}_sum", arrays, adv, nat)


def test_the_margin_takes_the_true_class_out_even_where_all_logits_are_negative(golden: Golden) -> None:
    arrays = golden("losses")
    logits = torch.as_tensor(arrays["cw_negative/logits"]).requires_grad_()
    value = cw_margin(logits, torch.as_tensor(arrays["cw_negative/y"])).sum()
    near(value, arrays["cw_negative/conf50_sum_value"])
    near(torch.autograd.grad(value, logits)[0], arrays["cw_negative/grad"])


@pytest.mark.parametrize(
    ("name", "defense", "fields"),
    [
        ("ce_mean", "madry", {}),
        ("ce_mean", "fat", {}),
        ("trades_beta1", "trades", {"beta": 1}),
        ("trades_beta6", "trades", {"beta": 6}),
        ("trades_beta6", "trades", {"forwards": "nat-adv-nat"}),
        ("trades_beta6", "fat-trades", {}),
        ("mart_beta5", "mart", {"beta": 5}),
        ("mart_beta6", "mart", {"beta": 6}),
        ("mart_beta6", "mart", {"forwards": "adv-nat"}),
        ("mart_beta6", "fat-mart", {}),
        ("mart_beta0_bce_only", "mart", {"beta": 0}),
    ],
)
def test_a_defense_s_loss_is_the_official_one(golden: Golden, name: str, defense: str, fields: dict[str, Any]) -> None:
    arrays = golden("losses")
    adv, nat, y = leaves(arrays)
    x, x_adv = torch.zeros(12, 1), torch.ones(12, 1)

    def model(images: Tensor) -> Tensor:
        return adv if images is x_adv else nat

    loss = build(defenses[defense], fields).loss(model, x, x_adv, y, Progress(0, 1))  # type: ignore[arg-type]
    held_to(loss, name, arrays, adv, nat)
