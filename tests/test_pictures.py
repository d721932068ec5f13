"""The paper's pictures measure what they say: against closed forms, hand-made points and the trainer's own runs."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch import Tensor, nn

from fatbench import data, recipe, trainer
from fatbench.errors import Refused, RunFailed
from fatbench.models import build
from fatbench.paper import bound, landscape, mixture, names, reproduce
from fatbench.paper.pictured import grouped, rounded, strangers, trained
from fatbench.paper.pictures import PICTURES

Evidence = list[dict[str, Any]]


class Line(nn.Module):
    """Two classes of two-pixel images: logit of class 1 is w x + b, of class 0 nought."""

    def __init__(self, weight: tuple[float, float], bias: float) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(weight)), bias

    def forward(self, x: Tensor) -> Tensor:
        score = x.flatten(1) @ self.weight + self.bias
        return torch.stack([torch.zeros_like(score), score], dim=1)


def images(*points: tuple[float, float]) -> Tensor:
    return torch.tensor(points)[:, :, None, None]


# ------------------------------------------------------------------------------------------------ what they share


def test_the_network_is_the_one_that_the_trainer_trains(tmp_path: Path) -> None:
    settings = recipe.resolve("fat", dataset="digits", epochs=2, lr=0.05, batch_size=64, n_train=300, seed=3)
    loaded = data.take(data.load("digits"), 300)
    seen = {epoch: deepcopy(net.state_dict()) for epoch, net in trained(settings, loaded, "cpu")}
    theirs = load_file(trainer.train(settings, tmp_path / "run", device="cpu") / "last.safetensors")
    assert sorted(seen) == [1, 2]
    assert all(torch.equal(value, theirs[key]) for key, value in seen[2].items())
    assert not all(torch.equal(value, theirs[key]) for key, value in seen[1].items())


def test_a_loss_that_is_not_finite_ends_the_measurement() -> None:
    settings = recipe.resolve("standard", dataset="digits", epochs=2, lr=1e30, batch_size=64, n_train=128)
    with pytest.raises(RunFailed, match="epoch 1"):
        list(trained(settings, data.take(data.load("digits"), 128), "cpu"))


def test_a_stranger_has_most_of_its_nearest_among_other_classes_its_origin_left_out() -> None:
    among = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1], [5.2]])
    y = torch.tensor([0, 0, 0, 1, 1, 1])
    assert strangers(among, among, y, neighbours=2).tolist() == [0] * 6
    moved = torch.tensor([[5.05], [0.1], [0.2], [5.0], [5.1], [0.15]])
    assert strangers(moved, among, y, neighbours=3).tolist() == [1, 0, 0, 0, 0, 1]
    # Example 1's own origin is the nearest to it and is not asked: of the two next one is of each class, no majority.
    alone = torch.tensor([[0.0], [1.0], [1.5]])
    assert strangers(alone, alone, torch.tensor([0, 0, 1]), neighbours=1).tolist() == [0, 1, 1]


def test_evidence_keeps_four_digits_and_leaves_all_else_alone() -> None:
    said = {"a": 1.23456, "b": [12345.6, [0.00012345]], "c": {"d": 2 / 3}, "n": 123456, "text": "1.23456", "no": None}
    kept = {"a": 1.235, "b": [12350.0, [0.0001234]], "c": {"d": 0.6667}, "n": 123456, "text": "1.23456", "no": None}
    assert rounded(said) == kept


def test_evidence_is_grouped_in_the_order_it_comes() -> None:
    runs = [{"epochs": 60, "seed": 0}, {"epochs": 15, "seed": 0}, {"epochs": 60, "seed": 1}]
    assert grouped(runs, "epochs") == {(60,): [runs[0], runs[2]], (15,): [runs[1]]}


def swapped(evidence: Any, first: str, second: str) -> Any:
    """The evidence as if one had been the other."""
    if isinstance(evidence, dict):
        names = {first: second, second: first}
        return {names.get(key, key): swapped(value, first, second) for key, value in evidence.items()}
    return [swapped(one, first, second) for one in evidence] if isinstance(evidence, list) else evidence


def verdicts(found: Any) -> dict[str, str]:
    return {finding.claim.id: finding.verdict for finding in found}


# ------------------------------------------------------------------------------------------------ figure 1


@pytest.fixture(scope="module")
def plane() -> Evidence:
    return [landscape.measured(seed, picture=seed == 0, n=80) for seed in range(3)]


def test_how_far_a_point_is_over_the_boundary_is_the_way_from_where_it_crossed() -> None:
    net, y = Line((1.0, 0.0), -0.5), torch.tensor([0, 0, 0, 0])
    x = images((0.4, 0.2), (0.4, 0.2), (0.4, 0.2), (0.6, 0.2))  # the last is wrong to begin with
    point = images((0.7, 0.2), (0.5001, 0.2), (0.45, 0.9), (0.9, 0.2))
    over = landscape._over(net, x, point, y)
    assert over.tolist() == pytest.approx([0.2, 0.0001, 0, 0], abs=1e-5)


def test_the_field_is_read_from_the_lower_left(plane: Evidence) -> None:
    side = landscape.FIELD - 1
    field = landscape._field(Line((1.0, 2.0), -0.5))
    assert [field[0][0], field[0][side], field[side][0]] == pytest.approx([-0.5, 0.5, 1.5])


def test_early_stopped_pgd_stays_at_the_boundary_that_pgd_leaves_behind(plane: Evidence) -> None:
    for one in plane:
        assert one["figures"]["natural"] == pytest.approx({"wrong": 0, "far": 0, "crossed": 0}, abs=3)
        assert one["figures"]["friendly"]["far"] == 0
        assert one["figures"]["pgd"]["far"] > 40
    assert verdicts(landscape.found(plane)) == {"fig1-far": "holds", "fig1-mixture": "holds"}


def test_figure_1_is_the_same_for_the_same_seed_and_plain_json(plane: Evidence) -> None:
    again = landscape.measured(0, n=80)
    assert again == plane[0] == json.loads(json.dumps(plane[0], allow_nan=False))
    assert ["picture" in one for one in plane] == [True, False, False]


def test_figure_1_with_its_attacks_exchanged_says_the_contrary(plane: Evidence) -> None:
    turned = swapped(plane, "pgd", "friendly")
    assert verdicts(landscape.found(turned)) == {"fig1-far": "does not hold", "fig1-mixture": "does not hold"}


def test_of_one_seed_nothing_is_decided(plane: Evidence) -> None:
    assert set(verdicts(landscape.found(plane[:1])).values()) == {"undecided"}


def drawn_points(figure: Figure) -> list[int]:
    """How many points lie in each panel, those of scatter alone."""
    return [
        sum(len(c.get_offsets()) for c in axis.collections if type(c).__name__ == "PathCollection")  # type: ignore[arg-type]
        for axis in figure.axes
    ]


def test_figure_1_draws_every_point_three_times(plane: Evidence) -> None:
    assert drawn_points(landscape.drawn(plane)) == [80, 80, 80]


# ------------------------------------------------------------------------------------------- figures 3, 11 and 12


@pytest.fixture(scope="module")
def pair() -> Evidence:
    return [mixture.measured("digits", seed, figure="fig3", epochs=4, device="cpu") for seed in range(2)]


def test_the_layers_are_those_that_work_last_in_the_order_they_work() -> None:
    net, x = build("digits-cnn", classes=3, channels=1).eval(), torch.rand(5, 1, 8, 8)
    layers = mixture._layers(net, x, (-4, -2, -1))
    assert list(layers) == ["layer 2 of 5", "layer 4 of 5", "layer 5 of 5"]
    with torch.no_grad():
        assert torch.equal(layers["layer 5 of 5"], net(x))
        assert torch.equal(layers["layer 2 of 5"], nn.Sequential(*list(net)[:4])(x).flatten(1))
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize(
    ("arch", "figure", "names"),
    [
        ("small-cnn", "fig3", ["6 of 8", "7 of 8", "8 of 8"]),
        ("wrn-40-4", "fig12", ["38 of 41", "40 of 41", "41 of 41"]),
    ],
)
def test_the_layers_are_numbered_as_the_paper_numbers_them(arch: str, figure: str, names: list[str]) -> None:
    layers = mixture._layers(build(arch), torch.rand(1, 3, 32, 32), mixture.FIGURES[figure].layers)
    assert list(layers) == [f"layer {name}" for name in names]


def test_two_classes_are_taken_by_their_labels_and_balanced() -> None:
    loaded = data.load("digits")
    shown = mixture._of_classes(loaded, (2, 4))
    assert shown.classes == 2
    assert torch.equal(shown.x_train[shown.y_train == 1], loaded.x_train[loaded.y_train == 4])
    assert torch.equal(shown.x_test[shown.y_test == 0], loaded.x_test[loaded.y_test == 2])
    x, y = mixture._balanced(shown)
    assert y[:4].tolist() == [0, 1, 0, 1]
    assert y.bincount().tolist() == [mixture.EACH] * 2
    assert len(torch.unique(x.flatten(1), dim=0)) == len(x)


def test_figure_3_measures_every_layer_and_keeps_what_is_drawn(pair: Evidence) -> None:
    one = pair[0]
    assert one == json.loads(json.dumps(one, allow_nan=False))
    assert (one["n"], one["arch"], len(one["layers"]), len(one["picture"]["layers"])) == (200, "digits-cnn", 3, 3)
    for layer, places in zip(one["layers"], one["picture"]["layers"], strict=True):
        assert layer["crossed"]["natural"] == layer["mixed"]["natural"] < 5
        assert layer["crossed"]["pgd"] > layer["crossed"]["friendly"]
        assert layer["silhouette"]["natural"] > layer["silhouette"]["pgd"]
        assert [len(places[which]) for which in mixture.TITLES] == [120] * 3
    assert drawn_points(mixture.drawn(pair)) == [120, 240, 240] * 3


def test_figure_3_is_the_same_for_the_same_seed(pair: Evidence) -> None:
    assert mixture.measured("digits", 1, figure="fig3", epochs=4, device="cpu") == pair[1]


def test_a_user_s_own_data_is_measured_at_the_budget_given(npz: Any) -> None:
    made = str(npz(classes=5, n=100))
    one = mixture.measured(made, 0, figure="fig3", eps="8/255", epochs=1, picture=False, device="cpu")
    assert (one["eps"], one["n"]) == ("8/255", 40)
    with pytest.raises(Refused, match="--eps"):
        mixture.measured(made, 0, figure="fig3", epochs=1)


def test_figure_12_shows_three_classes_of_a_network_that_knows_ten() -> None:
    one = mixture.measured("digits", 0, figure="fig12", epochs=1, picture=False, device="cpu")
    assert "picture" not in one
    assert (one["n"], [layer["name"] for layer in one["layers"]][-1]) == (300, "layer 5 of 5")


def layered(seed: int, crossed: tuple[float, float, float], mixed: tuple[float, float, float]) -> dict[str, Any]:
    """Made-up evidence of one layer: shares of natural, PGD's and early-stopped PGD's."""
    by = {"crossed": crossed, "mixed": mixed, "silhouette": (0.5, 0.1, 0.2)}
    layer = {measure: dict(zip(mixture.TITLES, values, strict=True)) for measure, values in by.items()}
    return {"figure": "fig3", "dataset": "digits", "seed": seed, "epochs": 15, "n": 200, "layers": [layer]}


@pytest.mark.parametrize(
    ("crossed", "mixed", "expected"),
    [
        ((0, 90, 40), (0, 1, 5), ("holds", "does not hold", "holds")),
        ((0, 40, 90), (0, 5, 1), ("does not hold", "holds", "holds")),  # the same with the attacks exchanged
        ((0, 90, 40), (30, 90, 80), ("holds", "holds", "does not hold")),
        ((0, 90, 90), (0, 5, 5), ("undecided", "undecided", "holds")),
    ],
)
def test_figure_3_says_what_its_measures_say(crossed: Any, mixed: Any, expected: tuple[str, ...]) -> None:
    spread = (0.0, 0.1, -0.1)  # of seeds, of early-stopped PGD's shares alone
    evidence = [
        layered(seed, (*crossed[:2], crossed[2] + off), (*mixed[:2], mixed[2] + off)) for seed, off in enumerate(spread)
    ]
    assert tuple(verdicts(mixture.found(evidence)).values()) == expected
    assert list(verdicts(mixture.found(evidence))) == ["fig3-crossing", "fig3-mixture", "fig3-apart"]


def test_each_budget_has_its_own_verdicts() -> None:
    runs = [layered(seed, (0, 90 + seed, 40), (0, 50, 4 + seed)) for seed in range(3)]
    found = mixture.found([*runs, *({**run, "epochs": 60} for run in runs[:2])])
    assert [(finding.budget, finding.seeds) for finding in found] == [("15 epochs", 3)] * 3 + [("60 epochs", 2)] * 3


def test_an_unknown_figure_of_layers_is_refused() -> None:
    with pytest.raises(Refused, match="fig11"):
        mixture.measured("digits", 0, figure="fig13")


def test_a_dataset_without_the_classes_shown_is_refused(npz: Any) -> None:
    with pytest.raises(Refused, match=r"classes 2, 4, and .* has 3"):
        mixture.measured(str(npz(classes=3)), 0, figure="fig3")


# ------------------------------------------------------------------------------------------------ theorem 1


def test_the_bounds_of_a_linear_network_are_their_closed_forms() -> None:
    """The greatest loss over the ball lies in a corner: a margin m becomes m - eps |w|_1."""
    net, eps = Line((2.0, -1.0), 0.0), 0.05
    x = images((0.5, 0.4), (0.3, 0.8), (0.4, 0.7), (0.6, 0.5))
    y = torch.tensor([1, 0, 1, 0])  # margins 0.6, 0.2, 0.1 and -0.7, the last an error; eps |w|_1 is 0.15
    margin, reach = torch.tensor([0.6, 0.2, 0.1, -0.7]), 0.15
    y[2] = 0 if (2 * 0.4 - 0.7) < 0 else 1

    def bits(m: Tensor) -> Tensor:
        return torch.log1p(torch.exp(-m)) / math.log(2)

    found = bound.bounds(net, x, y, eps)
    assert found["madry"] == pytest.approx((bits(margin) + bits(margin - reach)).mean().item(), abs=1e-5)
    # TRADES's pushes the last from its prediction, not from its label.
    assert found["trades"] == pytest.approx((bits(margin) + bits(margin.abs() - reach)).mean().item(), abs=1e-5)
    assert found["risk"] == 0.5
    assert found["risk"] < found["friendly"] < found["madry"]


def test_the_loss_is_at_least_one_wherever_a_network_errs() -> None:
    logits = torch.randn(500, 7)
    y = torch.randint(7, (500,))
    wrong = logits.argmax(dim=1) != y
    assert (bound._loss(nn.Identity(), logits, y)[wrong] >= 1).all()
    tie = torch.tensor([[1.0, 1.0, -50.0]])
    assert bound._loss(nn.Identity(), tie, torch.tensor([1])).item() == pytest.approx(1)


@pytest.fixture(scope="module")
def theorem() -> Evidence:
    return [bound.measured("digits", 0, defense=name, epochs=1, n=60, device="cpu") for name in bound.TRAINED]


def test_theorem_1_is_measured_along_training(theorem: Evidence) -> None:
    for one in theorem:
        assert one == json.loads(json.dumps(one, allow_nan=False))
        assert one["curves"].keys() == {"epoch", *bound.LINES}
        assert one["curves"]["epoch"] == [1]
        assert all(0 <= risk <= 1 for risk in one["curves"]["risk"])
        assert all(low < high for low, high in zip(one["curves"]["risk"], one["curves"]["madry"], strict=True))
    assert len(bound.drawn(theorem).axes) == len(bound.TRAINED)


def test_a_run_is_looked_at_so_many_times_whatever_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bound, "LOOKS", 2)
    monkeypatch.setattr(
        bound, "trained", lambda settings, loaded, device: ((e, Line((1.0, 1.0), 0)) for e in range(1, 6))
    )
    monkeypatch.setattr(bound, "bounds", lambda *_: dict.fromkeys(bound.LINES, 1.0))
    assert bound.measured("digits", 0, epochs=5)["curves"]["epoch"] == [2, 5]


def run_of(seed: int, **curves: list[float]) -> dict[str, Any]:
    known = {"epoch": [1.0, 2.0], "madry": [5.0, 5.0], **curves}
    return {"dataset": "digits", "defense": "fat", "seed": seed, "epochs": 2, "n": 100, "eps": "0.3", "curves": known}


def test_theorem_1_goes_by_the_epoch_where_the_bounds_come_closest() -> None:
    def made(friendly: list[float]) -> Evidence:
        return [run_of(s, trades=[5.0, 4 + s / 10], friendly=friendly, risk=[0.9, 0.8]) for s in range(3)]

    holds = {"theorem1-tighter-fat": "holds", "theorem1-above-fat": "holds"}
    assert verdicts(bound.found(made([3.0, 3.0]))) == holds
    assert verdicts(bound.found(made([1.0, 4.5])))["theorem1-tighter-fat"] == "does not hold"
    assert verdicts(bound.found(made([0.8, 3.0])))["theorem1-above-fat"] == "does not hold"
    assert verdicts(bound.found(swapped(made([3.0, 3.0]), "friendly", "trades")))["theorem1-tighter-fat"] != "holds"


# ------------------------------------------------------------------------------------------------ all of them


def test_every_picture_is_measured_by_dataset_seed_and_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []
    for room in (landscape, mixture, bound):
        monkeypatch.setattr(room, "measured", lambda *a, **k: asked.append((a, k)) or {})
    for scale in ("laptop", "paper"):
        for picture in PICTURES.values():
            assert picture.measured("digits", 1, scale)  # type: ignore[arg-type]
    assert {k.get("figure") for _, k in asked} == {None, *mixture.FIGURES}
    assert not any(k.get("picture") for _, k in asked), "only seed 0 keeps what is drawn"
    assert {k["arch"] for _, k in asked if "arch" in k} == {"small-cnn", "wrn-40-4", "resnet-18"}


def test_the_command_measures_pictures_at_the_papers_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fatbench.commands.many import _at_paper_scale
    from fatbench.paper import pictures

    tiny = {"arch": "digits-cnn", "epochs": 1, "lr": 0.1, "batch_size": 64}
    monkeypatch.setitem(pictures.PAPER, "theorem1", tiny)
    for dry_run in (True, False):
        _at_paper_scale(["theorem1"], "digits", 1, tmp_path / "out", 1, "cpu", dry_run)
        assert (tmp_path / "out" / "evidence" / "theorem1-seed0.json").exists() is not dry_run
    told = capsys.readouterr().out
    assert "theorem1: networks of their own" in told
    assert "Theorem 1: " in told
    assert (tmp_path / "out" / "plots" / "theorem1.png").stat().st_size > 1000


def test_all_at_the_papers_scale_is_all_that_the_paper_has() -> None:
    asked = [name for name in names.names() if reproduce.in_the_paper(name)]
    assert {"table1", "fig4", "fig1", "theorem1"} <= set(asked)
    assert not {"cost", "margin", "friendly"} & set(asked)
    assert set(reproduce.shelved(asked)) == set(asked) - set(PICTURES)
