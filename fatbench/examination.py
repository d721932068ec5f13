"""An examination as one value: what decides its result, the steps it takes, the plan that its record is named by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from fatbench.checkpoint import Subject
from fatbench.data import Data
from fatbench.doubts import CHECKS
from fatbench.draws import balanced_order
from fatbench.errors import Refused
from fatbench.evaluation import Evaluation, Staged, examiner
from fatbench.ledger import Step
from fatbench.protocol import Protocol, budget_of
from fatbench.quantities import Precision, number

# How much of a protocol is carried out: PGD-20 alone; everything but the stages that seldom break another example; all.
Tier = Literal["quick", "bound", "full"]


# The steps that ask the network itself.
DOUBTS = "check"


@dataclass(frozen=True)
class Examination:
    """All that decides a result: subject, data, protocol, budget, which examples, seed.

    Attributes:
        eps: As published.
        n: The first n test examples; as many as the protocol says where None, and all where that is silent.
        balanced: A draw of n with each class at its share instead.
        chunk: Examples attacked together.
        tier: How much of the protocol is carried out; less than `full` gives an upper bound.
        checked: Whether the network is looked at for gradient masking (`doubts`).
        surrogate: Another network, from which attacks are transferred where it is checked.
        attack_precision: What attacks are made in; what they find counts in float32 alone.
        layout: `swift` lets AutoAttack craft on a folded copy that lies channels last; `given` leaves the network be.
        outside: Examiners that are in no registry, by attack.
    """

    subject: Subject
    data: Data
    protocol: Protocol
    eps: str
    n: int | None = None
    balanced: bool = False
    seed: int = 0
    chunk: int = 250
    tier: Tier = "full"
    checked: bool = False
    surrogate: Subject | None = None
    attack_precision: Precision = "float32"
    layout: Literal["swift", "given"] = "swift"
    outside: Mapping[str, Evaluation] = field(default_factory=dict)

    def rows(self) -> np.ndarray:
        """The test examples' places, ascending."""
        total = len(self.data.y_test)
        n = min(self.protocol.n or total, total) if self.n is None else self.n
        if not 1 <= n <= total:
            raise Refused(f"--n {n}: {self.data.info.name} has {total} test examples")
        if not self.balanced or n == total:
            return np.arange(n)
        return np.sort(balanced_order(self.data.y_test.numpy(), "examined")[:n])

    def examiners(self) -> dict[str, Evaluation]:
        settings = self.protocol.settings_for
        return {name: self.outside.get(name) or examiner(name, settings(name)) for name in self.protocol.attacks}

    def stages(self) -> dict[str, tuple[str, ...]]:
        """The attacks that this tier carries out, and the stages of each, () where it has none."""
        examiners = self.examiners()
        if self.tier == "quick":
            if "pgd-20" not in examiners or self.protocol.standing:
                raise Refused(f"--tier quick is PGD-20, and {self.protocol.name} has none for everybody")
            return {"pgd-20": ()}
        asked: dict[str, tuple[str, ...]] = {}
        for name, one in examiners.items():
            stages = asked[name] = one.stages(self.data.classes)
            if self.tier == "bound" and isinstance(one, Staged):
                asked[name] = one.bounding(self.data.classes)
                if self.protocol.standing and asked[name] != stages:
                    break  # whoever comes next is given those whom all the stages left
        if self.tier == "bound" and asked == {name: one.stages(self.data.classes) for name, one in examiners.items()}:
            raise Refused(
                f"--tier bound leaves out AutoAttack's last stages, and {self.protocol.name} has none to leave out"
            )
        return asked

    def eps_of(self, attack: str) -> float:
        return number(budget_of(attack) or self.eps)

    def meant(self) -> dict[str, dict[str, Any]]:
        """Every setting of every attack, as the record tells it."""
        told = {name: {"family": e.name, **e.told()} for name, e in self.examiners().items()}
        for before, name in pairwise(("clean", *told) if self.protocol.standing else ()):
            told[name]["standing_after"] = before
        return {name: told[name] for name in self.stages()}

    def course(self) -> list[tuple[str, str]]:
        """The (attack, stage) of each step on a chunk, in order; the first looks at the clean images."""
        return [
            ("clean", ""),
            *((attack, stage) for attack, stages in self.stages().items() for stage in stages or ("",)),
        ]

    def steps(self) -> list[Step]:
        """All steps: first what is asked of the network on a few examples, then chunk by chunk."""
        chunks = -(-len(self.rows()) // self.chunk)
        names = [name for name in CHECKS if name != "transfer" or self.surrogate] if self.checked else []
        doubts = [Step(0, DOUBTS, name) for name in names if self.tier != "quick"]
        return [*doubts, *(Step(c, *what) for c in range(chunks) for what in self.course())]

    def former(self, step: Step) -> Step | None:
        """The step whose survivors this one is given; None where it is given everyone."""
        if not (step.stage or (self.protocol.standing and step.attack != "clean")):
            return None
        course = self.course()
        here = course.index((step.attack, step.stage))
        first = course[here - 1][0] != step.attack and not self.protocol.standing
        return Step(step.chunk, *course[0 if first else here - 1])

    def whole(self) -> Examination:
        """The examination that this one is a part of: its ledger is shared, so that a bound can be completed."""
        return replace(self, tier="full")

    def plan(self) -> dict[str, Any]:
        """Everything the result depends on, as plain JSON: its digest is the record's id."""
        protocol = self.protocol.model_dump(mode="json", include={"name", "version", "source"})
        rows = self.rows()
        rule = "all" if len(rows) == len(self.data.y_test) else "balanced" if self.balanced else "first"
        samples = {
            "name": self.data.info.name, "fingerprint": self.data.fingerprint("test"), "shape": self.data.shape,
            "classes": self.data.classes, "n": len(rows), "of": len(self.data.y_test), "rule": rule,
        }  # fmt: skip
        # Said only where it is not the usual, so that examinations known by their digest stay known.
        unusual: dict[str, Any] = {
            "bound": self.tier != "full", "checked": self.checked and self.tier != "quick",
            "surrogate": self.surrogate and self.surrogate.fingerprint,
            "attack_precision": self.attack_precision if self.attack_precision != "float32" else None,
        }  # fmt: skip
        return {
            "protocol": {**protocol, "attacks": self.meant()}, "network": _network(self.subject), "data": samples,
            "eps": self.eps, "eps_value": number(self.eps), "seed": self.seed, "chunk": self.chunk, "norm": "linf",
            **{key: value for key, value in unusual.items() if value},
        }  # fmt: skip


def _network(subject: Subject) -> dict[str, Any]:
    meta, settings = subject.meta, subject.meta.get("settings") or {}
    return {
        "fingerprint": subject.fingerprint, "arch": meta["arch"], "defense": settings.get("defense"),
        "fields": settings.get("fields", {}), "settings": settings, "seed": settings.get("seed"),
        "eps_train": settings.get("eps"), "selection": meta.get("selection"), "epoch": meta.get("epoch"),
        "epochs": meta.get("epochs"), "status": meta.get("status", "done"),
        **({"code": meta["code"]} if "code" in meta else {}),
    }  # fmt: skip
