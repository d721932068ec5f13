"""What a user gets: the wheel holds the package and nothing else, and with a third party's plugins it does a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from what git would hand out."""
    return _built(root, tmp_path_factory.mktemp("wheel"))


def _built(source: Path, folder: Path) -> Path:
    # From a copy: a build leaves build/ and *.egg-info beside its sources.
    copy = folder / "source"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=source, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        if (source / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((source / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(copy)], check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def installed(root: Path, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`fatbench` from the wheel, a third party's plugins beside it, in a virtual environment of their own.

    Everything else comes from this environment by a line in a .pth file, behind what is installed there.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "env", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env"), "platbase": str(folder / "env")}))
    third = _built(root / "tests" / "third_party", tmp_path_factory.mktemp("third"))
    for made in (wheel, third):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
        subprocess.run([*command, str(made)], check=True, capture_output=True)
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        program = "import sys; from fatbench.cli import main; sys.argv[0] = 'fatbench'; main()"
        command = [str(folder / "env" / "bin" / "python"), "-I", "-c", program, *map(str, arguments)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)

    return run


def test_the_wheel_holds_fatbench_alone(wheel: Path, root: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"fatbench"}
    for room, installed_as in (("fatbench", "fatbench"), ("defenses", "fatbench/defenses")):
        for file in (root / room).glob("*.py"):
            assert f"{installed_as}/{file.name}" in names
    for file in (*root.glob("defenses/recipes/*.toml"), *root.glob("evaluations/protocols/*.toml")):
        assert f"fatbench/{file.relative_to(root).as_posix()}" in names
    assert "fatbench/py.typed" in names


def test_the_installed_copy_is_the_one_that_runs(installed: Run) -> None:
    assert installed("--version").stdout.startswith("fatbench ")
    listed = installed("list", "defenses")
    assert listed.returncode == 0
    assert "fat-trades" in listed.stdout


def test_third_parties_are_listed_and_a_broken_one_is_named(installed: Run) -> None:
    listed = installed("list", "defenses")
    assert "smooth-fat " in listed.stdout
    checked = installed("check", "smooth-fat", "random-corner", "broken-import")
    assert checked.returncode == 1
    assert "ok      defense smooth-fat" in checked.stdout
    assert "ok      evaluation random-corner" in checked.stdout
    assert "a_package_that_nobody_has" in checked.stdout
    refused = installed("train", "broken-import")
    assert refused.returncode == 2
    assert "a_package_that_nobody_has" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1


def test_a_third_party_is_trained_examined_and_ranked(installed: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = ("--epochs", 1, "--n-train", 200, "--set", "smoothing=0.2", "--out", run)
    trained = installed("train", "smooth-fat", *short)
    assert trained.returncode == 0, trained.stderr
    examined = installed("evaluate", run, "--attacks", "fgsm,random-corner", "--n", 50, "--out", tmp_path / "records")
    assert examined.returncode == 0, examined.stderr
    ranked = installed("leaderboard", tmp_path / "records", "--out", tmp_path / "board")
    assert ranked.returncode == 0, ranked.stderr
    assert "smooth-fat" in ranked.stdout
    record = json.loads(next((tmp_path / "records").glob("*.json")).read_text())
    assert record["result"]["network"]["fields"]["smoothing"] == 0.2
    assert record["protocol"]["attacks"]["random-corner"]["tries"] == 4
    assert record["result"]["correct"]["fgsm"] <= record["result"]["correct"]["random-corner"]


def test_a_built_in_defense_does_a_one_epoch_run_from_the_wheel(installed: Run, tmp_path: Path) -> None:
    trained = installed("train", "fat", "--epochs", 1, "--n-train", 200, "--out", tmp_path / "run")
    assert trained.returncode == 0, trained.stderr
    assert {"settings.toml", "metrics.jsonl", "last.safetensors", "best.safetensors", "resume.pt", "done"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
