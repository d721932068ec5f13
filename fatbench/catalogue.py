"""What is known of datasets and networks before anything is loaded: names, shapes, the papers' defaults. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from fatbench.errors import Refused, unknown


@dataclass(frozen=True)
class Dataset:
    """A dataset's name and defaults.

    Attributes:
        shape: (C, H, W); None for a user's own.
        eps: The l-inf budget that the papers train and test with, as published; None: it must be given.
        augment: none, crop or crop-flip.
        torchvision: The class of torchvision.datasets that brings it.
        files: What to lay ready where there is no network.
        examples: To train on; 0 where only the data can tell.
        of: The dataset that this one is the beginning of: its first `examples` and `tests`.
    """

    name: str
    summary: str
    shape: tuple[int, int, int] | None = None
    classes: int = 0
    eps: str | None = None
    arch: str = "digits-cnn"
    augment: str = "none"
    torchvision: str = ""
    files: str = ""
    examples: int = 0
    of: str = ""
    tests: int = 0


_IDX = "{train,t10k}-images-idx3-ubyte and {train,t10k}-labels-idx1-ubyte (also .gz) under "

DATASETS: dict[str, Dataset] = {
    d.name: d
    for d in (
        Dataset(
            "digits", "scikit-learn's 8x8 digits, 1,437 + 360, needs no download", (1, 8, 8), 10, "0.3",
            examples=1437,
        ),
        Dataset(
            "cifar10", "CIFAR-10, 50,000 + 10,000", (3, 32, 32), 10, "8/255", "resnet-18", "crop-flip", "CIFAR10",
            "cifar-10-python.tar.gz", 50000,
        ),
        Dataset(
            "cifar10-reduced", "CIFAR-10, reduced: its first 10,000 + 1,000, for two CPU cores", (3, 32, 32), 10,
            "8/255", "narrow-cnn", "crop-flip", examples=10000, of="cifar10", tests=1000,
        ),
        Dataset(
            "cifar100", "CIFAR-100, 50,000 + 10,000", (3, 32, 32), 100, "8/255", "resnet-18", "crop-flip", "CIFAR100",
            "cifar-100-python.tar.gz", 50000,
        ),
        # FAT's code flips SVHN too (FAT.py:107-121); a mirrored digit is another sign, so it is left to `--set`.
        Dataset(
            "svhn", "SVHN, 73,257 + 26,032", (3, 32, 32), 10, "4/255", "resnet-18", "crop", "SVHN",
            "train_32x32.mat and test_32x32.mat", 73257,
        ),
        Dataset(
            "mnist", "MNIST, 60,000 + 10,000", (1, 28, 28), 10, "0.3", "small-cnn", "none", "MNIST",
            _IDX + "MNIST/raw", 60000,
        ),
        Dataset(
            "fashion-mnist", "Fashion-MNIST, 60,000 + 10,000", (1, 28, 28), 10, "0.1", "small-cnn", "none",
            "FashionMNIST", _IDX + "FashionMNIST/raw", 60000,
        ),
    )
}  # fmt: skip


def described(name: str) -> Dataset:
    """What is known of a dataset: by name, or a user's own by its path.

    Raises:
        Refused: neither a known name nor an .npz file or a folder that exists.
    """
    key = name.lower().replace("_", "-")
    if key in DATASETS:
        return DATASETS[key]
    path = Path(name)
    if len(path.name) > 255:
        raise Refused(f"no dataset at {name[:60]}...: no file has a name of {len(path.name)} letters")
    if path.is_dir() or (path.suffix == ".npz" and path.is_file()):
        return Dataset(path.stem, f"{path.name}, yours")
    if path.suffix == ".npz" or path.name != name:
        raise Refused(f"no dataset at {name}: a path must be an .npz file or a folder holding train/ and test/")
    raise unknown("dataset", name, [*DATASETS, "path.npz", "a folder"])


def shape_of(name: str) -> tuple[int, int, int] | None:
    """(C, H, W) of a known dataset's images; None for a user's own, which only the data can tell."""
    info = DATASETS.get(name.lower().replace("_", "-"))
    return info.shape if info else None


# name -> one line; fatbench/models.py builds them, and any other wide ResNet by `network`.
NETWORKS: dict[str, str] = {
    "digits-cnn": "four convolutions of width 16, any image size, 7.9 k parameters on digits",
    "small-cnn": "FAT's Small CNN, 1.6 M parameters",
    "narrow-cnn": "FAT's Small CNN with convolutions of 16-16-32-32-64-64, 337.5 k parameters",
    "resnet-18": "ResNet-18 for 32x32 images, 11.2 M parameters",
    "wrn-32-10": "FAT's Wide_ResNet_Madry, 46.2 M parameters, the network of wrn-34-10",
    "wrn-34-10": "TRADES's WRN-34-10, 48.3 M parameters, 2.1 M of them unused",
    "wrn-40-4": "WRN-40-4, 9.4 M parameters, 0.4 M of them unused",
    "wrn-58-10": "WRN-58-10, 88.8 M parameters, 3.9 M of them unused",
    "trades-mnist-cnn": "TRADES's MNIST network, four unpadded convolutions, 312 k parameters, 28x28 images",
}

# Of any depth 6n + 4 and width. TRADES's unused block is there where the listed name has it, or where it is said.
WIDE = re.compile(r"wrn-(?P<depth>[1-9]\d{0,2})-(?P<width>[1-9]\d?)(?:-(?P<block>sub-block1|plain))?")


def network(name: str) -> str:
    """A network's name as it is spelled here: one of NETWORKS, or another wide ResNet, `wrn-28-10`.

    Raises:
        Refused: unknown name, with the closest.
    """
    spelled = name.strip().lower().replace("_", "-")
    wide = WIDE.fullmatch(spelled)
    if spelled in NETWORKS or (wide and int(wide["depth"]) >= 10 and (int(wide["depth"]) - 4) % 6 == 0):
        return spelled
    raise unknown("model", name, [*NETWORKS, "wrn-28-10 (any depth 6n+4)"])


def family(arch: str) -> str:
    """Networks that are one bear one name: wrn-34-10 is wrn-32-10 beside a block that nothing passes through.

    >>> family("wrn-32-10"), family("WideResNet-34-10"), family("WideResNet-28-10"), family("ResNet-18")
    ('wrn-32/34-10', 'wrn-32/34-10', 'wrn-28-10', 'resnet-18')
    """
    wide = re.fullmatch(r"(?:WideResNet|WRN)-(\d+-\d+)(?:-sub-block1|-plain)?", arch, re.IGNORECASE)
    name = f"wrn-{wide[1]}" if wide else arch.lower() if arch.lower() in NETWORKS else arch
    return "wrn-32/34-10" if name in ("wrn-32-10", "wrn-34-10") else name


def base_of(defense: str) -> str | None:
    """The defense that a friendly one is the counterpart of.

    >>> base_of("fat-trades"), base_of("fat"), base_of("fat-margin"), base_of("trades")
    ('trades', 'madry', 'madry', None)
    """
    if defense in ("fat", "fat-margin"):
        return "madry"
    return defense.removeprefix("fat-") if defense.startswith("fat-") else None
