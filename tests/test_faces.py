"""One frame, many faces: each says the same, none is broken by a name, and a changed record reaches none of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from fatbench import beside, faces, leaderboard, page, plots, protocol, publish, record
from fatbench.errors import Refused
from fatbench.evaluation import examiner
from fatbench.quantities import number
from fatbench.record import Record

N = 200
CURVES = {"val_natural": [0.5, 0.7, None], "val_pgd-10": [0.1, 0.3, 0.4], "steps_per_example": [2.0, 4.0, 5.0]}
TRAINING = {"epochs": 3, "seconds": 90.0, "backwards_per_example": 4.5, "device": "cpu (x)", "curves": CURVES}
ODD = [
    "a|b", "</script><script>alert(1)</script>", "<b>bold</b>", "$x_1$ & 50% #1 {~^\\}", "[1cm] first", "a\nb\r\nc",
    "\u2028line", "'\"`", "=cmd()", "{{ 7 * 7 }}", "-->", "\\input{/etc/passwd}",
]  # fmt: skip

Put = Callable[..., Record]


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a record: put({"pgd-20": 150}, defense="fat", seed=1, ...), counts of examples that hold."""
    made = iter(range(1000))

    def write(
        right: dict[str, int], *, defense: str = "fat", seed: int = 0, eps: str = "0.3", eps_train: str = "0.3",
        selection: str = "last", fields: dict[str, Any] | None = None, training: Any = TRAINING, clean: int = 190,
        warnings: tuple[str, ...] = (), dataset: str = "digits", arch: str = "digits-cnn",
        status: str = "done", settings: dict[str, Any] | None = None, source: str = "these tests",
        protocol: str = "house", weights: str | None = None, collapsed: bool = False, half: bool = False,
    ) -> Record:  # fmt: skip
        k = next(made)
        index = np.arange(N)
        y = index % 10
        table = pd.DataFrame({"index": index, "label": y, "clean_pred": np.where(index < clean, y, (y + 1) % 10)})
        for attack, holds in right.items():
            table[f"{attack}.pred"] = np.where(index < holds, y, (y + 1) % 10)
            table[f"{attack}.broken"] = index >= holds
        correct = record.count(table, list(right))
        network = {
            "fingerprint": weights or f"weights {k}", "arch": arch, "defense": defense, "fields": fields or {},
            "seed": seed,
            "settings": {"defense": defense, "seed": seed, "eps": eps_train, "fields": fields or {}} | (settings or {}),
            "eps_train": eps_train, "selection": selection, "epoch": 3, "epochs": 3, "status": status,
        }  # fmt: skip
        samples = {
            "name": dataset, "fingerprint": "f", "shape": (1, 8, 8), "classes": 10, "n": N, "of": N, "rule": "all",
        }  # fmt: skip
        result = {
            "network": network, "data": samples, "norm": "linf", "eps": eps, "eps_value": number(eps), "seed": 0,
            "chunk": 250, "correct": correct, "accuracies": {a: c / N for a, c in correct.items()}, "stages": {},
            "collapsed": collapsed, "outcomes": record.outcomes_hash(table),
            "warnings": (*warnings, *([record.IN_BF16] if half else [])),
            **({"attack_precision": "bf16"} if half else {}),
        }  # fmt: skip
        said = {"name": protocol, "version": 1, "source": source, "attacks": {attack: {} for attack in right}}
        run = {"device": "cpu (x)"} | ({"training": training} if training else {})
        told = {"id": f"r-{k:012}", "protocol": said, "result": result, "run": run}
        return record.write(tmp_path / "records", told, table)

    return write


@pytest.fixture
def gathered(tmp_path: Path) -> Callable[[], list[Record]]:
    return lambda: leaderboard.gather(tmp_path / "records")


def one_row(records: list[Record]) -> dict[str, Any]:
    (row,) = leaderboard.board(records).to_dict("records")
    return {str(name): value for name, value in row.items()}


# ------------------------------------------------------------------------------------------------ the columns


def test_every_column_is_documented_and_has_its_type(put: Put, gathered: Any) -> None:
    put({"fgsm": 150, "autoattack": 100})
    whole = leaderboard.board(gathered(), beside.lines(["reported"]))
    told = faces.columns_of(whole)
    assert [column.name for column in told] == [name for name in whole.columns if name != "printed"]
    assert {column.name: column.dtype for column in told} == {c.name: str(whole[c.name].dtype) for c in told}
    assert all(column.meaning for column in told)


def test_the_effort_of_training_is_told_where_records_tell_it(put: Put, gathered: Any) -> None:
    for seed, seconds in enumerate((90.0, 100.0, 200.0)):
        put({"fgsm": 150}, seed=seed, training={**TRAINING, "seconds": seconds})
    row = one_row(gathered())
    assert (row["backwards_per_example"], row["train_seconds"], row["train_device"]) == (4.5, 100.0, "cpu (x)")
    shown = faces.cells(leaderboard.board(gathered())).iloc[0]
    assert (shown["gradients / example"], shown["training"], shown["trained on"]) == ("4.5", "100 s", "cpu (x)")


def test_without_a_run_folder_the_effort_is_unknown(put: Put, gathered: Any) -> None:
    put({"fgsm": 150}, training=None)
    row = one_row(gathered())
    assert pd.isna(row["backwards_per_example"])
    assert pd.isna(row["train_seconds"])
    assert "training" not in faces.cells(leaderboard.board(gathered()))


@pytest.mark.parametrize(
    "broken", [{"epochs": 3}, "three days", {**TRAINING, "seconds": -1}, {**TRAINING, "device": 7}]
)
def test_a_broken_account_of_training_is_refused(broken: Any, put: Put, gathered: Any) -> None:
    put({"fgsm": 150}, training=broken)
    with pytest.raises(Refused, match=r"the record r-0+ has a broken run\.training") as refused:
        leaderboard.board(gathered())
    assert "\n" not in str(refused.value)


def test_the_gap_between_pgd_and_autoattack_is_the_median_of_each_seeds_own(put: Put, gathered: Any) -> None:
    for seed, (pgd, auto) in enumerate(((150, 100), (140, 120), (160, 100))):
        put({"pgd-20": pgd, "autoattack": auto}, seed=seed)
    assert one_row(gathered())["pgd_gap"] == pytest.approx(25)


def test_what_another_attack_found_of_the_same_networks_is_the_best_known(put: Put, gathered: Any) -> None:
    put({"fgsm": 150, "autoattack": 100}, weights="w")
    assert "best known" not in faces.cells(leaderboard.board(gathered()))
    put({"external": 80}, weights="w", source="by hand", protocol="external-0a1b2c3d")
    whole = leaderboard.board(gathered())
    row = {str(k): v for k, v in whole[whole["protocol"] == "house v1"].iloc[0].items()}
    assert (row["worst"], row["best_known"]) == (50, 40)
    assert "best known 40.0, by external-0a1b2c3d v1" in row["notes"]
    assert list(faces.cells(whole)["best known"]) == ["40.0", "40.0"]


def test_what_is_unset_and_what_is_not_said_are_one_contestant(put: Put, gathered: Any) -> None:
    put({"fgsm": 150}, seed=0, settings={"n_train": None, "fields": {"step_size": None, "steps": 10}})
    put({"fgsm": 150}, seed=1, settings={"fields": {"steps": 10}})
    assert one_row(gathered())["seeds"] == 2


def test_another_budget_or_network_says_nothing_of_this_one(put: Put, gathered: Any) -> None:
    put({"fgsm": 150, "autoattack": 100}, weights="w")
    put({"external": 80}, weights="w", eps="0.4", protocol="external-0a1b2c3d")
    put({"external": 70}, weights="v", protocol="external-0a1b2c3d")
    whole = leaderboard.board(gathered())
    assert whole[whole["protocol"] == "house v1"]["best_known"].tolist() == [50]


def test_masking_is_a_verdict_only_where_autoattack_looked(put: Put, gathered: Any) -> None:
    put({"fgsm": 150}, defense="fat", warnings=("fgsm: odd",))
    put({"fgsm": 150, "autoattack": 90}, defense="madry", warnings=("fgsm: odd",))
    put({"fgsm": 150, "autoattack": 90}, defense="mart", warnings=("autoattack: Square broke 7 of 200",))
    for seed in range(2):
        put({"fgsm": 150, "autoattack": 90}, defense="cat", seed=seed, warnings=("autoattack: zero gradient",)[:seed])
    found = leaderboard.board(gathered()).set_index("defense")["masking"].to_dict()
    assert found == {"fat": "", "madry": "no sign", "mart": "suspected", "cat": "suspected, 1 of 2"}


def test_a_bound_is_shown_as_one_and_not_ranked(put: Put, gathered: Any, tmp_path: Path) -> None:
    put({"pgd-20": 150, "autoattack": 100})
    path = tmp_path / "records" / f"{put({'pgd-20': 150, 'autoattack': 120}, defense='mart').id}.json"
    said = json.loads(path.read_text())
    said["result"]["bound"] = True
    said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
    path.write_text(json.dumps(said))
    table = leaderboard.board(gathered())
    shown = faces.cells(table, brief=True).set_index("defense")
    assert shown.loc["mart", ["#", "PGD-20", "AutoAttack", "worst case"]].tolist() == ["–", "75.0", "≤ 60.0", "≤ 60.0"]
    assert any(note.startswith("`≤`") for note in faces.notes(table))


def test_best_and_last_of_one_training_tell_their_gap(put: Put, gathered: Any) -> None:
    for seed in range(3):
        put({"fgsm": 100 + seed}, seed=seed, selection="last")
        put({"fgsm": 120 + seed}, seed=seed, selection="best")
    put({"fgsm": 80}, defense="madry")
    whole = leaderboard.board(gathered()).set_index(["defense", "selection"])["best_minus_last"]
    assert whole["fat", "last"] == whole["fat", "best"] == pytest.approx(10)
    assert pd.isna(whole["madry", "last"])


def test_rows_of_one_defense_are_told_apart_by_what_differs(put: Put, gathered: Any) -> None:
    put({"fgsm": 150}, fields={"tau": 1, "steps": 10}, settings={"lr": 0.1})
    put({"fgsm": 140}, fields={"tau": [["0", 0], ["1/2", 3]], "steps": 10}, settings={"lr": 0.1})
    put({"fgsm": 130}, fields={"tau": 1, "steps": 10}, settings={"lr": 0.01})
    put({"fgsm": 120}, defense="trades", fields={"beta": 6.0})
    assert leaderboard.board(gathered())["variant"].tolist() == [
        "lr 0.1, tau 1", "lr 0.1, tau 0:0 1/2:3", "lr 0.01, tau 1", "beta 6",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------ all faces


@pytest.mark.parametrize("odd", ODD)
def test_no_name_breaks_any_face(odd: str, put: Put, gathered: Any, tmp_path: Path) -> None:
    put({"fgsm": 150, "pgd-20": 120}, defense=odd, arch=odd, warnings=(odd,), dataset=odd, source=odd)
    put({"fgsm": 150, "pgd-20": 100}, defense="madry", dataset=odd)
    publish.publish(gathered(), tmp_path / "board", beside.lines(["reported"]))
    board = tmp_path / "board"
    told = json.loads((board / "board.json").read_text())
    assert odd in {row["defense"] for row in told["rows"]}
    back = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    assert odd.replace("\r\n", "\n") in {name.replace("\r\n", "\n") for name in back["defense"]}
    tex = "".join(path.read_text() for path in board.glob("*.tex"))
    for line in tex.splitlines():
        if not line.startswith("%"):
            assert not re.search(r"(?<!\\)[&%#$_]", line.replace(" & ", "").replace(r"$\pm$", "").replace(r"$\le$", ""))
            assert "\\input{/" not in line
            assert not line.lstrip().startswith("[")
    html = (board / "index.html").read_text()
    assert html.count("<script") == 2  # the data and the code
    assert html.count("</script>") == 2
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.S)
    assert data
    assert odd in {row["defense"] for row in json.loads(data[1])["rows"]}
    assert "49" not in html.partition("<body>")[2].partition("<main>")[0]


def test_latex_has_a_booktabs_table_with_the_cells(put: Put, gathered: Any) -> None:
    put({"fgsm": 150})
    ((key, table),) = leaderboard.tables(leaderboard.board(gathered())).items()
    text = faces.latex(key, table)
    assert text.startswith("% digits, linf, eps 0.3, house v1\n")
    for rule in ("\\begin{tabular}", "\\toprule", "\\midrule", "\\bottomrule", "\\end{tabular}"):
        assert text.count(rule) == 1
    assert "& 75.0 " in text
    for seed in range(3):
        put({"fgsm": 150}, defense="mart", seed=seed)
        put({"fgsm": 140}, defense="cat", seed=seed)
    ((key, table),) = leaderboard.tables(leaderboard.board(gathered()[1:])).items()
    text = faces.latex(key, table)
    assert "% network digits-cnn, source measured, eps train 0.3, epochs 3, n 200, seeds 3\n" in text
    assert r"& 75.0 $\pm$ 0.0 " in text
    assert "digits-cnn &" not in text


def test_json_says_the_frame_and_its_columns(put: Put, gathered: Any) -> None:
    put({"fgsm": 150})
    put({"fgsm": 150}, defense="mart", status="unfinished")
    whole = leaderboard.board(gathered())
    told = json.loads(json.dumps(faces.as_json(whole), allow_nan=False))
    assert told["schema"] == faces.SCHEMA
    assert [column["name"] for column in told["columns"]] == list(told["rows"][0])
    assert [(row["rank"], row["fgsm"]) for row in told["rows"]] == [(1, 75.0), (None, None)]


def test_the_page_holds_every_record_protocol_and_curve(put: Put, gathered: Any) -> None:
    base = put({"fgsm": 150}, defense="madry")
    friend = put({"fgsm": 160}, defense="fat", fields={"tau": 0})
    put({"fgsm": 160}, defense="fat", eps_train="0.1")  # trained otherwise: no counterpart
    text = page.html(leaderboard.board(gathered()), gathered())
    told = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    assert told["records"][base.id]["curves"]["val_natural"] == [[1, 0.5], [2, 0.7]]
    assert told["records"][base.id]["hash"] == base.hash
    assert told["protocols"]["house v1"]["attacks"] == {"fgsm": {}}
    (arrow,) = told["arrows"]
    assert [told["rows"][at]["ids"] for at in arrow] == [base.id, friend.id]
    for asked in ("http:", "https:", "src=", "@import", "url("):
        assert asked not in text.replace("http://www.w3.org/2000/svg", "").partition('id="data"')[0]


# ------------------------------------------------------------------------------------------------ tampering


def _nan(said: dict[str, Any]) -> None:
    said["result"]["accuracies"]["fgsm"] = float("nan")


def _nan_inside(said: dict[str, Any]) -> None:
    said["protocol"]["attacks"]["fgsm"] = {"step_size": float("nan")}


def _accuracy(said: dict[str, Any]) -> None:
    said["result"]["correct"]["fgsm"] += 1
    said["result"]["accuracies"]["fgsm"] = said["result"]["correct"]["fgsm"] / N


def _negative(said: dict[str, Any]) -> None:
    said["result"]["correct"]["fgsm"] = -1


def _protocol(said: dict[str, Any]) -> None:
    said["protocol"]["name"] = "dat-2019"


def _relabelled(said: dict[str, Any]) -> None:
    version = protocol.load("fatbench-linf").version
    otherwise = {"start": "uniform", "step_size": "eps"}
    said["protocol"] |= {"name": "fatbench-linf", "version": version, "attacks": {"fgsm": otherwise}}


# Somebody who knows how the hash is made still has the outcomes and the shelf of protocols against him.
RESEALED = [_accuracy, _negative, _relabelled]


@pytest.mark.parametrize(
    ("change", "sealed"),
    [
        *((change, False) for change in (_nan, _nan_inside, _accuracy, _negative, _protocol)),
        *((c, True) for c in RESEALED),
    ],
)
def test_a_changed_record_reaches_no_face(change: Any, sealed: bool, put: Put, gathered: Any, tmp_path: Path) -> None:
    path = tmp_path / "records" / f"{put({'fgsm': 150}).id}.json"
    said = json.loads(path.read_text())
    change(said)
    if sealed:
        said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
    path.write_text(json.dumps(said))
    with pytest.raises(Refused) as refused:
        publish.publish(gathered(), tmp_path / "board")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "board").exists()


def test_what_a_protocol_file_says_stands_in_the_record_of_its_examination() -> None:
    for name in protocol.shelf():
        known = protocol.load(name)
        for attack in known.attacks:
            settings = json.loads(json.dumps(asdict(examiner(attack, known.settings_for(attack)))))
            assert known.settings_for(attack).items() <= settings.items()


def test_attacks_that_see_only_whom_another_left_standing_have_no_accuracy(
    put: Put, gathered: Any, tmp_path: Path
) -> None:
    made = put({"multitargeted": 100, "autoattack": 180})
    path = tmp_path / "records" / f"{made.id}.json"
    said = json.loads(path.read_text())
    said["protocol"]["attacks"] = {
        "multitargeted": {"standing_after": "clean"}, "autoattack": {"standing_after": "multitargeted"},
    }  # fmt: skip
    said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
    path.write_text(json.dumps(said))
    whole = leaderboard.board(gathered())
    assert faces.attacks_of(whole) == ["clean", "worst"]
    assert (whole["worst"].iloc[0], whole["masking"].iloc[0], whole["rank"].iloc[0]) == (50, "no sign", 1)


def test_what_attacks_were_made_in_is_a_column_and_no_doubt(put: Put, gathered: Any) -> None:
    put({"fgsm": 100}, half=True)
    put({"fgsm": 100}, defense="madry", half=True, warnings=("autoattack: odd",))
    ((key, table),) = leaderboard.tables(leaderboard.board(gathered())).items()
    assert table["crafted_in"].tolist() == ["bf16", "bf16"]
    assert sorted(table["notes"]) == ["", "autoattack: odd"]
    assert "crafted in" in faces.markdown(key, table)
    assert faces.folded(faces.cells(table))[1].endswith("crafted in bf16")
    put({"fgsm": 100}, dataset="cifar10")
    assert "crafted in" not in faces.cells(leaderboard.board(gathered()).query("dataset == 'cifar10'"))


def test_a_part_of_a_dataset_says_that_it_is_one_and_stands_apart(put: Put, gathered: Any) -> None:
    for dataset in ("cifar10", "cifar10-reduced"):
        put({"fgsm": 100}, dataset=dataset)
    made = leaderboard.tables(leaderboard.board(gathered()))
    (whole, _), (part, _) = ((faces.markdown(key, table), key) for key, table in made.items())
    assert "`cifar10-reduced` is CIFAR-10, reduced" in part
    assert "never ranked with cifar10" in part
    assert "reduced" not in whole


def test_a_flipped_outcome_reaches_no_face(put: Put, gathered: Any, tmp_path: Path) -> None:
    path = tmp_path / "records" / f"{put({'fgsm': 150}).id}.parquet"
    table = pd.read_parquet(path)
    table.loc[0, "fgsm.broken"] = True
    table.to_parquet(path, index=False)
    with pytest.raises(Refused, match="is not what its record was made from"):
        gathered()


# ------------------------------------------------------------------------------------------------ plots


def test_plots_are_drawn_where_there_is_something_and_the_same_to_the_byte(
    put: Put, gathered: Any, tmp_path: Path
) -> None:
    for tau in (0, 2):
        put({"fgsm": 100 + 10 * tau}, fields={"tau": tau}, defense="fat")
    for eps in ("0.1", "0.3"):
        put({"fgsm": 150}, defense="$madry$_&", eps=eps)
    drawn = plots.draw(gathered(), tmp_path / "records", tmp_path / "one")
    names = {path.name for path in drawn}
    stems = {"curves-digits-linf-0.1-house-v1", "curves-digits-linf-0.3-house-v1", "eps-digits-linf-house-v1",
             "tau-fat-digits-linf-0.3-house-v1", "classes-digits-linf-0.1-house-v1",
             "classes-digits-linf-0.3-house-v1"}  # fmt: skip
    assert names == {f"{stem}.{form}" for stem in stems for form in ("png", "svg")}
    plots.draw(gathered(), tmp_path / "records", tmp_path / "two")
    for path in drawn:
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert b"Date" not in path.read_bytes()


def test_trainings_that_differ_in_more_than_tau_have_figures_of_their_own(
    put: Put, gathered: Any, tmp_path: Path
) -> None:
    for eps_train in ("0.1", "0.3"):
        for tau in (0, 2):
            put({"fgsm": 100 + 10 * tau}, fields={"tau": tau}, defense="fat", eps_train=eps_train)
    drawn = plots.draw(gathered(), tmp_path / "records", tmp_path / "one", ["tau"])
    stems = {f"tau-fat-eps-{eps}-digits-linf-0.3-house-v1" for eps in ("0.1", "0.3")}
    assert {path.stem for path in drawn} == stems


def test_a_seed_that_collapsed_is_in_no_figure(put: Put, gathered: Any, tmp_path: Path) -> None:
    kept = put({"fgsm": 100}, defense="fat")
    put({"fgsm": 100}, defense="fat", seed=1, collapsed=True)
    ((row,),) = plots._rows(gathered()).values()
    assert row["ids"] == [kept.id]


def test_a_kind_is_drawn_alone_or_refused(put: Put, gathered: Any, tmp_path: Path) -> None:
    put({"fgsm": 100})
    drawn = plots.draw(gathered(), tmp_path / "records", tmp_path / "one", ["classes"])
    assert {path.name.partition("-")[0] for path in drawn} == {"classes"}
    with pytest.raises(Refused, match="nothing to draw for tau"):
        plots.draw(gathered(), tmp_path / "records", tmp_path / "two", ["tau"])
    with pytest.raises(Refused, match="unknown kind of figure 'taus': did you mean tau"):
        plots.draw(gathered(), tmp_path / "records", tmp_path / "two", ["taus"])
    assert not (tmp_path / "two").exists()


def test_a_curve_is_the_median_of_the_seeds_that_have_it() -> None:
    x, y = plots.median_curve([[1, 2, None], [3, 4], [8, None, None]])
    assert (x.tolist(), y.tolist()) == ([1, 2], [3, 3])


def test_classes_are_the_medians_of_the_seeds(put: Put, gathered: Any, tmp_path: Path) -> None:
    put({"fgsm": 100})
    put({"fgsm": 40}, seed=1)
    put({"fgsm": 60}, seed=2)
    folder = tmp_path / "records"
    share = plots._by_class([(r, folder / f"{r.id}.parquet") for r in gathered()])
    assert share.tolist() == [30.0] * 10  # 60 of 200 hold, 6 of 20 in each class
