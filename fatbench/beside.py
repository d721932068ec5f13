"""What others have published, as rows beside ours: marked with their source, never ranked with measured ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fatbench import reported, robustbench
from fatbench.errors import unknown
from fatbench.quantities import eps_class

Line = dict[str, Any]

# RobustBench runs AutoAttack's standard version; the protocol of that name does so here.
ROBUSTBENCH_PROTOCOL = "robustbench-linf v1"


def lines(names: Sequence[str]) -> list[Line]:
    """The rows of the named sources, each with the columns of a table's row that its source tells.

    Raises:
        Refused: an unknown source, or one that cannot be read.
    """
    known: dict[str, Callable[[], Iterator[Line]]] = {"reported": _reported, "robustbench": _robustbench}
    for name in names:
        if name not in known:
            raise unknown("source", name, known)
    return [line for name in dict.fromkeys(names) for line in known[name]()]


def _reported() -> Iterator[Line]:
    for path in reported.shelf().values():
        table = reported.read(path)
        for row in table.rows:
            yield {
                "dataset": table.dataset, "norm": table.norm, "eps_class": eps_class(table.eps), "eps": table.eps,
                "protocol": f"{table.protocol} v{table.version}",
                "source": "quoted" if row.quoted_from else "reported",
                "reference": f"{row.quoted_from}, in {table.paper}, {table.table}" if row.quoted_from
                else f"{table.paper}, {table.table}",
                "defense": row.defense, "variant": "" if row.beta is None else f"beta {row.beta:g}", "arch": row.arch,
                "eps_train": row.eps_train, "data": table.dataset, "n": table.n, "seeds": row.trials,
                "printed": row.accuracy, "notes": row.note,
            }  # fmt: skip


def _robustbench() -> Iterator[Line]:
    for model in robustbench.published():
        protocol = ROBUSTBENCH_PROTOCOL if model.norm == "linf" else f"robustbench-{model.norm} v1"
        yield {
            "dataset": model.dataset, "norm": model.norm, "eps_class": eps_class(model.eps), "eps": model.eps,
            "protocol": protocol, "source": "robustbench", "reference": f"{model.paper}, {model.venue}",
            "defense": model.id, "variant": "", "arch": model.arch, "eps_train": None, "data": None,
            "n": None, "seeds": None, "printed": {"clean": model.clean, "autoattack": model.robust},
            "notes": "",
        }  # fmt: skip
