"""The docs say what is so: their code is the code that is tested, their names exist."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from itertools import pairwise, takewhile
from pathlib import Path
from typing import get_args

import pandas as pd
import pytest

from fatbench import catalogue, protocol, recipe, record
from fatbench.autoattack import STAGES
from fatbench.doubts import CHECKS
from fatbench.examination import Tier
from fatbench.paper import names
from fatbench.registry import defenses, evaluations


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), flags=re.M | re.S)


def test_the_walk_through_shows_the_tested_plugin_in_at_most_40_lines(root: Path) -> None:
    (code,) = blocks(root / "docs" / "add-a-defense.md", "python")
    tested = root / "tests" / "third_party" / "src" / "thirdparty_fatbench" / "smooth_fat.py"
    assert code == tested.read_text()
    assert len(code.splitlines()) <= 40


@pytest.mark.parametrize("name", list(defenses))
def test_a_contestant_is_a_small_file(name: str, root: Path) -> None:
    lines = (root / "defenses" / f"{name.replace('-', '_')}.py").read_text().splitlines()
    assert len(lines) <= (95 if name == "cat" else 45)


def commands(root: Path) -> list[str]:
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = [line for page in pages for block in blocks(page, "sh") for line in block.splitlines()]
    return sorted({line.partition("  #")[0].strip() for line in lines if line.startswith("fatbench ")})


def test_every_command_in_the_docs_names_what_exists(root: Path) -> None:
    own = "smooth-fat"  # the third party's of the walk-through
    known = {
        "train": [*defenses, own], "check": [*defenses, *evaluations, own], "--protocol": list(protocol.shelf()),
        "--dataset": list(catalogue.DATASETS), "--arch": list(catalogue.NETWORKS), "--recipe": list(recipe.shelf()),
    }  # fmt: skip
    assert commands(root)
    for command in commands(root):
        words = command.split()
        assert words[1] in {
            "train", "evaluate", "leaderboard", "compare", "plot", "list", "show", "check", "demo", "sweep", "status",
            "reproduce",
        }, command  # fmt: skip
        if words[1] == "reproduce":
            asked = takewhile(lambda word: not word.startswith("-"), words[2:])
            assert set(asked) <= {*names.names(), "all"}, command
        for word, value in pairwise(words):
            if word == "check" != words[1]:
                continue  # leaderboard check takes records
            if word in known and not value.startswith("-") and "." not in value and "/" not in value:
                assert value in known[word], command


def test_the_readme_names_every_contestant(root: Path) -> None:
    text = (root / "README.md").read_text()
    for name in defenses:
        assert f"`{name}`" in text


COLUMNS = {
    "natural": "clean", "FGSM": "fgsm", "PGD-20": "pgd-20", "PGD-100": "pgd-100", "C&W-inf": "cw-inf",
    "AutoAttack": "autoattack", "worst case": "worst",
}  # fmt: skip


def tables_in(text: str, heading: str) -> list[list[list[str]]]:
    """The tables under a heading, each a list of rows, each a list of cells; the first is the header."""
    part = re.split(r"^#+ ", text.partition(heading)[2], flags=re.M)[0]
    blocks = [block.splitlines() for block in re.findall(r"(?:^\|.*\n)+", part, flags=re.M)]
    return [[[c.strip() for c in line.strip("|").split("|")] for line in [b[0], *b[2:]]] for b in blocks]


@pytest.mark.parametrize(
    ("page", "heading", "table", "dataset", "budgets", "epochs"),
    [
        ("docs/results.md", "## Digits", 0, "digits", {"": "0.3"}, 60),
        ("docs/results.md", "## Digits", 1, "digits", {"eps 0.1": "0.1", "eps 0.2": "0.2"}, 60),
        ("README.md", "### CIFAR-10, reduced", 0, "cifar10-reduced", {"": "8/255"}, 8),
    ],
)
def test_published_tables_say_what_the_board_says(
    page: str, heading: str, table: int, dataset: str, budgets: dict[str, str], epochs: int, root: Path
) -> None:
    board = pd.read_csv(root / "leaderboard" / "board.csv", low_memory=False)
    known = board[
        (board["source"] == "measured") & (board["dataset"] == dataset) & (board["epochs"] == epochs)
        & (board["selection"] == "last") & (board["protocol"] == "fatbench-linf v2")
    ]  # fmt: skip
    header, *rows = tables_in((root / page).read_text(), heading)[table]
    assert len(rows) == len(known[known["eps"].isin(budgets.values())]) / len(budgets) > 1
    for defense, *cells in rows:
        eps = next(iter(budgets.values()))
        for column, cell in zip(header[1:], cells, strict=True):
            name, _, own = column.partition(", ")
            eps = budgets.get(own, eps)
            row = known[(known["defense"] == defense) & (known["eps"] == eps)].iloc[0]
            if name == "passes":
                assert cell == f"{1 + row['backwards_per_example']:.1f}", (defense, column)
            elif name == "minutes":
                assert cell == f"{row['train_seconds'] / 60:.1f}", (defense, column)
            else:
                found = row[COLUMNS[name]], row[f"{COLUMNS[name]}_spread"]
                assert cell == "{:.1f} ± {:.1f}".format(*found), (defense, column)


@pytest.mark.parametrize("world", ["digits", "CIFAR-10, reduced"])
def test_the_readme_counts_the_verdicts_that_are_published(world: str, root: Path) -> None:
    page = (root / "docs" / "reproduction.md").read_text().partition(f"## On {world}\n")[2]
    published = re.findall(r"(\d+) findings: (\d+) hold, (\d+) do not hold, (\d+) are undecided", page)[0]
    text = " ".join((root / "README.md").read_text().split())
    told = re.search(
        rf"of (\d+)(?: findings)? on {world}, from \d+ runs[^;.]*?, (\d+) hold, (\d+) do not and (\d+) are", text
    )
    assert told and told.groups() == published


def test_every_check_and_tier_is_explained(root: Path) -> None:
    text = (root / "docs" / "autoattack.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \|", text, flags=re.M)
    assert {*CHECKS, "square-below-white-box", *get_args(Tier), *STAGES} <= set(rows)


@pytest.mark.parametrize("model", ["Record", "Examined", "Result", "Network", "Samples", "Doubt", "Training"])
def test_the_records_page_tells_every_field(model: str, root: Path) -> None:
    text = (root / "docs" / "record.md").read_text()
    for name, told in getattr(record, model).model_fields.items():
        assert f"| `{told.alias or name}` | {told.description or ''}" in text


@pytest.fixture(scope="module")
def published(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the published records are both `records` and `leaderboard/records`."""
    place = tmp_path_factory.mktemp("place")
    for name in ("records", "leaderboard/records"):
        shutil.copytree(root / "leaderboard" / "records", place / name)
    shutil.copy(root / "leaderboard" / "board.json", place / "leaderboard")
    return place


def boards(root: Path) -> list[str]:
    """The commands of all pages that need nothing but records."""
    pages = [root / "README.md", root / "leaderboard" / "README.md", *sorted((root / "docs").glob("*.md"))]
    lines = {line.partition("  #")[0].partition(" # ")[0].strip() for page in pages
             for block in blocks(page, "sh") for line in block.splitlines()}  # fmt: skip
    asked = ("fatbench leaderboard", "fatbench compare", "fatbench plot")
    return sorted(line for line in lines if line.startswith(asked) and "YOUR" not in line)


@pytest.mark.parametrize("command", boards(Path(__file__).resolve().parents[1]))
def test_every_command_on_boards_runs(
    command: str, published: Path, cli: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    ids = iter(sorted(path.stem for path in (published / "records").glob("*.json")))
    words = [next(ids) if word in ("A", "B") else word for word in command.split()[1:]]
    done = cli(*words, cwd=published)
    # Looked at beside themselves, the published records are copies, and refused as such.
    refused = "check" in words and "cannot go on a board" in done.stderr
    assert done.returncode == 0 or refused, done.stderr
    assert done.stdout
