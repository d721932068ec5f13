"""RobustBench: the one file that knows the distribution. Its published boards, from the metadata it is installed with.

The distribution's README lists every board of its model zoo, under a dataset (`### CIFAR-10`) and a threat model
(`#### Linf, eps=8/255`). Nothing of robustbench is imported for that, and nothing of it is copied here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, metadata

from fatbench.errors import Refused


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
