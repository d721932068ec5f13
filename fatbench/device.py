"""The name of what a run ran on."""

from __future__ import annotations

import platform

import torch


def named(device: torch.device | str) -> str:
    """`cuda (NVIDIA H100)`, `cpu (x86_64)`."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or platform.machine()
    return f"{kind.type} ({name})"
