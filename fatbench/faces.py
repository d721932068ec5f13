"""The faces of a table: what people read and what machines do, from the leaderboard's one frame."""

from __future__ import annotations

from typing import Any

import pandas as pd

from fatbench.quantities import eps_class

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


def cells(table: pd.DataFrame, *, intervals: bool = True) -> pd.DataFrame:
    """A table as people read it: text cells, `57.1 [54.0, 60.2]` for one seed, `57.1 ± 0.4` for several.

    What others published is as they printed it, and what they do not tell is "unknown".
    """
    found = table.to_dict("records")
    beside = (table["source"] != "measured").any()
    shown = pd.DataFrame(index=table.index)
    if "rank" in table:
        shown["#"] = [_text(row["rank"], "–") for row in found]
    doubts = list(dict.fromkeys(note for note in table["notes"] if note))
    marks = [f" [{doubts.index(note) + 1}]" if note else "" for note in table["notes"]]
    names = [f"{row['defense']} ({row['variant']})" if row["variant"] else row["defense"] for row in found]
    shown["defense"] = [name + mark for name, mark in zip(names, marks, strict=True)]
    shown["network"] = table["arch"]
    if "rank" not in table:
        shown["protocol"] = table["protocol"]
    shown["source"] = table["source"]
    shown["eps train"] = [_trained(row) for row in found]
    if table["epochs"].notna().any():
        shown["epochs"] = [_epochs(row) for row in found]
    for attack in attacks_of(table):
        shown[title(attack)] = [_cell(row, attack, intervals) for row in found]
    shown["n"] = [_text(row["n"]) for row in found]
    shown["seeds"] = [_seeds(row) for row in found]
    if beside:
        shown["reference"] = table["reference"]
    return shown


def _text(value: Any, absent: str = "unknown") -> str:
    return absent if pd.isna(value) or value == "" else str(value)


def _trained(row: dict[Any, Any]) -> str:
    # A table holds one class of budgets; one published otherwise, 0.031 for 8/255, is marked.
    tested = f" (tested at {row['eps']})" if row["eps"] != eps_class(row["eps"]) else ""
    return f"{_text(row['eps_train'], '' if row['source'] == 'measured' else 'unknown')}{tested}"


def _epochs(row: dict[Any, Any]) -> str:
    if pd.isna(row["epochs"]):
        return "" if row["source"] == "measured" else "unknown"
    selected = "" if row["selection"] in ("", "last") else f" ({row['selection']})"
    return f"{row['epochs']}{selected}"


def _seeds(row: dict[Any, Any]) -> str:
    done, failed = row["seeds"], row["failed"]
    if pd.isna(failed) or not failed:
        return _text(done)
    return f"{done} (+{failed} failed)" if done else f"{failed} failed"


def _cell(row: dict[Any, Any], attack: str, intervals: bool) -> str:
    if row["status"] != "done":
        return str(row["status"]) if attack == "clean" else "–"
    if row["source"] != "measured":
        return str(row["printed"].get(attack, "–"))
    if pd.isna(row[attack]):
        return "–"
    if row["seeds"] > 1:
        return f"{row[attack]:.1f} ± {row[f'{attack}_spread']:.1f}"
    bounds = f" [{row[f'{attack}_low']:.1f}, {row[f'{attack}_high']:.1f}]" if intervals else ""
    return f"{row[attack]:.1f}{bounds}"


def notes(table: pd.DataFrame) -> list[str]:
    """What stands under a table: how to read a cell, and every reason for doubt."""
    measured = table[table["source"] == "measured"]
    told = []
    if len(measured):
        how = "Accuracy in percent at the last iterate, `worst case` under the worst of the attacks for each example; "
        several = (measured["seeds"] > 1).any()
        how += (
            "median ± standard deviation over training seeds"
            if several
            else "Wilson 95 % interval over the n test samples"
        )
        told.append(how + ".")
    if len(measured) < len(table):
        told.append(
            "Rows of other sources stand as they were printed and are not ranked: `reported` by the paper that is "
            "named, `quoted` by it from another, `robustbench` on RobustBench's board; what a source does not tell is "
            "unknown."
        )
    doubts = dict.fromkeys(note for note in table["notes"] if note)
    return [*told, *(f"[{i}] {note}" for i, note in enumerate(doubts, start=1))]


def csv(table: pd.DataFrame) -> str:
    """A table for machines: a number a cell, percentages, empty where nothing is known."""
    return table.drop(columns="printed").to_csv(index=False, lineterminator="\n")


def markdown(key: tuple[str, ...], table: pd.DataFrame) -> str:
    """One table as Markdown; of several architecture families where the protocols stand side by side."""
    parts = [f"# {escaped(heading(key))}"]
    shown = cells(table).map(escaped)
    if len(key) == 4:
        parts.append(_grid(shown))
    else:
        for name, rows in table.groupby("family", sort=False):
            parts += [f"## {escaped(str(name))}", _grid(shown.loc[rows.index])]
    parts.append("\n".join(f"- {escaped(note)}" for note in notes(table)))
    return "\n\n".join(parts) + "\n"


def _grid(shown: pd.DataFrame) -> str:
    align = ["right" if column == "#" else "left" for column in shown.columns]
    return shown.to_markdown(index=False, disable_numparse=True, colalign=align)


_ONE_LINE = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def escaped(text: str) -> str:
    """Text that no Markdown table or page is broken by."""
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").translate(_ONE_LINE)
