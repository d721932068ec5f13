"""docs/reproduction.md: every claim with its verdict and figures, the plots, and what may not be concluded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pandas as pd
from matplotlib.figure import Figure

from fatbench.catalogue import described
from fatbench.errors import Refused
from fatbench.faces import escaped
from fatbench.files import write_atomic, write_text
from fatbench.paper import drawn, fullscale, reproduce
from fatbench.paper.claims import Finding
from fatbench.paper.contestants import DIGITS
from fatbench.paper.experiments import EXPERIMENTS, SAME, tabled
from fatbench.paper.pictures import PICTURES
from fatbench.paper.pool import Pool


class Section(NamedTuple):
    """What is found in one world."""

    pool: Pool
    found: list[Finding]
    plots: list[Path]


def publish(said: Sequence[str], pools: Sequence[Pool], folders: Sequence[Path], out: Path) -> list[Finding]:
    """Writes OUT.md and OUT/plots from what is recorded, a section a world; the same records give the same text.

    Raises:
        Refused: no claim can be judged by what is recorded.
    """
    found = [(pool, list(reproduce.findings(said, pool, folders))) for pool in pools]
    sections = [Section(pool, own, _plotted(said, pool, folders, out / "plots")) for pool, own in found if own]
    if not sections:
        raise Refused(f"nothing is recorded of {', '.join(said)}: leave --tell out, or say --records FOLDER")
    write_text(out.with_name(f"{out.name}.md"), text(sections, out.name))
    return [finding for section in sections for finding in section.found]


def _plotted(said: Sequence[str], pool: Pool, folders: Sequence[Path], out: Path) -> list[Path]:
    written, first = [], "" if pool.world is DIGITS else f"{pool.world.dataset}-"
    for name in filter(pool.world.has, said):
        figures = list(drawn.figures(name, EXPERIMENTS[name], pool)) if name in EXPERIMENTS else []
        if name in PICTURES and (seen := reproduce.evidence(name, folders)):
            figures.append((name, PICTURES[name].drawn(seen)))
        written += [_saved(figure, out / f"{first}{own}.png") for own, figure in figures]
    return written


def _saved(figure: Figure, path: Path) -> Path:
    write_atomic(path, partial(figure.savefig, format="png", dpi=110, metadata={"Software": None}))
    return path


def measured(said: Sequence[str], folders: Sequence[Path], out: Path) -> list[Finding]:
    """Draws the experiments that are pictures into OUT/plots, of what was measured, and says what is found of them."""
    found = []
    for name in said:
        seen = reproduce.evidence(name, folders)
        _saved(PICTURES[name].drawn(seen), out / "plots" / f"{name}.png")
        found += PICTURES[name].found(seen)
    return found


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


# On a laptop the same measurement as another place's: the paper varies starts or pictures, and the claim stands twice.
REPEATS = {"Table 3": "Table 2", "Figure 11": "Figure 3"}


def told(found: Sequence[Finding]) -> str:
    """`31 findings: 12 hold, 9 do not hold, 10 are undecided`; what is claimed again of one measurement counts once."""
    distinct = {
        (
            REPEATS.get(finding.claim.place, finding.claim.place),
            finding.claim.text,
            finding.budget,
            finding.said,
        ): finding
        for finding in found
    }
    counts, again = Counter(finding.verdict for finding in distinct.values()), len(found) - len(distinct)
    hold, fail, undecided = counts["holds"], counts["does not hold"], counts["undecided"]
    more = f" (rows that repeat one for another place of the paper: {again})" if again else ""
    return f"{len(distinct)} findings: {hold} hold, {fail} do not hold, {undecided} are undecided{more}"


def text(sections: Sequence[Section], folder: str) -> str:
    """The whole page."""
    parts = ["# The paper's claims, run again", INTRODUCTION, *_side_by_side(sections)]
    for section in sections:
        parts += _section(section, folder)
    return "\n\n".join(parts) + "\n"


def _side_by_side(sections: Sequence[Section]) -> list[str]:
    """Each claim that was judged in every world, with the verdict of its longest budget there."""
    judged = [{finding.claim.id: finding for finding in section.found} for section in sections]  # the longest is last
    shared = [[own[ident] for own in judged] for ident in judged[-1] if all(ident in own for own in judged)]
    if len(sections) < 2 or not shared:
        return []
    verdicts = [{finding.verdict for finding in row} for row in shared]
    alike, opposed = sum(len(said) == 1 for said in verdicts), verdicts.count({"holds", "does not hold"})
    rows = [
        {"claim": row[-1].claim.text, "place": row[-1].claim.place}
        | {
            f"on {section.pool.world.title}": f"{finding.verdict}, {finding.budget}"
            for section, finding in zip(sections, row, strict=True)
        }
        for row in shared
    ]
    told = f"Of {len(shared)} claims {alike} have one verdict everywhere; held here and refuted there: {opposed}."
    return ["## Side by side", BESIDE, told, str(pd.DataFrame(rows).to_markdown(index=False))]


def _section(section: Section, folder: str) -> list[str]:
    """One world's: what it is, its claims, what its training cost, its plots, and what they do not say."""
    world, found = section.pool.world, section.found
    beyond = [finding for finding in found if not finding.claim.place.startswith(("Table", "Figure", "Theorem"))]
    paper = [finding for finding in found if finding not in beyond]
    about, limits = WORDS[world.dataset]
    budgets = ", ".join(map(str, world.budgets))
    parts = [f"## On {world.title}", about.format(eps=world.eps, budgets=budgets), f"{told(found)}."]
    if world.tells is None:
        parts.append(_shared())
    for heading, own in (("What the paper claims", paper), ("Beyond the paper", beyond)):
        if own:
            parts += [f"### {heading}, on {world.title}", f"{told(own)}.", table(own)]
    if costs := _costs(section.pool):
        parts += [f"### What training cost on {world.title}", COSTS, costs]
    full = described(world.dataset).of
    if full and (beside := pd.DataFrame(fullscale.rows(section.pool, full))).size:
        parts += ["### Beside full scale", FULL, str(beside.to_markdown(index=False, disable_numparse=True))]
    if section.plots:
        parts += [f"### Plots of {world.title}", PLOTS]
        parts += [f"![{path.stem}]({folder}/plots/{path.name})" for path in section.plots]
    return [*parts, f"### What may not be concluded from {world.title}", limits]


def _costs(pool: Pool) -> str:
    """Backward passes and time of the tables' contestants at the longest budget, as Markdown; empty of none."""
    rows = []
    for side in filter(None, (pool.of(one, []) for _, one in tabled(pool.world))):
        trained = [run.training for run in side.runs if run.training]
        if not trained or not side.passes():
            continue
        own = "" if side.contestant.eps == pool.world.eps else f", eps {side.contestant.eps}"
        rows.append(
            {
                "contestant": side.contestant.name + own, "seeds": len(trained), "epochs": side.contestant.epochs,
                "backward passes an example and epoch": f"{median(side.passes()) / side.contestant.epochs:.2f}",
                "training, minutes": f"{median(one.seconds for one in trained) / 60:.1f}",
            }
        )  # fmt: skip
    return str(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True)) if rows else ""


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
"Attacks Which Do Not Kill Training Make Adversarial Learning Stronger" (ICML 2020), or one that it suggests, tested at
a scale that runs on two CPU cores.

How a verdict comes about: a difference is the mean over training seeds of one contestant's accuracy minus the other's,
on the same test images, with a 95 % t interval whose variance is that between seeds plus that of the images. A claim
*holds* where its whole interval lies on the claim's side, *does not hold* where it lies wholly on the other, and is
*undecided* in between. "Not below by more than 1" allows for one percentage point. Claims are tested one by one: of
twenty, one may come out wrong by chance. A claim whose runs are not recorded yet has no row."""

BESIDE = """\
What was judged in every setting, at its longest budget there; eps is each one's own, and said here as the last one has
it. The figures behind a verdict stand in the sections below."""

PLOTS = "Medians over seeds; bands go from the least to the greatest. The data behind each are the committed records."

COSTS = """\
Medians over seeds. The passes are crafting's and the update's own; the minutes are those of the machine that trained,
at times with another run beside."""

FULL = """\
Medians over seeds, percent, beside the FAT paper's own Tables 1, 2 and 4 and RobustBench's board (both: all 10,000 test
images, networks a hundred times as large, the whole training set). Nothing is ranked across the two."""

# What each world is, and what it does not say.
WORDS = {
    "digits": (
        """\
scikit-learn's 8x8 digits, eps {eps}, with networks that train in seconds. A claim is judged at several budgets of
training ({budgets} epochs), because what holds early need not hold late.""",
        """\
These are 8x8 grey digits, or points in the plane, and networks of some ten thousand weights; eps 0.3 of a digit is not
8/255 of a photograph. A claim that holds here is evidence for the mechanism that the paper describes; one that does not
hold is news about small data, not a refutation of the paper's tables, whose figures stand beside for comparison. The
same commands with `--scale paper` train the paper's recipes on CIFAR-10 and SVHN; that has not been run here.""",
    ),
    "cifar10-reduced": (
        """\
Real photographs and a small everything else: the first 10,000 training and the first 1,000 test images of CIFAR-10,
eps {eps}, FAT's Small CNN at a quarter of its width (`narrow-cnn`), {budgets} epochs where the paper trains 60 to 120,
bfloat16 while training and while attacks are made (what they found counts in float32 alone).""",
        """\
The networks have a hundredth of the paper's weights, a fifth of its images and a tenth of its epochs: they underfit,
and are far below the paper's and RobustBench's figures in everything. What may be concluded: which way a friendly
defense moves natural and robust accuracy and training cost when everything else is equal, early in training, on
photographs. What may not: what either reaches at full scale, whether their order there is the same, or anything of
robust overfitting, which needs the long training that is missing here. The rows of this setting have a board of their
own.""",
    ),
}
