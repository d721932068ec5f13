"""Where images and labels come from: packages, torchvision, a .npz, a folder of images; and how they become tensors.

Everything here refuses what it cannot use in one line that says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fatbench.catalogue import DATASETS, Dataset
from fatbench.draws import balanced_order
from fatbench.errors import Refused, first_line

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
Arrays = tuple[Any, Any, Any, Any]  # these, as they come


def known(info: Dataset, folder: Path) -> Arrays:
    """A dataset that has a name here, brought by a package, laid by in `folder`, or downloaded there."""
    if info.torchvision:
        return _torchvision(info, folder)
    if not info.of:
        return _digits()
    path = folder / f"{info.name}.npz"
    return npz(path) if path.exists() else first(info, _torchvision(DATASETS[info.of], folder))


def read(path: Path) -> Arrays:
    """A user's own: `path.npz`, or a folder that holds train/ and test/ with a folder of images per class."""
    return _images(path) if path.is_dir() else npz(path)


def first(info: Dataset, parts: Arrays) -> Arrays:
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


def npz(path: Path) -> Arrays:
    """What a .npz holds under ARRAYS."""
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


def write(parts: Arrays, path: Path) -> None:
    """A .npz that `npz` reads."""
    with path.open("wb") as file:
        np.savez(file, **dict(zip(ARRAYS, parts, strict=True)))


# ------------------------------------------------------------------------------------------------ as tensors


def pixels(array: Any, what: str) -> Tensor:
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


def labels(array: Any, n: int, classes: int, what: str) -> Tensor:
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
