"""Several processes examine one network: the result is that of one, whoever is killed on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fatbench import data, devices, evaluate, protocol, recipe, shards, trainer
from fatbench.asked import Network
from fatbench.checkpoint import load
from fatbench.evaluate import Examination, State
from fatbench.ledger import Ledger
from fatbench.record import Record

pytestmark = pytest.mark.timeout(240)
ATTACKS = "fgsm,pgd-5,pgd-10,autoattack"
EPS = "0.14"  # leaves AutoAttack few to spend its time on


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on a made-up dataset of three classes, and the dataset: 507 test images, chunks of 250, 250 and 7."""
    folder = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    patterns = rng.uniform(size=(3, 8, 8))
    arrays = {}
    for split, n in (("train", 300), ("test", 507)):
        y = np.arange(n) % 3
        arrays |= {f"x_{split}": (255 * (0.5 * patterns[y] + 0.5 * rng.uniform(size=(n, 8, 8)))).astype(np.uint8)}
        arrays |= {f"y_{split}": y}
    np.savez(folder / "made-up.npz", **arrays)
    settings = recipe.resolve(
        "standard", dataset=str(folder / "made-up.npz"), eps=EPS, epochs=8, lr=0.05, batch_size=64
    )
    return trainer.train(settings, folder / "run"), folder / "made-up.npz"


def options(**more: Any) -> dict[str, Any]:
    plain = dict.fromkeys(("dataset", "protocol", "eps", "external", "source", "surrogate", "checked"))
    return {**plain, "attacks": ATTACKS, "n": None, "balanced": False, "seed": 0, **more}


def examined(run: Path, out: Path, processes: int, *, keep: bool = False, **more: Any) -> Record:
    fabric = devices.fabric_on("cpu", devices=processes, patience=shards.PATIENCE)
    return devices.launched(fabric, shards.examine_as_asked, Network(str(run)), options(**more), out, keep)


def test_one_two_and_three_processes_find_the_same(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", str(torch.get_num_threads()))  # bits are held against bits
    records = [examined(world[0], tmp_path / str(n), n, keep=True) for n in (1, 2, 3)]
    one, two, three = (record.model_dump(mode="json") for record in records)
    assert one["result"] == two["result"] == three["result"]
    assert one["id"] == two["id"]
    assert one["hash"] == two["hash"] == three["hash"]
    assert one["result"]["data"]["n"] == 507
    right = one["result"]["correct"]
    assert right["clean"] > right["fgsm"] > right["pgd-10"] > right["autoattack"]
    assert ("ranks" in one["run"], two["run"]["ranks"], three["run"]["ranks"]) == (False, 2, 3)
    kept = [(tmp_path / str(n) / f"{one['id']}.adversarial.safetensors").read_bytes() for n in (1, 2, 3)]
    assert kept[0] == kept[1] == kept[2]
    for n in (2, 3):
        assert not list((tmp_path / str(n)).glob("*.partial*"))
        assert not list((tmp_path / str(n)).glob(".*"))


def test_what_ranks_left_behind_is_gone_on_with_by_any_number_of_processes(
    world: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As two ranks that were killed leave it: the first chunk in one ledger, half of the second in another."""
    subject, loaded = load(world[0]), data.load(str(world[1]))
    task = Examination(subject, loaded, protocol.load(protocol.DEFAULT).only(["fgsm", "pgd-5"]), EPS, checked=False)
    whole = evaluate.evaluate(task, tmp_path / "whole")
    state = State.of(task, tmp_path / "parts")
    (tmp_path / "parts").mkdir()
    steps = 0
    for rank in range(2):
        ledger = Ledger(shards._part(state.ledger, rank), state.digest)
        add = ledger.add

        def some(*arguments: Any, add: Callable[..., None] = add, most: int = 3 - rank) -> None:
            nonlocal steps
            add(*arguments)
            steps += 1
            if steps % 3 == most % 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(ledger, "add", some)
        with pytest.raises(KeyboardInterrupt):
            evaluate.examine(task, subject.model, ledger, "cpu", share=(rank, 3))
    shards._merge(state, keep_examples=False)
    assert len(Ledger(state.ledger, state.digest).entries) == steps > 3
    again = evaluate.evaluate(task, tmp_path / "parts")
    assert again.result == whole.result
    assert again.run["resumed_steps"] == steps


def test_every_chunk_is_one_ranks(world: tuple[Path, Path], tmp_path: Path) -> None:
    task = Examination(
        load(world[0]), data.load(str(world[1])), protocol.load(protocol.DEFAULT).only(["fgsm"]), EPS, checked=False
    )
    done = []
    for rank in range(4):  # one more than there are chunks
        ledger = Ledger(tmp_path / f"{rank}.jsonl", "plan")
        evaluate.examine(task, task.subject.model, ledger, "cpu", share=(rank, 4))
        done += [json.dumps(step) for step in ledger.entries]
    assert sorted(done) == sorted(json.dumps(step) for step in task.steps())
    assert os.environ.get("LOCAL_RANK") is None
