"""The docs say what is so: their code is the code that is tested, their names exist."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest

from fatbench import catalogue, protocol, recipe
from fatbench.autoattack import STAGES
from fatbench.doubts import CHECKS
from fatbench.examination import Tier
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
        }, command  # fmt: skip
        for word, value in pairwise(words):
            if word in known and not value.startswith("-") and "." not in value and "/" not in value:
                assert value in known[word], command


def test_the_readme_names_every_contestant(root: Path) -> None:
    text = (root / "README.md").read_text()
    for name in defenses:
        assert f"`{name}`" in text


def test_every_check_and_tier_is_explained(root: Path) -> None:
    text = (root / "docs" / "autoattack.md").read_text()
    rows = re.findall(r"^\| ([a-z0-9-]+) \|", text, flags=re.M)
    assert {*CHECKS, "square-below-white-box", *get_args(Tier), *STAGES} <= set(rows)
