"""What others have published stands beside what was measured: to the digit, with its source, and without a rank."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fatbench import beside, catalogue, faces, leaderboard, protocol, reported, robustbench, rows
from fatbench.errors import Refused
from fatbench.evaluation import examiner
from fatbench.registry import defenses

# Tables 1-4 of the FAT paper: natural, FGSM, PGD-20, C&W, PGD-100; an asterisk marks what it quotes.
TABLE_1 = """
madry*             87.30       56.10       45.80       46.80       -
cat*               77.43       57.17       46.06       42.28       -
dat*               85.03       63.53       48.70       47.27       -
fat 8/255          89.34+-.221 65.52+-.355 46.13+-.409 46.82+-.517 45.31+-.531
fat 16/255         87.00+-.203 65.94+-.244 49.86+-.328 48.65+-.176 49.56+-.255
"""
TABLE_2 = """
trades b=1*             88.64       56.38       49.14       -           -
fat-trades b=1 8/255    89.94+-.303 61.00+-.418 49.70+-.653 49.35+-.363 48.35+-.240
trades b=6*             84.92       61.06       56.61       54.47       55.47
fat-trades b=6 8/255    86.60+-.548 61.97+-.570 55.98+-.209 54.29+-.173 55.34+-.291
fat-trades b=6 16/255   84.39+-.030 61.73+-.131 57.12+-.233 54.36+-.177 56.07+-.155
"""
TABLE_3 = """
trades b=6                   84.92       67.00       57.18       54.72
fat-trades b=6 8/255         86.38+-.548 67.64+-.572 56.65+-.262 54.51+-.299
fat-trades b=6 16/255        84.39+-.030 67.38+-.370 57.67+-.198 54.62+-.140
fat-trades b=6 8/255 58-10   87.09       68.7        57.17       55.43
fat-trades b=6 16/255 58-10  85.28       68.08       58.39       55.89
"""
TABLE_4 = """
mart b=6                   83.62       67.38       58.24       53.67
fat-mart b=6 8/255         86.40+-.071 68.94+-.195 57.89+-.144 52.28+-.110
fat-mart b=6 16/255        84.39+-.390 68.52+-.297 59.13+-.180 52.85+-.459
fat-mart b=6 8/255 58-10   87.10       69.52       58.57       52.73
fat-mart b=6 16/255 58-10  85.19       69.00       59.82       53.01
"""
# table -> what it prints, the network, eps of the attacks, protocol, trials of the rows with a spread
PRINTED = {
    1: (TABLE_1, "wrn-32-10", "0.031", "dat-2019", 5),
    2: (TABLE_2, "wrn-34-10", "0.031", "trades-2019", 3),
    3: (TABLE_3, "wrn-34-10", "0.031", "trades-2019-rs", 3),
    4: (TABLE_4, "wrn-34-10", "8/255", "mart-2020", 3),
}
ATTACKS = ("clean", "fgsm", "pgd-20", "cw-inf", "pgd-100")
FAMILY = ("cifar10", "linf", "8/255")


def typed(number: int) -> list[dict[str, Any]]:
    text, arch, _, _, trials = PRINTED[number]
    rows = []
    for line in text.strip().splitlines():
        name, *said = line.split()
        figures = [word for word in said if re.match(r"\d+\.|-$", word)]
        shown = {a: w.replace("+-", " ± 0") for a, w in zip(ATTACKS, figures, strict=False) if w != "-"}
        beta = next((float(word[2]) for word in said if word.startswith("b=")), None)
        several = "±" in shown["clean"]
        rows.append(
            {
                "defense": name.rstrip("*"), "arch": "wrn-58-10" if "58-10" in said else arch,
                "eps_train": next((word for word in said if word.endswith("/255")), None), "beta": beta,
                "trials": trials if several else 1 if "58-10" in said else None,
                "quoted": name.endswith("*") or said[0].endswith("*"), "accuracy": shown,
            }
        )  # fmt: skip
    return rows


@pytest.mark.parametrize("number", PRINTED)
def test_the_reported_numbers_are_the_papers_to_the_digit(number: int) -> None:
    table = reported.read(reported.shelf()[f"fat-2020-table-{number}"])
    assert (table.table, table.eps, table.protocol) == (f"Table {number}", *PRINTED[number][2:4])
    said = [row.model_dump(exclude={"note", "quoted_from"}) | {"quoted": bool(row.quoted_from)} for row in table.rows]
    assert said == typed(number)


def test_every_reported_row_names_what_exists_here() -> None:
    for path in reported.shelf().values():
        table = reported.read(path)
        assert table.dataset in catalogue.DATASETS
        if table.protocol in protocol.shelf():
            assert protocol.load(table.protocol).version == table.version
        for row in table.rows:
            assert row.defense in defenses
            assert row.arch in catalogue.NETWORKS
            assert all(examiner(attack, {}).name for attack in row.accuracy if attack != "clean")


@pytest.mark.parametrize(
    ("number", "row", "both"),
    [(1, 3, ["± 0.049"]), (2, 3, ["86.38", "86.60", "61.79"]), (3, 1, ["86.60"])],
)
def test_where_two_sources_differ_the_row_says_so(number: int, row: int, both: list[str]) -> None:
    note = reported.read(reported.shelf()[f"fat-2020-table-{number}"]).rows[row].note
    assert all(figure in note for figure in both)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ('clean = "87.30" -> clean = "eighty"', "is no percentage"),
        ('clean = "87.30" -> clean = "187.30"', r"lies outside \[0, 100\]"),
        ('clean = "87.30" -> clean = "nan"', r"lies outside \[0, 100\]"),
        ('defense = "madry" -> defence = "madry"', "defence: Extra inputs"),
        ('eps = "0.031" -> eps = "8/0"', "eps: "),
        ("n = 10000 -> n = 0", "n: "),
        ('paper = -> "', "cannot read the reported numbers"),
    ],
)
def test_a_broken_file_of_reported_numbers_is_refused(change: str, complaint: str, tmp_path: Path) -> None:
    before, after = change.split(" -> ")
    text = reported.shelf()["fat-2020-table-1"].read_text()
    assert before in text
    broken = tmp_path / "broken.toml"
    broken.write_text(text.replace(before, after, 1))
    with pytest.raises(Refused, match=complaint) as refused:
        reported.read(broken)
    assert "\n" not in str(refused.value)


# ------------------------------------------------------------------------------------------------ RobustBench


def test_robustbenchs_boards_are_read_from_what_is_installed() -> None:
    listed = robustbench.published()
    boards = pd.Series([(m.dataset, m.norm, m.eps) for m in listed]).value_counts()
    assert boards[[FAMILY]].tolist() == [76]
    assert set(boards.index) == {
        FAMILY, ("cifar100", "linf", "8/255"), ("imagenet", "linf", "4/255"), ("cifar10", "l2", "0.5"),
    }  # fmt: skip
    known = {m.id: m for m in listed if (m.dataset, m.norm, m.eps) == FAMILY}
    assert sum(m.arch == "WideResNet-34-10" for m in known.values()) == 16
    fat = known["Zhang2020Attacks"]
    assert (fat.clean, fat.robust, fat.arch, fat.venue) == ("84.52", "53.51", "WideResNet-34-10", "ICML 2020")
    assert fat.paper == "Attacks Which Do Not Kill Training Make Adversarial Learning Stronger"
    assert (known["Zhang2019Theoretically"].clean, known["Zhang2019Theoretically"].robust) == ("84.92", "53.08")
    assert (known["Standard"].place, known["Standard"].robust) == (76, "0.00")
    # What the README does not tell is not known.
    assert {(m.extra_data, m.reported, m.unreliable) for m in listed} == {(None, None, None)}


ROW = "| <sub>**1**</sub> | <sub><sup>**Me2020**</sup></sub> | <sub>*[A paper](http://x)*</sub> | <sub>93.68%</sub> | \
<sub>73.71%</sub> | <sub>ResNet-18</sub> | <sub>ICML 2024</sub> |"
HEAD = (
    "| <sub>#</sub> | <sub>Model ID</sub> | <sub>Paper</sub> | <sub>Clean accuracy</sub> | <sub>Robust accuracy</sub> \
| <sub>Architecture</sub> | <sub>Venue</sub> |\n|:---:|---|---|:---:|:---:|:---:|:---:|"
)
README = f"### CIFAR-10\n\n#### Linf, eps=8/255\n\n{HEAD}\n{ROW}\n\n#### Corruptions\n"


@pytest.fixture
def readme(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts another README into the installed distribution's metadata."""

    def put(text: str) -> None:
        class Told(Message):
            json = {"description": text}

        told = Told()
        told["Version"] = "9.9"
        monkeypatch.setattr(robustbench, "metadata", lambda name: told)

    return put


def test_a_board_in_the_known_form_is_read(readme: Callable[[str], None]) -> None:
    readme(README)
    (listed,) = robustbench.published()
    assert (listed.id, listed.dataset, listed.norm, listed.eps) == ("Me2020", "cifar10", "linf", "8/255")
    assert (listed.paper, listed.link, listed.clean, listed.robust) == ("A paper", "http://x", "93.68", "73.71")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("#### Linf, eps=8/255", "#### L-infinity at 8/255"), ("Model ID", "Model"), (ROW, ""), ("93.68%", "93.68"),
        ("73.71%", "?"), ("**1**", "**2**"), ("| <sub>ICML 2024</sub> |", "|"), ("[A paper](http://x)", "A paper"),
        (README, ""),
    ],
)  # fmt: skip
def test_another_form_of_the_readme_is_refused(before: str, after: str, readme: Callable[[str], None]) -> None:
    assert before in README
    readme(README.replace(before, after))
    with pytest.raises(Refused, match=r"the README of robustbench 9\.9 is not as it was in 1\.1\.1") as refused:
        robustbench.published()
    assert "\n" not in str(refused.value)


def test_without_the_distribution_its_boards_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise robustbench.PackageNotFoundError(name)

    monkeypatch.setattr(robustbench, "metadata", absent)
    with pytest.raises(Refused, match="robustbench is not installed"):
        beside.lines(["robustbench"])


# ------------------------------------------------------------------------------------------------ beside ours


@pytest.fixture(scope="module")
def whole() -> pd.DataFrame:
    """The board of what others have published, and of nothing else."""
    return leaderboard.board([], beside.lines(["reported", "robustbench"]))


def test_the_wide_networks_stand_together_each_with_its_source(whole: pd.DataFrame) -> None:
    side = leaderboard.overviews(whole)[FAMILY]
    family = side[side["family"] == "wrn-32/34-10"]
    assert set(family["arch"]) == {"wrn-32-10", "wrn-34-10", "WideResNet-34-10"}
    assert family["source"].value_counts().to_dict() == {"robustbench": 16, "reported": 11, "quoted": 5}
    assert {"fat", "trades", "mart", "madry", "fat-trades", "fat-mart"} <= set(family["defense"])
    assert family["reference"].str.len().gt(0).all()
    assert "rank" not in side
    assert len(side) == 96


def test_published_rows_have_no_rank_and_stay_as_printed(whole: pd.DataFrame) -> None:
    made = leaderboard.tables(whole)
    assert whole["rank"].isna().all()
    table = made[*FAMILY, "dat-2019 v1"]
    shown = faces.cells(table)
    fat = shown[shown["eps train"].str.startswith("8/255")].iloc[0]
    assert (fat["#"], fat["natural"], fat["PGD-20"]) == ("–", "89.34 ± 0.221", "46.13 ± 0.409")
    assert fat["eps train"] == "8/255 (tested at 0.031)"
    assert fat["reference"] == "Zhang et al., ICML 2020 (FAT), Table 1"
    madry = shown[shown["defense"].str.startswith("madry")].iloc[0]
    assert (madry["source"], madry["natural"], madry["PGD-100"], madry["seeds"]) == ("quoted", "87.30", "–", "unknown")
    assert madry["reference"] == "Wang et al., ICML 2019 (DAT), in Zhang et al., ICML 2020 (FAT), Table 1"
    row = table[table["defense"] == "fat"].iloc[1]
    assert (row["clean"], row["clean_spread"], row["n"], row["seeds"]) == (89.34, 0.221, 10000, 5)


def test_what_robustbench_does_not_tell_is_unknown(whole: pd.DataFrame) -> None:
    table = leaderboard.tables(whole)[*FAMILY, "robustbench-linf v1"]
    shown = faces.cells(table)
    assert set(shown["n"]) == set(shown["seeds"]) == set(shown["eps train"]) == {"unknown"}
    assert any("does not tell which" in note for note in faces.notes(table))


def test_an_unknown_source_is_refused_with_those_that_are(cli: Callable[..., Any], tmp_path: Path) -> None:
    done = cli("leaderboard", "--with", "reportet", "--out", "board", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "fatbench: unknown source 'reportet': did you mean reported? (known: reported, robustbench)\n"
    )


def test_published_rows_need_no_records(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, root: Path
) -> None:
    done = cli("leaderboard", "--with", "reported,robustbench", "--out", "board", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "cifar10, linf, eps 8/255, dat-2019 v1: 5 published rows, none measured" in done.stdout
    for path in (tmp_path / "board").glob("cifar10-*"):
        assert path.read_bytes() == (root / "leaderboard" / path.name).read_bytes()
    named = cli("leaderboard", "absent", "--with", "reported", "--out", "board", cwd=tmp_path)
    assert (named.returncode, named.stdout) == (2, "")


@pytest.mark.parametrize(
    ("names", "order"),
    [
        (["pgd-100", "pgd-20@16/255", "pgd-20", "fgsm"], ["fgsm", "pgd-20", "pgd-20@16/255", "pgd-100"]),
        (["pgd-20@odd", "pgd-20@0.1", "pgd-20@8/255"], ["pgd-20@8/255", "pgd-20@0.1", "pgd-20@odd"]),
        (["worst", "clean", "zoo", "cw-inf"], ["cw-inf", "zoo"]),
    ],
)
def test_an_attack_with_its_own_budget_stands_behind_its_plain_one(names: list[str], order: list[str]) -> None:
    assert rows.in_order(names) == order
    assert faces.title("pgd-20@16/255") == "PGD-20 (16/255)"


@pytest.mark.parametrize(
    ("arch", "family"),
    [
        ("wrn-32-10", "wrn-32/34-10"), ("WideResNet-34-10", "wrn-32/34-10"), ("WideResNet-34-15", "wrn-34-15"),
        ("MeanSparse WideResNet-94-16", "MeanSparse WideResNet-94-16"), ("PreActResNet-18", "PreActResNet-18"),
        ("ResNet-18", "resnet-18"), ("WideResNet-34-10-PSSiLU", "WideResNet-34-10-PSSiLU"),
    ],
)  # fmt: skip
def test_networks_that_are_one_are_one_family(arch: str, family: str) -> None:
    assert catalogue.family(arch) == family
