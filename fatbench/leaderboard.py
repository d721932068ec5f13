"""Records -> one DataFrame -> tables: one for each (dataset, norm, eps class, protocol), with an index.

Nothing else goes into a table. Rows of one contestant over several training seeds become one row: median and spread, as
the FAT paper reports. A failed or unfinished run has a row and no number.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from fatbench.errors import Refused
from fatbench.files import digest, write_text
from fatbench.quantities import eps_class, number
from fatbench.record import Record, read
from fatbench.stats import over_seeds, wilson

# The order in which attacks stand on a table; others follow by name.
ORDER = ("fgsm", "pgd-20", "pgd-100", "cw-inf", "autoattack")
TITLES = {
    "clean": "natural", "fgsm": "FGSM", "cw-inf": "C&W-inf", "autoattack": "AutoAttack", "worst": "worst case",
}  # fmt: skip


def gather(folder: Path) -> list[Record]:
    """Every record in a folder and below it, checked, in the order of their ids.

    Raises:
        Refused: no record there, one that was tampered with, or two of one id that differ.
    """
    if not folder.is_dir():
        raise Refused(f"no folder of records at {folder}: fatbench evaluate writes them, --out says where")
    records: dict[str, Record] = {}
    for path in sorted(folder.rglob("*.json")):
        if path.name.startswith("."):
            continue
        record = read(path)
        if records.setdefault(record.id, record).hash != record.hash:
            raise Refused(f"{path}: two different records are called {record.id}: keep one")
    if not records:
        raise Refused(f"no record in {folder}: fatbench evaluate writes them, --out says where")
    return [records[ident] for ident in sorted(records)]


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One line a record: what it is about, and its counts."""
    return pd.DataFrame([_line(record) for record in records])


def _line(record: Record) -> dict[str, Any]:
    result, network = record.result, record.result.network
    settings = {key: value for key, value in network.settings.items() if key != "seed"}
    return {
        "id": record.id,
        "dataset": result.data.name,
        "data": result.data.fingerprint,
        "fingerprint": network.fingerprint,
        "norm": result.norm,
        "eps": result.eps,
        "eps_class": eps_class(result.eps),
        "protocol": f"{record.protocol.name} v{record.protocol.version}",
        "defense": network.defense or network.arch,
        "arch": network.arch,
        "eps_train": network.eps_train or "",
        "epochs": network.epochs,
        "selection": network.selection or "",
        "seed": network.seed,
        "status": _status(record),
        "n": result.data.n,
        "rule": result.data.rule,
        # One contestant: the same settings but for the seed, examined on the same samples in the same way.
        "contestant": digest(
            [
                settings or network.fingerprint,
                network.selection,
                result.data.model_dump(mode="json"),
                result.eps,
                result.seed,
                record.protocol.model_dump(mode="json"),
            ]
        ),
        "correct": result.correct,
        "warnings": result.warnings,
    }


def _status(record: Record) -> str:
    """`done`, or why a network has no place on the table."""
    network = record.result.network
    if network.status == "unfinished":
        return f"unfinished ({network.epoch}/{network.epochs})"
    return "failed: collapsed to one answer" if record.result.collapsed else network.status


def attacks_of(lines: pd.DataFrame) -> list[str]:
    """The attacks that any line was examined under, in the table's order."""
    names = {name for correct in lines["correct"] for name in correct} - {"clean", "worst"}
    steps = {name: int(name.rpartition("-")[2]) if name.rpartition("-")[2].isdigit() else 0 for name in names}
    return sorted(
        names, key=lambda a: (ORDER.index(a) if a in ORDER else len(ORDER), a.rpartition("-")[0], steps[a], a)
    )


def rows(lines: pd.DataFrame) -> pd.DataFrame:
    """One row a contestant, ranked by worst-case accuracy; percentages.

    A row is ranked against those examined under the same attacks; a failed, unfinished or less examined one is not.
    """
    attacks = attacks_of(lines)
    table = pd.DataFrame([_row(group, attacks) for _, group in lines.groupby("contestant", sort=False)])
    table["ranked"] = (table["status"] == "done") & table["complete"]
    table = table.sort_values(
        ["ranked", "worst", "clean", "defense"], ascending=[False, False, False, True], kind="stable"
    )
    ranks = table.loc[table["ranked"], "worst"].rank(method="min", ascending=False)
    table.insert(0, "rank", ranks.astype("Int64").reindex(table.index))
    return table.drop(columns=["ranked", "complete"]).reset_index(drop=True)


def _row(group: pd.DataFrame, attacks: list[str]) -> dict[str, Any]:
    group = group.drop_duplicates("fingerprint")  # one network examined twice is one seed
    first = group.iloc[0]
    good = group[group["status"] == "done"]
    status = "; ".join(dict.fromkeys(group["status"]) if good.empty else ["done"])
    row: dict[str, Any] = {
        key: first[key] for key in ("defense", "arch", "eps", "eps_train", "epochs", "selection", "n")
    }
    # A seed that failed, or was examined before it was finished, and has no finished run beside it.
    failed = group[(group["status"] != "done") & ~group["seed"].isin(good["seed"])]
    row |= {"seeds": len(good), "failed": len(failed), "status": status}
    row["complete"] = all(set(attacks) <= set(correct) for correct in good["correct"])
    for attack in ("clean", *attacks, "worst"):
        right = [correct[attack] for correct in good["correct"] if attack in correct]
        if not right:
            row |= {attack: None, f"{attack}_spread": None, f"{attack}_low": None, f"{attack}_high": None}
            continue
        middle, spread = over_seeds([100 * value / first["n"] for value in right])
        # The interval says what n test samples can tell of one network; the spread, what another seed would change.
        low, high = wilson(round(middle / 100 * first["n"]), first["n"])
        row |= {attack: middle, f"{attack}_spread": spread, f"{attack}_low": 100 * low, f"{attack}_high": 100 * high}
    row["warnings"] = "; ".join(_told_once(w for warnings in good["warnings"] for w in warnings))
    row["ids"] = " ".join(group["id"])
    return row


def _told_once(warnings: Iterable[str]) -> list[str]:
    """Warnings that differ in their figures alone, as several seeds give them, as the first of them and how many."""
    alike: dict[str, list[str]] = {}
    for warning in warnings:
        alike.setdefault(re.sub(r"\d+", "#", warning), []).append(warning)
    return [same[0] + (f" (and {len(same) - 1} more such)" if len(same) > 1 else "") for same in alike.values()]


def title(attack: str) -> str:
    return TITLES.get(attack, attack.upper())


def cells(table: pd.DataFrame, *, intervals: bool = True) -> pd.DataFrame:
    """A table as people read it: text cells, `57.1 [54.0, 60.2]` for one seed, `57.1 ± 0.4` for several."""
    attacks = [column.removesuffix("_low") for column in table.columns if column.endswith("_low")]
    shown = pd.DataFrame({"#": [str(rank) if pd.notna(rank) else "–" for rank in table["rank"]]})
    doubts = list(dict.fromkeys(w for w in table["warnings"] if w))
    marks = [f" [{doubts.index(w) + 1}]" if w else "" for w in table["warnings"]]
    shown["defense"] = [d + mark for d, mark in zip(table["defense"], marks, strict=True)]
    shown["network"] = table["arch"]
    shown["eps train"] = [_trained(row) for row in table.to_dict("records")]
    shown["epochs"] = [
        f"{int(e)}{'' if s in ('', 'last') else f' ({s})'}" if pd.notna(e) else ""
        for e, s in zip(table["epochs"], table["selection"], strict=True)
    ]
    for attack in attacks:
        shown[title(attack)] = [_cell(row, attack, intervals) for row in table.to_dict("records")]
    shown["n"] = table["n"].astype(str)
    shown["seeds"] = [_seeds(s, f) for s, f in zip(table["seeds"], table["failed"], strict=True)]
    return shown


def _seeds(done: int, failed: int) -> str:
    return f"{failed} failed" if not done else f"{done} (+{failed} failed)" if failed else str(done)


def _trained(row: dict[Any, Any]) -> str:
    # A table holds one class of budgets; one published otherwise, 0.031 for 8/255, is marked.
    tested = f" (tested at {row['eps']})" if row["eps"] != eps_class(row["eps"]) else ""
    return f"{row['eps_train']}{tested}"


def _cell(row: dict[Any, Any], attack: str, intervals: bool) -> str:
    if row["status"] != "done":
        return row["status"] if attack == "clean" else "–"
    if pd.isna(row[attack]):
        return "–"
    if row["seeds"] > 1:
        return f"{row[attack]:.1f} ± {row[f'{attack}_spread']:.1f}"
    return (
        f"{row[attack]:.1f} [{row[f'{attack}_low']:.1f}, {row[f'{attack}_high']:.1f}]"
        if intervals
        else f"{row[attack]:.1f}"
    )


def notes(table: pd.DataFrame) -> list[str]:
    """What stands under a table: how to read a cell, and every reason for doubt."""
    several = (table["seeds"] > 1).any()
    how = "Accuracy in percent at the last iterate, `worst case` under the worst of the attacks for each example; "
    how += (
        "median ± standard deviation over training seeds" if several else "Wilson 95 % interval over the n test samples"
    )
    doubts = dict.fromkeys(w for w in table["warnings"] if w)
    return [how + ".", *(f"[{i}] {warning}" for i, warning in enumerate(doubts, start=1))]


def slug(key: tuple[str, ...], others: Iterable[tuple[str, ...]] = ()) -> str:
    """A table's file name; where another table's would be the same, with a hash of the whole title."""
    plain = _plain(key)
    return f"{plain}-{digest(key)[:6]}" if sum(_plain(other) == plain for other in others) > 1 else plain


def _plain(key: tuple[str, ...]) -> str:
    return "-".join(re.sub(r"[^A-Za-z0-9.]+", "_" if "/" in part else "-", part) for part in key).lower()


GROUP = ["dataset", "norm", "eps_class", "protocol"]


def tables(records: list[Record]) -> dict[tuple[str, ...], pd.DataFrame]:
    """(dataset, norm, eps class, protocol) -> its rows, in a fixed order.

    Raises:
        Refused: protocols of one name and version that are not one.
    """
    lines = frame(records)
    _one_meaning_each(records)
    # Two files of one name are two datasets.
    versions = lines.groupby("dataset")["data"].transform("nunique")
    lines["dataset"] = lines["dataset"].where(versions == 1, lines["dataset"] + " " + lines["data"].str[:8])
    grouped = lines.groupby(GROUP, sort=True)
    found = {tuple(str(part) for part in key): rows(group) for key, group in grouped}
    return dict(sorted(found.items(), key=lambda item: (item[0][0], item[0][1], number(item[0][2]), item[0][3])))


def _one_meaning_each(records: list[Record]) -> None:
    meant: dict[tuple[str, int, str], tuple[str, dict[str, Any]]] = {}
    for record in records:
        for attack, settings in record.protocol.attacks.items():
            key = (record.protocol.name, record.protocol.version, attack)
            first, theirs = meant.setdefault(key, (record.id, settings))
            if theirs != settings:
                raise Refused(
                    f"{first} and {record.id} mean different things by {attack} of {key[0]} v{key[1]}: their protocols "
                    "must have different names or versions to be ranked"
                )


def heading(key: tuple[str, ...]) -> str:
    dataset, norm, eps, protocol = key
    return f"{dataset}, {norm}, eps {eps}, {protocol}"


def markdown(key: tuple[str, ...], table: pd.DataFrame) -> str:
    """One table as Markdown."""
    shown = cells(table).map(_escaped)
    text = shown.to_markdown(
        index=False, disable_numparse=True, colalign=["right", *["left"] * (len(shown.columns) - 1)]
    )
    under = "\n".join(f"- {_escaped(note)}" for note in notes(table))
    return f"# {_escaped(heading(key))}\n\n{text}\n\n{under}\n"


_ONE_LINE = dict.fromkeys(map(ord, "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"), " ")


def _escaped(text: str) -> str:
    return str(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").translate(_ONE_LINE)


def publish(records: list[Record], out: Path) -> dict[tuple[str, ...], pd.DataFrame]:
    """Writes every table as Markdown and CSV, and `index.md` over them; returns the tables."""
    made = tables(records)
    index = ["# Leaderboards", ""]
    for key, table in made.items():
        name = slug(key, made)
        write_text(out / f"{name}.md", markdown(key, table))
        write_text(out / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))
        index.append(f"- [{_escaped(heading(key))}]({name}.md), {len(table)} rows ([csv]({name}.csv))")
    write_text(out / "index.md", "\n".join(index) + "\n")
    return made


def summary(record: Record) -> str:
    """A record in one JSON line, for scripts."""
    return json.dumps({"id": record.id, **record.result.accuracies})
