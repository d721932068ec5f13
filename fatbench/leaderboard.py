"""Records -> one DataFrame -> tables: one for each (dataset, norm, eps class, protocol), with an index.

Nothing else is measured. Rows of one contestant over several training seeds become one row: median and spread, as the
FAT paper reports. A failed or unfinished run has a row and no number. What others have published may stand beside
(fatbench/beside.py), with its source and without a rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import pandas as pd

from fatbench import columns
from fatbench.beside import Line
from fatbench.catalogue import family
from fatbench.errors import Refused
from fatbench.files import digest
from fatbench.quantities import eps_class, number
from fatbench.record import Record, Training, read
from fatbench.reported import parsed
from fatbench.stats import over_seeds, ranks, wilson

# The order in which attacks stand on a table; others follow by name.
ORDER = ("fgsm", "pgd-20", "pgd-100", "cw-inf", "autoattack")
# The order of a table's rows by where they come from.
SOURCES = ("measured", "reported", "quoted", "robustbench")
GROUP = [column.name for column in columns.GROUP]
Key = tuple[str, ...]


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


# ------------------------------------------------------------------------------------------------ one line a record


def frame(records: Iterable[Record]) -> pd.DataFrame:
    """One line a record: what it is about, and its counts."""
    return pd.DataFrame([_line(record) for record in records])


def _line(record: Record) -> dict[str, Any]:
    result, network = record.result, record.result.network
    settings = {key: value for key, value in network.settings.items() if key != "seed"}
    said = record.protocol.model_dump(mode="json")
    examined = [result.data.model_dump(mode="json"), result.eps, result.seed, said]
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
        "variant": _variant(network.fields.get("beta")),
        "arch": network.arch,
        "eps_train": network.eps_train or "",
        "epochs": network.epochs,
        "selection": network.selection or "",
        "seed": network.seed,
        "status": _status(record),
        "n": result.data.n,
        "rule": result.data.rule,
        # One contestant: the same settings but for the seed, examined on the same samples in the same way. Its last and
        # its best epoch are two.
        "training_of": digest([settings or network.fingerprint, examined]),
        "contestant": digest([settings or network.fingerprint, network.selection, examined]),
        "correct": result.correct,
        "warnings": result.warnings,
        "masking": result.masking,
        "training": record.training,
    }


def _variant(beta: object) -> str:
    """What sets a contestant apart from others of its defense; text where a record's field is no number."""
    return "" if beta is None else f"beta {beta:g}" if isinstance(beta, (int, float)) else f"beta {beta}"


def _status(record: Record) -> str:
    """`done`, or why a network has no place on the table."""
    network = record.result.network
    if network.status == "unfinished":
        return f"unfinished ({network.epoch}/{network.epochs})"
    if record.result.collapsed:
        return "failed: collapsed to one answer"
    return "bound" if record.result.bound and network.status == "done" else network.status


def in_order(attacks: Iterable[str]) -> list[str]:
    """Attacks as they stand on a table: the known, then others; one with a budget of its own behind its plain one."""
    return sorted(set(attacks) - {"clean", "worst"}, key=_place)


def _place(attack: str) -> tuple[Any, ...]:
    plain, _, budget = attack.partition("@")
    stem, _, steps = plain.rpartition("-")
    try:
        size = number(budget) if budget else -1.0
    except ValueError:
        size = 2.0  # a name from elsewhere: behind every budget
    known = ORDER.index(plain) if plain in ORDER else len(ORDER)
    return known, stem, int(steps) if steps.isdecimal() else 0, plain, size, budget


# ------------------------------------------------------------------------------------------------ one row a contestant


def rows(lines: pd.DataFrame) -> list[dict[str, Any]]:
    """The measured rows of one table: one a contestant; percentages.

    A row is ranked against those examined under the same attacks; a failed, unfinished or less examined one is not.
    """
    attacks = in_order(name for correct in lines["correct"] for name in correct)
    found = [_row(group, attacks) for _, group in lines.groupby("contestant", sort=False)]
    ranked = [row for row in found if row["status"] == "done" and row.pop("complete")]
    for row, rank in zip(ranked, ranks([(row["worst_low"], row["worst_high"]) for row in ranked]), strict=True):
        row["rank"] = rank
    best = {row["training_of"]: row["worst"] for row in found if row["selection"] == "best"}
    last = {row["training_of"]: row["worst"] for row in found if row["selection"] == "last"}
    for row in found:
        a, b = best.get(row["training_of"]), last.get(row["training_of"])
        row["best_minus_last"] = None if a is None or b is None else a - b
    return found


def _row(group: pd.DataFrame, attacks: list[str]) -> dict[str, Any]:
    # One network examined twice is one seed; what was examined whole says more than a bound on it.
    group = group.sort_values("status", key=lambda s: s == "bound", kind="stable").drop_duplicates("fingerprint")
    first = group.iloc[0]
    good = group[group["status"] == "done"]
    good = group[group["status"] == "bound"] if good.empty else good
    status = "; ".join(dict.fromkeys(group["status"] if good.empty else good["status"]))
    row: dict[str, Any] = {"source": "measured", "reference": "", "data": first["dataset"]}
    copied = (*GROUP, "defense", "variant", "arch", "eps", "eps_train", "epochs", "selection", "n", "training_of")
    row |= {key: first[key] for key in copied}
    # A seed that failed, or was examined before it was finished, and has no finished run beside it.
    failed = group[(group["status"] != "done") & ~group["seed"].isin(good["seed"])]
    row |= {"seeds": len(good), "failed": len(failed), "status": status}
    row["complete"] = all(set(attacks) <= set(correct) for correct in good["correct"])
    for attack in ("clean", *attacks, "worst"):
        row |= _accuracy(attack, [c[attack] for c in good["correct"] if attack in c], int(first["n"]))
    row["pgd_gap"] = _median(
        100 * (c["pgd-20"] - c["autoattack"]) / first["n"]
        for c in good["correct"]
        if {"pgd-20", "autoattack"} <= set(c)
    )
    row |= {"masking": _masking(good), "ids": " ".join(group["id"])} | _effort(good)
    row["notes"] = "; ".join(_told_once(w for warnings in good["warnings"] for w in warnings))
    return row


def _accuracy(attack: str, right: list[int], n: int) -> dict[str, float | None]:
    """An attack's four columns, from how many of the n examples each seed's network still gets right."""
    if not right:
        return dict.fromkeys([f"{attack}{end}" for end, _ in columns.ACCURACY])
    middle, spread = over_seeds([100 * count / n for count in right])
    # The interval says what n test samples can tell of one network; the spread, what another seed would change.
    low, high = wilson(round(middle / 100 * n), n)
    return dict(
        zip([f"{attack}{end}" for end, _ in columns.ACCURACY], [middle, spread, 100 * low, 100 * high], strict=True)
    )


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _masking(good: pd.DataFrame) -> str:
    """The verdict on masked gradients: the names of the checks that fired, or what AutoAttack's own say."""
    tested = [
        list(line["masking"] if line["masking"] is not None else _library_doubts(line["warnings"]))
        for line in good.to_dict("records")
        if line["masking"] is not None or "autoattack" in line["correct"]
    ]
    if not tested:
        return ""
    doubtful = sum(map(bool, tested))
    names = ", ".join(dict.fromkeys(name for fired in tested for name in fired if name))
    verdict = "suspected" + (f" ({names})" if names else "")
    return "no sign" if not doubtful else verdict if len(tested) == 1 else f"{verdict}, {doubtful} of {len(tested)}"


def _library_doubts(warnings: Iterable[str]) -> list[str]:
    """The verdict of a record that made no checks: AutoAttack's own warnings, which have no names."""
    return [""] if any(warning.startswith("autoattack") for warning in warnings) else []


def _effort(good: pd.DataFrame) -> dict[str, Any]:
    """What training took, where the records tell."""
    told: list[Training] = [training for training in good["training"] if training]
    return {
        "backwards_per_example": _median(t.backwards_per_example for t in told),
        "train_seconds": _median(t.seconds for t in told),
        "train_device": "; ".join(sorted({t.device for t in told if t.device})),
    }


def _told_once(warnings: Iterable[str]) -> list[str]:
    """Warnings that differ in their figures alone, as several seeds give them, as the first of them and how many."""
    alike: dict[str, list[str]] = {}
    for warning in warnings:
        alike.setdefault(re.sub(r"\d+", "#", warning), []).append(warning)
    return [same[0] + (f" (and {len(same) - 1} more such)" if len(same) > 1 else "") for same in alike.values()]


def _published(line: Line) -> dict[str, Any]:
    """A published row in a table's columns; what its source does not tell stays unset."""
    row = {**line, "status": "done", "selection": "", "ids": ""}
    for attack, printed in line["printed"].items():
        row[attack], row[f"{attack}_spread"] = parsed(printed)
    return row


# ------------------------------------------------------------------------------------------------ the one frame


def board(records: Sequence[Record], beside: Sequence[Line] = ()) -> pd.DataFrame:
    """Every row of every table in a fixed order: the one frame that all faces are made of.

    Raises:
        Refused: protocols of one name and version that are not one.
    """
    _one_meaning_each(records)
    found = [_published(line) for line in beside]
    if records:
        lines = frame(records)
        # Two files of one name are two datasets.
        versions = lines.groupby("dataset")["data"].transform("nunique")
        lines["dataset"] = lines["dataset"].where(versions == 1, lines["dataset"] + " " + lines["data"].str[:8])
        found += [row for _, group in lines.groupby(GROUP) for row in rows(group)]
    attacks = in_order(name.removesuffix("_spread") for row in found for name in row if name.endswith("_spread"))
    for row in found:
        row["family"] = family(row["arch"])
    found.sort(key=_order)
    types = {column.name: column.dtype for column in columns.described(attacks)}
    return pd.DataFrame(found, columns=pd.Index([*types, "printed"])).astype(types)


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    """Measured rows by rank, then the unranked, then what others published by source and robustness."""
    attacked = [row[name.removesuffix("_spread")] for name in row if name.endswith("_spread") and "clean" not in name]
    robust = row.get("worst") or min((value for value in attacked if value is not None), default=0.0)
    table = (row["dataset"], row["norm"], number(row["eps_class"]), row["protocol"])
    rank = row.get("rank", math.inf)
    return *table, SOURCES.index(row["source"]), rank, -robust, -(row.get("clean") or 0.0), row["defense"]


def tables(whole: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """(dataset, norm, eps class, protocol) -> its rows."""
    return {_key(key): _view(part) for key, part in whole.groupby(GROUP, sort=False)}


def overviews(whole: pd.DataFrame) -> dict[Key, pd.DataFrame]:
    """(dataset, norm, eps class) -> the rows of all its protocols and sources by architecture family, without ranks.

    Only where there is more than one protocol or source; the families seen under most protocols come first.
    """
    found: dict[Key, pd.DataFrame] = {}
    for key, part in whole.groupby(GROUP[:3], sort=False):
        if part["protocol"].nunique() > 1 or part["source"].nunique() > 1:
            by_family = pd.DataFrame(
                {
                    "seen": -part.groupby("family")["protocol"].transform("nunique"),
                    "family": part["family"].str.lower(),
                    "listed": part["source"] == "robustbench",
                }
            ).sort_values(["seen", "family", "listed"], kind="stable")
            found[_key(key)] = _view(part.drop(columns="rank").loc[by_family.index])
    return found


def _key(key: Any) -> Key:
    return tuple(str(part) for part in key)


def _view(part: pd.DataFrame) -> pd.DataFrame:
    """Some rows of the frame, without the attacks that none of them was examined under."""
    attacks = [name.removesuffix("_spread") for name in part.columns if name.endswith("_spread")]
    absent = [a for a in attacks if a != "clean" and part[a].isna().all()]
    unwanted = [f"{a}{end}" for a in absent for end, _ in columns.ACCURACY]
    return part.drop(columns=unwanted).reset_index(drop=True)


def _one_meaning_each(records: Iterable[Record]) -> None:
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


def summary(record: Record) -> str:
    """A record in one JSON line, for scripts."""
    return json.dumps({"id": record.id, **record.result.accuracies})
