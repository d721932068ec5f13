"""Datasets as tensors: images (N, C, H, W) float32 in [0, 1], labels (N,) int64, with a fingerprint of every split.

`digits` (scikit-learn's 1,797 8x8 digits) needs no download; torchvision brings cifar10, cifar100, svhn, mnist and
fashion-mnist; anybody's own data comes as `path.npz` or as a folder of images.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fatbench import sources
from fatbench.catalogue import Dataset, described
from fatbench.draws import balanced_order, hashed
from fatbench.errors import Refused
from fatbench.files import write_atomic

Augment = Literal["none", "crop", "crop-flip"]


@dataclass(frozen=True)
class Data:
    """A dataset in memory.

    Attributes:
        info: Its name and defaults.
        x_train, x_test: (N, C, H, W) float32 in [0, 1], contiguous.
        y_train, y_test: (N,) int64 in 0..classes-1.
    """

    info: Dataset
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return tuple(self.x_test.shape[1:])  # type: ignore[return-value]

    def fingerprint(self, split: Literal["train", "test"]) -> str:
        """sha256 of a split's images and labels as they are used, independent of the file they came from."""
        x, y = (self.x_train, self.y_train) if split == "train" else (self.x_test, self.y_test)
        sha = hashlib.sha256(repr((tuple(x.shape), self.classes)).encode())
        sha.update(x.contiguous().numpy().data)
        sha.update(y.contiguous().numpy().data)
        return sha.hexdigest()

    def split(self, share: float) -> tuple[np.ndarray, np.ndarray]:
        """Training rows to train on and to validate on, each class at its share; one split for all seeds."""
        order = balanced_order(self.y_train.numpy(), "validation")
        held = round(share * len(order))
        return np.sort(order[held:]), np.sort(order[:held])


def load(name: str, folder: Path | None = None) -> Data:
    """A dataset by name, from `path.npz`, or from a folder holding train/ and test/ with a folder of images per class.

    Args:
        name: A name of DATASETS, or a path.
        folder: Where downloads live; $FATBENCH_DATA, or ~/.cache/fatbench/data.

    Raises:
        Refused: unknown name, missing or broken file, labels out of range, images outside [0, 1] or not finite.
    """
    info = described(name)
    if info.shape:
        return _checked(info, *sources.known(info, folder or data_folder()), classes=info.classes)
    return _checked(info, *sources.read(Path(name)))


def keep(name: str, source: str) -> Data:
    """Lays the beginning of a user's file by under the name that it has here; it is loaded by that name from then on.

    Args:
        name: Of a dataset that is the beginning of another, `cifar10-reduced`.
        source: `path.npz` or a folder that holds the other.

    Raises:
        Refused: too few images or others than that dataset's, or something else was laid by before.
    """
    info, path = described(name), data_folder() / f"{name}.npz"
    whole = load(source)
    if (whole.shape, whole.classes) != (info.shape, info.classes):
        raise Refused(f"{source} has images of {whole.shape} and {whole.classes} classes, not those of {info.of}")
    if min(len(whole.y_train) - info.examples, len(whole.y_test) - info.tests) < 0:
        raise Refused(f"{source} has fewer images than the {info.examples} + {info.tests} of {name}")
    train, test = (np.asarray((x * 255).round(), np.uint8) for x in (whole.x_train, whole.x_test))
    parts = sources.first(info, (train, np.asarray(whole.y_train), test, np.asarray(whole.y_test)))
    if not path.exists():
        write_atomic(path, partial(sources.write, parts))
    elif not all(map(np.array_equal, sources.npz(path), parts)):
        raise Refused(f"{path} was laid by from another file than {source}: remove it, or set FATBENCH_DATA elsewhere")
    return load(name)


def data_folder() -> Path:
    return Path(os.environ.get("FATBENCH_DATA") or Path.home() / ".cache" / "fatbench" / "data")


def _checked(info: Dataset, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: int = 0) -> Data:
    train, test = sources.pixels(x_train, f"{info.name} x_train"), sources.pixels(x_test, f"{info.name} x_test")
    if train.shape[1:] != test.shape[1:]:
        raise Refused(f"{info.name}: training images are {tuple(train.shape[1:])}, test images {tuple(test.shape[1:])}")
    labels = [
        sources.labels(y, len(x), classes, f"{info.name} {split}")
        for y, x, split in ((y_train, train, "y_train"), (y_test, test, "y_test"))
    ]
    present = torch.unique(labels[0]).tolist()
    known = classes or len(present)
    if not classes and present != list(range(known)):
        lacking = next(label for label in range(known) if label not in present)
        raise Refused(f"{info.name}: y_train goes up to {present[-1]} and lacks {lacking}: labels must be 0..classes-1")
    if not classes and int(labels[1].max()) >= known:
        raise Refused(f"{info.name} y_test holds {int(labels[1].max())}: y_train has labels in 0..{known - 1} only")
    if known < 2:
        raise Refused(f"{info.name}: one class only; a classifier needs two")
    return Data(info, train, labels[0], test, labels[1], known)


def take(data: Data, n_train: int | None) -> Data:
    """The same dataset with n_train training examples, each class at its share.

    Raises:
        Refused: more than there are, or fewer than classes.
    """
    if n_train is None or n_train == len(data.y_train):
        return data
    if not data.classes <= n_train <= len(data.y_train):
        raise Refused(
            f"--n-train {n_train}: {data.info.name} has {len(data.y_train)} training examples of {data.classes} classes"
        )
    rows = np.sort(balanced_order(data.y_train.numpy(), "n-train")[:n_train])
    return replace(data, x_train=data.x_train[rows], y_train=data.y_train[rows])


def augmented(x: Tensor, indices: np.ndarray, how: Augment, *key: object) -> Tensor:
    """Random crop (zero padding of 4, a shift of -4..4 each way) and horizontal flip, of the whole batch at once.

    Keyed by (key, index): the same example gets the same crop whatever batch it is in.
    """
    if how == "none":
        return x
    bits = hashed(indices, "augment", *key)
    n, c, height, width = x.shape
    shift = torch.from_numpy(np.stack([bits % np.uint64(9), (bits >> np.uint64(16)) % np.uint64(9)]).astype(np.int64))
    rows = torch.arange(height) + shift[0][:, None]
    columns = torch.arange(width) + shift[1][:, None]
    if how == "crop-flip":
        flip = torch.from_numpy(((bits >> np.uint64(32)) & np.uint64(1)).astype(bool))
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    padded = F.pad(x, (4, 4, 4, 4))
    where = (torch.arange(n)[:, None, None, None], torch.arange(c)[None, :, None, None])
    index = (*where, rows[:, None, :, None], columns[:, None, None, :])
    return padded[tuple(part.to(x.device) for part in index)]
