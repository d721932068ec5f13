"""The shelf holds what the papers and their code say: every number is written here a second time, from the sources."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch

from fatbench import protocol, recipe
from fatbench.defense import settings_of
from fatbench.errors import Refused
from fatbench.quantities import Progress, value_at
from fatbench.recipe import Recipe, Settings, contestant, load, points, resolve

# ------------------------------------------------------------------------------------ the numbers, by hand

Segments = list[tuple[int, float]]  # (last epoch, value), epochs from 1

FAT_LR: Segments = [(59, 0.1), (89, 0.01), (109, 0.001), (120, 0.0005)]
FAT_TAU: Segments = [(50, 0), (90, 1), (120, 2)]
FAT_TRADES_LR: Segments = [(74, 0.1), (85, 0.01)]
FAT_TRADES_TAU: Segments = [(30, 0), (50, 1), (70, 2), (85, 3)]
FAT_MART_LR: Segments = [(59, 0.1), (89, 0.01), (90, 0.001)]
FAT_MART_TAU: Segments = [(20, 0), (40, 1), (60, 2), (80, 3), (90, 4)]

COMMON = {
    "dataset": "cifar10", "batch_size": 128, "momentum": 0.9, "weight_decay": 2e-4, "augment": "crop-flip",
    "validation": 0.0, "steps": 10, "step_size": 0.007, "omega": 0.0, "mode": "eval",
}  # fmt: skip
UNIFORM = {"start": "uniform", "clamp_start": True}
NATURAL = {"start": "natural", "clamp_start": True}
CLAMPED = {"start": "gaussian", "clamp_start": True}
LOOSE = {"start": "gaussian", "clamp_start": False}

FAT = {"defense": "fat", "arch": "wrn-32-10", "lr": FAT_LR, "tau": FAT_TAU}
FAT_TRADES = {"defense": "fat-trades", "lr": FAT_TRADES_LR, "tau": FAT_TRADES_TAU, "forwards": "nat-adv", "beta": 6}
FAT_MART = {"defense": "fat-mart", "lr": FAT_MART_LR, "tau": FAT_MART_TAU, "forwards": "adv-nat", "beta": 6}
TRADES = {"defense": "trades", "arch": "wrn-34-10", "eps": "0.031", "lr": [(74, 0.1), (76, 0.01)],
          "forwards": "nat-adv-nat", **LOOSE}  # fmt: skip
MART = {"defense": "mart", "arch": "wrn-34-10", "eps": "0.031", "forwards": "nat-adv", "beta": 6, **LOOSE}
MADRY = {"defense": "madry", "arch": "wrn-32-10", "eps": "8/255", "step_size": 2 / 255, **UNIFORM,
         "lr": [(103, 0.1), (154, 0.01), (205, 0.001)]}  # fmt: skip
CAT = {"defense": "cat", "arch": "wrn-32-10", "lr": [(300, 0.1)], "batch_size": 200, "weight_decay": 5e-4,
       "mode": "train", "steps": 7, "clamp_start": False, "patience": 10, "validation": 0.02}  # fmt: skip
DAT = {"defense": "dat", "arch": "wrn-32-10", "eps": "0.031", "lr": [(59, 0.01), (99, 0.001), (120, 0.0001)],
       "step_size": "eps/4", "start": "uniform", "c_max": 0.5, "until": "100/120", "first": 1}  # fmt: skip

DAT_2019, TABLE_2, TABLE_3 = ("dat-2019",), ("trades-2019",), ("trades-2019-rs",)
TABLE_4 = ("mart-2020", "mart-2020-script")

# name -> (protocols, what differs from COMMON)
ROWS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "fat-wrn-32-10-eps8-code": (DAT_2019, FAT | UNIFORM | {"eps": "0.031", "omega": 0.001}),
    "fat-wrn-32-10-eps8-paper": (DAT_2019, FAT | NATURAL | {"eps": "8/255"}),
    "fat-wrn-32-10-eps16-code": (DAT_2019, FAT | UNIFORM | {"eps": "0.062", "omega": 0.001}),
    "fat-wrn-32-10-eps16-paper": (DAT_2019, FAT | NATURAL | {"eps": "16/255"}),
    "madry-wrn-32-10-code": (DAT_2019, MADRY | {"mode": "train"}),
    "madry-wrn-32-10-paper": (DAT_2019, MADRY | {"steps": 7}),
    "cat-wrn-32-10-code": (DAT_2019, CAT | {"eps": "0.032", "jitter": True, "train_above": 0.9, "levels": 16}),
    "cat-wrn-32-10-paper": (DAT_2019, CAT | {"eps": "0.031", "jitter": False, "train_above": 0, "levels": 0}),
    "dat-wrn-32-10-code": (
        DAT_2019, DAT | {"weight_decay": 4e-3, "clamp_start": False, "origin": "start", "weighted": True}
    ),
    "dat-wrn-32-10-paper": (
        DAT_2019, DAT | {"weight_decay": 1e-4, "clamp_start": True, "origin": "clean", "weighted": False}
    ),
    "trades-wrn-34-10-beta1-code": (TABLE_2, TRADES | {"beta": 1}),
    "trades-wrn-34-10-beta6-code": (TABLE_2 + TABLE_3, TRADES | {"beta": 6}),
    "mart-wrn-34-10-code": (TABLE_4, MART | {"lr": [(74, 0.1), (89, 0.01), (90, 0.001)], "weight_decay": 7e-4}),
    "mart-wrn-34-10-paper": (TABLE_4, MART | {"lr": FAT_MART_LR, "eps": "8/255"}),
    "mart-resnet-18-code": (
        TABLE_4,
        MART | {"arch": "resnet-18", "lr": [(74, 0.01), (89, 1e-3), (99, 1e-4), (120, 1e-5)], "weight_decay": 3.5e-3,
                "beta": 5},
    ),
    "fat-resnet-18-growing-eps": (
        ("fat-6.1-cifar10",),
        {"defense": "fat", "arch": "resnet-18", "eps": "16/255", "lr": [(59, 0.01), (80, 0.001)], "step_size": "eps/10",
         "omega": 0.001, "tau": 3, **UNIFORM,
         "eps_schedule": [["0", "4/255"], ["1/4", "8/255"], ["1/2", "12/255"], ["3/4", "16/255"]]},
    ),
}  # fmt: skip
for arch, budget, beta, tables in (
    ("wrn-34-10", 8, 1, TABLE_2), ("wrn-34-10", 8, 6, TABLE_2 + TABLE_3), ("wrn-34-10", 16, 6, TABLE_2 + TABLE_3),
    ("wrn-58-10", 8, 6, TABLE_3), ("wrn-58-10", 16, 6, TABLE_3),
):  # fmt: skip
    row = FAT_TRADES | {"arch": arch, "beta": beta}
    rounded = {8: "0.031", 16: "0.062"}[budget]
    ROWS[f"fat-trades-{arch}-beta{beta}-eps{budget}-paper"] = (tables, row | LOOSE | {"eps": f"{budget}/255"})
    if arch == "wrn-34-10":
        ROWS[f"fat-trades-{arch}-beta{beta}-eps{budget}-code"] = (tables, row | CLAMPED | {"eps": rounded})
    if beta == 6:
        row = FAT_MART | {"arch": arch}
        ROWS[f"fat-mart-{arch}-eps{budget}-paper"] = (TABLE_4, row | NATURAL | {"eps": f"{budget}/255"})
        if arch == "wrn-34-10":
            ROWS[f"fat-mart-{arch}-eps{budget}-code"] = (TABLE_4, row | CLAMPED | {"eps": rounded})

# The figures: their own schedules and budgets, and the released code's ways where their text is silent.
LR_F1: Segments = [(59, 0.1), (80, 0.01)]
LR_FIG_5: Segments = [(59, 0.1), (89, 0.01), (100, 0.001)]
LR_6_1: Segments = [(59, 0.01), (80, 0.001)]
OUR_EPS = {
    "cifar10": ["0.03", "0.045", "0.06", "0.075", "0.09", "0.105", "0.12", "0.135", "0.15"],
    "svhn": ["0.01", "0.02", "0.03", "0.04", "0.05", "0.06"],
}
AS_CODE = {
    "fat": {"omega": 0.001, **UNIFORM},
    "madry": {"omega": 0.001, **UNIFORM},
    "fat-trades": {"beta": 6, "forwards": "nat-adv", **CLAMPED},
    "trades": {"beta": 6, "forwards": "nat-adv", **CLAMPED},
}
SWEEPS: dict[str, dict[str, list[Any]]] = {}


def figure(name: str, protocols: tuple[str, ...], said: dict[str, Any], **sweep: list[Any]) -> None:
    ROWS[name], SWEEPS[name] = (protocols, AS_CODE[said["defense"]] | said), sweep


for arch in ("small-cnn", "resnet-18", "wrn-34-10"):
    said = {"defense": "fat", "arch": arch, "eps": "8/255"}
    if arch != "wrn-34-10":
        figure(f"fig-4-{arch}", ("fat-fig4",), said | {"lr": LR_F1}, tau=list(range(11)))
    for defense in ("fat", "fat-trades"):
        figure(f"fig-5-{defense}-{arch}", (), said | {"defense": defense, "lr": LR_FIG_5}, tau=[0, 1, 2, 3, 10])
for number, dataset, arch, pair, K in (
    (6, "cifar10", "resnet-18", "fat madry", 10), (7, "svhn", "resnet-18", "fat madry", 10),
    (13, "cifar10", "small-cnn", "fat madry", 10), (14, "svhn", "small-cnn", "fat madry", 10),
    (15, "cifar10", "small-cnn", "fat-trades trades", 10), (16, "cifar10", "resnet-18", "fat-trades trades", 10),
    (17, "cifar10", "small-cnn", "fat madry", 20), (18, "cifar10", "resnet-18", "fat madry", 20),
    (19, "cifar10", "small-cnn", "fat-trades trades", 20), (20, "cifar10", "resnet-18", "fat-trades trades", 20),
):  # fmt: skip
    for defense in pair.split():
        said = {"defense": defense, "dataset": dataset, "arch": arch, "steps": K, "step_size": "eps/10", "lr": LR_6_1}
        taus: dict[str, list[Any]] = {"tau": [0, 1, 3]} if defense.startswith("fat") else {}
        figure(f"fig-{number}-{defense}", (f"fat-6.1-{dataset}",), said, eps=OUR_EPS[dataset], **taus)
for number, arch in ((9, "small-cnn"), (10, "resnet-18")):
    for defense in ("fat", "madry"):
        said = {"defense": defense, "arch": arch, "eps": "8/255", "lr": LR_6_1, "omega": 0.0, "project": False}
        taus = {"tau": [0, 1, 3]} if defense == "fat" else {}
        alphas = [0.003, 0.006, 0.009, 0.012, 0.015]
        figure(f"fig-{number}-{defense}", ("fat-6.1-cifar10",), said | NATURAL, step_size=alphas, **taus)


def expected(name: str) -> dict[str, Any]:
    """A recipe's numbers as the tables above have them, what it sweeps left out."""
    said = COMMON | ROWS[name][1]
    if said["defense"] == "cat":
        said = {key: value for key, value in said.items() if key != "step_size"}
    return {key: value for key, value in said.items() if key not in SWEEPS.get(name, {})}


def epochs_of(segments: Segments) -> list[float]:
    """The value of each epoch."""
    values: list[float] = []
    for last, value in segments:
        values += [value] * (last - len(values))
    return values


def flat(settings: Settings) -> dict[str, Any]:
    said = settings.model_dump()
    return {**said.pop("fields"), **said}


SHELF = list(recipe.shelf())


def test_the_shelf_holds_each_trained_row_and_curve_and_no_other() -> None:
    assert set(SHELF) == set(ROWS)


@pytest.mark.parametrize("name", SHELF)
def test_every_number_of_a_recipe_is_the_source_s(name: str) -> None:
    page, wanted = load(name), expected(name)
    rates = epochs_of(wanted.pop("lr"))
    taus = wanted.pop("tau", None)
    one = next(iter(points(name).values()))
    found = flat(one)
    for key, value in wanted.items():
        assert found[key] == value, key
    assert one.epochs == len(rates)
    assert [one.lr_at(Progress(done, one.epochs)) for done in range(one.epochs)] == pytest.approx(rates, rel=1e-12)
    if taus is not None:
        at = [value_at(contestant(one).tau, Progress(done, one.epochs)) for done in range(one.epochs)]
        assert at == (epochs_of(taus) if isinstance(taus, list) else [taus] * one.epochs)
    assert {key: list(values) for key, values in page.sweep.items()} == SWEEPS.get(name, {})
    assert page.protocols == ROWS[name][0]
    # What the file says is what the table says: no number on the shelf goes unchecked.
    said = {*page.settings, *page.settings["fields"]} - {"fields"}
    assert said == {*wanted, "lr", "lr_divisors", "epochs"} | ({"tau"} if taus is not None else set())


@pytest.mark.parametrize("name", SHELF)
def test_a_recipe_says_where_each_of_its_numbers_comes_from(name: str) -> None:
    page, lines = load(name), recipe.shelf()[name].read_text(encoding="utf-8").splitlines()
    assert page.name == name
    assert 20 < len(page.summary) < 120
    assert re.search(r"Tables? [1-4]|Figure (4|5|6|7|9|1\d|20)\b|section 6\.1|no row of", page.source)
    bare = [
        line
        for above, line in zip(["", *lines], lines, strict=False)
        if re.match(r"\w+ = ", line) and "  # " not in line and not above.startswith("# ")
    ]
    assert [line.partition(" =")[0] for line in bare] == ["name", "summary", "source", "protocols"]
    assert [line for line in lines if len(line) > 120 and not line.startswith(("source", "summary"))] == []


@pytest.mark.parametrize("name", SHELF)
def test_a_recipe_writes_down_every_field_of_its_defense_that_matters(name: str) -> None:
    page = load(name)
    fields = set(settings_of(type(contestant(next(iter(points(name).values()))))))
    silent = fields - {*page.settings["fields"], *page.sweep, "eps"}
    idle = {"project", "eps_schedule"} | ({"step_size", "start"} if page.settings["defense"] == "cat" else set())
    assert silent <= idle


def test_a_name_with_code_or_paper_has_its_counterpart_or_a_reason() -> None:
    alone = {name for name in SHELF if name.endswith("-code") and name.removesuffix("code") + "paper" not in SHELF}
    # TRADES's paper and code train alike as far as is known; MART's ResNet-18 is no row of the FAT paper.
    assert alone == {"trades-wrn-34-10-beta1-code", "trades-wrn-34-10-beta6-code", "mart-resnet-18-code"}
    alone = {name for name in SHELF if name.endswith("-paper") and name.removesuffix("paper") + "code" not in SHELF}
    assert all("wrn-58-10" in name for name in alone)  # no script of that network was released


# ------------------------------------------------------------------------------------ the official schedules

OFFICIAL = {
    "FAT": ["fat-wrn-32-10-eps8-code", "fat-wrn-32-10-eps8-paper", "fat-wrn-32-10-eps16-code",
            "fat-wrn-32-10-eps16-paper"],
    "FAT_for_TRADES": [name for name in SHELF if name.startswith("fat-trades-")],
    "FAT_for_MART": [name for name in SHELF if name.startswith("fat-mart-")],
    "TRADES": ["trades-wrn-34-10-beta1-code", "trades-wrn-34-10-beta6-code"],
    "MART_wrn": ["mart-wrn-34-10-code"],
    "MART_resnet18": ["mart-resnet-18-code"],
    "DAT": ["dat-wrn-32-10-code", "dat-wrn-32-10-paper"],
}  # fmt: skip


@pytest.mark.parametrize(("official", "name"), [(key, name) for key, names in OFFICIAL.items() for name in names])
def test_schedules_are_the_official_ones_at_every_epoch(shared: Path, official: str, name: str) -> None:
    book = json.loads((shared / "golden" / "schedules.json").read_text())
    assert set(book) == set(OFFICIAL)
    said, one = book[official], resolve(None, recipe=name)
    defense, run = contestant(one), [Progress(done, one.epochs) for done in range(one.epochs)]
    assert one.epochs == said["epochs"]
    rates = epochs_of([(last, value) for _, last, value in said["lr_segments_first_last_value"]])
    assert [one.lr_at(now) for now in run] == pytest.approx(rates, rel=1e-12)
    if segments := said.get("tau_segments_first_last_value"):
        assert [value_at(defense.tau, now) for now in run] == epochs_of([(last, value) for _, last, value in segments])
    if official == "DAT":
        assert [defense.threshold(now) for now in run] == pytest.approx(
            [max(0.5 * (1 - e / 100), 0) for e in range(120)]
        )


# ------------------------------------------------------------------------------------ the official updates

Golden = Callable[[str], Any]
World = tuple[torch.nn.Module, torch.Tensor, torch.Tensor]
START = Progress(0, 120)


def cooked(name: str, x_init: np.ndarray, normals: torch.Tensor | None = None, **replaced: Any) -> tuple[Settings, Any]:
    """A recipe's settings and its contestant, which begins where the official code began, by its draws."""
    settings = resolve(None, recipe=name, sets=[f"{key}={value}" for key, value in replaced.items()])
    one, point = contestant(settings), torch.as_tensor(x_init)
    given: dict[str, Any] = {"start_at": lambda self, draws: lambda x, eps: point}
    if normals is not None:
        given["step_noise"] = lambda self, x, draws: lambda k, which: self.omega * normals[which, k]
    cls = type("Given", (type(one),), given)
    return settings, cls(**{field: getattr(one, field) for field in settings_of(type(one))})


def sgd(net: torch.nn.Module, settings: Settings) -> torch.optim.SGD:
    rate = settings.lr_at(START)
    return torch.optim.SGD(
        net.parameters(), lr=rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )  # fmt: skip


def close(found: torch.Tensor, golden: np.ndarray) -> None:
    np.testing.assert_allclose(found.detach().numpy(), golden, rtol=0, atol=1e-9)


def test_fat_s_recipe_trains_as_the_official_code_does(golden: Golden, golden_world: World) -> None:
    arrays, (net, x, y) = golden("official_fat_train"), golden_world
    settings, _ = cooked("fat-wrn-32-10-eps8-code", arrays["batch0/x_init"])
    optimizer = sgd(net, settings)
    for call, tau in enumerate((0, 1, 10)):
        for half, rows in enumerate((slice(0, 8), slice(8, 16))):
            batch = 2 * call + half
            # The golden run left omega out; its noise is held to the recipe's below.
            _, one = cooked("fat-wrn-32-10-eps8-code", arrays[f"batch{batch}/x_init"], omega=0, tau=tau)
            crafted = one.craft(net.train(), x[rows], y[rows], START)
            assert int(crafted.steps.sum()) == arrays[f"batch{batch}/count"]
            optimizer.zero_grad()
            torch.autograd.backward(one.loss(net, x[rows], crafted.x_adv, y[rows], START))
            optimizer.step()
        for key, value in net.state_dict().items():
            close(value, arrays[f"call{call}/state/{key}"])


def test_fat_s_recipe_has_the_official_start_and_noise(golden: Golden, golden_world: World) -> None:
    arrays, (net, x, y) = golden("earlystop_ce_uniform_omega"), golden_world
    normals = torch.as_tensor(arrays["randn_f32"], dtype=torch.float64)
    settings, one = cooked("fat-wrn-32-10-eps8-code", arrays["x_init"], normals)
    crafted = one.craft(net, x, y, START)  # epoch 1: tau 0, as there
    close(crafted.x_adv, arrays["adv"])
    assert crafted.steps.tolist() == arrays["steps"].tolist()
    begun = contestant(settings).start_at(None)(x, one.eps)
    for start in (begun, torch.as_tensor(arrays["x_init"])):  # within the ball and the pixels, and far from x
        assert (start - x).abs().max() <= 0.031 + 1e-7
        assert start.min() >= 0 and start.max() <= 1
        assert (start - x).abs().mean() > 0.012


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_fat_for_trades_recipe_crafts_as_the_official_code_does(golden: Golden, golden_world: World, tau: int) -> None:
    arrays, (net, x, y) = golden("earlystop_kl_normal"), golden_world
    _, one = cooked("fat-trades-wrn-34-10-beta6-eps8-code", arrays["x_init"])
    epoch = {0: 1, 1: 31, 3: 71}[tau]  # where the recipe's own schedule first says so
    crafted = one.craft(net, x, y, Progress(epoch - 1, 85))
    close(crafted.x_adv, arrays[f"tau{tau}/adv"])
    assert crafted.steps.tolist() == arrays[f"tau{tau}/steps"].tolist()


def test_trades_recipe_takes_the_step_that_the_official_code_takes(golden: Golden, golden_world: World) -> None:
    arrays, (net, x, y) = golden("official_trades_step"), golden_world
    settings, one = cooked("trades-wrn-34-10-beta6-code", arrays["x_init"])
    optimizer = sgd(net, settings)
    crafted = one.craft(net.train(), x, y, START)
    close(crafted.x_adv, arrays["x_adv"])
    loss = one.loss(net, x, crafted.x_adv, y, START)
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-9)
    torch.autograd.backward(loss)
    optimizer.step()
    for key, parameter in net.named_parameters():
        close(parameter, arrays[f"param_after/{key}"])
    for key, buffer in net.named_buffers():
        close(buffer, arrays[f"buf/{key}"])
    assert arrays["x_init"].min() < 0 or arrays["x_init"].max() > 1, "the official start is not clamped"
    assert not one.clamp_start


@pytest.mark.parametrize(("c", "done"), [("0.5", 0), ("0.25", 50), ("0.1", 80), ("0.02", 96), ("0", 100)])
def test_dat_s_recipe_crafts_as_the_official_code_does(golden: Golden, golden_world: World, c: str, done: int) -> None:
    arrays, (net, x, y) = golden("dat_perturb"), golden_world
    _, one = cooked("dat-wrn-32-10-code", arrays["x_init"])
    crafted = one.craft(net, x, y, Progress(done, 120))
    assert crafted.steps.tolist() == arrays[f"cri{c}/steps"].tolist()
    close(crafted.x_adv, arrays[f"cri{c}/adv"])


# ------------------------------------------------------------------------------------ sweeps


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe file and returns its path."""

    def write(**said: Any) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps(said), encoding="utf-8")
        return str(path)

    return write


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(Refused) as refused:
        call(*arguments, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_sweep_is_every_combination_in_the_file_s_order() -> None:
    found = points("fig-6-fat")
    assert list(found)[:4] == ["eps=0.03 tau=0", "eps=0.03 tau=1", "eps=0.03 tau=3", "eps=0.045 tau=0"]
    assert [(one.eps, one.fields["tau"]) for one in found.values()] == [
        (eps, tau) for eps in OUR_EPS["cifar10"] for tau in (0, 1, 3)
    ]
    assert found["eps=0.06 tau=3"] == resolve(None, recipe="fig-6-fat", eps="0.06", sets=["tau=3"])
    assert {round(contestant(one).step_at(START) / contestant(one).eps, 12) for one in found.values()} == {0.1}


def test_what_is_chosen_is_not_swept() -> None:
    assert list(points("fig-6-fat", eps="0.06")) == ["tau=0", "tau=1", "tau=3"]
    assert list(points("fig-6-fat", sets=["tau=3", "eps=0.06"])) == [""]
    assert list(points("fat-wrn-32-10-eps8-code", epochs=2)) == [""]
    assert points("fat-wrn-32-10-eps8-code", epochs=2)[""].epochs == 2


def test_a_swept_recipe_is_not_run_without_a_choice() -> None:
    said = refusal(resolve, None, recipe="fig-6-fat")
    assert "sweeps eps (0.03, 0.045, 0.06, 0.075, 0.09, 0.105, 0.12, 0.135, 0.15) and tau (0, 1, 3)" in said
    assert said.endswith("such as --eps 0.03 --set tau=0")
    assert "sweeps tau (0, 1, 3): choose one run of it, such as --set tau=0" in refusal(
        resolve, None, recipe="fig-6-fat", eps="0.06"
    )


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"sweep": 3}, "sweep: Input should be a valid dictionary"),
        ({"sweep": {"tau": 3}}, "sweep.tau: Input should be a valid tuple"),
        ({"sweep": {"tau": []}}, "sweep.tau: Tuple should have at least 1 item"),
        ({"sweep": {"tau": [1, 1]}}, "sweep.tau names a value twice"),
        ({"sweep": {"tau": [1]}, "fields": {"tau": 1}}, "'tau' is both set and swept"),
        ({"sweep": {"lr": [0.1]}, "lr": 0.1}, "'lr' is both set and swept"),
        ({"sweep": {"defense": ["fat"]}}, "'defense' cannot be swept"),
        ({"sweep": {"tua": [1]}}, "unknown field of fat 'tua': did you mean tau"),
        ({"sweep": {"eps": ["0.1", "8/0"]}}, "eps: '8/0' divides by zero"),
        ({"sweep": {"tau": [1, -1]}}, "fat: tau=-1"),
        ({"protocols": "dat-2019"}, "protocols: "),
        ({"name": "Mine"}, "name: String should match pattern"),
        ({"fields": 3}, "write [fields]"),
        ({"epoch": 3}, "unknown setting 'epoch': did you mean epochs"),
        ({"name": "fat-wrn-32-10-eps8-code"}, "as a built-in one does: rename it"),
    ],
    ids=str,
)  # fmt: skip
def test_a_broken_recipe_is_refused_in_one_line(written: Callable[..., str], said: dict[str, Any], told: str) -> None:
    assert told in refusal(points, written(**{"defense": "fat", **said}))


def test_a_built_in_recipe_may_be_named_by_its_file() -> None:
    path = recipe.shelf()["fig-6-fat"]
    assert load(str(path)) == load("fig-6-fat") == load("fig_6_fat")


def test_an_unknown_recipe_is_told_the_closest_and_where_to_look() -> None:
    said = refusal(load, "fat-wrn-32-10-eps8")
    assert "did you mean fat-wrn-32-10-eps8-code" in said
    assert said.endswith("(fatbench list recipes)")


@pytest.mark.parametrize("bad", ["8/0", "1e9", "much"])
def test_a_budget_that_is_none_is_refused_of_a_recipe_too(bad: str) -> None:
    assert "eps: " in refusal(resolve, None, recipe="fat-wrn-32-10-eps8-code", eps=bad)


# ------------------------------------------------------------------------------------ data of another shape


@pytest.mark.parametrize(
    ("dataset", "shape"), [("mnist", "1x28x28"), ("digits", "1x8x8"), ("Fashion_MNIST", "1x28x28")]
)
def test_a_recipe_is_not_run_on_images_of_another_shape(dataset: str, shape: str) -> None:
    for asked in ({"dataset": dataset}, {"sets": [f"dataset={dataset}"]}):
        said = refusal(resolve, None, recipe="fat-wrn-32-10-eps8-code", **asked)
        assert f"is for images of 3x32x32, and {dataset.lower().replace('_', '-')} has {shape}" in said
        assert "leave --dataset out" in said


def test_a_recipe_may_be_run_on_other_data_of_its_shape() -> None:
    assert resolve(None, recipe="fat-wrn-32-10-eps8-code", dataset="svhn").dataset == "svhn"
    assert resolve(None, recipe="fat-wrn-32-10-eps8-code", dataset="CIFAR10").shape is None


@pytest.mark.parametrize("side", [8, 28])
def test_one_s_own_data_of_another_shape_is_refused_when_it_is_seen(
    npz: Callable[..., Path], tmp_path: Path, side: int
) -> None:
    from fatbench.trainer import train

    path = npz(shape=(side, side))
    settings = resolve(None, recipe="fig-6-fat", eps="0.06", sets=["tau=0"], dataset=str(path))
    assert f"is for images of 3x32x32, and made-up has 1x{side}x{side}" in refusal(train, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_s_own_settings_are_a_recipe_for_the_same_run(tmp_path: Path, npz: Callable[..., Path]) -> None:
    path = str(npz(shape=(32, 32, 3)))
    one = resolve(None, recipe="fig-6-fat", eps="0.06", sets=["tau=0"], dataset=path)
    (tmp_path / "settings.toml").write_text(one.toml())
    assert resolve(None, recipe=str(tmp_path / "settings.toml")) == one
    plain = resolve(None, recipe="fat-wrn-32-10-eps8-code")
    (tmp_path / "settings.toml").write_text(plain.toml())
    assert resolve(None, recipe=str(tmp_path / "settings.toml")) == plain


# ------------------------------------------------------------------------------------ what a person sees


def test_show_tells_the_file_and_what_follows_from_it() -> None:
    from fatbench.show import show

    said = show("recipe", "fat-wrn-32-10-eps8-code")
    assert recipe.shelf()["fat-wrn-32-10-eps8-code"].read_text().rstrip() in said
    assert "lr        0.1 epochs 1-59, 0.01 epochs 60-89, 0.001 epochs 90-109, 0.0005 epochs 110-120" in said
    assert "tau       0 epochs 1-50, 1 epochs 51-90, 2 epochs 91-120" in said
    assert "defaults  seed = 0, precision = 32-true, ranks = 1, sync_bn = False, fields.project = True" in said
    assert "27, one of them: fatbench train --recipe fig-6-fat --eps 0.03 --set tau=0" in show("recipe", "fig-6-fat")
    growing = show("recipe", "fat-resnet-18-growing-eps")
    assert "eps       0.0156863 epochs 1-20, 0.0313725 epochs 21-40" in growing
    assert "0.5 epoch 1, 0.495 epoch 2, ..., 0.005 epoch 100, 0 epochs 101-120" in show("recipe", "dat-wrn-32-10-code")


def test_show_refuses_a_recipe_of_which_any_run_is_broken(written: Callable[..., str]) -> None:
    from fatbench.show import show

    assert "divides by zero" in refusal(show, "recipe", written(defense="fat", sweep={"eps": ["0.1", "1/0"]}))


def test_the_docs_list_the_shelf_with_its_protocols(root: Path) -> None:
    rows = re.findall(r"^\| [^|]* \| (.*?) \| (.*?) \|$", (root / "docs" / "recipes.md").read_text(), flags=re.M)
    listed = {name: protocols for names, protocols in rows for name in re.findall(r"`([^`]+)`", names)}
    assert set(listed) == set(SHELF)
    for name, protocols in listed.items():
        assert tuple(re.findall(r"`([^`]+)`", protocols)) == load(name).protocols, name


def test_the_recipe_in_the_docs_is_one(root: Path, tmp_path: Path, npz: Callable[..., Path]) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", (root / "docs" / "recipes.md").read_text(), flags=re.M | re.S)
    path = tmp_path / "mine.toml"
    path.write_text(text.replace("mydata.npz", str(npz(shape=(32, 32, 3)))))
    found = points(str(path))
    assert list(found) == ["tau=0", "tau=1", "tau=3"]
    one = contestant(found["tau=1"])
    assert [one.step_at(Progress(done, 80)) for done in (0, 39, 40)] == pytest.approx([0.4 / 255] * 2 + [1.6 / 255])


def test_a_recipe_file_s_settings_are_what_is_left_of_it() -> None:
    said = tomllib.loads(recipe.shelf()["fig-9-fat"].read_text())
    page = load("fig-9-fat")
    assert page.settings == {key: value for key, value in said.items() if key not in Recipe.model_fields}


def test_every_protocol_that_a_recipe_names_is_on_the_shelf_of_protocols() -> None:
    named = {name: set(load(name).protocols) for name in recipe.shelf()}
    assert {name: lacking for name, said in named.items() if (lacking := said - protocol.shelf().keys())} == {}
    assert named["fat-trades-wrn-34-10-beta6-eps8-code"] == {"trades-2019", "trades-2019-rs"}
