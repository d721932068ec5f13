"""RobustBench: the one file that knows the distribution. Its published boards, from the metadata it is installed with.

The distribution's README lists every board of its model zoo, under a dataset (`### CIFAR-10`) and a threat model
(`#### Linf, eps=8/255`). Nothing of robustbench is imported for that, and nothing of it is copied here. Its live models
are loaded by its own code (`zoo`).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fatbench import zoo
from fatbench.errors import Refused

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Listed:
    """One line of a published board; None is what the README does not tell.

    Attributes:
        id: What RobustBench calls the model.
        norm: linf or l2.
        eps: As the board's heading has it; a few models were attacked at 0.031, which the README does not tell.
        place: On that board.
        clean, robust: Percentages as printed. `robust` is AutoAttack's, or the lower one of a stronger evaluation where
            RobustBench knows of one; the README does not tell which.
        extra_data: Whether it was trained on more images.
        reported: What its authors report, in percent.
        unreliable: Whether RobustBench doubts AutoAttack's number.
    """

    id: str
    dataset: str
    norm: str
    eps: str
    place: int
    paper: str
    link: str
    clean: str
    robust: str
    arch: str
    venue: str
    extra_data: bool | None = None
    reported: str | None = None
    unreliable: bool | None = None


_HEADING = re.compile(r"#### (Linf|L2), eps=([0-9./]+)")
_PERCENT = re.compile(r"([0-9]{1,3}\.[0-9]+)%")
_PAPER = re.compile(r"\[(.+)\]\((\S+)\)")
_TITLES = ["#", "Model ID", "Paper", "Clean accuracy", "Robust accuracy", "Architecture", "Venue"]


def published() -> list[Listed]:
    """Every line of the boards with an l-inf or l2 budget, in the README's order.

    Raises:
        Refused: robustbench is not installed, or its README has another form than the one known here.
    """
    try:
        said = metadata("robustbench")
    except PackageNotFoundError:
        raise Refused(
            "robustbench is not installed, and its boards are read from it: pip install robustbench"
        ) from None
    version, readme = said["Version"], str(said.json.get("description", ""))
    try:
        return list(_boards(readme))
    except ValueError as error:
        raise Refused(
            f"the README of robustbench {version} is not as it was in 1.1.1: {error}; install robustbench 1.1.1"
        ) from None


def _boards(readme: str) -> Iterator[Listed]:
    lines = readme.splitlines()
    dataset, boards = "", 0
    for at, line in enumerate(lines):
        if line.startswith("### "):
            dataset = line.removeprefix("### ").strip().lower().replace("-", "")
        if heading := _HEADING.fullmatch(line.strip()):
            yield from _rows(lines[at + 1 :], dataset, heading[1].lower(), heading[2])
            boards += 1
    if not boards:
        raise ValueError("it has no heading like '#### Linf, eps=8/255'")


def _rows(lines: Iterable[str], dataset: str, norm: str, eps: str) -> Iterator[Listed]:
    """The rows of the first table, which stands before the next heading."""
    titles: list[str] = []
    place = 0
    for line in lines:
        if line.startswith("#") or (titles and not line.strip()):
            break
        cells = [_plain(cell) for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and not titles:
            titles = cells
        elif line.startswith("|") and set(line) - set("|:- "):
            place += 1
            yield _listed(cells, place, dataset, norm, eps)
    if titles != _TITLES or not place:
        raise ValueError(f"the table under '{norm}, eps={eps}' of {dataset} has the columns {titles}, {place} rows")


def _plain(cell: str) -> str:
    return " ".join(re.sub(r"</?su[bp]>", "", cell).split())


def _listed(cells: list[str], place: int, dataset: str, norm: str, eps: str) -> Listed:
    if len(cells) != len(_TITLES):
        raise ValueError(f"row {place} of {dataset} {norm} has {len(cells)} cells")
    number, name, paper, clean, robust, arch, venue = (cell.strip("* ") for cell in cells)
    cited, shares = _PAPER.fullmatch(paper), [_PERCENT.fullmatch(share) for share in (clean, robust)]
    if number != str(place) or not name or cited is None or not shares[0] or not shares[1]:
        raise ValueError(f"row {place} of {dataset} {norm} reads {cells}")
    return Listed(name, dataset, norm, eps, place, cited[1].strip(), cited[2], shares[0][1], shares[1][1], arch, venue)


# ------------------------------------------------------------------------------------------------ the benchmark


def benchmark(
    model: nn.Module,
    n_examples: int = 10000,
    dataset: Any = "cifar10",
    threat_model: Any = "Linf",
    to_disk: bool = False,
    model_name: str | None = None,
    data_dir: str = "./data",
    corruptions_data_dir: str | None = None,
    device: torch.device | None = None,
    batch_size: int = 32,
    eps: float | None = None,
    log_path: str | None = None,
    preprocessing: Any = None,
    aa_state_path: Path | None = None,
) -> tuple[float, float]:
    """robustbench.benchmark, carried out here: (clean accuracy, accuracy under AutoAttack standard), from 0 to 1.

    As there, the first n examples are taken and both figures printed. Seeds are 0 instead of the clock. `aa_state_path`
    names a folder that keeps the state and the record, from which a killed run goes on; `log_path` a file that gets
    the record's figures.

    Raises:
        Refused: before anything is computed, what is not done here: corruptions, l2, ImageNet.
    """
    from fatbench import checkpoint, data, protocol
    from fatbench.evaluate import Examination, evaluate

    name, threat = (getattr(one, "value", one) for one in (dataset, threat_model))
    if threat != "Linf" or name not in ("cifar10", "cifar100") or preprocessing is not None:
        raise Refused(
            f"benchmark of {name} under {threat}: only cifar10 and cifar100 under Linf, without preprocessing"
        )
    if eps is None or (to_disk and model_name is None):
        raise Refused("benchmark needs eps, and model_name where to_disk is set")
    if not 0 <= eps <= 1:
        raise Refused(f"benchmark at eps {eps:g}: eps is a distance in pixel units, such as 8 / 255")
    loaded, budget = data.load(name, Path(data_dir)), _published(eps)
    subject = checkpoint.Subject(model, {"arch": model_name or type(model).__name__}, checkpoint.fingerprint(model))
    n = min(n_examples, len(loaded.y_test))
    task = Examination(subject, loaded, protocol.load("robustbench-linf"), budget, n, chunk=batch_size)
    with contextlib.ExitStack() as stack:
        out = Path(aa_state_path or stack.enter_context(tempfile.TemporaryDirectory()))
        record = evaluate(task, out, device=device or "cpu")
    clean, robust = record.result.accuracies["clean"], record.result.accuracies["autoattack"]
    said = f"Clean accuracy: {clean:.2%}\nAdversarial accuracy: {robust:.2%}"
    sys.stdout.write(f"{said}\n")
    if log_path:
        with Path(log_path).open("a", encoding="utf-8") as log:
            log.write(f"{said}\n{json.dumps(record.result.after)}\n")
    if to_disk:
        with zoo.imported():
            enums = importlib.import_module("robustbench.model_zoo.enums")
            kinds = enums.BenchmarkDataset(name), enums.ThreatModel(threat)
            importlib.import_module("robustbench.utils").update_json(*kinds, model_name, clean, robust, eps, {})
    return clean, robust


def _published(eps: float) -> str:
    """8/255 of 0.03137254901960784: a float that is a share of 255 is published as one."""
    share = Fraction(round(eps * 255), 255)
    return f"{round(eps * 255)}/255" if abs(float(share) - eps) < 1e-12 else repr(float(eps))
