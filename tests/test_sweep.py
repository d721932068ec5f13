"""Sweeps: a grid is what it says; every job's state can be read from the disk; what died is seen and done again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from fatbench import files, job, recipe, sweep
from fatbench.errors import Refused, RunFailed
from fatbench.job import standing
from fatbench.record import read

pytestmark = pytest.mark.timeout(120)
GRID = """
epochs = 1
n_train = 100
[sweep]
defense = ["madry", "fat"]
seed = [0, 1, 2]
eps = ["0.2", "0.3"]
"""
# Does nothing, or crashes, or waits to be killed, as the job's folder says.
STUB = """
import sys, time
from pathlib import Path
from fatbench import job

def work(folder):
    if (folder / "crash").exists():
        raise ValueError("made to crash")
    while (folder / "wait").exists():
        time.sleep(0.05)

if len(sys.argv) == 2:
    job.carry_out(Path(sys.argv[1]), work)
else:
    job.in_turn([Path(folder) for folder in sys.argv[1:]], work)
"""


def grid(tmp_path: Path, text: str = GRID) -> str:
    (tmp_path / "grid.toml").write_text(text)
    return str(tmp_path / "grid.toml")


@pytest.fixture
def stub(tmp_path: Path) -> sweep.Start:
    (tmp_path / "stub.py").write_text(STUB)
    return lambda folders, device: [sys.executable, str(tmp_path / "stub.py"), *map(str, folders)]


# ------------------------------------------------------------------------------------------------ the grid


def test_a_grid_is_the_product_of_its_values(tmp_path: Path) -> None:
    points = sweep.expand(grid(tmp_path)).points
    assert len(points) == 12
    assert points["fat-seed2-eps0.3"] == recipe.resolve("fat", epochs=1, n_train=100, seed=2, eps="0.3")


def test_a_field_is_swept_for_those_who_have_it(tmp_path: Path) -> None:
    text = 'epochs = 1\n[fields]\ntau = 1\nsteps = 5\n[sweep]\ndefense = ["madry", "fat-trades"]\nbeta = [1, 6]\n'
    points = sweep.expand(grid(tmp_path, text)).points
    assert list(points) == ["madry", "fat-trades-beta1", "fat-trades-beta6"]
    assert points["madry"].fields["steps"] == 5
    assert points["fat-trades-beta6"].fields["beta"] == 6
    assert points["fat-trades-beta6"].fields["tau"] == 1


def test_a_recipe_that_sweeps_is_a_grid(tmp_path: Path) -> None:
    found = sweep.expand("fig-4-small-cnn")
    assert list(found.points.values()) == list(recipe.points("fig-4-small-cnn").values())
    assert found.examine.protocols == ("fat-fig4",)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[sweep]\ndefense = ["madry", "trades"]\ntau = [0]\n', "sweeps tau, which none of madry, trades has"),
        ('[sweep]\ndefense = ["madri"]\n', "did you mean madry"),
        ('defense = "fat"\n[sweep]\ntau = [-1]\n', "greater than or equal to 0"),
        ('defense = "fat"\n[sweep]\nseed = [1, 1]\n', "names a value twice"),
        ('defense = "fat"\n[evaluate]\natacks = ["fgsm"]\n', "evaluate: atacks"),
        ('defense = "fat"\n[evaluate]\nbalanced = true\n', "give n too"),
        ('defense = "fat"\nepoch = 3\n', "did you mean epochs"),
        ('defense = "fat"\n[sweep]\ndefense = ["fat"]\n', "both sets and sweeps defense"),
        ('[fields]\nomeg = 0.1\n[sweep]\ndefense = ["madry", "fat"]\n', "field omeg, which none of madry, fat has"),
        ('defense = "fat"\n[fields]\neps = "16/255"\n', r"eps stands above \[fields\]"),
        ("[sweep\n", "cannot read"),
        ("[sweep]\nseed = [0]\n", "which defense"),
    ],
)
def test_a_grid_that_does_not_fit_is_refused(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=told) as refusal:
        sweep.expand(grid(tmp_path, text))
    assert "\n" not in str(refusal.value)


def test_a_folder_is_one_grids(tmp_path: Path) -> None:
    sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")
    more = sweep.prepare(sweep.expand(grid(tmp_path, GRID.replace("[0, 1, 2]", "[0, 1, 2, 3]"))), tmp_path / "out")
    assert len(more) == 16
    # As a release wrote it whose examinations could say less.
    said = files.read_json(more[0] / "examine.json", "list of examinations")
    files.write_json(more[0] / "examine.json", {key: said[key] for key in said if key != "attack_precision"})
    sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")
    with pytest.raises(Refused, match=r"another grid .*epochs: 1 -> 2"):
        sweep.prepare(sweep.expand(grid(tmp_path, GRID.replace("epochs = 1", "epochs = 2"))), tmp_path / "out")
    with pytest.raises(Refused, match="other examinations"):
        sweep.prepare(sweep.expand(grid(tmp_path, GRID + '[evaluate]\nattacks = ["fgsm"]\n')), tmp_path / "out")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.tex").write_text("mine")
    with pytest.raises(Refused, match="something else"):
        sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "else")
    with pytest.raises(Refused, match="no sweep at"):
        sweep.jobs_in(tmp_path / "else")


# ------------------------------------------------------------------------------------------------ the jobs


@pytest.mark.parametrize("many", [1, 5])
def test_of_twelve_runs_one_crashes_and_one_is_killed_and_a_relaunch_completes_them(
    tmp_path: Path, stub: sweep.Start, monkeypatch: pytest.MonkeyPatch, many: int
) -> None:
    monkeypatch.setattr(sweep, "_share", lambda waiting, workers: [waiting.pop(0) for _ in waiting[:many]])
    folders = sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")
    crashing, killed = folders[3], folders[6]
    (crashing / "crash").touch()
    (killed / "wait").touch()

    def kill() -> None:
        while standing(killed).state != "running":
            time.sleep(0.02)
        os.kill(json.loads((killed / "state.json").read_text())["pid"], signal.SIGKILL)

    assert sweep.report(folders).startswith("12 runs: 12 not launched")
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(RunFailed, match="2 of 12 runs are not done"):
        sweep.work_through(folders, 2, ["auto"], stub)
    killer.join()
    shown = sweep.report(sweep.jobs_in(tmp_path / "out"))
    assert shown.startswith("12 runs: 2 failed, 10 done")
    assert re.search(f"{crashing.name} +ValueError: made to crash", shown)
    assert re.search(f"{killed.name} +killed by SIGKILL", shown)
    (crashing / "crash").unlink()
    (killed / "wait").unlink()
    assert sweep.printed(folders, "cuda").count("fatbench job") == 2
    sweep.work_through(folders, 2, ["auto"], stub)
    assert sweep.report(folders).startswith("12 runs: 12 done")


def test_a_job_at_work_is_left_alone_and_a_dead_one_is_seen(tmp_path: Path) -> None:
    (folder, *_) = sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")
    job.note(folder, "running")
    with files.locked(folder / ".lock", "here"):
        assert standing(folder).state == "running"
        assert folder not in sweep.open_jobs([folder])
        with pytest.raises(Refused, match="another process is at work at the job"):
            job.carry_out(folder, lambda folder: None)
    assert (
        standing(folder).said
        == f"killed: process {os.getpid()} on {job.socket.gethostname()} is gone, 0 of 1 epochs done"
    )
    assert sweep.open_jobs([folder]) == [folder]


def test_many_jobs_share_a_process_and_the_last_ones_do_not() -> None:
    waiting = [Path(str(at)) for at in range(40)]
    taken = []
    while waiting:
        taken.append(len(sweep._share(waiting, 2)))
    assert taken[0] == 5
    assert set(taken[-8:]) == {1}
    assert sum(taken) == 40
    assert len(sweep._share([Path(str(at)) for at in range(1000)], 2)) == sweep.TOGETHER


def test_jobs_in_turn_end_as_jobs_alone_and_each_has_its_log(tmp_path: Path) -> None:
    settings = (recipe.resolve("fat", eps="0.3", epochs=1, n_train=100, seed=seed) for seed in (0, 1))
    grid = sweep.Grid(dict(zip("ab", settings, strict=True)), job.Examine())
    alone, together = (sweep.prepare(grid, tmp_path / name) for name in ("alone", "together"))
    work = partial(job.train_and_examine, device="cpu")
    for folder in alone:
        job.carry_out(folder, work)
    (together[0].parent / "c").mkdir()
    with pytest.raises(RunFailed, match=r"1 of 3 jobs failed: the log\.txt of each says why"):
        job.in_turn([together[0].parent / "c", *together], work)
    for one, other in zip(alone, together, strict=True):
        assert (one / "run" / "last.safetensors").read_bytes() == (other / "run" / "last.safetensors").read_bytes()
        assert "on digits 1/1" in (other / "log.txt").read_text()
    assert "holds no job" in (together[0].parent / "c" / "log.txt").read_text()


def test_a_training_that_fails_has_a_row_without_a_number_and_the_others_have_theirs(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    text = 'defense = "fat"\nepochs = 1\nn_train = 100\nbatch_size = 16\nlr = 1e30\n[sweep]\nseed = [0, 1]\n'
    path = grid(tmp_path, text + '[evaluate]\nattacks = ["fgsm"]\nn = 50\n')
    done = cli("sweep", path, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "2 of 2 runs are not done" in done.stderr
    found = [read(path).result for path in (tmp_path / "sweep" / "records").glob("*.json")]
    assert [one.network.status.split(":")[0] for one in found] == ["failed", "failed"]
    assert [one.correct for one in found] == [{}, {}]
    assert "failed: the loss was not finite" in (tmp_path / "sweep" / "board" / "board.csv").read_text()


def test_a_sweep_in_the_background_that_is_killed_leaves_no_worker_behind(tmp_path: Path) -> None:
    path = grid(tmp_path, GRID.replace("epochs = 1", "epochs = 400"))
    process = subprocess.Popen(
        [sys.executable, "-m", "fatbench", "sweep", path, "--workers", "1", "--device", "cpu"], cwd=tmp_path,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None,  # as a shell does to `... &`
    )  # fmt: skip
    while not (started := list(tmp_path.glob("sweep/jobs/*/run/resume.pt"))):
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 130
    assert standing(started[0].parents[1]) == ("failed", "interrupted")


def test_what_a_job_dies_of_before_it_can_speak_is_its_logs_last_line(tmp_path: Path) -> None:
    folders = sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")[:1]
    with pytest.raises(RunFailed):
        sweep.work_through(
            folders, 1, ["auto"], lambda folders, device: [sys.executable, "-c", "import nothing_at_all"]
        )
    assert standing(folders[0]).said == "ModuleNotFoundError: No module named 'nothing_at_all'"


def test_each_worker_has_its_device(tmp_path: Path) -> None:
    folders = sweep.prepare(sweep.expand(grid(tmp_path)), tmp_path / "out")[:4]
    given = []

    def start(folders: Sequence[Path], device: str) -> list[str]:
        given.append(device)
        return [sys.executable, "-c", ""]

    with pytest.raises(RunFailed):
        sweep.work_through(folders, 2, ["cuda:0", "cuda:1"], start)
    assert set(given[:2]) == {"cuda:0", "cuda:1"}
    assert sweep.command(folders, "cuda:1")[-2:] == ["--device", "cuda:1"]


def test_a_sweep_from_the_command_line_ends_on_the_board(
    cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    text = GRID.replace("[0, 1, 2]", "[0]").replace('["0.2", "0.3"]', '["0.2"]')
    path = grid(tmp_path, text + '[evaluate]\nattacks = ["fgsm"]\nn = 50\nattack_precision = "bf16"\n')
    listed = cli("sweep", path, "--print", "--device", "cpu", cwd=tmp_path)
    assert listed.returncode == 0, listed.stderr
    done = cli("sweep", path, "--workers", 2, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr + (tmp_path / "sweep/jobs/fat-seed0-eps0.2/log.txt").read_text()
    assert "2 runs: 2 done" in done.stdout
    made_in = [read(path).result.attack_precision for path in (tmp_path / "sweep" / "records").glob("*.json")]
    assert made_in == ["bf16", "bf16"]
    assert (tmp_path / "sweep" / "board" / "index.md").exists()
    assert len(listed.stdout.splitlines()) == 2
    told = cli("status", "sweep", cwd=tmp_path)
    assert told.stdout.startswith("2 runs: 2 done")
