"""The state of an examination under way: `ID.partial.jsonl`, a JSON line for each step done, and before them the plan.

A step is one attack on one chunk, and of an attack in stages, one stage of it: what a kill can cost at most. Where
evidence is asked for, the examples that a step broke lie in `ID.partial/`, and a step without them is not done.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from fatbench.errors import Refused
from fatbench.files import append_line, canonical, disk, read_lines, write_atomic, write_text

# The form of an entry; raised when one says something else.
FORMAT = 2


class Step(NamedTuple):
    """One attack on one chunk; `stage` is empty where it has none."""

    chunk: int
    attack: str
    stage: str = ""

    def __str__(self) -> str:
        return f"chunk {self.chunk + 1}, {self.attack}" + (f" {self.stage}" if self.stage else "")


class Ledger:
    """What has been done.

    Attributes:
        entries: What each step found.
        evidence: Whether the examples themselves are kept.
        resumed: Steps that were there already.
    """

    def __init__(self, path: Path, plan: str, *, evidence: bool = False) -> None:
        self.path, self.evidence = path, evidence
        self.folder = path.with_suffix("")
        lines = read_lines(path)
        head = {"plan": plan, "format": FORMAT}
        if lines and lines[0] != head:
            raise Refused(f"{path} belongs to another examination or fatbench: choose another --out, or remove it")
        self.entries: dict[Step, dict[str, Any]] = {}
        torn = set()  # chunks of which a step is lost: what came after it hangs on how it ends this time
        for entry in lines[1:]:
            step = Step(entry["chunk"], entry["attack"], entry["stage"])
            if not self._kept(step, entry):
                torn.add(step.chunk)
            if step.chunk not in torn:
                self.entries[step] = entry
        self.resumed = len(self.entries)
        # Where a kill cut a line off, what can be read is what was done.
        write_text(path, "".join(canonical(line) + "\n" for line in (head, *self.entries.values())))

    def add(self, step: Step, entry: dict[str, Any], examples: Tensor) -> None:
        """Keeps a step's outcome, and where asked the examples (K, C, H, W) it broke, before the line that says so."""
        if self.evidence and len(examples):
            write_atomic(self._examples(step), lambda to: save_file({"x_adv": examples.cpu().contiguous()}, to))
        line = {**step._asdict(), **entry}
        append_line(self.path, line)
        self.entries[step] = line

    def examples(self, step: Step) -> Tensor:
        """(K, C, H, W) what a step broke, in the order of its `broken`."""
        return load_file(self._examples(step))["x_adv"]

    def _kept(self, step: Step, entry: dict[str, Any]) -> bool:
        return not self.evidence or not entry.get("fell") or self._examples(step).exists()

    def close(self) -> None:
        """Clears away what a finished examination no longer needs."""
        self.path.unlink()
        with disk(self.folder):
            if self.folder.exists():
                shutil.rmtree(self.folder)

    def _examples(self, step: Step) -> Path:
        return self.folder / f"{'-'.join(str(part) for part in step if part != '')}.safetensors"
