"""Records -> rows: one a contestant, over its training seeds, ranked within its table.

Runs of one contestant over several seeds become one row: median and spread, as the FAT paper reports. A failed or
unfinished run has a row and no number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from statistics import median
from typing import Any

from fatbench import columns, protocol
from fatbench.files import digest
from fatbench.quantities import eps_class, number
from fatbench.recipe import without_none
from fatbench.record import IN_BF16, Record, Training
from fatbench.stats import over_seeds, ranks, wilson

# The order in which attacks stand on a table; others follow by name.
ORDER = ("fgsm", "pgd-20", "pgd-100", "cw-inf", "autoattack")
GROUP = [column.name for column in columns.GROUP]
Line = dict[str, Any]


def lines(records: Sequence[Record]) -> list[Line]:
    """One line a record: what it is about, and its counts."""
    files: dict[str, set[str]] = {}
    for record in records:
        files.setdefault(record.result.data.name, set()).add(record.result.data.fingerprint)
    found = [_line(record, several=len(files[record.result.data.name]) > 1) for record in records]
    for same in grouped(found, "fingerprint", "attacked"):
        least = min(same, key=lambda line: line["correct"].get("worst", math.inf))
        for line in same:
            line["best_known"] = least["correct"].get("worst"), least["protocol"]
    return found


def grouped(table: Iterable[Line], *names: str) -> Iterator[list[Line]]:
    """The lines that agree in some of their columns, together, in the order of the first of each."""
    groups: dict[tuple[Any, ...], list[Line]] = {}
    for line in table:
        groups.setdefault(tuple(line[name] for name in names), []).append(line)
    yield from groups.values()


def _line(record: Record, several: bool) -> dict[str, Any]:
    result, network = record.result, record.result.network
    # A run that a sweep wrote down as TOML says nothing of what is unset.
    settings = without_none({key: value for key, value in network.settings.items() if key != "seed"})
    said = record.protocol.model_dump(mode="json")
    examined = [result.data.model_dump(mode="json"), result.eps, result.seed, said]
    return {
        "id": record.id,
        # Two files of one name are two datasets.
        "dataset": f"{result.data.name} {result.data.fingerprint[:8]}" if several else result.data.name,
        "fingerprint": network.fingerprint,
        "norm": result.norm,
        "eps": result.eps,
        "eps_class": eps_class(result.eps),
        "protocol": f"{record.protocol.name} v{record.protocol.version}",
        "defense": network.defense or network.arch,
        "said": {**{k: v for k, v in settings.items() if k not in ("fields", "source")}, **network.fields},
        "arch": network.arch,
        "eps_train": network.eps_train or "",
        "epochs": network.epochs,
        "selection": network.selection or "",
        "seed": network.seed,
        "status": _status(record),
        "n": result.data.n,
        # What attacks of any protocol, outside ones too, are compared on.
        "attacked": digest([result.data.model_dump(mode="json"), result.eps_value, result.norm]),
        # One contestant: the same settings but for the seed, examined on the same samples in the same way. Its last and
        # its best epoch are two.
        "training_of": digest([settings or network.fingerprint, examined]),
        "contestant": digest([settings or network.fingerprint, network.selection, examined]),
        # An attack that saw only whom another left standing has no accuracy of its own: the worst case alone counts.
        "correct": {
            a: k for a, k in result.correct.items() if "standing_after" not in record.protocol.attacks.get(a, {})
        },
        "examined": record.attacks,
        "warnings": tuple(warning for warning in result.warnings if warning != IN_BF16),
        "crafted_in": result.attack_precision,
        "masking": result.masking,
        "training": record.training,
    }


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


def rows(table: list[Line]) -> list[dict[str, Any]]:
    """The measured rows of one table: one a contestant; percentages.

    A row is ranked against those examined under the attacks that are needed; a failed, unfinished or less examined one
    is not.
    """
    attacks, needed = in_order(name for line in table for name in line["correct"]), _needed(table)
    found = [_row(group, attacks, needed) for group in grouped(table, "contestant")]
    ranked = [row for row in found if row["status"] == "done" and row.pop("complete")]
    for row, rank in zip(ranked, ranks([(row["worst_low"], row["worst_high"]) for row in ranked]), strict=True):
        row["rank"] = rank
    _tell_apart(found)
    best = {row["training_of"]: row["worst"] for row in found if row["selection"] == "best"}
    last = {row["training_of"]: row["worst"] for row in found if row["selection"] == "last"}
    for row in found:
        a, b = best.get(row["training_of"]), last.get(row["training_of"])
        row["best_minus_last"] = None if a is None or b is None else a - b
    return found


def _needed(table: list[Line]) -> set[str]:
    """The attacks that a row is ranked with: its protocol's, or, where nobody had all of those, all that anyone had.

    An attack that somebody added takes no rank from the others, nor does one with a budget of its own.
    """
    had = [set(in_order(line["correct"])) for line in table if line["status"] == "done"]
    name = table[0]["protocol"].rpartition(" v")[0]
    said = protocol.load(name) if name in protocol.shelf() else None
    own = set(said.attacks) if said and table[0]["protocol"] == f"{said.name} v{said.version}" else set()
    if said and own and not said.standing and any(own <= attacks for attacks in had):
        return own
    return {attack for attacks in had for attack in attacks if "@" not in attack}


def _tell_apart(found: list[dict[str, Any]]) -> None:
    """Gives each row its `variant`: beta, and whatever else sets it apart from the others of its defense."""
    alike: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in found:
        seen = (row[name] for name in ("defense", "arch", "eps_train", "epochs", "selection"))
        alike.setdefault(tuple(seen), []).append(row)
    for group in alike.values():
        names = dict.fromkeys(name for row in group for name in row["said"])
        apart = [n for n in names if n == "beta" or any(row["said"].get(n) != group[0]["said"].get(n) for row in group)]
        for row in group:
            row["variant"] = ", ".join(_setting(name, row["said"].get(name)) for name in apart)


def _setting(name: str, value: object) -> str:
    """`beta 6`, `tau 2`; a schedule by its steps."""
    if isinstance(value, list):
        value = " ".join(
            f"{step[0]}:{step[1]}" if isinstance(step, list) and len(step) == 2 else f"{step}" for step in value
        )
    return f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def _row(group: list[Line], attacks: list[str], needed: set[str]) -> dict[str, Any]:
    # One network examined twice is one seed; what was examined whole says more than a bound on it.
    whole_first = sorted(group, key=lambda line: line["status"] == "bound")
    group = [same[0] for same in grouped(whole_first, "fingerprint")]
    first, done = group[0], [line for line in group if line["status"] == "done"]
    good = done or [line for line in group if line["status"] == "bound"]
    row: dict[str, Any] = {"source": "measured", "reference": "", "data": first["dataset"]}
    copied = (*GROUP, "defense", "said", "arch", "eps", "eps_train", "epochs", "selection", "n", "training_of")
    row |= {key: first[key] for key in copied}
    # A seed that failed, or was examined before it was finished, and has no finished run beside it.
    finished = {line["seed"] for line in good}
    failed = [line for line in group if line["status"] not in ("done", "bound") and line["seed"] not in finished]
    status = "; ".join(dict.fromkeys(line["status"] for line in good or group))
    row |= {"seeds": len(good), "failed": len(failed), "status": status}
    correct = [line["correct"] for line in good]
    row["crafted_in"] = "; ".join(sorted({line["crafted_in"] for line in good}))
    row["complete"] = all(needed <= set(counts) for counts in correct)
    for attack in ("clean", *attacks, "worst"):
        row |= _accuracy(attack, [counts[attack] for counts in correct if attack in counts], first["n"])
    both = [counts for counts in correct if {"pgd-20", "autoattack"} <= counts.keys()]
    row["pgd_gap"] = _median(100 * (counts["pgd-20"] - counts["autoattack"]) / first["n"] for counts in both)
    row |= {"masking": _masking(good), "ids": " ".join(line["id"] for line in group)} | _effort(good)
    notes = _told_once(warning for line in good for warning in line["warnings"])
    known = [line["best_known"] for line in good if "worst" in line["correct"]]
    row["best_known"] = _median(100 * right / first["n"] for right, _ in known)
    elsewhere = dict.fromkeys(by for line in good for _, by in [line["best_known"]] if by != line["protocol"])
    if row["best_known"] is not None and elsewhere:
        notes.append(f"best known {row['best_known']:.1f}, by {', '.join(elsewhere)}")
    row["notes"] = "; ".join(notes)
    return row


def _accuracy(attack: str, right: list[int], n: int) -> dict[str, float | None]:
    """An attack's four columns, from how many of the n examples each seed's network still gets right."""
    names = [f"{attack}{end}" for end, _ in columns.ACCURACY]
    if not right:
        return dict.fromkeys(names)
    middle, spread = over_seeds([100 * count / n for count in right])
    # The interval says what n test samples can tell of one network; the spread, what another seed would change.
    low, high = wilson(round(middle / 100 * n), n)
    return dict(zip(names, [middle, spread, 100 * low, 100 * high], strict=True))


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _masking(good: list[Line]) -> str:
    """The verdict on masked gradients: the names of the checks that fired, or what AutoAttack's own say."""
    tested = [
        list(line["masking"] if line["masking"] is not None else _library_doubts(line["warnings"]))
        for line in good
        if line["masking"] is not None or "autoattack" in line["examined"]
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


def _effort(good: list[Line]) -> dict[str, Any]:
    """What training took, where the records tell."""
    told: list[Training] = [line["training"] for line in good if line["training"]]
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
