"""What is to be run the day a GPU is at hand: `make gpu`. Skipped aloud without CUDA; nothing here has been run yet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fatbench import checkpoint, data, models, protocol, recipe, trainer
from fatbench.attacks import Friendly, natural, pgd, uniform
from fatbench.draws import Draws
from fatbench.evaluate import Examination, evaluate
from fatbench.registry import defenses

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="NOT RUN: torch sees no CUDA device here"),
]
two_cards = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NOT RUN: needs two CUDA devices")


def short(defense: str, **options: Any) -> recipe.Settings:
    return recipe.resolve(
        defense, **{"epochs": 2, "n_train": 400, "batch_size": 64, "lr": 0.05, "eps": "0.2", **options}
    )


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def no_host_syncs() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("defense", list(defenses))
def test_every_defense_trains_on_a_gpu(defense: str, precision: str, tmp_path: Path) -> None:
    run = trainer.train(short(defense, precision=precision), tmp_path / "run", device="cuda")
    last = metrics(run)[-1]
    assert np.isfinite(last["loss"])
    assert last["device"].startswith("cuda")
    assert load_file(run / "last.safetensors")["0.weight"].dtype == torch.float32


@pytest.mark.parametrize("defense", ["madry", "fat", "trades"])
def test_a_run_on_a_gpu_learns_as_one_on_the_cpu(defense: str, tmp_path: Path) -> None:
    """The same examples, order, weights and noise: the first epoch's loss agrees to 1 %."""
    there, here = (
        metrics(trainer.train(short(defense), tmp_path / device, device=device)) for device in ("cuda", "cpu")
    )
    assert there[0]["loss"] == pytest.approx(here[0]["loss"], rel=0.01)


def test_a_killed_run_resumed_on_a_gpu_goes_on_from_its_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one_epoch = trainer.Run.one_epoch

    def dies(self: trainer.Run) -> dict[str, Any]:
        if self.epoch == 1:
            raise KeyboardInterrupt
        return one_epoch(self)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.Run, "one_epoch", dies)
        trainer.train(short("fat"), tmp_path / "run", device="cuda")
    run = trainer.train(short("fat"), tmp_path / "run", device="cuda", resume=True)
    assert [line["epoch"] for line in metrics(run)] == [1, 2]


def batch() -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net = models.build("resnet-18").cuda().eval()
    return net, torch.rand(32, 3, 32, 32).cuda(), torch.randint(0, 10, (32,)).cuda()


def test_crafting_without_a_stop_rule_never_waits_for_the_gpu() -> None:
    """All K steps of an attack are queued without a look at the result; random starts come from the CPU beforehand."""
    net, x, y = batch()
    pgd(net, x, y, eps=8 / 255, step_size=2 / 255, steps=2, start=natural)  # warm: a folded copy is made once
    with no_host_syncs():
        pgd(net, x, y, eps=8 / 255, step_size=2 / 255, steps=10, start=natural)


def test_a_stop_rule_waits_no_oftener_than_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compaction must know how many go on: a handful of waits for each step, whatever the batch."""
    net, x, y = batch()
    waits: dict[int, int] = {}
    for n in (8, 32):
        with pytest.warns(UserWarning) as caught:
            torch.cuda.set_sync_debug_mode("warn")
            try:
                pgd(net, x[:n], y[:n], eps=8 / 255, step_size=2 / 255, steps=5, start=natural, stop=Friendly(5, y[:n]))
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits[n] = len(caught)
    assert waits[8] == waits[32]


def test_random_starts_are_the_cpus_on_a_gpu() -> None:
    x = torch.rand(16, 3, 32, 32)
    draws = Draws(("test", 0), range(16))
    assert torch.equal(uniform(x, 0.1, draws=draws), uniform(x.cuda(), 0.1, draws=draws).cpu())


def test_autoattack_on_a_gpu_finds_what_it_finds_on_the_cpu(tmp_path: Path) -> None:
    """On 100 digits the robust counts differ by at most one, and every example that both judge is judged the same way
    but for two: cuDNN's sums are rounded in another order, and an attack of thousands of steps may follow either."""
    run = trainer.train(short("fat", epochs=10, n_train=None), tmp_path / "run", device="cpu")
    said = protocol.load(protocol.DEFAULT).only(["pgd-20", "autoattack"])
    records = [
        evaluate(
            Examination(checkpoint.load(run), data.load("digits"), said, "0.2", n=100), tmp_path / device, device=device
        )
        for device in ("cpu", "cuda")
    ]
    here, there = (record.result.correct for record in records)
    assert here["clean"] == there["clean"]
    for attack in ("pgd-20", "autoattack"):
        assert abs(here[attack] - there[attack]) <= 1


@two_cards
@pytest.mark.parametrize("defense", list(defenses))
def test_every_defense_trains_on_two_cards(defense: str, tmp_path: Path) -> None:
    """NCCL; every epoch the ranks' networks are held against each other, so that reaching the end says they agree."""
    run = trainer.train(short(defense, ranks=2), tmp_path / "run", device="cuda", devices=2)
    assert np.isfinite(metrics(run)[-1]["loss"])


@two_cards
def test_synchronised_batchnorm_on_two_cards(tmp_path: Path) -> None:
    run = trainer.train(short("fat-trades", ranks=2, sync_bn=True), tmp_path / "run", device="cuda", devices=2)
    saved = checkpoint.load(run)
    assert saved.meta["settings"]["sync_bn"] is True
    assert {type(module).__name__ for module in saved.model.modules()} & {"BatchNorm2d"}


@two_cards
def test_two_cards_examine_as_one(cli: Callable[..., Any], tmp_path: Path) -> None:
    trainer.train(short("fat"), tmp_path / "run", device="cuda")
    results = []
    for n in (1, 2):
        out = tmp_path / f"records-{n}"
        done = cli("evaluate", tmp_path / "run", "--device", "cuda", "--devices", n, "--out", out)
        assert done.returncode == 0, done.stderr
        results.append(json.loads(next(out.glob("*.json")).read_text())["result"])
    assert results[0] == results[1]
