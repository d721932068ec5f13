"""The paper's claims are judged by what is recorded: the right runs, the right verdicts, the same page each time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fatbench import recipe, record
from fatbench.errors import Refused, Unknown
from fatbench.paper import drawn, names, report, reproduce, verdicts
from fatbench.paper.claims import Claim, Finding, Interval, mean_interval, not_below, sided, trend, within
from fatbench.paper.contestants import DIGITS, REDUCED, WORLDS, Contestant, World, world
from fatbench.paper.experiment import at
from fatbench.paper.experiments import EXPERIMENTS, SAME
from fatbench.paper.pool import Pool
from fatbench.paper.report import told
from fatbench.quantities import number
from fatbench.stats import contrast

N = 200
Put = Callable[..., None]
FAT, MADRY = at("fat"), at("madry")
CLAIM = Claim("c", "Table 0", "the first is above the second")


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a record of one seed: put(FAT(DIGITS, 60), 0, {"pgd-20": 150}), counts of examples that hold."""
    made = iter(range(10000))

    def write(
        whom: Contestant, seed: int, right: dict[str, int], *, clean: int = 190, selection: str = "last",
        status: str = "done", eps: str = "", steps: Sequence[float] = (), version: int | None = None,
        folder: str = "records", offset: int = 0, on: World = DIGITS, precision: str = "",
    ) -> None:  # fmt: skip
        k, index, eps = next(made), np.arange(N), eps or on.eps
        y, place = index % 10, (index + offset) % N
        table = pd.DataFrame({"index": index, "label": y, "clean_pred": np.where(place < clean, y, (y + 1) % 10)})
        for attack, holds in right.items():
            table[f"{attack}.pred"] = np.where(place < holds, y, (y + 1) % 10)
            table[f"{attack}.broken"] = place >= holds
        correct = record.count(table, list(right))
        settings = whom.settings(on, seed).model_dump(mode="json")
        network = {
            "fingerprint": f"weights {k}", "arch": "digits-cnn", "defense": whom.defense, "fields": settings["fields"],
            "seed": seed, "settings": settings, "eps_train": whom.eps, "selection": selection, "epoch": whom.epochs,
            "epochs": whom.epochs, "status": status,
        }  # fmt: skip
        samples = {
            "name": on.dataset, "fingerprint": "f", "shape": (1, 8, 8), "classes": 10, "n": N, "of": N, "rule": "all",
        }  # fmt: skip
        result = {
            "network": network, "data": samples, "norm": "linf", "eps": eps, "eps_value": number(eps), "seed": 0,
            "chunk": 250, "correct": correct, "accuracies": {a: c / N for a, c in correct.items()}, "stages": {},
            "collapsed": clean < 30, "outcomes": record.outcomes_hash(table), "warnings": (),
            "attack_precision": precision or on.attack_precision,
        }  # fmt: skip
        said = {"name": "fatbench-linf", "version": version or 2, "source": "s", "attacks": {a: {} for a in right}}
        training = {
            "epochs": whom.epochs, "seconds": 1.0, "backwards_per_example": float(np.mean(steps)) if steps else None,
            "device": "cpu (x)", "curves": {"steps_per_example": list(steps)},
        }  # fmt: skip
        told = {"id": f"r-{k:012}", "protocol": said, "result": result, "run": {"training": training}}
        record.write(tmp_path / folder, told, table)

    return write


@pytest.fixture
def pool(tmp_path: Path) -> Callable[[], Pool]:
    return lambda: Pool([tmp_path / "records"], DIGITS)


# ------------------------------------------------------------------------------------------------ intervals


def outcomes(rights: Sequence[int], n: int = N) -> list[np.ndarray]:
    return [np.arange(n) < right for right in rights]


def test_a_contrast_is_its_formula() -> None:
    first, second = outcomes([150, 160, 155]), outcomes([140, 130, 150])
    found = contrast(first, second)
    each = 100 * (np.mean(first, axis=0) - np.mean(second, axis=0))
    own = [np.var(each, ddof=1) / N, np.var([75.0, 80, 77.5], ddof=1) / 3, np.var([70.0, 65, 75], ddof=1) / 3]
    freedom = sum(own) ** 2 / (own[0] ** 2 / (N - 1) + own[1] ** 2 / 2 + own[2] ** 2 / 2)
    reach = stats.t.ppf(0.975, freedom) * math.sqrt(sum(own))
    assert found.middle == pytest.approx(7.5)
    assert found.low == pytest.approx(7.5 - reach)
    assert found.high == pytest.approx(7.5 + reach)


def test_a_contrast_turns_round_with_its_sides_and_knows_no_difference_from_itself() -> None:
    first, second = outcomes([150, 160]), outcomes([140, 130])
    one, other = contrast(first, second), contrast(second, first)
    assert other == pytest.approx((-one.middle, -one.high, -one.low, one.p))
    same = contrast(outcomes([150]), outcomes([150]))
    assert same == (0, 0, 0, 1)
    alone = contrast(outcomes([150]), outcomes([140]))
    paired = stats.t.interval(
        0.95, N - 1, 5, np.std(100 * (np.arange(N) < 150) - 100 * (np.arange(N) < 140), ddof=1) / N**0.5
    )
    assert alone[1:3] == pytest.approx(paired)


def test_a_planted_difference_is_found_and_a_planted_null_is_not() -> None:
    rng = np.random.default_rng(0)

    def drawn(mean: float) -> list[np.ndarray]:
        return [rng.random(1000) < mean + rng.normal(0, 0.01) for _ in range(3)]

    null = [sided(*contrast(drawn(0.5), drawn(0.5))[1:3]) for _ in range(300)]
    planted = [sided(*contrast(drawn(0.6), drawn(0.5))[1:3]) for _ in range(100)]
    assert sum(verdict != "undecided" for verdict in null) <= 0.08 * 300
    assert sum(verdict == "holds" for verdict in planted) >= 90


def test_a_measurement_that_two_places_claim_counts_once() -> None:
    def said(place: str, verdict: str = "holds") -> Finding:
        return Finding(Claim("c", place, "a claim"), verdict, "1 [0, 2]", 9, 3, "15 epochs", "x")  # type: ignore[arg-type]

    both = [said("Table 2"), said("Table 3"), said("Figure 16"), said("Figure 20", "undecided")]
    assert told(both) == (
        "3 findings: 2 hold, 0 do not hold, 1 are undecided (rows that repeat one for another place of the paper: 1)"
    )
    assert told(both[1:]) == "3 findings: 2 hold, 0 do not hold, 1 are undecided"


def test_a_trend_is_least_squares() -> None:
    x, y = [0.0, 1, 2, 3, 0, 1, 2, 3], [5.0, 4, 3.5, 2, 5.2, 3.9, 3, 2.5]
    found, fit = trend(x, y), stats.linregress(x, y)
    assert found.middle == pytest.approx(fit.slope)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 6) * fit.stderr)


@pytest.mark.parametrize(
    ("low", "high", "above", "inside", "least"),
    [(0.1, 2, "holds", "undecided", "holds"), (-2, -1.5, "does not hold", "does not hold", "does not hold"),
     (-0.5, 0.5, "undecided", "holds", "holds"), (-3, 3, "undecided", "undecided", "undecided")],
)  # fmt: skip
def test_verdicts_are_where_the_whole_interval_lies(
    low: float, high: float, above: str, inside: str, least: str
) -> None:
    assert (sided(low, high), within(low, high, 1), not_below(low, high, 1)) == (above, inside, least)


def test_one_seed_knows_nothing_of_seeds() -> None:
    assert mean_interval([3.0]) == (3.0, -math.inf, math.inf)
    assert Interval(1.25, -0.5, 3).told() == "+1.2 [-0.5, +3.0]"


# ------------------------------------------------------------------------------------------------ whose records


def test_runs_are_found_by_their_settings_whatever_their_seed(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in (0, 2):
        put(FAT(DIGITS, 60), seed, {"pgd-20": 150})
    put(at("fat", tau=0)(DIGITS, 60), 0, {"pgd-20": 10})
    put(FAT(DIGITS, 15), 0, {"pgd-20": 20})
    found = pool().of(FAT(DIGITS, 60), ["pgd-20"])
    assert found is not None
    assert [run.seed for run in found.runs] == [0, 2]
    assert found.accuracies("pgd-20") == [75, 75]
    assert pool().of(MADRY(DIGITS, 60), ["pgd-20"]) is None


def test_what_several_records_say_of_a_run_is_joined(put: Put, pool: Callable[[], Pool]) -> None:
    put(FAT(DIGITS, 60), 0, {"pgd-20": 150})
    assert pool().missing(FAT(DIGITS, 60), 0, ["pgd-20", "autoattack"]) == ["autoattack"]
    assert pool().missing(FAT(DIGITS, 60), 1, ["pgd-20"]) == ["pgd-20"]
    put(FAT(DIGITS, 60), 0, {"autoattack": 100, "pgd-20@0.4": 80})
    found = pool().of(FAT(DIGITS, 60), ["pgd-20", "autoattack", "pgd-20@0.4"])
    assert found is not None
    assert [found.accuracies(name) for name in ("clean", "pgd-20", "autoattack", "pgd-20@0.4")] == [
        [95],
        [75],
        [50],
        [40],
    ]


@pytest.mark.parametrize(
    "other",
    [{"selection": "best"}, {"status": "failed: NaN"}, {"eps": "0.2"}, {"version": 1}, {"precision": "bf16"}],
)
def test_other_examinations_do_not_count(other: dict[str, Any], put: Put, pool: Callable[[], Pool]) -> None:
    put(FAT(DIGITS, 60), 0, {"pgd-20": 150}, **other)
    assert pool().of(FAT(DIGITS, 60), ["pgd-20"]) is None


@pytest.mark.parametrize("own", ["jobs", "evidence", "records"])
def test_an_out_folder_may_hold_other_files_than_records(own: str, tmp_path: Path, pool: Callable[[], Pool]) -> None:
    (tmp_path / own / "x").mkdir(parents=True)
    (tmp_path / own / "x" / "examine.json" if own != "records" else tmp_path / "examine.json").write_text("{}")
    assert Pool([tmp_path], DIGITS).paths == {}


def test_only_what_is_not_recorded_is_to_be_done(put: Put, pool: Callable[[], Pool]) -> None:
    whole = dict.fromkeys(EXPERIMENTS["friendly"].attacks, 100)
    for defense in ("cat", "fat-cat", "dat"):
        for seed in range(2):
            put(at(defense)(DIGITS, 60), seed, whole)
    put(at("fat-dat")(DIGITS, 60), 0, {name: 100 for name in whole if name != "autoattack"})
    todo = reproduce.missing(["friendly"], pool(), 2)
    assert {name: attacks for name, (_, attacks) in todo.items()} == {
        "fat-dat-eps0.3-epochs60-seed0-whole": ("autoattack",),
        "fat-dat-eps0.3-epochs60-seed1-whole": tuple(whole),
    }
    settings, _ = todo["fat-dat-eps0.3-epochs60-seed1-whole"]
    assert (settings.defense, settings.seed, settings.epochs) == ("fat-dat", 1, 60)


def test_a_run_that_two_experiments_ask_for_is_trained_once(pool: Callable[[], Pool]) -> None:
    apart = [len(reproduce.missing([name], pool(), 1)) for name in ("fig4", "fig5")]
    shared = set(EXPERIMENTS["fig4"].everybody(DIGITS)) & set(EXPERIMENTS["fig5"].everybody(DIGITS))
    assert len(reproduce.missing(["fig4", "fig5"], pool(), 1)) == sum(apart) - len(shared) < sum(apart)


# ------------------------------------------------------------------------------------------------ verdicts


def judged(test: verdicts.Test, pool: Pool, epochs: int = 60) -> tuple[str, str]:
    found = test.finding(pool, epochs, "fatbench reproduce x")
    assert found is not None
    return found.verdict, found.said


def test_swapping_two_defenses_records_turns_the_verdict_round(
    put: Put, pool: Callable[[], Pool], tmp_path: Path
) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"pgd-20": 150 + seed}, clean=195)
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 110 + seed}, clean=190)
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 150 + seed}, clean=195, folder="swapped")
        put(FAT(DIGITS, 60), seed, {"pgd-20": 110 + seed}, clean=190, folder="swapped")
    test = verdicts.versus(CLAIM, FAT, MADRY, "pgd-20")
    assert judged(test, pool())[0] == "holds"
    assert judged(test, Pool([tmp_path / "swapped"], DIGITS))[0] == "does not hold"
    least = verdicts.versus(CLAIM, MADRY, FAT, "pgd-20", margin=1)
    assert judged(least, pool())[0] == "does not hold"
    assert judged(least, Pool([tmp_path / "swapped"], DIGITS))[0] == "holds"


def test_a_finding_says_its_figures_and_on_what_they_stand(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"pgd-20": 150})
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 150})
    found = verdicts.alike(CLAIM, FAT, MADRY, "pgd-20").finding(pool(), 60, "fatbench reproduce x")
    assert found is not None
    assert (found.n, found.seeds, found.budget, found.verdict) == (N, 3, "60 epochs", "holds")
    assert found.said == "PGD-20: fat 75.0 ± 0.0, madry 75.0 ± 0.0; difference +0.0 [+0.0, +0.0]"
    assert verdicts.alike(CLAIM, FAT, MADRY, "pgd-20").finding(pool(), 15, "x") is None


@pytest.mark.parametrize(
    ("robust", "above", "below"),
    [(5, "undecided", "undecided"), (60, "holds", "does not hold"), (20, *["undecided"] * 2)],
)
def test_what_one_constant_answer_keeps_speaks_for_nobody(
    robust: int, above: str, below: str, put: Put, pool: Callable[[], Pool]
) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"pgd-20": robust}, clean=190)
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 20}, clean=20)  # of 200: it gives one answer to all
    for first, second, verdict in ((FAT, MADRY, above), (MADRY, FAT, below)):
        found, said = judged(verdicts.versus(CLAIM, first, second, "pgd-20"), pool())
        assert found == verdict
        assert "madry collapsed in every run" in said
    assert "collapsed" not in judged(verdicts.versus(CLAIM, FAT, MADRY, "clean"), pool())[1]


def test_who_has_nothing_to_lose_is_not_said_to_lose_no_more_than_a_margin(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"pgd-20": 0, "fgsm": 0})
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 2, "fgsm": 30})
    for attack, verdict in (("pgd-20", "undecided"), ("fgsm", "does not hold")):
        found, said = judged(verdicts.versus(CLAIM, FAT, MADRY, attack, 1), pool())
        assert (found, "next to nothing to lose" in said) == (verdict, attack == "pgd-20")


def test_accuracy_that_falls_along_tau_is_a_trend(put: Put, pool: Callable[[], Pool]) -> None:
    line = [(tau, at("fat", tau=tau)(DIGITS, 15)) for tau in range(4)]
    for tau, whom in line:
        for seed in range(2):
            put(whom, seed, {"pgd-20": 100 + 10 * tau}, clean=199 - 5 * tau - seed)
    falls = verdicts.falls(CLAIM, lambda world, epochs: line, "clean", "tau")
    rises = verdicts.falls(CLAIM, lambda world, epochs: line, "pgd-20", "tau")
    assert judged(falls, pool(), 15)[0] == "holds"
    assert judged(rises, pool(), 15)[0] == "does not hold"


@pytest.mark.parametrize(
    ("madry", "fat", "verdict"),
    [((20, 20), (180, 180), "holds"), ((20, 180), (180, 180), "undecided"), ((180, 180), (180, 180), "does not hold"),
     ((20, 20), (20, 20), "does not hold"), ((80, 80), (180, 180), "holds")],
)  # fmt: skip
def test_a_collapse_is_one_answer_or_half_of_the_best(
    madry: tuple[int, ...], fat: tuple[int, ...], verdict: str, put: Put, pool: Callable[[], Pool]
) -> None:
    big = {name: at(name, "0.5")(DIGITS, 60) for name in ("madry", "fat")}
    for seed in range(2):
        put(big["madry"], seed, {"pgd-20": 10}, clean=madry[seed])
        put(big["fat"], seed, {"pgd-20": 10}, clean=fat[seed])
        for small in (MADRY(DIGITS, 60), FAT(DIGITS, 60)):
            put(small, seed, {"pgd-20": 10}, clean=190)
    test = verdicts.collapses(
        CLAIM, at("madry", "0.5"), at("fat", "0.5"), lambda world, epochs: [MADRY(DIGITS, 60), FAT(DIGITS, 60)]
    )
    assert judged(test, pool())[0] == verdict


def test_backward_passes_that_grow_stay_below_k_and_surge(put: Put, pool: Callable[[], Pool]) -> None:
    curve = [1 + 0.05 * epoch + (1.0 if epoch >= 30 else 0) for epoch in range(60)]
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"pgd-20": 10}, steps=[value + 0.01 * seed for value in curve])
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 10}, steps=[10 - value for value in curve])
    assert judged(verdicts.grows(CLAIM, FAT), pool())[0] == "holds"
    assert judged(verdicts.grows(CLAIM, MADRY), pool())[0] == "does not hold"
    assert judged(verdicts.surges(CLAIM, FAT, [0.5]), pool())[0] == "holds"
    assert judged(verdicts.surges(CLAIM, MADRY, [0.5]), pool())[0] == "does not hold"
    for seed in range(3):
        put(FAT(DIGITS, 15), seed, {"pgd-20": 10}, steps=[1 + epoch / 8 + seed / 16 for epoch in range(15)])
    verdict, said = judged(verdicts.surges(CLAIM, FAT, [0.5]), pool(), 15)  # that they grow all the time is no surge
    assert verdict == "undecided"
    assert said.endswith("surge +0.00 [+0.00, +0.00]")
    assert judged(verdicts.cheaper(CLAIM, FAT, 10), pool())[0] == "holds"
    assert judged(verdicts.cheaper(CLAIM, FAT, 2), pool())[0] == "does not hold"


def test_equal_cost_compares_with_what_lies_between_two_budgets(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"autoattack": 120 + seed}, steps=[4] * 60)
        for epochs, right in ((15, 60), (30, 100), (60, 150)):
            put(MADRY(DIGITS, epochs), seed, {"autoattack": right + seed}, steps=[9] * epochs)
    test = verdicts.at_equal_cost(
        CLAIM, FAT, lambda world: [MADRY(world, epochs) for epochs in (15, 30, 60)], "autoattack"
    )
    verdict, said = judged(test, pool())
    assert verdict == "holds"
    assert "fat, 60 epochs: 300 passes an example" in said
    assert "madry, 30 epochs: 300 passes an example" in said
    assert "difference at equal cost +10.0 " in said


def test_outcomes_between_two_budgets_are_mixed_in_proportion(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in range(3):
        put(FAT(DIGITS, 60), seed, {"autoattack": 100 + seed}, steps=[5.75] * 60)
        for epochs, right in ((30, 80), (60, 160)):
            put(MADRY(DIGITS, epochs), seed, {"autoattack": right + seed}, steps=[9] * epochs)
    test = verdicts.at_equal_cost(CLAIM, FAT, lambda world: [MADRY(DIGITS, 30), MADRY(DIGITS, 60)], "autoattack")
    assert "difference at equal cost -4.0 " in judged(test, pool())[1]  # 405 passes: 108 of 200, from 80 and 160
    cheap = verdicts.at_equal_cost(CLAIM, FAT, lambda world: [MADRY(DIGITS, 60), MADRY(DIGITS, 60)], "autoattack")
    assert cheap.finding(pool(), 60, "x") is None


# ------------------------------------------------------------------------------------------------ experiments


def test_every_table_and_figure_that_is_asked_for_is_there() -> None:
    wanted = {f"table{k}" for k in range(1, 5)} | {f"fig{k}" for k in (1, 3, 4, 5, 6, 7, 9, 10, 11, 12, *range(13, 21))}
    assert {name: picture.place for name, picture in reproduce.PICTURES.items()} == names.PICTURED
    assert wanted | {"theorem1", "budget", "cost", "margin", "friendly"} == set(names.names())
    assert all(names.summary(name) for name in names.names())


def test_no_two_claims_share_a_name_and_all_are_about_contestants_that_are_trained() -> None:
    ids = [test.claim.id for own in EXPERIMENTS.values() for test in own.tests]
    assert len(ids) == len(set(ids))
    for name, own in EXPERIMENTS.items():
        assert own.everybody(DIGITS), name
        assert {one.epochs for one in own.everybody(DIGITS)} <= set(DIGITS.budgets), name


def test_the_tables_have_the_papers_rows_at_the_larger_budget_and_of_beta_1(put: Put, pool: Callable[[], Pool]) -> None:
    for seed in range(3):
        put(MADRY(DIGITS, 60), seed, {"pgd-20": 100 + seed}, clean=190)
        put(at("fat", "0.4")(DIGITS, 60), seed, {"pgd-20": 130 + seed}, clean=190)
        put(at("trades", beta=1.0)(DIGITS, 60), seed, {"pgd-20": 100 + seed}, clean=180)
        put(at("fat-trades", beta=1.0)(DIGITS, 60), seed, {"pgd-20": 90 + seed}, clean=195)
    found = {one.claim.id: one.verdict for one in reproduce.findings(["table1", "table2"], pool(), [])}
    assert found == {
        "table1-larger-pgd-20": "holds", "table1-larger-natural": "holds",
        "table2-beta1-natural": "holds", "table2-beta1-pgd-20": "does not hold",
    }  # fmt: skip


def test_every_claim_is_of_contestants_that_its_budgets_train(put: Put, pool: Callable[[], Pool]) -> None:
    everybody = {one for own in EXPERIMENTS.values() for one in own.everybody(DIGITS)}
    attacks = dict.fromkeys({attack for own in EXPERIMENTS.values() for attack in own.under(DIGITS)}, 100)
    for one in everybody:
        put(one, 0, attacks, steps=[4.0] * one.epochs)
    said = pool()
    unheard = [test.claim.id for own in EXPERIMENTS.values() for test in own.tests
               if not any(test.finding(said, epochs, "x") for epochs in own.budgets(DIGITS))]  # fmt: skip
    assert unheard == []


def test_each_experiment_of_the_paper_has_its_recipes() -> None:
    paper = [name for name in (*EXPERIMENTS, *SAME) if name.startswith(("table", "fig"))]
    shelved = reproduce.shelved(paper)
    assert shelved["fig7"] == ["fig-7-fat", "fig-7-madry"]
    assert len(shelved["fig5"]) == 6
    assert {one for own in shelved.values() for one in own} >= {n for n in recipe.shelf() if n.startswith("fig-")}
    runs = reproduce.at_paper_scale(["fig6"], None, 2)
    assert set(runs) == {"fig-6-fat", "fig-6-madry"}
    assert all(settings.dataset == "cifar10" for own in runs.values() for settings in own.values())
    assert len({name for own in runs.values() for name in own}) == sum(len(own) for own in runs.values())


def test_a_world_is_what_a_name_or_a_file_means(tmp_path: Path) -> None:
    (tmp_path / "digits.npz").touch()
    said = {name: world(name) for name in ("digits", "cifar10", "CIFAR10-reduced", str(tmp_path / "digits.npz"))}
    assert list(said.values()) == [DIGITS, REDUCED, REDUCED, REDUCED]


def test_what_is_set_up_on_reduced_cifar10_can_be_trained_and_is_told_in_its_budgets() -> None:
    said = names.asked(["all"], REDUCED)
    assert {"table1", "table2", "table4", "fig4", "fig5", "fig6"} < set(said)
    own = [EXPERIMENTS[name] for name in said]
    settings = [one.settings(REDUCED, 0) for experiment in own for one in experiment.everybody(REDUCED)]
    assert {(s.dataset, s.arch, s.precision) for s in settings} == {("cifar10-reduced", "narrow-cnn", "bf16-mixed")}
    assert {
        "standard",
        "madry",
        "cat",
        "dat",
        "trades",
        "mart",
        "fat",
        "fat-cat",
        "fat-dat",
        "fat-trades",
        "fat-mart",
    } == {s.defense for s in settings}
    assert {s.eps for s in settings} == set(REDUCED.sweep)
    assert EXPERIMENTS["fig6"].under(REDUCED)[-1] == "pgd-20@16/255"


def test_names_scales_and_data_that_do_not_exist_are_refused() -> None:
    with pytest.raises(Unknown, match="did you mean table1"):
        names.asked(["tabel1"])
    with pytest.raises(Refused, match=r"set up for digits and CIFAR-10 .*, not mnist"):
        world("mnist")
    with pytest.raises(Refused, match=r"fig10 is not set up on CIFAR-10, reduced, but table1, .* are"):
        names.asked(["table1", "fig10"], REDUCED)
    with pytest.raises(Refused, match="cost is not in the paper, and has no recipe"):
        reproduce.shelved(["cost"])
    assert names.asked(["fig6", "fig6"]) == ["fig6"]
    assert names.asked(["all"]) == names.names()


def test_networks_examined_on_other_examples_are_refused(put: Put, pool: Callable[[], Pool]) -> None:
    put(FAT(DIGITS, 60), 0, {"pgd-20": 150})
    put(MADRY(DIGITS, 60), 0, {"pgd-20": 150})
    made = pool()
    one, other = made.of(FAT(DIGITS, 60), ["pgd-20"]), made.of(MADRY(DIGITS, 60), ["pgd-20"])
    assert one is not None
    assert other is not None
    other.runs[0].__dict__["right"] = other.runs[0].right.iloc[:10]
    with pytest.raises(Refused, match=r"fat was examined on 200 examples and madry on 10"):
        verdicts.same_examples(one, other)


# ------------------------------------------------------------------------------------------------ the page


def test_the_same_records_give_the_same_page_and_plots(put: Put, tmp_path: Path) -> None:
    for epochs in (15, 30):
        for tau in range(11):
            for seed in range(2):
                right = dict.fromkeys(EXPERIMENTS["fig4"].attacks, 100 + 3 * tau)
                put(at("fat", tau=tau)(DIGITS, epochs), seed, right, clean=190 - tau, steps=[1.0] * epochs)
    written = []
    for name in ("one", "two"):
        out = tmp_path / name / "page"
        report.publish(["fig4", "fig5"], [reproduce.pooled(DIGITS, [tmp_path / "records"])], [tmp_path], out)
        written.append(
            {path.relative_to(out.parent): path.read_bytes() for path in out.parent.rglob("*.*") if path.is_file()}
        )
    assert written[0] == written[1]
    assert {path.name for path in written[0]} == {"page.md", "fig4.png", "fig5-15.png", "fig5-30.png"}
    page = written[0][Path("page.md")].decode()
    assert "| natural accuracy falls as tau grows" in page
    assert "**holds**" in page
    assert "![fig4](page/plots/fig4.png)" in page


def test_each_world_has_its_section_and_its_plots(put: Put, tmp_path: Path) -> None:
    right = dict.fromkeys(EXPERIMENTS["table1"].attacks, 100)
    for on in WORLDS:
        for seed in range(2):
            for defense in ("madry", "fat"):
                clean = 120 if (defense, on) == ("madry", REDUCED) else 190
                put(at(defense)(on, on.budgets[-1]), seed, right, clean=clean, steps=[4.0] * on.budgets[-1], on=on)
            for tau in on.taus:
                put(at("fat", tau=tau)(on, on.short), seed, right, clean=190 - tau, steps=[1.0] * on.short, on=on)
    pools = [reproduce.pooled(on, [tmp_path]) for on in WORLDS]
    found = report.publish(names.names(), pools, [tmp_path], tmp_path / "page")
    page = (tmp_path / "page.md").read_text()
    beside, digits, reduced = re.split("## On (?:digits|CIFAR-10, reduced)\n", page)
    assert "Of 16 claims 15 have one verdict everywhere; held here and refuted there: 0." in beside
    (natural,) = [line for line in beside.splitlines() if line.startswith("| fat has more natural accuracy than madry")]
    assert [cell.strip() for cell in natural.split("|")[3:5]] == ["undecided, 60 epochs", "holds, 8 epochs"]
    assert "`fatbench reproduce table1`" in digits
    assert "`fatbench reproduce table1 --dataset cifar10.npz`" in reduced
    assert "| madry        | 2       | 8        | 5.00" in reduced
    assert "Beside full scale" not in digits
    (trades,) = [line for line in reduced.splitlines() if line.startswith("| madry ") and "Engstrom" in line]
    assert [cell.strip() for cell in trades.split("|")[2:7]] == ["60.0", "50.0", "50.0", "87.30", "45.80"]
    assert len(found) == digits.count("| **") + reduced.count("| **")
    plots = {path.name for path in (tmp_path / "page" / "plots").iterdir()}
    assert plots == {"cost.png", "fig4.png", "fig5-15.png", "cifar10-reduced-fig4.png", "cifar10-reduced-fig5-8.png"}


def test_the_published_page_is_what_its_records_say(root: Path, tmp_path: Path) -> None:
    folders = [root / "docs" / "reproduction", root / "leaderboard" / "records"]
    out = tmp_path / "reproduction"
    report.publish(names.names(), [reproduce.pooled(one, folders) for one in WORLDS], folders, out)
    assert (tmp_path / "reproduction.md").read_text() == (root / "docs" / "reproduction.md").read_text()
    published = {path.name for path in (root / "docs" / "reproduction" / "plots").iterdir()}
    assert {path.name for path in (out / "plots").iterdir()} == published


def test_what_was_measured_for_a_picture_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    own = reproduce.PICTURES["fig1"]

    def counted(dataset: str, seed: int, scale: Any) -> list[dict[str, Any]]:
        asked.append(seed)
        return [{"seed": seed}]

    monkeypatch.setitem(reproduce.PICTURES, "fig1", own._replace(measured=counted))
    reproduce.measure(["fig1", "table1"], "digits", "laptop", 2, tmp_path)
    reproduce.measure(["fig1"], "digits", "laptop", 3, tmp_path)
    assert asked == [0, 1, 2]
    assert [one["seed"] for one in reproduce.evidence("fig1", [tmp_path])] == [0, 1, 2]


def test_pictures_are_measured_by_several_processes_as_by_one(tmp_path: Path) -> None:
    for workers in (1, 2):
        reproduce.measure(["fig1"], "digits", "laptop", 2, tmp_path / str(workers), workers)
    one, two = ({p.name: p.read_bytes() for p in (tmp_path / n / "evidence").iterdir()} for n in ("1", "2"))
    assert one == two
    assert len(one) == 2


def test_a_small_experiment_runs_from_nothing_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = replace(DIGITS, budgets=(1, 1, 1))
    few = replace(
        EXPERIMENTS["margin"], whom=lambda world: [at("fat", tau=0)(DIGITS, 1), at("fat-margin", rho=0.5)(DIGITS, 1)],
        attacks=("fgsm",), budgets=lambda world: (1,),
        tests=(verdicts.versus(CLAIM, at("fat", tau=0), at("fat-margin", rho=0.5), "fgsm"),),
    )  # fmt: skip
    monkeypatch.setitem(EXPERIMENTS, "margin", few)
    out = tmp_path / "out"
    pool = Pool([out], tiny)
    todo = reproduce.missing(["margin"], pool, 1)
    reproduce.carry_out(todo, tiny, out, 1, ["cpu"])
    pool = Pool([out], tiny)
    assert reproduce.missing(["margin"], pool, 1) == {}
    (found,) = report.publish(["margin"], [pool], [out], out)
    assert (found.n, found.seeds, found.budget) == (360, 1, "1 epochs")
    assert "the first is above the second" in (tmp_path / "out.md").read_text()


def test_nothing_recorded_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nothing is recorded of fig4, table1"):
        report.publish(["fig4", "table1"], [reproduce.pooled(DIGITS, [tmp_path])], [tmp_path], tmp_path / "page")
    assert not (tmp_path / "page.md").exists()


def test_the_figures_that_a_finding_says_add_up(put: Put, pool: Callable[[], Pool]) -> None:
    for seed, right in enumerate((100, 100, 160)):  # medians would tell a loss of 5 points
        put(FAT(DIGITS, 60), seed, {"pgd-20": right})
        put(MADRY(DIGITS, 60), seed, {"pgd-20": (110, 120, 70)[seed]})
    said = judged(verdicts.versus(CLAIM, FAT, MADRY, "pgd-20"), pool())[1]
    assert said.startswith("PGD-20: fat 60.0 ± 17.3, madry 50.0 ± 13.2; difference +10.0 ")


def test_accuracy_is_drawn_against_the_cost_of_training(put: Put, pool: Callable[[], Pool]) -> None:
    whole = dict.fromkeys(EXPERIMENTS["cost"].attacks, 100)
    for epochs in DIGITS.budgets:
        put(MADRY(DIGITS, epochs), 0, {**whole, "autoattack": 50 + epochs}, steps=[9] * epochs)
    ((name, figure),) = drawn.figures("cost", EXPERIMENTS["cost"], pool())
    natural, attacked = (axis.lines[0] for axis in figure.axes)
    assert name == "cost"
    assert list(attacked.get_xdata()) == list(natural.get_xdata()) == [150, 300, 600]
    assert list(attacked.get_ydata()) == pytest.approx([32.5, 40, 55])


def test_a_tau_looks_the_same_in_every_panel_of_figure_5(put: Put, pool: Callable[[], Pool]) -> None:
    epochs = DIGITS.short
    for defense, taus in (("fat-trades", (0, 3)), ("fat", (0, 1, 2, 3))):
        for tau in taus:
            put(at(defense, tau=tau)(DIGITS, epochs), 0, {}, steps=[tau + 1.0] * epochs)
    ((_, figure),) = drawn.figures("fig5", EXPERIMENTS["fig5"], pool())
    looks = [{line.get_label(): (line.get_color(), line.get_marker()) for line in axis.lines} for axis in figure.axes]
    assert [len([label for label in look if str(label).startswith("tau")]) for look in looks] == [4, 2]
    assert looks[1]["tau 3"] == looks[0]["tau 3"] != looks[0]["tau 1"]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["tau 0", "tau 1", "tau 2", "tau 3"]
