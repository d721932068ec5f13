"""docs/reproduction.md: every claim with its verdict and figures, the plots, and what may not be concluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from fatbench.errors import Refused
from fatbench.faces import escaped
from fatbench.files import write_atomic, write_text
from fatbench.paper import drawn, reproduce
from fatbench.paper.claims import Finding
from fatbench.paper.contestants import World
from fatbench.paper.experiments import EXPERIMENTS, SAME
from fatbench.paper.pictures import PICTURES
from fatbench.paper.pool import Pool


def publish(said: Sequence[str], pool: Pool, folders: Sequence[Path], out: Path) -> list[Finding]:
    """Writes OUT.md and OUT/plots from what is recorded; the same records give the same text.

    Raises:
        Refused: no claim can be judged by what is recorded.
    """
    found = list(reproduce.findings(said, pool, folders))
    if not found:
        raise Refused(f"nothing is recorded of {', '.join(said)}: leave --tell out, or say --records FOLDER")
    plots = _plotted(said, pool, folders, out / "plots")
    write_text(out.with_name(f"{out.name}.md"), text(found, plots, pool.world, out.name))
    return found


def _plotted(said: Sequence[str], pool: Pool, folders: Sequence[Path], out: Path) -> list[Path]:
    written = []
    for name in said:
        figures = list(drawn.figures(name, EXPERIMENTS[name], pool)) if name in EXPERIMENTS else []
        if name in PICTURES and (seen := reproduce.evidence(name, folders)):
            figures.append((name, PICTURES[name].drawn(seen)))
        for own, figure in figures:
            path = out / f"{own}.png"
            write_atomic(path, partial(figure.savefig, format="png", dpi=110, metadata={"Software": None}))
            written.append(path)
    return written


def table(found: Sequence[Finding]) -> str:
    """Every claim, a row each, as Markdown."""
    rows = [
        {
            "claim": finding.claim.text, "place": finding.claim.place, "verdict": f"**{finding.verdict}**",
            "found": finding.said, "the paper's": finding.claim.paper or "–", "n": finding.n, "seeds": finding.seeds,
            "budget": finding.budget, "command": f"`{finding.command}`",
        }
        for finding in found
    ]  # fmt: skip
    shown = pd.DataFrame(rows).map(lambda cell: cell if str(cell).startswith(("**", "`")) else escaped(str(cell)))
    return str(shown.to_markdown(index=False, disable_numparse=True))


def told(found: Sequence[Finding]) -> str:
    """`31 findings: 12 hold, 9 do not, 10 are undecided`."""
    counts = Counter(finding.verdict for finding in found)
    hold, fail, undecided = counts["holds"], counts["does not hold"], counts["undecided"]
    return f"{len(found)} findings: {hold} hold, {fail} do not hold, {undecided} are undecided"


def text(found: Sequence[Finding], plots: Sequence[Path], world: World, folder: str) -> str:
    """The whole page."""
    beyond = [finding for finding in found if not finding.claim.place.startswith(("Table", "Figure", "Theorem"))]
    paper = [finding for finding in found if finding not in beyond]
    parts = [
        "# The paper's claims, run again",
        INTRODUCTION.format(dataset=world.dataset, eps=world.eps, budgets=", ".join(map(str, world.budgets)))
        + f"\n\n{told(found)}.",
        _shared(),
    ]
    for heading, own in (("What the paper claims", paper), ("Beyond the paper", beyond)):
        if own:
            parts += [f"## {heading}", f"{told(own)}.", table(own)]
    if plots:
        parts += ["## Plots", PLOTS, *(f"![{path.stem}]({folder}/plots/{path.name})" for path in plots)]
    parts += ["## What may not be concluded", LIMITS]
    return "\n\n".join(parts) + "\n"


def _shared() -> str:
    """Which figures stand for others, and what else must be known of an experiment."""
    others: dict[str, list[str]] = {}
    for name, own in SAME.items():
        others.setdefault(own, []).append(name)
    shared = "; ".join(f"{', '.join(names)} by {own}" for own, names in others.items())
    notes = [f"`{name}`: {own.note}" for name, own in EXPERIMENTS.items() if own.note]
    return " ".join(
        [f"What differs in the paper by data or network alone is told here by one sweep: {shared}.", *notes]
    )


INTRODUCTION = """\
This page is written by `fatbench reproduce` from recorded runs, and by nothing else. Each row is one claim of
"Attacks Which Do Not Kill Training Make Adversarial Learning Stronger" (ICML 2020), or one that it suggests, tested on
{dataset} at eps {eps} with networks that train in seconds. A claim is judged at several budgets of training
({budgets} epochs), because what holds early need not hold late.

How a verdict comes about: a difference is the mean over training seeds of one contestant's accuracy minus the other's,
on the same test images, with a 95 % t interval whose variance is that between seeds plus that of the images. A claim
*holds* where its whole interval lies on the claim's side, *does not hold* where it lies wholly on the other, and is
*undecided* in between. "Not below by more than 1" allows for one percentage point. Claims are tested one by one: of
twenty, one may come out wrong by chance. A claim whose runs are not recorded yet has no row."""

PLOTS = "Medians over seeds; bands go from the least to the greatest. The data behind each are the committed records."

LIMITS = """\
These are 8x8 grey digits, or points in the plane, and networks of some ten thousand weights; eps 0.3 of a digit is not
8/255 of a photograph. A claim that holds here is evidence for the mechanism that the paper describes; one that does not
hold is news about small data, not a refutation of the paper's tables, whose figures stand beside for comparison. The
same commands with `--scale paper` train the paper's recipes on CIFAR-10 and SVHN; that has not been run here."""
