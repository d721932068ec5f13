"""What the command line asks to be examined: names and paths made networks, data and an examination."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fatbench import checkpoint, data, evidence, robustbench, zoo
from fatbench import protocol as protocols
from fatbench.checkpoint import Subject
from fatbench.data import Data
from fatbench.errors import Refused
from fatbench.examination import Examination, Tier
from fatbench.protocol import Protocol
from fatbench.quantities import Precision, published

ZOO = "robustbench:"


@dataclass(frozen=True)
class Network:
    """Where a network is to be taken from, as it was written.

    Attributes:
        checkpoint: A run folder, a file, or `robustbench:ID`.
        arch, factory, mean, std: Of foreign weights, as for `checkpoint.load`.
        folder: Where RobustBench's models lie.
    """

    checkpoint: str
    arch: str | None = None
    factory: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    folder: str = "models"

    def load(self, loaded: Data | None) -> Subject:
        """Raises Refused where it cannot be had."""
        if self.checkpoint.startswith(ZOO):
            return self._of_the_zoo(loaded.info.name if loaded else "cifar10")
        if (self.mean is None) != (self.std is None):
            raise Refused("--mean and --std go together")
        size = loaded.shape[1] if loaded else 32
        return checkpoint.load(
            Path(self.checkpoint), arch=self.arch, factory=self.factory, mean=self.mean, std=self.std, size=size
        )

    def _of_the_zoo(self, dataset: str) -> Subject:
        if self.arch or self.factory or self.mean or self.std:
            raise Refused(f"{self.checkpoint} brings its own network: leave --arch, --model, --mean and --std out")
        board = dataset if dataset in ("cifar10", "cifar100", "imagenet") else "cifar10"
        model = zoo.live(self.checkpoint.removeprefix(ZOO), Path(self.folder), board)
        return Subject(model, {"arch": self.checkpoint, "mean": None, "std": None}, checkpoint.fingerprint(model))

    def budget(self, subject: Subject, dataset: str) -> str | None:
        """The eps that it was trained or is published for."""
        if self.checkpoint.startswith(ZOO):
            name = self.checkpoint.removeprefix(ZOO)
            rows = [
                row for row in robustbench.published() if (row.id, row.dataset, row.norm) == (name, dataset, "linf")
            ]
            return rows[0].eps if rows else None
        return (subject.meta.get("settings") or {}).get("eps")


@dataclass(frozen=True)
class Asked:
    """An examination, and where its parts were taken from."""

    task: Examination
    source: dict[str, Any]


def asked(
    network: Network,
    *,
    dataset: str | None,
    protocol: str | None,
    attacks: str | None,
    eps: str | None,
    external: Path | None = None,
    source: str | None = None,
    surrogate: str | None = None,
    n: int | None = None,
    checked: bool | None = None,
    tier: Tier = "full",
    attack_precision: Precision = "float32",
    **more: Any,
) -> Asked:
    """The examination that these options mean.

    Args:
        external: A file of examples instead of a protocol; `source` says who made them.
        checked: Whether to look for gradient masking; where AutoAttack is run unless given.
        more: As Examination takes it.

    Raises:
        Refused: options that exclude each other, or something that is missing.
    """
    if sum(map(bool, (protocol, attacks, external))) > 1:
        raise Refused("--protocol, --attacks and --external: give one; a protocol says its attacks itself")
    said = protocols.load(protocol or protocols.DEFAULT)
    said = said.only(attacks.split(",")) if attacks else said
    loaded = data.load(dataset) if dataset else data.load("cifar10") if network.checkpoint.startswith(ZOO) else None
    subject = network.load(loaded)
    trained = subject.meta.get("settings") or {}
    if loaded is None and not trained:
        raise Refused(f"{network.checkpoint} does not say what it was trained on: give --dataset")
    loaded = loaded or data.load(trained["dataset"])
    budget = eps or said.eps or network.budget(subject, loaded.info.name)
    if budget is None:
        raise Refused(f"{network.checkpoint} does not say its budget: give --eps, such as --eps 8/255")
    checked = "autoattack" in said.attacks and not external if checked is None else checked
    other = Network(surrogate).load(loaded) if surrogate else None
    task = Examination(
        subject, loaded, said, _published(budget), n, checked=checked, surrogate=other, tier=tier,
        attack_precision=attack_precision, **more,
    )  # fmt: skip
    if task.balanced and n is None:
        raise Refused("--balanced draws N of the test examples: give --n too")
    if surrogate and not checked:
        raise Refused("--surrogate is for the checks: it goes with autoattack, or with --checks")
    if external:
        task = _outside(task, external, source)
    elif source:
        raise Refused("--source says who made the examples of --external: give both")
    return Asked(task, {**asdict(network), "dataset": dataset or trained.get("dataset") or loaded.info.name})


def _outside(task: Examination, file: Path, source: str | None) -> Examination:
    """The same network and data under somebody else's examples."""
    tensors, _ = evidence.read(file)
    n = task.n or len(tensors.get("x_adv", ()))
    whole = replace(task, n=n or None, protocol=task.protocol.model_copy(update={"n": None}))
    attack = evidence.external(file, source, whole.rows(), task.data.shape)
    protocol = Protocol(
        name=f"external-{attack.sha256[:8]}", version=1, summary="examples made elsewhere", source=attack.source,
        attacks=("external",),
    )  # fmt: skip
    return replace(whole, protocol=protocol, outside={"external": attack})


def _published(eps: str) -> str:
    try:
        return published(eps)
    except ValueError as error:
        raise Refused(f"--eps {eps}: {error}") from None
