"""RobustBench's live models: by id, from a file or with one line that says which file; its benchmark, run by ours."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fatbench import data, zoo
from fatbench.asked import Network
from fatbench.errors import Refused
from fatbench.registry import evaluations
from fatbench.robustbench import benchmark

AutoAttack: Any = evaluations["autoattack"]
NAME = "Tiny2026Test"


class Tiny(nn.Sequential):
    """A network for 32x32 colour images, small enough for a test."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 3, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 10))


@pytest.fixture
def entry() -> Any:
    """A small entry in the zoo: what its board holds for a test."""
    with zoo.imported():
        from robustbench.model_zoo import model_dicts
        from robustbench.model_zoo.enums import BenchmarkDataset, ThreatModel
    board = model_dicts[BenchmarkDataset.cifar_10][ThreatModel.Linf]
    board[NAME] = {"model": Tiny, "gdrive_id": "1-drive-id"}
    yield board
    del board[NAME]


def refusal(run: Callable[[], object]) -> str:
    with pytest.raises(Refused) as refused:
        run()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def put(folder: Path, content: Any) -> Path:
    path = folder / "cifar10" / "Linf" / f"{NAME}.pt"
    path.parent.mkdir(parents=True)
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path


# ------------------------------------------------------------------------------------------------ the wheel


def test_the_wheel_is_imported_and_nothing_is_left_in_its_place() -> None:
    code = """
import sys
from fatbench import zoo
before = set(sys.modules)
ids = zoo.ids()
assert len(zoo.models()) >= 76 and "Zhang2020Attacks" in ids, ids
assert not {"autoattack", "pkg_resources"} & (set(sys.modules) - before)
import torch, robustbench
assert robustbench.load_model
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


def test_every_id_stands_with_its_boards() -> None:
    known = zoo.ids()
    assert "cifar10 Linf" in known["Zhang2020Attacks"]
    assert "imagenet Linf" in known["Standard_R50"]
    assert zoo.models()["Zhang2020Attacks"] == ["1lBVvLG6JLXJgQP2gbsTxNHl6s3YAopqk"]
    assert "no models for mnist" in refusal(lambda: zoo.models("mnist"))


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_file_in_its_place_is_loaded(wrapped: bool, entry: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Tiny()
    state = {f"module.{key}": value for key, value in net.state_dict().items()}
    put(tmp_path, {"state_dict": state} if wrapped else net.state_dict())
    loaded = Network(f"robustbench:{NAME}", folder=str(tmp_path)).load(None)
    x = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.model(x), net(x))
    assert not loaded.model.training
    assert loaded.meta["arch"] == f"robustbench:{NAME}"


def test_without_a_file_and_without_a_network_one_line_says_what_is_wanted(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdown.download", lambda **_: (_ for _ in ()).throw(ConnectionError("no\nroute")))
    said = refusal(lambda: zoo.live(NAME, tmp_path / "models"))
    path = tmp_path / "models" / "cifar10" / "Linf" / f"{NAME}.pt"
    assert said == (
        f"robustbench:{NAME} could not be downloaded (ConnectionError): "
        f"fetch https://drive.google.com/uc?id=1-drive-id and save it as {path}"
    )
    assert not (tmp_path / "models").exists()


def test_a_web_page_that_a_download_leaves_is_not_kept(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gdown.download", lambda id, output: Path(output).write_text("<!DOCTYPE html>quota"))
    assert "could not be downloaded" in refusal(lambda: zoo.live(NAME, tmp_path / "models"))
    assert not (tmp_path / "models").exists()


@pytest.mark.parametrize(
    ("content", "why"),
    [(b"<html>quota</html>", "is a web page"), (b"no weights", "does not fit"), ({"a": torch.ones(1)}, "does not fit")],
    ids=["page", "text", "other weights"],
)
def test_a_file_that_holds_something_else_is_named(content: Any, why: str, entry: Any, tmp_path: Path) -> None:
    path = put(tmp_path, content)
    said = refusal(lambda: zoo.live(NAME, tmp_path))
    assert why in said
    assert str(path) in said
    assert path.exists()


def test_an_unknown_id_is_answered_with_the_closest(tmp_path: Path) -> None:
    said = refusal(lambda: zoo.live("Zhang2020Attack", tmp_path))
    assert "did you mean Zhang2020Attacks" in said
    assert said.endswith("fatbench list robustbench names them all")


def test_an_ensemble_wants_all_its_files() -> None:
    wanted = zoo._files("Two", ["a", "b"], Path("m"))
    assert {str(path): drive for path, drive in wanted.items()} == {"m/Two.pt_m0.pt": "a", "m/Two.pt_m1.pt": "b"}


def test_a_zoo_model_brings_its_own_network() -> None:
    assert "leave --arch" in refusal(lambda: Network(f"robustbench:{NAME}", arch="resnet-18").load(None))


def test_the_published_budget_is_the_default() -> None:
    from fatbench.checkpoint import Subject

    assert Network("robustbench:Zhang2020Attacks").budget(Subject(nn.Identity(), {}, ""), "cifar10") == "8/255"
    assert Network(f"robustbench:{NAME}").budget(Subject(nn.Identity(), {}, ""), "cifar10") is None


# ------------------------------------------------------------------------------------------------ the benchmark


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> data.Data:
    """Twelve made-up images that stand for CIFAR-10."""
    from fatbench.catalogue import DATASETS

    torch.manual_seed(1)
    x, y = torch.rand(12, 3, 32, 32), torch.arange(12) % 10
    made = data.Data(DATASETS["cifar10"], x, y, x, y, 10)
    monkeypatch.setattr(data, "load", lambda name, folder=None: made)
    return made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    library = AutoAttack._library

    def cheap(self: Any, *given: Any) -> Any:
        made = library(self, *given)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 3
        made.square.n_queries = 5
        return made

    monkeypatch.setattr(AutoAttack, "_library", cheap)


class Knows(nn.Module):
    """A network that knows its images by their first pixel, but for the last."""

    def __init__(self, loaded: data.Data) -> None:
        super().__init__()
        self.register_buffer("pixels", loaded.x_test[:, 0, 0, 0].clone())
        self.register_buffer("labels", loaded.y_test.clone())

    def forward(self, x: Tensor) -> Tensor:
        near = -(((x[:, 0, 0, 0, None] - self.pixels) * 40) ** 2)
        near = torch.cat([near[:, :-1], near[:, -1:] - 1e3], dim=1)
        return torch.zeros(len(x), 10).index_add(1, self.labels, near.softmax(dim=1)) * 5


def test_a_benchmark_of_robustbench_changes_one_import(
    cifar: data.Data, small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    clean, robust = benchmark(
        Knows(cifar), dataset="cifar10", threat_model="Linf", eps=8 / 255, n_examples=10, to_disk=True,
        model_name="Knows2026", aa_state_path=tmp_path / "state", log_path="log.txt",
    )  # fmt: skip
    assert isinstance(clean, float)
    assert 0 <= robust <= clean == 1.0
    out = capsys.readouterr().out.splitlines()
    assert out == ["Clean accuracy: 100.00%", f"Adversarial accuracy: {robust:.2%}"]
    assert '"eps": "8/255"' in next((tmp_path / "state").glob("*.json")).read_text()
    assert (tmp_path / "model_info" / "cifar10" / "Linf" / "Knows2026.json").exists()
    assert "Clean accuracy" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"threat_model": "L2"}, "only cifar10 and cifar100 under Linf"),
        ({"dataset": "imagenet"}, "only cifar10 and cifar100 under Linf"),
        ({"eps": None}, "needs eps"),
        ({"eps": 8}, "eps is a distance in pixel units"),
        ({"to_disk": True}, "model_name where to_disk"),
    ],
)
def test_what_the_benchmark_does_not_do_is_refused_before_it_begins(given: dict[str, Any], why: str) -> None:
    assert why in refusal(lambda: benchmark(nn.Identity(), **{"eps": 8 / 255, **given}))


def test_its_arguments_are_robustbenchs_own() -> None:
    import inspect

    with zoo.imported():
        import robustbench
    assert list(inspect.signature(benchmark).parameters) == list(inspect.signature(robustbench.benchmark).parameters)
