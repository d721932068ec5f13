"""Tables are made of records and of nothing else: who stands where, under which number, and who is not ranked."""

from __future__ import annotations

import csv
import json
import math
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from fatbench import beside, faces, leaderboard, protocol, publish, record
from fatbench.errors import Refused
from fatbench.quantities import number
from fatbench.record import Record
from fatbench.stats import wilson

N = 60
DIGITS = ("digits", "linf", "8/255", "house v1")
# What a board has once, however many tables.
WHOLE = {"index.md", "index.html", "board.csv", "board.json", "columns.md"}


def outcomes(n: int, right: dict[str, int]) -> pd.DataFrame:
    """Made-up outcomes: the first `right[...]` of n examples hold, so that the worst case is the smallest of all."""
    index = np.arange(n)
    y = index % 10
    columns = {"index": index, "label": y, "clean_pred": np.where(index < right["clean"], y, (y + 1) % 10)}
    for attack in [name for name in right if name != "clean"]:
        broken = index >= right[attack]
        columns |= {f"{attack}.pred": np.where(broken, (y + 1) % 10, y), f"{attack}.broken": broken}
    return pd.DataFrame(columns)


Write = Callable[..., Record]


@pytest.fixture
def put(tmp_path: Path) -> Write:
    """Writes a record: put(clean=50, fgsm=40, defense="fat", seed=1, ...); counts are given by attack."""
    made = iter(range(1000))

    def write(
        right: dict[str, int] | None = None, *, defense: str | None = "fat", arch: str = "digits-cnn", seed: int = 0,
        eps: str = "8/255", dataset: str = "digits", protocol: str = "house", version: int = 1, n: int = N,
        status: str = "done", warnings: tuple[str, ...] = (), ident: str = "", folder: Path | None = None,
        fields: dict[str, Any] | None = None, weights: str = "", chunk: int = 250, collapsed: bool = False,
        **network: Any,
    ) -> Record:  # fmt: skip
        number_ = next(made)
        right = {"clean": 50, "fgsm": 40, "pgd-20": 30} if right is None else right
        table = None if status.startswith("failed") else outcomes(n, right)
        correct = {} if table is None else record.count(table, [name for name in right if name != "clean"])
        settings = (
            {"defense": defense, "arch": arch, "eps": eps, "seed": seed, "fields": fields or {}} if defense else {}
        )
        described = {
            "fingerprint": weights or f"weights {number_}", "arch": arch, "defense": defense, "fields": fields or {},
            "settings": settings, "seed": seed, "eps_train": eps if defense else None, "selection": "last",
            "epoch": 5, "epochs": 10, "status": status, **network,
        }  # fmt: skip
        data = {
            "name": dataset, "fingerprint": "f", "shape": (1, 8, 8), "classes": 10, "n": n, "of": n, "rule": "all",
        }  # fmt: skip
        result = {
            "network": described, "data": data, "norm": "linf", "eps": eps, "eps_value": number(eps), "seed": 0,
            "chunk": chunk, "correct": correct, "accuracies": {name: k / n for name, k in correct.items()},
            "stages": {}, "collapsed": collapsed, "outcomes": "" if table is None else record.outcomes_hash(table),
            "warnings": warnings,
        }  # fmt: skip
        said = {"name": protocol, "version": version, "source": "these tests", "attacks": {}}
        told = {"id": ident or f"record-{number_:03}", "protocol": said, "result": result, "run": {}}
        return record.write(folder or tmp_path / "records", told, table)

    return write


@pytest.fixture
def tables(tmp_path: Path) -> Callable[[], dict[tuple[str, ...], pd.DataFrame]]:
    """The tables of all that was put."""
    return lambda: leaderboard.tables(leaderboard.board(leaderboard.gather(tmp_path / "records")))


@pytest.fixture
def published(tmp_path: Path) -> Callable[..., Path]:
    """The folder of the tables of all that was put."""

    def make(name: str = "board") -> Path:
        publish.publish(leaderboard.gather(tmp_path / "records"), tmp_path / name)
        return tmp_path / name

    return make


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as refused:
        leaderboard.gather(folder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ which table


def test_each_dataset_budget_and_protocol_has_a_table_of_its_own(put: Write, tables: Any) -> None:
    for options in (
        {}, {"dataset": "cifar10"}, {"eps": "0.3"}, {"eps": "0.2"}, {"eps": "16/255"}, {"protocol": "fat"},
        {"version": 2}, {"version": 10},
    ):  # fmt: skip
        put(**options)
    assert list(tables()) == [
        ("cifar10", "linf", "8/255", "house v1"),
        ("digits", "linf", "8/255", "fat v1"),
        ("digits", "linf", "8/255", "house v1"),
        ("digits", "linf", "8/255", "house v10"),
        ("digits", "linf", "8/255", "house v2"),
        ("digits", "linf", "16/255", "house v1"),
        ("digits", "linf", "0.2", "house v1"),
        ("digits", "linf", "0.3", "house v1"),
    ]
    assert all(len(table) == 1 for table in tables().values())


def test_a_budget_printed_otherwise_shares_the_table_and_is_marked(put: Write, tables: Any) -> None:
    put(eps="8/255")
    put(eps="0.031")
    put(eps="0.0314")
    (table,) = tables().values()
    shown = faces.cells(table)
    marks = dict(zip(table["eps"], shown["eps train"], strict=True))
    assert marks == {"8/255": "8/255", "0.031": "0.031 (tested at 0.031)", "0.0314": "0.0314 (tested at 0.0314)"}


@pytest.mark.parametrize(("one", "other"), [("0.2", "1/5"), ("0.2", "51/255"), ("0.30", "0.3"), ("16/510", "8/255")])
def test_one_budget_written_in_two_ways_is_one_class(one: str, other: str, put: Write, tables: Any) -> None:
    put(eps=one)
    put(eps=other)
    assert len(tables()) == 1


def test_the_index_names_every_table_and_every_table_has_its_files(put: Write, tables: Any, published: Any) -> None:
    for options in ({}, {"dataset": "cifar10"}, {"eps": "0.3"}, {"version": 2}):
        put(**options)
    board = published()
    lines = (board / "index.md").read_text().splitlines()
    assert lines[:2] == ["# Leaderboards", ""]
    side = "[digits, linf, eps 8/255, all protocols](digits-linf-8_255.md), 2 rows of all protocols and sources"
    assert lines[2].startswith("- [All of it on one page](index.html)")
    assert lines[3] == f"- {side} side by side ([csv](digits-linf-8_255.csv), [tex](digits-linf-8_255.tex))"
    slugs = {key: publish.slug(key) for key in tables()}
    assert lines[4:] == [
        f"- [{faces.heading(key)}]({name}.md), 1 rows ([csv]({name}.csv), [tex]({name}.tex))"
        for key, name in slugs.items()
    ]
    stems = {publish.slug(key) for key in [*tables(), ("digits", "linf", "8/255")]}
    each = {f"{stem}.{end}" for stem in stems for end in ("md", "csv", "tex")}
    assert {path.name for path in board.iterdir()} == each | WHOLE


def test_tables_of_names_that_look_alike_do_not_overwrite_each_other(put: Write, published: Any) -> None:
    for dataset in ("my data", "my-data", "my/data", "my_data"):
        put(dataset=dataset)
    assert len(list(published().glob("*.tex"))) == 4


# ------------------------------------------------------------------------------------------------ rows and ranks


def test_rows_are_ranked_by_the_worst_case(put: Write, tables: Any) -> None:
    put({"clean": 59, "fgsm": 4}, defense="trades")
    put({"clean": 58, "fgsm": 55}, defense="fat")
    put({"clean": 55, "fgsm": 30}, defense="mart")
    table = tables()[DIGITS]
    assert table[["rank", "defense"]].to_numpy().tolist() == [[1, "fat"], [2, "mart"], [3, "trades"]]
    first = table.iloc[0]
    assert (first["clean"], first["fgsm"], first["worst"]) == pytest.approx((100 * 58 / N, 100 * 55 / N, 100 * 55 / N))
    assert (first["n"], first["seeds"], first["failed"], first["status"]) == (N, 1, 0, "done")


def test_who_overlaps_with_the_best_shares_its_rank(put: Write, tables: Any) -> None:
    # Wilson's intervals of n = 60, in percent: 55 [82, 96], 48 [68, 88], 45 [63, 84], 30 [38, 62], 4 [3, 16].
    for defense, fgsm in (("fat", 48), ("trades", 55), ("mart", 45), ("madry", 4), ("dat", 30), ("cat", 48)):
        put({"clean": 58, "fgsm": fgsm}, defense=defense)
    table = tables()[DIGITS]
    assert table["defense"].tolist() == ["trades", "cat", "fat", "mart", "dat", "madry"]
    assert table["rank"].tolist() == [1, 1, 1, 1, 5, 6]
    for row in table.to_dict("records"):
        assert row["rank"] == 1 + (table["worst_low"] > row["worst_high"]).sum()
    assert "wholly above" in faces.notes(table)[1]


def test_who_is_examined_under_fewer_attacks_is_not_ranked(put: Write, tables: Any) -> None:
    put({"clean": 59, "fgsm": 58}, defense="standard")
    put({"clean": 50, "fgsm": 40, "pgd-20": 30}, defense="fat")
    put({"clean": 50, "pgd-20": 31}, defense="mart")
    table = tables()[DIGITS]
    assert table["defense"].tolist() == ["fat", "standard", "mart"]
    assert table["rank"].tolist() == [1, pd.NA, pd.NA]
    shown = faces.cells(table)
    assert shown["#"].tolist() == ["1", "–", "–"]
    assert shown["PGD-20"].tolist()[1] == "–"
    assert shown["FGSM"].tolist()[2] == "–"


def test_what_somebody_was_examined_under_besides_takes_no_rank_from_the_others(put: Write, tables: Any) -> None:
    said = protocol.load("fatbench-linf")
    house = {"protocol": said.name, "version": said.version}
    whole = {"clean": 50, **dict.fromkeys(said.attacks, 30)}
    put(whole, defense="fat", **house)
    put({**whole, "pgd-50": 29, "pgd-20@16/255": 3}, defense="mart", **house)
    put({"clean": 59, "fgsm": 58, "pgd-50": 57}, defense="standard", **house)
    ((_, table),) = tables().items()
    assert dict(zip(table["defense"], table["rank"].isna(), strict=True)) == {
        "fat": False, "mart": False, "standard": True
    }  # fmt: skip


def test_a_budget_of_its_own_is_needed_for_no_rank(put: Write, tables: Any) -> None:
    put({"clean": 50, "fgsm": 40, "fgsm@16/255": 20}, defense="mart")
    put({"clean": 50, "fgsm": 39}, defense="fat")
    assert not tables()[DIGITS]["rank"].isna().any()


@pytest.mark.parametrize("status", ["failed: the loss was not finite at epoch 1, batch 2", "unfinished"])
def test_a_failed_or_unfinished_run_has_a_row_and_no_number(
    status: str, put: Write, tables: Any, published: Any
) -> None:
    put({"clean": 59, "fgsm": 58}, defense="mart", status=status)
    put({"clean": 50, "fgsm": 40}, defense="fat")
    table = tables()[DIGITS]
    assert table["rank"].tolist() == [1, pd.NA]
    row = table.iloc[1]
    said = "unfinished (5/10)" if status == "unfinished" else status
    assert (row["defense"], row["status"], row["seeds"], row["failed"]) == ("mart", said, 0, 1)
    assert (
        row[[f"{a}{end}" for a in ("clean", "fgsm", "worst") for end in ("", "_spread", "_low", "_high")]].isna().all()
    )
    shown = faces.cells(table).iloc[1]
    assert (shown["natural"], shown["FGSM"], shown["worst case"], shown["#"]) == (said, "–", "–", "–")
    table = "\n".join(
        line for line in (published() / f"{publish.slug(DIGITS)}.md").read_text().splitlines() if "mart" in line
    )
    assert said in table
    assert "98" not in table


def test_a_collapsed_network_is_shown_as_failed(put: Write, tables: Any) -> None:
    put({"clean": 50, "fgsm": 50}, defense="mart", collapsed=True)
    put({"clean": 50, "fgsm": 40}, defense="fat")
    shown = faces.cells(tables()[DIGITS])
    assert shown["#"].tolist() == ["1", "–"]
    assert shown["natural"].tolist()[1] == "failed: collapsed to one answer"
    assert shown["FGSM"].tolist()[1] == "–"


def test_a_table_of_failures_alone_is_a_table(put: Write, tables: Any, published: Any) -> None:
    put(status="failed: no")
    put(status="unfinished", defense="mart")
    assert tables()[DIGITS]["rank"].isna().all()
    assert len(pd.read_csv(published() / f"{publish.slug(DIGITS)}.csv")) == 2


def test_attacks_stand_in_the_papers_order_and_others_after_them(put: Write, tables: Any) -> None:
    names = ["autoattack", "pgd-100", "pgd-7", "cw-inf", "apgd", "fgsm", "pgd-20", "pgd-50"]
    put({"clean": 50, **dict.fromkeys(names, 40)})
    columns = [c.removesuffix("_low") for c in tables()[DIGITS].columns if c.endswith("_low")]
    assert columns == [
        "clean", "fgsm", "pgd-20", "pgd-100", "cw-inf", "autoattack", "apgd", "pgd-7", "pgd-50", "worst",
    ]  # fmt: skip
    assert list(faces.cells(tables()[DIGITS]))[6:12] == [
        "natural", "FGSM", "PGD-20", "PGD-100", "C&W-inf", "AutoAttack",
    ]  # fmt: skip


def test_weights_of_unknown_training_are_contestants_of_their_own(put: Write, tables: Any) -> None:
    for _ in range(2):
        put(defense=None, arch="wrn-34-10")
    table = tables()[DIGITS]
    assert table["defense"].tolist() == ["wrn-34-10", "wrn-34-10"]
    assert table["seeds"].tolist() == [1, 1]


# ------------------------------------------------------------------------------------------------ seeds


def test_seeds_become_one_row_of_median_and_deviation(put: Write, tables: Any) -> None:
    for seed, (clean, fgsm) in enumerate([(50, 40), (53, 31), (47, 37)]):
        put({"clean": clean, "fgsm": fgsm}, seed=seed)
    put({"clean": 50, "fgsm": 39}, defense="mart", seed=0)
    table = tables()[DIGITS]
    assert table["defense"].tolist() == ["mart", "fat"]  # the median counts, not the best seed
    row = table.iloc[1]
    assert (row["seeds"], row["failed"], row["status"]) == (3, 0, "done")
    assert (row["clean"], row["clean_spread"]) == pytest.approx((100 * 50 / N, 100 * 3 / N))
    spread = 100 / N * math.sqrt(((40 - 36) ** 2 + (31 - 36) ** 2 + (37 - 36) ** 2) / 2)
    assert (row["fgsm"], row["fgsm_spread"]) == pytest.approx((100 * 37 / N, spread))
    assert row["ids"] == "record-000 record-001 record-002"
    shown = faces.cells(table).iloc[1]
    low, high = (100 * bound for bound in wilson(37, N))
    assert (shown["FGSM"], shown["seeds"]) == (f"{100 * 37 / N:.1f} ± {spread:.1f} [{low:.1f}, {high:.1f}]", "3")
    assert "median ± standard deviation over training seeds" in faces.notes(table)[0]


def test_a_failed_seed_is_counted_and_spoils_nothing(put: Write, tables: Any) -> None:
    for seed, status in enumerate(["done", "failed: no", "done", "unfinished"]):
        put({"clean": 50, "fgsm": 40 + seed}, seed=seed, status=status)
    row = tables()[DIGITS].iloc[0]
    assert (row["rank"], row["seeds"], row["failed"], row["status"]) == (1, 2, 2, "done")
    assert row["fgsm"] == pytest.approx(100 * 41 / N)
    assert faces.cells(tables()[DIGITS])["seeds"].tolist() == ["2 (+2 failed)"]


@pytest.mark.parametrize(
    "other", [{"fields": {"tau": 1}}, {"selection": "best"}, {"n": 30}, {"defense": "mart"}], ids=str
)
def test_what_differs_in_more_than_the_seed_is_another_row(other: dict[str, Any], put: Write, tables: Any) -> None:
    put({"clean": 30, "fgsm": 20}, seed=0)
    put({"clean": 30, "fgsm": 20}, seed=1, **other)
    assert tables()[DIGITS]["seeds"].tolist() == [1, 1]


def test_one_network_examined_twice_is_one_seed(put: Write, tables: Any) -> None:
    for chunk in (100, 250):
        put(seed=0, weights="the same", chunk=chunk)
    assert tables()[DIGITS]["seeds"].tolist() == [1]


# ------------------------------------------------------------------------------------------------ intervals


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 20_000))
def test_wilsons_interval_is_the_textbooks(data: st.DataObject, n: int) -> None:
    k = data.draw(st.integers(0, n))
    confidence = data.draw(st.sampled_from([0.9, 0.95, 0.99]))
    z = norm.ppf(0.5 + confidence / 2)
    middle, half = k + z * z / 2, z * math.sqrt(k * (n - k) / n + z * z / 4)
    bounds = (max(0, (middle - half) / (n + z * z)), min(1, (middle + half) / (n + z * z)))
    assert wilson(k, n, confidence) == pytest.approx(bounds, abs=1e-12)


def test_a_row_of_one_seed_has_wilsons_interval_in_percent(put: Write, tables: Any) -> None:
    put({"clean": 50, "fgsm": 0, "pgd-20": 37})
    row = tables()[DIGITS].iloc[0]
    for attack, k in (("clean", 50), ("fgsm", 0), ("pgd-20", 37), ("worst", 0)):
        bounds = tuple(100 * bound for bound in wilson(k, N))
        assert (row[f"{attack}_low"], row[f"{attack}_high"]) == pytest.approx(bounds)
    low, high = (100 * bound for bound in wilson(50, N))
    shown = faces.cells(tables()[DIGITS]).iloc[0]
    assert shown["natural"] == f"{100 * 50 / N:.1f} [{low:.1f}, {high:.1f}]"
    assert faces.cells(tables()[DIGITS], brief=True).iloc[0]["natural"] == f"{100 * 50 / N:.1f}"
    assert "Wilson's 95 % interval" in faces.notes(tables()[DIGITS])[0]


# ------------------------------------------------------------------------------------------------ as it is read


def test_doubts_are_marked_and_told_once(put: Write, tables: Any, published: Any) -> None:
    put({"clean": 50, "fgsm": 49}, defense="fat", warnings=("gradients vanish",))
    put({"clean": 50, "fgsm": 48}, defense="mart")
    put({"clean": 50, "fgsm": 47}, defense="trades", warnings=("gradients vanish",))
    put({"clean": 50, "fgsm": 46}, defense="dat", warnings=("collapsed", "odd"))
    shown = faces.cells(tables()[DIGITS])["defense"].tolist()
    assert shown == ["fat [1]", "mart", "trades [1]", "dat [2]"]
    assert faces.notes(tables()[DIGITS])[2:] == ["[1] gradients vanish", "[2] collapsed; odd"]
    text = (published() / f"{publish.slug(DIGITS)}.md").read_text()
    assert text.count("gradients vanish") == 1


def columns(line: str) -> list[str]:
    """A Markdown table's row as its cells."""
    assert (line[0], line[-1]) == ("|", "|")
    return [cell.strip() for cell in line[1:-1].replace("\\\\", "\0").replace("\\|", "\1").split("|")]


@pytest.mark.parametrize("odd", ["a|b", "a\\|b", "<script>alert(1)</script>", "a\nb", "a\r\nb", "a\rb", "| |", "a\\"])
@pytest.mark.parametrize("where", ["defense", "arch", "dataset", "warnings", "status"])
def test_no_name_breaks_the_page(where: str, odd: str, put: Write, tables: Any, published: Any) -> None:
    value: Any = {"warnings": (odd,), "status": f"failed: {odd}"}.get(where, odd)
    put(**{where: value})
    put(fields={"tau": 1}, dataset=odd if where == "dataset" else "digits")
    board = published()
    (page,) = [path for path in board.glob("*.md") if path.name not in WHOLE]
    text = page.read_bytes().decode()
    lines = text.split("\n")
    assert "\r" not in text
    assert "<script" not in text
    assert lines[0].startswith("# ")
    assert lines[1] == ""
    table = [columns(line) for line in lines[2 : lines.index("", 2)]]
    assert len(table) == 4
    assert {len(row) for row in table} == {len(faces.cells(next(iter(tables().values()))).columns)}
    index = (board / "index.md").read_bytes().decode()
    assert "<script" not in index
    assert len(index.splitlines()) == 4


def test_the_page_says_what_the_table_says(put: Write, tables: Any, published: Any) -> None:
    put({"clean": 50, "fgsm": 40}, defense="fat")
    put({"clean": 55, "fgsm": 30}, defense="mart")
    shown = faces.cells(tables()[DIGITS])
    lines = (published() / f"{publish.slug(DIGITS)}.md").read_text().splitlines()
    assert lines[0] == "# digits, linf, eps 8/255, house v1"
    assert columns(lines[2]) == list(shown.columns)
    assert [columns(line) for line in lines[4:6]] == shown.to_numpy().tolist()
    assert lines[7].startswith("- Accuracy in percent at the last iterate")


def test_the_csv_holds_the_tables_numbers(put: Write, tables: Any, published: Any) -> None:
    for seed in range(3):
        put({"clean": 50 + seed, "fgsm": 40 - seed}, defense='f,"a"t|x\ny', seed=seed)
    put({"clean": 59, "fgsm": 41}, defense="mart", warnings=("a, doubt", "another"))
    put({"clean": 58}, defense="trades")
    put(defense="dat", status="failed: no")
    table = tables()[DIGITS]
    path = published() / f"{publish.slug(DIGITS)}.csv"
    types = {column.name: column.dtype for column in faces.columns_of(table)}
    back = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=[""])
    blank = {name: "" for name, dtype in types.items() if dtype == "string"}
    pd.testing.assert_frame_equal(back.fillna(blank), table[list(types)].fillna(blank))
    with path.open(newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {len(back.columns)}


def test_publishing_is_the_same_to_the_byte_wherever_the_records_lie(
    put: Write, tmp_path: Path, published: Any
) -> None:
    made = [
        (seed, defense, options)
        for seed in range(2) for defense in ("fat", "mart")
        for options in ({}, {"eps": "0.3"}, {"arch": "small-cnn"}, {"warnings": (f"doubt {seed}",), "fields": {"a": 1}})
    ]  # fmt: skip
    for number_, (seed, defense, options) in enumerate(made):
        put(seed=seed, defense=defense, ident=f"r-{number_}", weights=f"w-{number_}", **options)
    first = {path.name: path.read_bytes() for path in published().iterdir()}
    assert {path.name: path.read_bytes() for path in published().iterdir()} == first
    shuffled = list(enumerate(made))
    random.Random(0).shuffle(shuffled)
    for number_, (seed, defense, options) in shuffled:
        folder = tmp_path / "moved" / f"{number_ % 3}" / f"{9 - number_ % 5}"
        put(seed=seed, defense=defense, ident=f"r-{number_}", weights=f"w-{number_}", folder=folder, **options)
    publish.publish(leaderboard.gather(tmp_path / "moved"), tmp_path / "again")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == first


# ------------------------------------------------------------------------------------------------ refusals


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    assert f"no folder of records at {tmp_path / 'absent'}" in refusal(tmp_path / "absent")
    assert "no record in" in refusal(tmp_path)
    (tmp_path / "file").write_text("")
    assert "no folder of records" in refusal(tmp_path / "file")


@pytest.mark.parametrize("foreign", ["{}", '{"cells": []}', "[]", "not JSON", ""])
def test_a_json_that_is_no_record_is_refused_by_name(foreign: str, put: Write, tmp_path: Path) -> None:
    put()
    (tmp_path / "records" / "package.json").write_text(foreign)
    assert "package.json is no record" in refusal(tmp_path / "records")


def test_a_changed_record_is_refused_by_name(put: Write, tmp_path: Path) -> None:
    path = tmp_path / "records" / f"{put().id}.json"
    path.write_text(path.read_text().replace('"fat"', '"trades"'))
    assert f"{path} was changed after it was written" in refusal(tmp_path / "records")


def test_two_records_of_one_id_that_differ_are_refused_and_a_copy_is_not(put: Write, tmp_path: Path) -> None:
    put(ident="same")
    put(ident="same", folder=tmp_path / "records" / "copy", weights="weights 0")
    assert len(leaderboard.gather(tmp_path / "records")) == 1
    put({"clean": 59, "fgsm": 59}, ident="same", folder=tmp_path / "records" / "other")
    assert "two different records are called same" in refusal(tmp_path / "records")


def test_what_an_examination_has_under_way_is_passed_over(put: Write, tmp_path: Path) -> None:
    put()
    for name in (".hidden.json", ".record.json.77.tmp", "record-9.partial.jsonl", "note.txt"):
        (tmp_path / "records" / name).write_text("{")
    assert len(leaderboard.gather(tmp_path / "records")) == 1


def test_a_protocol_without_a_name_is_refused(put: Write, tmp_path: Path) -> None:
    path = tmp_path / "records" / f"{put().id}.json"
    said = json.loads(path.read_text())
    del said["protocol"]["name"]
    path.write_text(json.dumps(said))
    with pytest.raises(Refused, match=r"protocol\.name: Field required"):
        leaderboard.gather(tmp_path / "records")


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_and_writes_the_tables(
    put: Write, tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    put({"clean": 50, "fgsm": 40}, defense="fat")
    put({"clean": 55, "fgsm": 30}, defense="[bold]mart[/]")
    put(defense="trades", status="failed: no", dataset="cifar10")
    done = cli("leaderboard", "records", "--out", "board", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    for said in ("digits, linf, eps 8/255, house v1", "[bold]mart[/]", "83.3", "66.7", "failed: no", "natural"):
        assert said in done.stdout
    assert done.stdout.splitlines()[-1] == "written: board/index.md and board/index.html"
    assert done.stdout.index("fat") < done.stdout.index("[bold]mart[/]")
    assert len(list((tmp_path / "board").iterdir())) == 6 + len(WHOLE)


def test_the_command_refuses_in_one_line(tmp_path: Path, cli: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    done = cli("leaderboard", "absent", "--out", "board", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fatbench: no folder of records at absent")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "board").exists()


def test_the_published_tables_are_what_their_records_say(root: Path, tmp_path: Path) -> None:
    board = root / "leaderboard"
    others = beside.lines(["reported", "robustbench"])
    publish.publish(leaderboard.gather(board / "records"), tmp_path, others)
    derived = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    published = {path.name: path.read_bytes() for path in board.iterdir() if path.is_file()}
    del published["README.md"]
    assert derived == published


def test_protocols_of_one_name_that_differ_are_not_ranked_together(put: Write, tmp_path: Path) -> None:
    for defense, steps in (("fat", 1), ("mart", 77)):
        path = tmp_path / "records" / f"{put(defense=defense).id}.json"
        said = json.loads(path.read_text())
        said["protocol"]["attacks"] = {"fgsm": {"steps": steps}}
        said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
        path.write_text(json.dumps(said))
    with pytest.raises(Refused, match="mean different things by fgsm"):
        publish.publish(leaderboard.gather(tmp_path / "records"), tmp_path / "board")


def test_an_unfinished_examination_beside_the_finished_one_is_no_failure(put: Write, tables: Any) -> None:
    put(seed=0, weights="half way", status="unfinished")
    put(seed=0, weights="finished")
    row = tables()[DIGITS].iloc[0]
    assert (row["seeds"], row["failed"], row["status"]) == (1, 0, "done")
