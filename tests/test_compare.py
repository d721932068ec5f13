"""Whether a difference is real: paired on the same samples, by textbook tests, and in words that claim no more."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from fatbench import compare, record, robustbench, verdict
from fatbench.errors import Refused
from fatbench.quantities import number
from fatbench.record import Record
from fatbench.standing import standing
from fatbench.stats import Paired, contrast, holm, ranks, wilson

# ------------------------------------------------------------------------------------------------ the mathematics

COUNTS = st.integers(0, 60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(first=COUNTS, second=COUNTS)
def test_mcnemars_test_is_the_exact_binomial(first: int, second: int) -> None:
    p = Paired(10, first, second, 10).p
    if first + second == 0:
        assert p == 1
        return
    assert p == binomtest(min(first, second), first + second).pvalue
    # Two-sided of a symmetric binomial: twice the smaller tail.
    assert p == pytest.approx(min(1, 2 * binom.cdf(min(first, second), first + second, 0.5)))


def test_the_interval_of_newcombes_example_is_his() -> None:
    # Statistics in Medicine 17, 1998, method 10: 36, 12, 2 and 0 of 50.
    assert Paired(36, 12, 2, 0).interval() == pytest.approx((0.0569, 0.3404), abs=5e-5)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(both=COUNTS, first=COUNTS, second=COUNTS, neither=COUNTS)
def test_the_interval_is_the_published_formula(both: int, first: int, second: int, neither: int) -> None:
    n = both + first + second + neither
    if not n:
        return
    found = Paired(both, first, second, neither)
    p1, p2 = (both + first) / n, (both + second) / n
    (l1, u1), (l2, u2) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    ad_bc = both * neither - first * second
    phi = 0.0 if not margins else (max(ad_bc - n / 2, 0) if ad_bc > 0 else ad_bc) / math.sqrt(margins)
    delta = math.sqrt(max(0, (p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2))
    epsilon = math.sqrt(max(0, (u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2))
    expected = max(-1, p1 - p2 - delta), min(1, p1 - p2 + epsilon)
    assert found.interval() == pytest.approx(expected, abs=1e-9)
    assert found.interval()[0] <= found.difference <= found.interval()[1]
    turned = Paired(both, second, first, neither).interval()
    assert turned == pytest.approx((-expected[1], -expected[0]), abs=1e-9)


def test_several_tests_are_adjusted_as_holm_says() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5, 0.001, 0.02]) == pytest.approx([1, 1, 0.004, 0.06])
    assert holm([0.2]) == [0.2]
    assert holm([]) == []


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda b: (min(b), max(b))), max_size=20))
def test_a_rank_is_one_more_than_the_intervals_wholly_above(intervals: list[tuple[int, int]]) -> None:
    expected = [1 + sum(low > high for low, _ in intervals) for _, high in intervals]
    assert ranks(intervals) == expected


# Two networks on 1,000 samples that stand to each other as fat and madry do on the digits board at eps 0.3, 60 epochs:
# about a third right, 10 to 12 % of the samples right for only one of the two.
N, DISCORDANT, RUNS = 1000, 0.12, 500


def simulated(difference: float, seed: int) -> list[Paired]:
    rng = np.random.default_rng(seed)
    first, second = (DISCORDANT + difference) / 2, (DISCORDANT - difference) / 2
    return [
        Paired(*map(int, counts)) for counts in rng.multinomial(N, [0.3, first, second, 0.7 - DISCORDANT], size=RUNS)
    ]


def exact_power(difference: float) -> float:
    """How often McNemar's exact test says p < 0.05, over every number of discordant samples and every split of them."""
    tilt, power = (1 + difference / DISCORDANT) / 2, 0.0
    for m in range(60, 190):
        k = np.arange(m + 1)
        rejected = np.minimum(1, 2 * binom.cdf(np.minimum(k, m - k), m, 0.5)) < 0.05
        power += binom.pmf(m, N, DISCORDANT) * binom.pmf(k, m, tilt)[rejected].sum()
    return float(power)


def test_a_planted_difference_is_found_and_a_planted_null_is_not_at_the_stated_rates() -> None:
    planted, null = simulated(0.03, seed=1), simulated(0.0, seed=2)
    # The exact test finds 3 points of 1,000 samples at this discordance in 76 % of cases, and nothing in 4 %.
    found, mistaken = exact_power(0.03), exact_power(0.0)
    assert (found, mistaken) == pytest.approx((0.76, 0.04), abs=0.006)
    assert np.mean([run.p < 0.05 for run in planted]) == pytest.approx(found, abs=0.05)
    assert np.mean([run.p < 0.05 for run in null]) == pytest.approx(mistaken, abs=0.02)
    assert all(found.difference > 0 for found in planted if found.p < 0.05)
    # Of seed pairs paired on their samples, the interval holds the truth about 95 times of 100.
    for truth, runs in ((0.03, planted), (0.0, null)):
        inside = np.mean([low <= truth <= high for low, high in (found.interval() for found in runs)])
        assert 0.93 <= inside <= 0.98
    # Comparing intervals of each alone, as a table's ranks do, finds far less: that is what compare is for.
    alone = [wilson(f.both + f.first, N)[0] > wilson(f.both + f.second, N)[1] for f in planted]
    assert np.mean(alone) < 0.1


def test_the_difference_it_calls_detectable_is_found_four_times_of_five() -> None:
    found = Paired(300, 60, 60, 580)
    assert found.detectable() == pytest.approx((1.959964 + 0.841621) * math.sqrt(0.12 / 1000), rel=1e-5)
    assert np.mean([run.p < 0.05 for run in simulated(found.detectable(), seed=3)]) == pytest.approx(0.8, abs=0.05)


# ------------------------------------------------------------------------------------------------ records

Put = Callable[..., Record]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a record: put([the samples it gets wrong under each attack], defense="fat", seed=0, ...)."""
    made = iter(range(100))

    def write(
        broken: dict[str, Sequence[int]], *, defense: str | None = "fat", seed: int = 0, n: int = 100,
        eps: str = "8/255", data: str = "f", status: str = "done", warnings: tuple[str, ...] = (),
        collapsed: bool = False, wrong: Sequence[int] = (), dataset: str = "digits", arch: str = "digits-cnn",
        of: int | None = None,
        said: dict[str, dict[str, Any]] | None = None, fields: dict[str, Any] | None = None, weights: str = "",
    ) -> Record:  # fmt: skip
        number_ = next(made)
        index = np.arange(n)
        y = index % 10
        table = pd.DataFrame(
            {"index": index, "label": y, "clean_pred": np.where(np.isin(index, wrong), (y + 1) % 10, y)}
        )
        for attack, lost in broken.items():
            table[f"{attack}.pred"] = np.where(np.isin(index, lost), (y + 1) % 10, y)
            table[f"{attack}.broken"] = np.isin(index, lost)
        failed = status.startswith("failed")
        correct = {} if failed else record.count(table, list(broken))
        network = {
            "fingerprint": weights or f"weights {number_}", "arch": arch, "defense": defense, "fields": fields or {},
            "settings": {"defense": defense, "seed": seed, "fields": fields or {}}, "seed": seed, "eps_train": eps,
            "selection": "last", "epoch": 5, "epochs": 5, "status": status,
        }  # fmt: skip
        samples = {
            "name": dataset, "fingerprint": data, "shape": (1, 8, 8), "classes": 10, "n": n, "of": of or n,
            "rule": "all",
        }  # fmt: skip
        result = {
            "network": network, "data": samples, "norm": "linf", "eps": eps, "eps_value": number(eps), "seed": 0,
            "chunk": 250, "correct": correct, "accuracies": {name: k / n for name, k in correct.items()}, "stages": {},
            "collapsed": collapsed, "outcomes": "" if failed else record.outcomes_hash(table), "warnings": warnings,
        }  # fmt: skip
        protocol = {"name": "house", "version": 1, "source": "these tests", "attacks": said or {a: {} for a in broken}}
        told = {"id": f"record-{number_:012}", "protocol": protocol, "result": result, "run": {}}
        return record.write(tmp_path / "records", told, None if failed else table)

    return write


@pytest.fixture
def compared(tmp_path: Path) -> Callable[..., compare.Comparison]:
    """Compares records, several of one side as a list."""

    def run(*sides: Record | list[Record]) -> compare.Comparison:
        texts = [",".join(one.id for one in (side if isinstance(side, list) else [side])) for side in sides]
        return compare.compare([compare.find(text, tmp_path / "records") for text in texts])

    return run


def test_the_two_by_two_tables_count_the_same_samples(put: Put, compared: Any) -> None:
    a = put({"fgsm": range(30), "pgd-20": range(50)}, wrong=range(10))
    b = put({"fgsm": range(20, 60), "pgd-20": range(20, 90)}, wrong=range(5, 10), defense="madry")
    (pair,) = compared(a, b).pairs
    assert pair.seeds["clean"] == [Paired(90, 0, 5, 5)]
    assert pair.seeds["fgsm"] == [Paired(40, 30, 20, 10)]
    assert pair.seeds["pgd-20"] == [Paired(10, 40, 20, 30)]
    assert pair.seeds["worst"] == [Paired(10, 40, 15, 35)]  # samples 5-9 are wrong as they are
    assert pair.p == pair.adjusted == binomtest(15, 55).pvalue
    assert pair.classes["n"].tolist() == [10] * 10
    assert pair.classes["fat"].sum() == pytest.approx(10 * 50)
    # Of class 0's samples 0, 10, ..., 90 fat loses five (0 to 40), madry seven (20 to 80).
    assert pair.classes.loc[0, ["fat", "madry", "difference"]].tolist() == [50, 30, 20]


def test_a_clear_difference_is_said_and_an_unclear_one_is_not(put: Put, compared: Any) -> None:
    a, b = put({"pgd-20": range(30)}), put({"pgd-20": range(60)}, defense="madry")
    (pair,) = compared(a, b).pairs
    low, high = pair.seeds["worst"][0].interval()
    said = verdict.verdict(pair, 1)
    assert said[0].startswith(
        f"This fat network is more robust than this madry one in the worst case: +30.0 points [{100 * low:+.1f}, "
        f"{100 * high:+.1f}]; McNemar's exact p ≤ 0.001"
    )
    assert "single training run" in said[1]
    (turned,) = compared(b, a).pairs
    assert verdict.verdict(turned, 1)[0].startswith("This fat network is more robust than this madry one")
    c = put({"pgd-20": range(2, 31)}, defense="mart")
    (close,) = compared(a, c).pairs
    said = verdict.verdict(close, 1)
    assert said[0].startswith("fat and mart are not told apart in the worst case: -1.0 points")
    assert f"less than about {100 * close.seeds['worst'][0].detectable():.1f} points is missed" in said[0]


def test_over_seeds_seeds_and_samples_are_weighed_together(put: Put, compared: Any) -> None:
    fat = [put({"pgd-20": range(30 + seed)}, seed=seed) for seed in range(3)]
    madry = [put({"pgd-20": range(60 - seed)}, seed=seed, defense="madry") for seed in range(3)]
    (pair,) = compared(list(reversed(fat)), madry).pairs
    assert [round(100 * found.difference) for found in pair.seeds["worst"]] == [30, 28, 26]  # seed by seed
    sides = ([np.arange(100) >= 30 + seed for seed in range(3)], [np.arange(100) >= 60 - seed for seed in range(3)])
    assert pair.contrasts["worst"] == pytest.approx(contrast(*sides))
    assert pair.p == pair.contrasts["worst"].p
    said = verdict.verdict(pair, 1)
    assert said[0].startswith(
        "fat is more robust than madry in the worst case: 69.0 ± 1.0 against 41.0 ± 1.0 over 3 and 3 seeds, +28.0 ["
    )
    assert said[1] == "Seed by seed the worst case differs by +30.0, +28.0, +26.0 points: one direction."
    assert "seed by seed" in verdict.markdown(compared(fat, madry))


def test_seeds_that_agree_by_chance_do_not_make_a_difference_sure(put: Put, compared: Any) -> None:
    fat = [put({"pgd-20": range(30)}, seed=seed) for seed in range(2)]
    madry = [put({"pgd-20": [*range(28), 99]}, seed=seed, defense="madry") for seed in range(2)]
    (pair,) = compared(fat, madry).pairs
    assert pair.contrasts["worst"].middle == -1
    assert pair.p > 0.05  # of 100 samples three differ, whatever the seeds say
    assert "are not told apart" in verdict.verdict(pair, 1)[0]


def test_several_seeds_against_one_are_all_weighed(put: Put, compared: Any) -> None:
    fat = [put({"pgd-20": range(30 + 10 * seed)}, seed=seed) for seed in range(3)]
    (pair,) = compared(fat, put({"pgd-20": range(60)}, defense="madry")).pairs
    assert pair.contrasts["worst"].middle == pytest.approx(20)
    said = verdict.verdict(pair, 1)
    assert "60.0 ± 10.0 against 40.0 over 3 and 1 seeds" in said[0]
    assert said[1] == "madry: a single training run; this does not say what another seed would give."


def test_of_several_every_pair_is_compared_and_adjusted(put: Put, compared: Any) -> None:
    sides = [put({"fgsm": range(lost)}, defense=name) for name, lost in (("fat", 30), ("madry", 42), ("cat", 80))]
    found = compared(*sides)
    assert [(p.first.name, p.second.name) for p in found.pairs] == [("fat", "madry"), ("fat", "cat"), ("madry", "cat")]
    assert [p.adjusted for p in found.pairs] == holm([p.p for p in found.pairs])
    assert "among 3 pairs (Holm)" in verdict.verdict(found.pairs[0], 3)[0]


def test_only_attacks_that_mean_the_same_are_compared(put: Put, compared: Any) -> None:
    a = put(
        {"fgsm": range(10), "pgd-20": range(20), "cw-inf": [1]},
        said={"fgsm": {}, "pgd-20": {"steps": 20}, "cw-inf": {}},
    )
    b = put({"fgsm": range(9), "pgd-20": range(90)}, said={"fgsm": {}, "pgd-20": {"steps": 7}}, defense="madry")
    found = compared(a, b)
    assert found.left_out == {
        "pgd-20": "the protocols mean different things by it", "cw-inf": "not everyone was examined under it",
    }  # fmt: skip
    (pair,) = found.pairs
    assert list(pair.seeds) == ["clean", "fgsm", "worst"]
    assert pair.seeds["worst"] == [Paired(90, 0, 1, 9)]
    assert "PGD-20 is left out: the protocols mean different things by it" in verdict.markdown(found)


def test_an_attack_with_its_own_budget_is_compared_but_is_no_worst_case(put: Put, compared: Any) -> None:
    a, b = put({"fgsm": [1], "fgsm@16/255": range(50)}), put({"fgsm": [2], "fgsm@16/255": range(60)}, defense="madry")
    (pair,) = compared(a, b).pairs
    assert pair.seeds["fgsm@16/255"] == [Paired(40, 10, 0, 50)]
    assert pair.seeds["worst"] == [Paired(98, 1, 1, 0)]


def test_doubts_are_said(put: Put, compared: Any) -> None:
    a = put({"fgsm": range(5)}, warnings=("autoattack: gradients may be masked",))
    b = put({"fgsm": range(50)}, defense="madry", collapsed=True)
    said = verdict.verdict(compared(a, b).pairs[0], 1)
    assert "fat's examination warns (autoattack: gradients may be masked): its robust accuracy may be too high." in said
    assert any(sentence.startswith("madry answers no better than one class") for sentence in said)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"data": "g"}, "were examined on other samples"),
        ({"n": 50}, "were examined on other samples"),
        ({"eps": "0.1"}, r"was attacked at eps 8/255, record-\d+ at 0.1"),
        ({"status": "failed: no"}, "has no outcomes to compare"),
    ],
)
def test_what_is_not_comparable_is_refused(other: dict[str, Any], why: str, put: Put, compared: Any) -> None:
    a, b = put({"fgsm": [1]}), put({"fgsm": [1]}, defense="madry", **other)
    with pytest.raises(Refused, match=why) as refused:
        compared(a, b)
    assert "\n" not in str(refused.value)


def test_seeds_of_two_contestants_are_not_one_side(put: Put, compared: Any) -> None:
    a, b, c = put({"fgsm": [1]}), put({"fgsm": [1]}, defense="madry"), put({"fgsm": [1]}, fields={"tau": 3}, seed=1)
    for other in (b, c):
        with pytest.raises(Refused, match="are no seeds of one contestant"):
            compared([a, other], b)
    foreign = [put({"fgsm": [1]}, defense=None, arch=arch) for arch in ("a.py:net", "b.py:net")]
    with pytest.raises(Refused, match="are no seeds of one contestant"):
        compared(foreign, b)
    twice = [put({"fgsm": [1]}, weights="same"), put({"fgsm": [1]}, weights="same")]
    with pytest.raises(Refused, match="are of the same weights"):
        compared(twice, b)


def test_records_are_found_by_id_and_by_path(put: Put, tmp_path: Path) -> None:
    a = put({"fgsm": [1]})
    folder = tmp_path / "records"
    for name in (a.id, a.id.removeprefix("record-"), str(folder / f"{a.id}.json")):
        assert compare.find(name, folder)[0][0].id == a.id
    for name in ("absent", ""):
        with pytest.raises(Refused, match="no record"):
            compare.find(name, folder)
    for end in ("json", "parquet"):
        (folder / "copy").mkdir(exist_ok=True)
        (folder / "copy" / f"{a.id}.{end}").write_bytes((folder / f"{a.id}.{end}").read_bytes())
    with pytest.raises(Refused, match=r"means .* and .*: give a path"):
        compare.find(a.id, folder)
    with pytest.raises(Refused, match="two contestants or more"):
        compare.compare([compare.find(str(folder / f"{a.id}.json"), folder)])


# ------------------------------------------------------------------------------------------------ RobustBench's board


def test_the_place_on_robustbenchs_board_counts_who_is_listed_above(put: Put) -> None:
    said = {"autoattack": {"version": "standard"}}
    found = put({"autoattack": range(480)}, n=1000, of=10_000, said=said, dataset="cifar10", arch="wrn-32-10")
    listed = [m for m in robustbench.published() if (m.dataset, m.norm) == ("cifar10", "linf")]
    wide = [m for m in listed if m.arch == "WideResNet-34-10"]

    def place(models: list[robustbench.Listed], percent: float) -> int:
        return 1 + sum(float(m.robust) > percent for m in models)

    low, high = (100 * bound for bound in wilson(520, 1000))
    (sentence,) = standing(found)
    assert f"It would stand {place(listed, 52)}" in sentence
    assert f"of 77 ({place(listed, high)}" in sentence
    assert f"to {place(listed, low)}" in sentence
    assert "RobustBench's cifar10 linf board at 8/255" in sentence
    assert f"and {place(wide, 52)}" in sentence
    assert "of 17 (" in sentence
    assert "among those with its architecture (wrn-32/34-10)" in sentence
    assert "on 1000 of 10000 samples" in sentence


@pytest.mark.parametrize(
    "other",
    [{"dataset": "digits"}, {"eps": "0.1"}, {"said": {"autoattack": {"version": "plus"}}}, {"said": {}}],
    ids=str,
)
def test_where_no_board_fits_no_place_is_claimed(other: dict[str, Any], put: Put) -> None:
    fitting = {"said": {"autoattack": {"version": "standard"}}, "dataset": "cifar10"}
    assert standing(put({"autoattack": range(50)}, **fitting)) != []
    assert standing(put({"autoattack": range(50)}, **{**fitting, **other})) == []


def test_an_upper_bound_is_neither_compared_nor_placed(put: Put) -> None:
    fitting = {"said": {"autoattack": {"version": "standard"}, "fgsm": {}}, "dataset": "cifar10"}
    whole, other = (
        put({"fgsm": range(40), "autoattack": range(50)}, defense=name, **fitting) for name in ("fat", "cat")
    )
    cut = {"bound": True, "stages": {"autoattack": {"apgd-ce": 50}}}
    bound = other.model_copy(update={"result": other.result.model_copy(update=cut)})
    attacks, left_out = compare._shared([whole, bound])
    assert attacks == ["fgsm"]
    assert left_out == {"autoattack": "of some it is an upper bound: examine with --tier full"}
    assert standing(other)
    assert standing(bound) == []


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_tells_people_and_machines(
    put: Put, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    a, b = put({"fgsm": range(30)}), put({"fgsm": range(60)}, defense="madry|<b>")
    done = cli("compare", a.id, b.id, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "# fat against madry\\|&lt;b>" in done.stdout
    assert "This fat network is more robust" in done.stdout
    told = json.loads(cli("compare", a.id, b.id, "--json", cwd=tmp_path).stdout)
    assert told["pairs"][0]["measures"]["worst"][0]["first"] == 30
    assert told["contestants"][0] == {"name": "fat", "records": [a.id], "standing": []}
    refused = cli("compare", a.id, "absent", cwd=tmp_path)
    assert (refused.returncode, refused.stdout, refused.stderr.count("\n")) == (2, "", 1)
