"""Datasets as tensors: images (N, C, H, W) float32 in [0, 1], labels (N,) int64, with a fingerprint of every split.

`digits` (scikit-learn's 1,797 8x8 digits) needs no download; torchvision brings cifar10, cifar100, svhn, mnist and
fashion-mnist; anybody's own data comes as `path.npz` or as a folder of images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fatbench.catalogue import DATASETS, Dataset, described
from fatbench.draws import hashed, shuffled
from fatbench.errors import Refused, first_line
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
        """Rows of the training set for training and for validation, class-balanced, one split for all seeds."""
        order = balanced_order(self.y_train.numpy(), "validation")
        held = round(share * len(order))
        return np.sort(order[held:]), np.sort(order[:held])


def balanced_order(y: np.ndarray, *key: object) -> np.ndarray:
    """(N,) an order of the examples in which each class comes at even intervals: every beginning is class-balanced."""
    order = shuffled(len(y), *key)
    place = np.empty(len(y))
    for label in np.unique(y):
        mine = order[y[order] == label]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return order[np.argsort(place[order], kind="stable")]


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
        return _checked(info, *_known(info, folder or data_folder()), classes=info.classes)
    return _checked(info, *(_images(Path(name)) if Path(name).is_dir() else _npz(Path(name))))


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
    parts = _first(info, (train, np.asarray(whole.y_train), test, np.asarray(whole.y_test)))
    if not path.exists():
        write_atomic(path, partial(_save, parts))
    elif not all(map(np.array_equal, _npz(path), parts)):
        raise Refused(f"{path} was laid by from another file than {source}: remove it, or set FATBENCH_DATA elsewhere")
    return load(name)


def _save(parts: Arrays, path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, **dict(zip(ARRAYS, parts, strict=True)))


def data_folder() -> Path:
    return Path(os.environ.get("FATBENCH_DATA") or Path.home() / ".cache" / "fatbench" / "data")


# ------------------------------------------------------------------------------------------------ sources

Arrays = tuple[Any, Any, Any, Any]  # these, as they come
ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def _known(info: Dataset, folder: Path) -> Arrays:
    if info.torchvision:
        return _torchvision(info, folder)
    if not info.of:
        return _digits()
    path = folder / f"{info.name}.npz"
    return _npz(path) if path.exists() else _first(info, _torchvision(DATASETS[info.of], folder))


def _first(info: Dataset, parts: Arrays) -> Arrays:
    """The beginning that a dataset is of another."""
    train, test = slice(info.examples), slice(info.tests)
    return parts[0][train], parts[1][train], parts[2][test], parts[3][test]


def _digits() -> Arrays:
    # scikit-learn's file without scikit-learn, whose import takes longer than many a run's epoch.
    table = np.loadtxt(_beside("sklearn", "datasets/data/digits.csv.gz"), delimiter=",")
    images, y = (table[:, :-1].reshape(-1, 8, 8) / 16.0).astype(np.float32), table[:, -1].astype(np.int64)
    order = balanced_order(y, "digits")  # a fixed split: 360 to test, 1,437 to train on
    test, train = np.sort(order[:360]), np.sort(order[360:])
    return images[train], y[train], images[test], y[test]


def _beside(package: str, path: str) -> Path:
    """A file that an installed package carries; the package is not imported."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise Refused(f"{package} is not installed: pip install -e . installs all that fatbench needs")
    return Path(found.origin).parent / path


def _torchvision(info: Dataset, folder: Path) -> Arrays:
    from torchvision import datasets

    make: Callable[..., Any] = getattr(datasets, info.torchvision)
    splits = (
        ({"split": "train"}, {"split": "test"}) if info.torchvision == "SVHN" else ({"train": True}, {"train": False})
    )
    parts: list[Any] = []
    for split in splits:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            made = make(str(folder), download=True, **split)
        except (OSError, RuntimeError, ValueError) as error:  # no network is an OSError, a bad download a RuntimeError
            raise Refused(
                f"cannot get {info.name}: {first_line(error)}; without a network put {info.files} into {folder} "
                "(or set FATBENCH_DATA to where it is)"
            ) from None
        parts += [np.asarray(made.data), np.asarray(made.labels if hasattr(made, "labels") else made.targets)]
    return tuple(parts)


def _npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [name for name in ARRAYS if name not in file.files]
            parts = None if missing else tuple(file[name] for name in ARRAYS)
    except Exception as error:  # a damaged zip makes numpy raise almost anything
        raise Refused(f"{path} is not a readable .npz of plain arrays: {first_line(error)}") from None
    if parts is None:
        raise Refused(f"{path} lacks {', '.join(missing)}: it must hold {', '.join(ARRAYS)}")
    return parts


def _images(path: Path) -> Arrays:
    from torchvision.datasets import ImageFolder

    found: list[list[str]] = []
    parts: list[Any] = []
    for split in ("train", "test"):
        try:
            images = ImageFolder(str(path / split), loader=_opened)
            arrays = [array for array, _ in images]
        except (OSError, ValueError, SyntaxError) as error:
            raise Refused(f"{path / split} is not a folder of images per class: {first_line(error)}") from None
        shapes = sorted({array.shape for array in arrays})
        if len(shapes) != 1:
            raise Refused(
                f"{path / split} holds images of {len(shapes)} shapes, such as {shapes[0]} and {shapes[1]}: resize them"
            )
        found.append(images.classes)
        parts += [np.stack(arrays), np.asarray(images.targets)]
    if found[0] != found[1]:
        raise Refused(f"{path}: train/ has the classes {found[0]}, test/ has {found[1]}: they must be the same")
    return tuple(parts)


def _opened(path: str) -> np.ndarray:
    """An image as (H, W) where it is grey, as (H, W, 3) where it is not."""
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("L" if image.mode in ("1", "L", "LA") else "RGB"))


# ------------------------------------------------------------------------------------------------ checks


def _checked(info: Dataset, x_train: Any, y_train: Any, x_test: Any, y_test: Any, classes: int = 0) -> Data:
    train, test = _pixels(x_train, f"{info.name} x_train"), _pixels(x_test, f"{info.name} x_test")
    if train.shape[1:] != test.shape[1:]:
        raise Refused(f"{info.name}: training images are {tuple(train.shape[1:])}, test images {tuple(test.shape[1:])}")
    labels = [
        _labels(y, len(x), classes, f"{info.name} {split}")
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


def _pixels(array: Any, what: str) -> Tensor:
    """uint8 or float NHW, NHWC or NCHW -> (N, C, H, W) float32 in [0, 1]."""
    array = np.asarray(array)
    if array.ndim not in (3, 4) or array.dtype.kind not in "uf":
        raise Refused(f"{what} is {array.dtype} {array.shape}: images must be uint8 or float, NHW, NHWC or NCHW")
    if not array.size:
        raise Refused(f"{what} is empty")
    if array.ndim == 3:
        array = array[:, None]
    elif array.shape[1] == array.shape[3]:
        raise Refused(
            f"{what} is {array.shape}: channels may be its 2nd or its last axis; store it as NHW or with H != C"
        )
    elif array.shape[3] < array.shape[1]:
        array = array.transpose(0, 3, 1, 2)
    if array.dtype.kind == "u":
        if array.dtype != np.uint8:
            raise Refused(f"{what} is {array.dtype}: integer images must be uint8, 0..255")
        return torch.from_numpy(np.ascontiguousarray(array)).float().div_(255)
    images = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    if not torch.isfinite(images).all():
        raise Refused(f"{what} holds NaN or infinity")
    low, high = images.aminmax()
    if low < 0 or high > 1:
        raise Refused(
            f"{what} lies in [{low:.4g}, {high:.4g}]: float images must lie in [0, 1]; divide by 255, or store uint8"
        )
    return images


def _labels(array: Any, n: int, classes: int, what: str) -> Tensor:
    """Integers (N,), not negative, below `classes` where that is known."""
    array = np.asarray(array)
    if array.shape == (n, 1):
        array = array[:, 0]
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise Refused(f"{what} is {array.dtype} {array.shape}: labels must be integers, one for each of the {n} images")
    if array.min() < 0 or array.max() >= (classes or 2**31):
        most = classes - 1 if classes else "classes-1"
        raise Refused(f"{what} holds labels {array.min()}..{array.max()}: they must lie in 0..{most}")
    return torch.from_numpy(array.astype(np.int64))


# ------------------------------------------------------------------------------------------------ use


def take(data: Data, n_train: int | None) -> Data:
    """The same dataset with n_train class-balanced training examples.

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
