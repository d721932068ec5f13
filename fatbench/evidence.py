"""The examples behind a record: kept exactly, in float32, so that anybody can count again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fatbench.examination import DOUBTS, Examination
from fatbench.files import canonical, write_atomic
from fatbench.ledger import Ledger
from fatbench.protocol import budget_of

SCHEMA = 1


def path(folder: Path, ident: str) -> Path:
    """Where a record's examples lie, beside it."""
    return folder / f"{ident}.adversarial.safetensors"


def save(where: Path, task: Examination, ledger: Ledger, result: dict[str, Any]) -> None:
    """Writes for each example the one that broke it first, and the clean image where none did or none was needed.

    Tensors: x_adv (n, C, H, W) float32, index (n,) int64 places in the test set, label (n,) int64. The metadata says of
    which network, data, budget and outcomes they are.
    """
    rows = task.rows()
    x_adv, done = task.data.x_test[rows].float().clone(), torch.zeros(len(rows), dtype=torch.bool)
    for step in task.steps():
        entry = ledger.entries[step]
        if step.attack == DOUBTS or budget_of(step.attack):
            continue
        fell = torch.tensor(entry["fell"], dtype=torch.int64)
        first = ~done[step.chunk * task.chunk + fell]
        places = step.chunk * task.chunk + fell[first]
        x_adv[places], done[places] = ledger.examples(step)[first], True
    tensors = {"x_adv": x_adv.contiguous(), "index": torch.as_tensor(rows), "label": task.data.y_test[rows].long()}
    about = {
        "schema": SCHEMA, "network": result["network"]["fingerprint"], "data": result["data"]["fingerprint"],
        "eps": result["eps"], "norm": result["norm"], "outcomes": result["outcomes"],
    }  # fmt: skip
    write_atomic(where, lambda to: save_file(tensors, to, metadata={"fatbench": canonical(about)}))
