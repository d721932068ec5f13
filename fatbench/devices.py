"""Where a command runs: on one device, or as many processes in step, on Lightning Fabric (torch.distributed).

Every process is a rank with a device of its own. `--devices N` starts N of them here; torchrun and SLURM start them
themselves, and say so in the environment. What one rank refuses, all refuse, and rank 0 alone says it.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import platform
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from inspect import signature
from multiprocessing.connection import wait
from typing import Any, TypeVar

import lightning_fabric  # noqa: F401  before the next line: it sets its logger up as it is imported
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from lightning_fabric.strategies.ddp import DDPStrategy
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.nn.parallel import DistributedDataParallel

from fatbench import console
from fatbench.errors import Refused, RunFailed
from fatbench.world import world

T = TypeVar("T")
for _talker in ("lightning_fabric", "torch.multiprocessing.spawn"):  # who announce every process, and every end of one
    logging.getLogger(_talker).setLevel(logging.ERROR)

# The wrapped module must not touch buffers by itself: fatbench/team.py makes them equal when that is safe. torch 2.14
# gave the option another name.
_SYNC = "forward_sync_buffers"
_NO_BUFFERS: dict[str, Any] = {
    _SYNC if _SYNC in signature(DistributedDataParallel).parameters else "broadcast_buffers": False
}


class Mixed(MixedPrecision):
    """bfloat16 by autocast alone: what is handed to an update is the very tensor, and stays float32."""

    def __init__(self, device: str) -> None:
        super().__init__("bf16-mixed", device)

    def forward_context(self) -> torch.autocast:
        # Of no weight a cast is kept: one that was made without gradients would be used, cut off from its weight, by
        # the forwards of a loss that come after it.
        return torch.autocast(self.device, torch.bfloat16, cache_enabled=False)

    def convert_input(self, data: Any) -> Any:
        return data


def fabric_on(
    device: str,
    precision: str = "32-true",
    devices: int | None = None,
    nodes: int | None = None,
    *,
    patience: timedelta = timedelta(minutes=30),
) -> Fabric:
    """Lightning Fabric on a world of devices.

    Args:
        device: auto, cpu, cuda, or cuda:1.
        precision: As Lightning names it.
        devices, nodes: As `world` takes them.
        patience: How long a rank waits for the others before it gives up.

    Raises:
        Refused: a device that is not there, or a world that cannot be.
    """
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise Refused(f"--device {device!r}: auto, cpu, cuda, or cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no CUDA device here; use --device cpu")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if index and kind == "cpu":
        raise Refused(f"--device {device}: a CPU has no number; use --device cpu")
    if index and int(index) >= torch.cuda.device_count():
        raise Refused(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices, the first is cuda:0")
    if precision == "bf16-mixed" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refused("--precision bf16-mixed: this GPU has no bfloat16; use 32-true")
    around = world(devices, nodes)
    how: dict[str, Any] = {"plugins": Mixed(kind)} if precision == "bf16-mixed" else {"precision": precision}
    if around.size == 1:
        where: Any = [int(index)] if index else 1
        return Fabric(accelerator=kind, devices=where, **how)
    if index:
        raise Refused(f"--device {device} names one device: leave its number out for {around.size} processes")
    if kind == "cuda" and torch.cuda.device_count() < around.devices:
        raise Refused(
            f"{around.devices} processes on this node need as many GPUs, torch sees {torch.cuda.device_count()}: "
            "lower --devices (under SLURM ask for --gpus-per-node, not --gpus-per-task)"
        )
    method: Any = "popen" if around.started else "spawn"
    strategy = DDPStrategy(start_method=method, timeout=patience, **_NO_BUFFERS)
    return Fabric(accelerator=kind, devices=around.devices, num_nodes=around.nodes, strategy=strategy, **how)


def named(device: torch.device | str) -> str:
    """What a run ran on: `cuda (NVIDIA H100)`, `cpu (x86_64)`."""
    kind = torch.device(device)
    name = torch.cuda.get_device_name(kind) if kind.type == "cuda" else platform.processor() or platform.machine()
    return f"{kind.type} ({name})"


def launched(fabric: Fabric, work: Callable[..., T], *arguments: Any) -> T:
    """work(fabric, *arguments) on every rank, started here where nobody else has; what rank 0 returned.

    `work` and its arguments must pickle. It may raise Refused and RunFailed only where all ranks do (Team.together).

    Raises:
        Refused, RunFailed: as `work` did; RunFailed also where a process was ended from outside.
    """
    if fabric.world_size == 1 and not isinstance(fabric.strategy, DDPStrategy):
        return work(fabric, *arguments)
    port = os.environ.get("MASTER_PORT")
    # Lightning does it for NCCL alone; gloo's threads, too, must have ended before the process does.
    atexit.register(_leave)
    try:
        outcome = fabric.launch(partial(_outcome, work=work, arguments=arguments))
    except ProcessExitedException as error:
        how = error.signal_name or f"exit code {error.exit_code}"
        raise RunFailed(
            f"process {error.error_index} was ended by {how}; the same command goes on (train: with --resume)"
        ) from error
    except ProcessRaisedException as error:
        last = str(error).strip().splitlines()[-1]
        raise RuntimeError(f"process {error.error_index}: {last}") from error
    finally:
        _end_children()
        if port is None:  # chosen for this launch: the next one finds its own
            os.environ.pop("MASTER_PORT", None)
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome  # type: ignore[no-any-return]


def _leave() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _outcome(fabric: Fabric, work: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """What work returned, or how all ranks ended it: an exception's type would be lost between processes."""
    console.stderr.quiet = console.stdout.quiet = not fabric.is_global_zero
    if parent := multiprocessing.parent_process():
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    try:
        return work(fabric, *arguments)
    except (Refused, RunFailed, KeyboardInterrupt) as error:
        return error


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone: killed, it could not say so."""
    wait([parent])
    os._exit(1)


def _end_children() -> None:
    """After an interruption those that were started here may still wait for each other."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(10)
        if child.is_alive():
            child.kill()
            child.join()
