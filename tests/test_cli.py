"""The command line: every refusal is one line and exit code 2 and writes nothing; Ctrl-C can be resumed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fatbench import __version__, recipe, registry, trainer
from fatbench.cli import main

Cli = Callable[..., subprocess.CompletedProcess[str]]


# A process each would spend its time on importing torch: most commands are run in this one.
@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """Runs the command line in this process, in an empty folder."""

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["fatbench", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            main()
        said = capsys.readouterr()
        return subprocess.CompletedProcess(list(arguments), int(leaving.value.code or 0), said.out, said.err)

    return run


@pytest.fixture
def refused(here: Cli, tmp_path: Path) -> Callable[..., str]:
    """Runs a command that must be refused, in one line, and write nothing."""

    def attempt(*arguments: object, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        said = here(*arguments)
        assert said.returncode == code, said.stderr
        assert len(said.stderr.strip().splitlines()) == 1, said.stderr
        assert said.stderr.startswith("fatbench: ")
        assert sorted(tmp_path.rglob("*")) == before, "something was written"
        return said.stderr

    return attempt


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    return trainer.train(recipe.resolve("fat", epochs=1, n_train=100, seed=3), folder)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "fat-trade"), "did you mean fat-trades"),
        (("train",), "which defense?"),
        (("train", "fat", "--dataset", "cifar"), "did you mean cifar10"),
        (("train", "fat", "--dataset", "no/such.npz"), "no dataset at no/such.npz"),
        (("train", "fat", "--arch", "resnet18"), "did you mean resnet-18"),
        (("train", "fat", "--eps", "8/0"), "divides by zero"),
        (("train", "fat", "--eps", "8"), "outside [0, 1]"),
        (("train", "fat", "--eps", "nan"), "is not finite"),
        (("train", "fat", "--epochs", "0"), "greater than or equal to 1"),
        (("train", "fat", "--epochs", "many"), "valid integer"),
        (("train", "fat", "--lr", "-1"), "greater than 0"),
        (("train", "fat", "--lr", "fast"), "is not a number"),
        (("train", "fat", "--set", "tua=1"), "did you mean tau"),
        (("train", "fat", "--set", "tau=-1"), "greater than or equal to 0"),
        (("train", "fat", "--set", "start=here"), "'uniform', 'gaussian' or 'natural'"),
        (("train", "fat", "--set", "tau"), "key=value"),
        (("train", "fat", "--n-train", "3"), "1437 training examples of 10 classes"),
        (("train", "fat", "--batch-size", "0"), "greater than or equal to 1"),
        (("train", "fat", "--device", "abacus"), "--device"),
        (("train", "fat", "--devices", "0"), "greater than or equal to 1"),
        (("train", "fat", "--devices", "2", "--device", "cuda:1"), "torch sees no CUDA"),
        (("train", "fat", "--nodes", "2"), "MASTER_ADDR"),
        (("train", "fat", "--sync-bn"), "for GPUs only"),
        (("train", "fat", "--set", "ranks=2"), "2 processes and there are 1"),
        (("train", "fat", "--precision", "8-bit"), "32-true"),
        (("train", "fat", "--recipe", "no.toml"), "cannot read the recipe no.toml"),
        (("train", "fat", "--recipe", "nope"), "unknown recipe"),
        (("train", "--recipe", "fat-wrn-32-10-eps8"), "did you mean fat-wrn-32-10-eps8-code"),
        (("train", "--recipe", "fat-wrn-32-10-eps8-code", "--dataset", "mnist"), "images of 3x32x32, and mnist has"),
        (("train", "--recipe", "fat-wrn-32-10-eps8-code", "--eps", "8/0", "--dry-run"), "divides by zero"),
        (("train", "--recipe", "fig-6-fat"), "such as --eps 0.03 --set tau=0"),
        (("train", "trades", "--recipe", "fig-6-fat", "--dry-run"), "is for fat, not trades"),
        (("show", "recipe", "fig-6-trades"), "did you mean fig-16-trades"),
        (("train", "fat", "--unheard-of"), "No such option"),
        (("evaluate", "nowhere"), "no checkpoint at nowhere"),
        (("evaluate", "nowhere", "--attacks", ","), "no attack named"),
        (("evaluate", "nowhere", "--protocol", "fatbench"), "did you mean fatbench-linf"),
        (("evaluate", "nowhere", "--protocol", "fatbench-linf", "--attacks", "fgsm"), "give one"),
        (("evaluate", "nowhere", "--mean", "0.5"), "go together"),
        (("evaluate", "nowhere", "--model", "mine.py:net", "--arch", "resnet-18"), "leave --arch out"),
        (("evaluate", "nowhere", "--mean", "a,b", "--std", "1,1"), "is not a number"),
        (("leaderboard", "nowhere"), "no folder of records"),
        (("leaderboard", "nowhere", "--against", "records"), "--against is not for the board, but for check"),
        (("leaderboard", "check", "a.json", "--with", "reported"), "--with is not for check, but for the board"),
        (("leaderboard", "diff", "old", "new", "--out", "board"), "--out is not for diff, but for the board"),
        (("list", "everything"), "defenses"),
        (("show", "defense", "fast"), "did you mean fat"),
        (("show", "weather", "fat"), "unknown kind"),
        (("show", "record", "nowhere.json"), "no record at nowhere.json"),
        (("check", "fast"), "did you mean fat"),
        (("demo", "--eps", "1/0"), "divides by zero"),
        (("sweep", "nowhere.toml"), "cannot read the recipe nowhere.toml"),
        (("sweep", "fig-4-small"), "did you mean fig-4-small-cnn"),
        (("sweep", "fig-4-small-cnn", "--workers", "0"), "greater than or equal to 1"),
        (("status", "nowhere"), "no sweep at nowhere"),
        (("job", "nowhere"), "nowhere holds no job"),
        (("reproduce", "tabel1"), "did you mean table1"),
        (("reproduce", "fig6", "--dataset", "mnist"), "set up for digits and CIFAR-10 (by name, or a file), not mnist"),
        (("reproduce", "fig6", "--scale", "paper", "--tell"), "judge what was made at --scale laptop"),
        (("reproduce", "cost", "--scale", "paper"), "cost is not in the paper, and has no recipe"),
        (("reproduce", "fig6", "--scale", "moon"), "not one of 'laptop', 'paper'"),
        (("reproduce", "fig6", "--seeds", "0"), "greater than or equal to 1"),
        (("reproduce", "fig6", "--out", "."), "give a folder a name"),
        (("frobnicate",), "No such command"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_a_refusal_is_one_line(arguments: tuple[object, ...], told: str, refused: Callable[..., str]) -> None:
    assert told in refused(*arguments)


def test_a_network_that_cannot_take_the_images_is_refused_before_it_is_trained(
    refused: Callable[..., str], npz: Callable[..., Path], tmp_path: Path
) -> None:
    wide = ("--dataset", npz(shape=(8, 24)), "--epochs", 1, "--out", tmp_path / "run")
    for arch in ("small-cnn", "narrow-cnn"):
        said = refused("train", "fat", "--eps", "0.1", "--arch", arch, *wide)
        assert f"{arch} cannot take made-up's images of 1x8x24" in said
    assert not (tmp_path / "run").exists()


def test_a_last_batch_that_a_network_cannot_train_on_is_refused_before_it_trains(
    refused: Callable[..., str], tmp_path: Path
) -> None:
    few = ("--dataset", "digits", "--set", "n_train=60", "--epochs", 1, "--out", tmp_path / "run")
    said = refused("train", "standard", "--arch", "resnet-18", "--batch-size", 53, *few)
    assert "54 training examples in batches of 53 leave one for the last, and resnet-18 cannot train on one" in said
    assert not (tmp_path / "run").exists()


def test_an_examination_refuses_what_does_not_fit(
    run: Path, refused: Callable[..., str], npz: Callable[..., Path]
) -> None:
    three, colour = npz(classes=3), npz(classes=10, shape=(8, 8, 3))
    assert "unknown attack 'deepfool'" in refused("evaluate", run, "--attacks", "deepfool")
    assert "10 classes, made-up has 3" in refused("evaluate", run, "--dataset", three)
    assert "cannot take made-up's images (3, 8, 8)" in refused("evaluate", run, "--dataset", colour)
    assert "digits has 360 test examples" in refused("evaluate", run, "--n", 361)
    assert "digits has 360 test examples" in refused("evaluate", run, "--n", 0)
    assert "give --n too" in refused("evaluate", run, "--balanced")
    assert "autoattack has no steps" in refused("evaluate", run, "--attacks", "autoattack-3")


def test_foreign_weights_must_say_data_and_budget(
    run: Path, refused: Callable[..., str], npz: Callable[..., Path]
) -> None:
    weights = run.parent / "weights.pt"
    torch.save(load_file(run / "last.safetensors"), weights)
    assert "give --dataset" in refused("evaluate", weights)
    assert "give --eps" in refused("evaluate", weights, "--dataset", "digits")
    assert "does not fit resnet-18" in refused("evaluate", weights, "--dataset", "digits", "--arch", "resnet-18")


def test_own_data_must_be_fit_to_train_on(refused: Callable[..., str], npz: Callable[..., Path]) -> None:
    assert "give --eps" in refused("train", "fat", "--dataset", npz())
    beyond = npz(classes=3, y_test=np.full(30, 7))
    assert "labels" in refused("train", "fat", "--eps", 0.1, "--dataset", beyond)
    dark = npz(x_train=np.full((60, 8, 8), 2.0, dtype=np.float32))
    assert "[2, 2]" in refused("train", "fat", "--eps", 0.1, "--dataset", dark)


def test_a_run_in_use_is_refused(run: Path, refused: Callable[..., str]) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    same = ("train", "fat", "--n-train", 100, "--seed", 3, "--out", run)
    assert "--resume goes on with it" in refused(*same, "--epochs", 1)
    assert "epochs: 1 -> 2" in refused(*same, "--epochs", 2, "--resume")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_train_evaluate_leaderboard(here: Cli, tmp_path: Path) -> None:
    trained = here("train", "fat_trades", "--epochs", 1, "--n-train", 100, "--seed", 3, "--set", "tau=1")
    assert trained.returncode == 0, trained.stderr
    folder = tmp_path / "runs" / "fat-trades-digits-seed3"
    assert f"next: fatbench evaluate {folder.relative_to(tmp_path)}" in trained.stdout
    for attacks in ("fgsm,pgd_20", "fgsm,pgd-20"):
        examined = here("evaluate", folder, "--attacks", attacks, "--n", 60)
        assert examined.returncode == 0, examined.stderr
        assert "pgd-20" in examined.stdout
    (path,) = (tmp_path / "records").glob("*.json")
    ranked = here("leaderboard")
    assert ranked.returncode == 0, ranked.stderr
    assert "digits, linf, eps 0.3, fatbench-linf v2" in ranked.stdout
    assert (tmp_path / "board" / "index.md").exists()
    record = json.loads(path.read_text())
    assert record["result"]["network"]["seed"] == 3
    assert record["result"]["network"]["fields"]["tau"] == 1
    assert json.loads(here("show", "record", path).stdout) == record


def test_a_dry_run_tells_the_cost_and_writes_nothing(here: Cli, tmp_path: Path, npz: Callable[..., Path]) -> None:
    own = ("--dataset", npz(shape=(32, 32, 3), n=200), "--arch", "small-cnn", "--device", "cpu")
    told = here("train", "--recipe", "fig-6-fat", "--eps", "0.06", "--set", "tau=3", *own, "--dry-run")
    assert told.returncode == 0, told.stderr
    assert not list(tmp_path.iterdir())
    for said in (
        'eps = "0.06"', "  tau = 3", "lr          0.01 epochs 1-59, 0.001 epochs 60-80", "parameters  1,637,483, all",
        "2 an epoch, 160 in 80 epochs", "0 to K = 10 attack steps", "memory      ", "how known   updates of",
    ):  # fmt: skip
        assert said in told.stdout, told.stdout
    assert "made up" not in told.stdout


def test_recipes_are_listed_a_line_each(here: Cli) -> None:
    told = here("list", "recipes").stdout.splitlines()
    assert len(told) == len(recipe.shelf())
    assert all(len(line.split("  ", 1)[1].strip()) > 20 for line in told)


def test_experiments_are_listed_and_told_before_they_are_run(here: Cli, tmp_path: Path) -> None:
    listed = here("list", "experiments", "--names").stdout.split()
    assert {"table1", "fig4", "fig20", "theorem1", "margin"} <= set(listed)
    said = here("reproduce", "fig4", "--seeds", "1", "--dry-run").stdout.splitlines()
    assert said[0] == "22 runs to train and examine"
    assert len(said) == 23
    assert not list(tmp_path.iterdir())


def test_a_resumed_run_needs_its_folder_alone(run: Path, here: Cli) -> None:
    done = here("train", "--resume", "--out", run)
    assert done.returncode == 0, done.stderr


def test_three_classes_one_channel_odd_size_from_end_to_end(here: Cli, npz: Callable[..., Path]) -> None:
    data = npz(classes=3, shape=(20, 20), n=90)
    short = ("--eps", 0.3, "--epochs", 3, "--lr", 0.05, "--batch-size", 16)
    trained = here("train", "fat-trades", "--dataset", data, *short, "--out", "run")
    assert trained.returncode == 0, trained.stderr
    examined = here("evaluate", "run", "--n", 12)  # AutoAttack included
    assert examined.returncode == 0, examined.stderr
    assert "autoattack" in examined.stdout
    ranked = here("leaderboard")
    assert ranked.returncode == 0, ranked.stderr
    assert "made-up, linf, eps 0.3" in ranked.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_kill_exit_130_and_the_run_goes_on(sent: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = ["train", "fat", "--epochs", "400", "--n-train", "200", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "fatbench", *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        # Where the tests themselves run in the background, Ctrl-C is ignored, and a child inherits that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )  # fmt: skip
    for _ in range(600):
        if (out / "resume.pt").exists():
            break
        time.sleep(0.1)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "--resume" in said.strip().splitlines()[-1]
    assert "Traceback" not in said
    assert (out / "resume.pt").exists()
    assert not (out / "done").exists()


def test_help_and_version(cli: Cli, here: Cli) -> None:
    assert cli("--version").stdout == f"fatbench {__version__}\n"
    for command in ("train", "evaluate", "leaderboard", "list", "show", "check", "demo", "sweep", "status"):
        told = here(command, "--help")
        assert told.returncode == 0
        assert "Usage: " in told.stdout


def test_show_tells_of_everything(here: Cli, run: Path) -> None:
    assert "tau = " in here("show", "defense", "fat").stdout
    assert "46,160,474 of them in use" in here("show", "model", "wrn-34-10").stdout
    assert 'name = "fatbench-linf"' in here("show", "protocol", "fatbench-linf").stdout
    assert "8x8" in here("show", "dataset", "digits").stdout
    assert json.loads(here("show", "checkpoint", run / "best.safetensors").stdout)["selection"] == "best"


def test_an_unexpected_error_is_one_line_too(monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]) -> None:
    monkeypatch.setattr(registry.Registry, "summary", lambda self, name: 1 / 0)
    monkeypatch.delenv("FATBENCH_TRACEBACK", raising=False)
    assert "this is a bug: ZeroDivisionError" in refused("list", "defenses", code=1)
