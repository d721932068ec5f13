"""How many processes work together, and who has started them: the options, or torchrun or SLURM. No torch."""

from __future__ import annotations

import os
from typing import NamedTuple

from fatbench.errors import Refused


class World(NamedTuple):
    """How many processes work together: `devices` on each of `nodes`.

    Attributes:
        started: This process is already one of them; torchrun or SLURM has started it.
    """

    devices: int = 1
    nodes: int = 1
    started: bool = False

    @property
    def size(self) -> int:
        return self.devices * self.nodes


def world(devices: int | None = None, nodes: int | None = None) -> World:
    """The world that was asked for, or that this process was started into.

    Raises:
        Refused: what was asked for is not what torchrun or SLURM has started, or nodes that do not know of each other.
    """
    found, by = _started()
    if found.size > 1 or found.started:
        asked = (devices or found.devices, nodes or found.nodes)
        if asked != found[:2]:
            raise Refused(
                f"--devices {asked[0]} --nodes {asked[1]}: {by} has started {found.devices} processes on each of "
                f"{found.nodes} nodes; leave both options out"
            )
        return found
    if (nodes or 1) > 1 and not {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK"} <= os.environ.keys():
        raise Refused(
            f"--nodes {nodes}: the nodes must find each other: use torchrun or srun, or set MASTER_ADDR, MASTER_PORT "
            "and NODE_RANK on each"
        )
    return World(devices or 1, nodes or 1)


def _started() -> tuple[World, str]:
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        here, everywhere = int(env["LOCAL_WORLD_SIZE"]), int(env["WORLD_SIZE"])
        if everywhere % here:
            raise Refused(f"torchrun has started {everywhere} processes, {here} on this node: give all nodes as many")
        return World(here, everywhere // here, started=True), "torchrun"
    tasks = int(env.get("SLURM_NTASKS", 1))
    if tasks > 1 and env.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        here = int(env.get("SLURM_NTASKS_PER_NODE", 0))
        if not here or tasks % here:
            raise Refused(f"SLURM has started {tasks} tasks: say how many on each node, srun --ntasks-per-node=...")
        return World(here, tasks // here, started=True), "SLURM"
    return World(), ""
