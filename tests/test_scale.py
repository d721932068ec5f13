"""Many processes: they train one network, one of them speaks, and nobody waits for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fatbench import checkpoint, console, recipe, trainer
from fatbench.attacks import Friendly, natural, pgd
from fatbench.errors import Refused
from fatbench.registry import defenses
from fatbench.team import Team
from fatbench.world import World
from fatbench.world import world as around

pytestmark = pytest.mark.timeout(240)  # what goes wrong among processes shows as a hang
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
SHORT = ("--epochs", 1, "--n-train", 116, "--batch-size", 32, "--lr", 0.05, "--eps", 0.2, "--device", "cpu")


@pytest.fixture(scope="session")
def two_ranks(root: Path) -> Any:
    """tests/two_ranks.py as a module."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("two_ranks", root / "tests" / "two_ranks.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def pair(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """Two processes as SLURM would start them on two nodes: their folder, and what each saw."""
    out = tmp_path_factory.mktemp("two-ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    slurm = {"SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": 2, "SLURM_LOCALID": 0, "SLURM_JOB_ID": 7}
    slurm |= {"SLURM_NODELIST": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(root / "tests" / "two_ranks.py"), str(out)],
            env={**os.environ, **ONE_THREAD, **{k: str(v) for k, v in slurm.items()},
                 "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=200)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    assert not said[1], "rank 1 spoke"
    return out, [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(2)]


def seen(pair: tuple[Path, list[dict[str, Any]]], check: str) -> tuple[Any, Any]:
    zero, one = pair[1]
    return zero[check], one[check]


# ------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("defense", list(defenses))
def test_every_defense_trains_the_same_network_on_both_ranks_though_their_steps_differ(defense: str, pair: Any) -> None:
    zero, one = seen(pair, "every_defense")
    assert zero[defense] == one[defense]
    run = pair[0] / "every_defense" / defense
    saved = checkpoint.load(run / "last.safetensors")
    assert saved.fingerprint == zero[defense]["network"]
    assert saved.meta["settings"]["ranks"] == 2
    (epoch,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert epoch["forwards"] >= epoch["backwards"] >= round(epoch["steps_per_example"] * 104)


@pytest.mark.parametrize("defense", ["madry", "fat-trades", "fat-mart"])
def test_with_frozen_batchnorm_two_ranks_make_the_update_of_one(
    defense: str, pair: Any, two_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.models, "build", two_ranks.frozen)
    # 103 examples: the last batch is of 7, 4 and 3 of them on a rank.
    alone = trainer.train(two_ranks.settings(defense, precision="64-true", n_train=114), tmp_path / "run")
    both = pair[0] / "frozen_batchnorm" / defense
    ours, theirs = load_file(alone / "last.safetensors"), load_file(both / "last.safetensors")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert torch.allclose(value, theirs[key], rtol=0, atol=1e-13), key
    (a,), (b,) = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (alone, both)
    )
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-7)  # a float32 when it leaves the wrapper
    for count in ("forwards", "backwards", "steps_per_example", "train_accuracy", "val_natural", "val_pgd-10"):
        assert a[count] == b[count], count


def test_in_bfloat16_too(pair: Any, two_ranks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    zero, one = seen(pair, "half")
    assert zero == one
    monkeypatch.setattr(trainer.models, "build", two_ranks.frozen)
    alone = trainer.train(two_ranks.settings("fat-dat", precision="bf16-mixed", n_train=114), tmp_path / "run")
    (a,), (b,) = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (alone, pair[0] / "half")
    )
    assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    assert a["train_accuracy"] == pytest.approx(b["train_accuracy"], abs=0.03)
    assert b["train_accuracy"] > 0.05


def test_a_curriculum_resumed_on_two_ranks_ends_with_the_same_bits(pair: Any) -> None:
    zero, one = seen(pair, "resumed")
    assert zero == one
    whole, parts = zero
    assert whole == parts
    assert whole["memory"]["strength"] >= 1


def test_ranks_that_come_apart_by_one_bit_are_named_on_every_rank(pair: Any) -> None:
    zero, one = seen(pair, "desynchronised")
    assert zero == one
    assert zero.startswith("RunFailed: rank 1 has another network than rank 0 after epoch 1")


@pytest.mark.parametrize(
    ("check", "told"),
    [
        ("full_disk", "Refused: cannot write: No space left on device"),
        ("not_finite", "RunFailed: the loss was not finite at epoch 1, batch 3"),
        ("claimed", "holds something else and no run"),
    ],
)
def test_what_stops_one_rank_stops_both_in_the_same_words(check: str, told: str, pair: Any) -> None:
    zero, one = seen(pair, check)
    assert zero == one
    assert told in zero


def test_devices_2_and_torchrun_do_the_same(
    pair: Any, root: Path, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    spawned = cli("train", "fat", *SHORT, "--devices", 2, "--out", tmp_path / "spawned", env=ONE_THREAD)
    assert spawned.returncode == 0, spawned.stderr
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "fatbench", "train", "fat", *map(str, SHORT), "--out", str(tmp_path / "torchrun")]
    started = subprocess.run(
        command, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True, timeout=200, check=False
    )
    assert started.returncode == 0, started.stderr
    ends = [checkpoint.load(tmp_path / name).fingerprint for name in ("spawned", "torchrun")]
    assert ends == 2 * [seen(pair, "every_defense")[0]["fat"]["network"]]
    for said in (spawned, started):
        assert said.stdout.count("done: ") == 1
        assert said.stderr.count("fat on digits 1/1") == 1


# ------------------------------------------------------------------------------------------------ the parts


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc, to see which processes are there")
@pytest.mark.timeout(120)
def test_when_the_command_is_killed_its_processes_end_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fatbench", "train", "standard", "--devices", "2", "--epochs", "5000"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([*command, "--out", str(tmp_path / "run")], cwd=tmp_path, env=env, stderr=subprocess.PIPE)
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        assert run.poll() is None
        time.sleep(0.2)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    assert len(children) >= 2
    run.kill()
    run.communicate()
    while any(Path(f"/proc/{child}").exists() for child in children):  # pytest's timeout is the limit
        time.sleep(0.2)


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 16, 37, 128])
def test_shares_are_the_batch_and_their_weighted_means_its_mean(n: int, size: int) -> None:
    rows = np.arange(100, 100 + n)
    losses = np.random.default_rng(0).uniform(size=300)
    shares = [Team(fabric(rank, size)).share(rows) for rank in range(size)]
    counted = np.concatenate([share.rows for share in shares if share.counts])
    assert np.array_equal(counted, rows)
    assert np.mean([share.weight * losses[share.rows].mean() for share in shares]) == pytest.approx(losses[rows].mean())
    assert min(len(share.rows) for share in shares) >= min(2, n)


def fabric(rank: int, size: int) -> Any:
    return SimpleNamespace(global_rank=rank, world_size=size)


def test_levelling_leaves_a_lone_rank_and_frozen_layers_as_they_are() -> None:
    net = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    net[1].eval()
    net[0].running_mean.fill_(1.0)
    net[1].running_mean.fill_(1.0)
    Team(fabric(0, 1)).level(net)
    assert net[0].running_mean.tolist() == [1, 1]
    other = SimpleNamespace(global_rank=0, world_size=2, all_reduce=lambda flat, reduce_op: flat + 3 * flat)
    Team(other).level(net)  # type: ignore[arg-type]
    assert net[0].running_mean.tolist() == [2, 2]
    assert net[1].running_mean.tolist() == [1, 1]


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for its GPU: reading a number, and picking by a mask."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = [t for t in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else []) if is_mask(t)]
        self.count += bool(masks) or str(func) in ("aten.nonzero.default", "aten._local_scalar_dense.default")
        return func(*args, **(kwargs or {}))


def is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.bool


def test_crafting_without_a_stop_rule_never_waits_for_a_device(world: Any) -> None:
    net, x, y = world
    with Waits() as waits:
        pgd(net, x, y, eps=0.1, step_size=0.02, steps=5, start=natural)
        assert waits.count == 0
        pgd(net, x, y, eps=0.1, step_size=0.02, steps=5, start=natural, stop=Friendly(5, y))
        assert waits.count > 0


def test_synchronised_batchnorm_is_refused_where_ranks_would_wait_for_ever() -> None:
    two_gpus: Any = SimpleNamespace(world_size=2, device=torch.device("cuda"))
    trainer._fits(recipe.resolve("fat", ranks=2, sync_bn=True), two_gpus)
    with pytest.raises(Refused, match="cat crafts in train mode"):
        trainer._fits(recipe.resolve("cat", ranks=2, sync_bn=True), two_gpus)


TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4", "RANK": "3"}
SLURM = {"SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "2", "SLURM_PROCID": "3"}


@pytest.mark.parametrize("env", [TORCHRUN, SLURM], ids=["torchrun", "SLURM"])
def test_the_world_is_what_the_launcher_started(env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert around() == World(1, 1, started=False)
    assert console.speaks()
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    assert around() == around(2, 2) == World(2, 2, started=True)
    assert around().size == 4
    assert not console.speaks()
    with pytest.raises(Refused, match="has started 2 processes on each of 2 nodes; leave both"):
        around(devices=4)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "give all nodes as many"),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "3"}, "--ntasks-per-node"),
        ({"SLURM_NTASKS": "4"}, "--ntasks-per-node"),
    ],
)
def test_a_lopsided_world_is_refused(env: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(Refused, match=told):
        around()


def test_an_interactive_allocation_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**SLURM, "SLURM_JOB_NAME": "interactive"}.items():
        monkeypatch.setenv(key, value)
    assert around() == World(1, 1, started=False)
