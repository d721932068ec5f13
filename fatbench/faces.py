"""The faces of a table: what people read and what machines do, from the leaderboard's one frame."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pandas as pd

from fatbench.catalogue import DATASETS
from fatbench.columns import Column, described
from fatbench.quantities import eps_class

SCHEMA = 1  # of the JSON face; raised when a column changes its meaning
Row = dict[Any, Any]

TITLES = {
    "clean": "natural", "fgsm": "FGSM", "cw-inf": "C&W-inf", "autoattack": "AutoAttack", "worst": "worst case",
}  # fmt: skip


def title(attack: str) -> str:
    """An attack as a column's head.

    >>> title("pgd-20"), title("pgd-20@16/255"), title("cw-inf")
    ('PGD-20', 'PGD-20 (16/255)', 'C&W-inf')
    """
    plain, _, budget = attack.partition("@")
    return TITLES.get(plain, plain.upper()) + (f" ({budget})" if budget else "")


def heading(key: tuple[str, ...]) -> str:
    """A table's title; of all protocols where the key names none."""
    dataset, norm, eps, *protocol = key
    return f"{dataset}, {norm}, eps {eps}, {protocol[0] if protocol else 'all protocols'}"


def attacks_of(table: pd.DataFrame) -> list[str]:
    """clean, the attacks and worst, in the order of the columns."""
    return [column.removesuffix("_low") for column in table.columns if column.endswith("_low")]


def cells(table: pd.DataFrame, *, brief: bool = False) -> pd.DataFrame:
    """A table as people read it: text cells, `57.1 [54.0, 60.2]` for one seed, `57.1 ± 0.4` for several.

    What others published is as they printed it, and what they do not tell is "unknown". An effort or verdict that no
    row knows is left out; where it is to be brief, so are intervals and all that a narrow page has no room for.
    """
    found = table.to_dict("records")
    marks = _marks(table)
    shown: dict[str, list[str]] = {"#": [_text(row["rank"], "–") for row in found]} if "rank" in table else {}
    shown["defense"] = [named(row) + mark for row, mark in zip(found, marks, strict=True)]
    shown["network"] = [row["arch"] for row in found]
    shown |= {} if "rank" in table else {"protocol": [row["protocol"] for row in found]}
    shown["source"] = [row["source"] for row in found]
    shown |= {} if (table["source"] == "measured").all() else {"data": [_text(row["data"]) for row in found]}
    shown["eps train"] = [_trained(row) for row in found]
    shown["epochs"] = [_epochs(row) for row in found]
    for attack in attacks_of(table):
        shown[title(attack)] = [_cell(row, attack, not brief) for row in found]
    shown["n"] = [_text(row["n"]) for row in found]
    shown["seeds"] = [_seeds(row) for row in found]
    shown |= {} if brief else {head: [_text(tell(row)) for row in found] for head, tell in _WIDE.items()}
    idle = [head for head in ("epochs", *_WIDE) if set(shown.get(head, ())) <= {"unknown"}]
    lower = "worst" in table and bool((table["best_known"] < table["worst"]).any())
    idle += [] if lower else ["best known"]
    idle += [] if set(table["crafted_in"].dropna()) - {"", "float32"} else ["crafted in"]
    return pd.DataFrame({head: texts for head, texts in shown.items() if head not in idle}, index=table.index)


def _marks(table: pd.DataFrame) -> list[str]:
    """` [2]` for a row with the second of the notes that stand under the table."""
    doubts = list(dict.fromkeys(note for note in table["notes"] if note))
    return [f" [{doubts.index(note) + 1}]" if note else "" for note in table["notes"]]


def named(row: Row) -> str:
    """A row's defense, with what sets it apart from others of its name."""
    return f"{row['defense']} ({row['variant']})" if row["variant"] else str(row["defense"])


def _text(value: Any, absent: str = "unknown") -> str:
    return absent if pd.isna(value) or value == "" else str(value)


def _trained(row: Row) -> str:
    # A table holds one class of budgets; one published otherwise, 0.031 for 8/255, is marked.
    tested = f" (tested at {row['eps']})" if row["eps"] != eps_class(row["eps"]) else ""
    return f"{_text(row['eps_train'])}{tested}"


def _epochs(row: Row) -> str:
    selected = "" if _text(row["selection"], "last") == "last" else f" ({row['selection']})"
    return f"{_text(row['epochs'])}{selected}"


def _seeds(row: Row) -> str:
    done, failed = row["seeds"], row["failed"]
    if pd.isna(failed) or not failed:
        return _text(done)
    return f"{done} (+{failed} failed)" if done else f"{failed} failed"


def _cell(row: Row, attack: str, intervals: bool) -> str:
    if row["status"] not in ("done", "bound"):
        return str(row["status"]) if attack == "clean" else "–"
    if row["source"] != "measured":
        return str(row["printed"].get(attack, "–"))
    if pd.isna(row[attack]):
        return "–"
    spread = f" ± {row[f'{attack}_spread']:.1f}" if row["seeds"] > 1 else ""
    bounds = f" [{row[f'{attack}_low']:.1f}, {row[f'{attack}_high']:.1f}]" if intervals else ""
    most = "≤ " if row["status"] == "bound" and attack in ("autoattack", "worst") else ""
    return f"{most}{row[attack]:.1f}{spread}{bounds}"


def _points(name: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if pd.isna(row[name]) else format(row[name], form)


def _duration(row: Row) -> str:
    """Seconds as people say them."""
    seconds = row["train_seconds"]
    if pd.isna(seconds):
        return ""
    return (
        f"{seconds:.0f} s"
        if seconds < 600
        else f"{seconds / 60:.0f} min"
        if seconds < 36000
        else f"{seconds / 3600:.0f} h"
    )


_WIDE: dict[str, Callable[[Row], Any]] = {
    "best known": _points("best_known", ".1f"),
    "PGD-20 − AutoAttack": _points("pgd_gap", "+.1f"),
    "masking": lambda row: row["masking"],
    "best − last": _points("best_minus_last", "+.1f"),
    "gradients / example": _points("backwards_per_example", ".1f"),
    "training": _duration,
    "crafted in": lambda row: row["crafted_in"],
    "trained on": lambda row: row["train_device"],
    "reference": lambda row: row["reference"],
    # A record's id ends with twelve digits of what it is about.
    "records": lambda row: " ".join(ident.rpartition("-")[2] for ident in _text(row["ids"], "").split()),
}


def notes(table: pd.DataFrame, *, brief: bool = False) -> list[str]:
    """What stands under a table: how to read a cell, and every reason for doubt."""
    measured = table[table["source"] == "measured"]
    told = [
        f"`{known.name}` is {known.summary}. It is a setting of its own, never ranked with {known.of}."
        for known in map(DATASETS.get, dict.fromkeys(table["dataset"]))
        if known and known.of
    ]
    if len(measured):
        told.append(
            "Accuracy in percent at the last iterate, `worst case` under the worst of the attacks for each example; "
            "median ± standard deviation over training seeds"
            + ("." if brief else ", in brackets Wilson's 95 % interval over the n test samples.")
        )
    if "rank" in table and table["rank"].notna().any():
        told.append(
            "`#` is 1 + the measured rows whose worst-case interval lies wholly above this row's: who overlaps with "
            "the best shares its rank. `fatbench compare` pairs the samples, and tells closer rows apart."
        )
    if (table["status"] == "bound").any():
        told.append("`≤`: a part of the protocol was left out, and the whole of it could only lower this number.")
    if len(measured) < len(table):
        told.append(
            "Rows of other sources stand as they were printed and are not ranked: `reported` by the paper that is "
            "named, `quoted` by it from another, `robustbench` on RobustBench's board; what a source does not tell is "
            "unknown."
        )
    if (table["source"] == "robustbench").any():
        told.append(
            "RobustBench's robust accuracy stands under AutoAttack; where it knows of a stronger evaluation, it is "
            "that one's, lower. A few of its models were attacked at 0.031. What it installs does not tell which."
        )
    doubts = dict.fromkeys(note for note in table["notes"] if note)
    return [*told, *(f"[{i}] {note}" for i, note in enumerate(doubts, start=1))]


def parts(key: tuple[str, ...], table: pd.DataFrame, *, brief: bool = False) -> dict[str, pd.DataFrame]:
    """A table's cells under its heading; where protocols stand side by side, by architecture family."""
    shown = cells(table, brief=brief)
    if len(key) == 4:
        return {"": shown}
    return {str(family): shown.loc[rows.index] for family, rows in table.groupby("family", sort=False)}


def folded(shown: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """What is the same in every row, said once: `network digits-cnn, seeds 3`, and the cells without it."""
    same = [c for c in _ONCE if c in shown and len(shown) > 1 and shown[c].nunique() == 1]
    return shown.drop(columns=same), ", ".join(f"{column} {shown[column].iloc[0]}" for column in same)


_ONCE = ("network", "protocol", "source", "data", "eps train", "epochs", "n", "seeds", "crafted in")


def markdown(key: tuple[str, ...], table: pd.DataFrame) -> str:
    """One table as Markdown."""
    text = [f"# {escaped(heading(key))}"]
    for family, shown in parts(key, table).items():
        align = ["right" if column == "#" else "left" for column in shown.columns]
        grid = shown.map(escaped).to_markdown(index=False, disable_numparse=True, colalign=align)
        text += [f"## {escaped(family)}", grid] if family else [grid]
    text.append("\n".join(f"- {escaped(note)}" for note in notes(table)))
    return "\n\n".join(text) + "\n"


def latex(key: tuple[str, ...], table: pd.DataFrame) -> str:
    """One table as narrow LaTeX, for a paper: a tabular for each family; what stands under it, as comments."""
    from tabulate import tabulate

    text = [f"% {_line(heading(key))}", "% \\usepackage{booktabs}"]
    for family, whole in parts(key, table, brief=True).items():
        shown, said = folded(whole)
        rows = [[_line(cell) for cell in row] for row in shown.itertuples(index=False)]
        grid = tabulate(rows, list(shown.columns), tablefmt="latex_booktabs", disable_numparse=True)
        for sign, command in (("±", r"$\pm$"), ("≤", r"$\le$"), ("–", "--")):
            grid = grid.replace(sign, command)
        # A row that begins with a bracket would be an argument of the line break before it.
        grid = re.sub(r"^(\s*)\[", r"\1{[}", grid, flags=re.MULTILINE)
        text += [f"% {_line(about)}" for about in (family, said) if about]
        text.append(grid)
    return "\n".join([*text, *(f"% {_line(note)}" for note in notes(table, brief=True))]) + "\n"


def csv(table: pd.DataFrame) -> str:
    """Numbers for machines: a number a cell, percentages, empty where nothing is known."""
    return table.drop(columns="printed").to_csv(index=False, lineterminator="\n")


def as_json(whole: pd.DataFrame) -> dict[str, Any]:
    """The whole frame as plain JSON: its columns with type and meaning, and its rows, null where nothing is known."""
    return {
        "schema": SCHEMA,
        "columns": [column._asdict() for column in columns_of(whole)],
        "rows": [
            {name: None if pd.isna(value) else value for name, value in row.items()}
            for row in whole.drop(columns="printed").to_dict("records")
        ],
    }


def columns_of(whole: pd.DataFrame) -> list[Column]:
    """The frame's columns, documented."""
    return described(attack for attack in attacks_of(whole) if attack not in ("clean", "worst"))


def documented(whole: pd.DataFrame) -> str:
    """What every column of the CSV and JSON files says, as Markdown."""
    told = pd.DataFrame(columns_of(whole)).map(escaped)
    told.columns = pd.Index(["column", "type", "meaning"])
    return (
        "# The columns\n\nAn empty cell is what is not known or was not done.\n\n"
        + told.to_markdown(index=False)
        + "\n"
    )


_ONE_LINE = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def _line(text: object) -> str:
    return str(text).translate(_ONE_LINE)


def escaped(text: object) -> str:
    """Text that no Markdown table or page is broken by."""
    return _line(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
