"""Datasets become the same tensors from whatever they are stored in, and what is no dataset is refused in one line."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from fatbench import data, sources
from fatbench.catalogue import DATASETS, Dataset
from fatbench.draws import balanced_order
from fatbench.errors import Refused

DIGITS_TEST = "78a343f1c3e655be79cd8732d7091cbd81fe708dbe0dd18bb070882ea21609c0"
SPLITS = ("x_train", "y_train", "x_test", "y_test")
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 5, 6, 3), dtype=np.uint8)  # NHWC
LABELS = np.arange(12) % 3


def refusal(source: object, **options: Any) -> str:
    """What load says, in one line, on refusing it."""
    with pytest.raises(Refused) as caught:
        data.load(str(source), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def written(path: Path, save: Callable[..., None] = np.savez, **replaced: Any) -> Path:
    """A small dataset of three classes as .npz, some arrays replaced, or left out for None."""
    arrays = {"x_train": PIXELS, "y_train": LABELS, "x_test": PIXELS, "y_test": LABELS, **replaced}
    save(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def counts(y: torch.Tensor) -> list[int]:
    return torch.bincount(y).tolist()


# ------------------------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits")


def test_digits_are_1437_and_360_images_in_the_unit_interval(digits: data.Data) -> None:
    assert (digits.shape, digits.classes) == ((1, 8, 8), 10) == (DATASETS["digits"].shape, DATASETS["digits"].classes)
    for x, y, n in ((digits.x_train, digits.y_train, 1437), (digits.x_test, digits.y_test, 360)):
        assert x.shape == (n, 1, 8, 8)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert (x.min(), x.max()) == (0, 1)
        assert y.shape == (n,)
        assert y.dtype == torch.int64
        assert y.unique().tolist() == list(range(10))


def test_the_digits_of_both_splits_are_those_of_scikit_learn_each_once(digits: data.Data) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.cat([digits.x_train, digits.x_test]), torch.cat([digits.y_train, digits.y_test])
    ours, theirs = torch.hstack([16 * x.flatten(1), y[:, None]]), np.column_stack([bunch.data, bunch.target])
    assert sorted(ours.tolist()) == sorted(theirs.tolist())


def test_digits_are_refused_where_scikit_learn_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(Refused, match="sklearn is not installed: pip install"):
        data.load("digits")


def test_the_test_digits_are_balanced_as_all_digits_are(digits: data.Data) -> None:
    test, every = np.array(counts(digits.y_test)), np.array(counts(torch.cat([digits.y_train, digits.y_test])))
    assert np.abs(test - 360 * every / 1797).max() < 1


def test_the_fingerprint_of_the_test_digits_never_changes(digits: data.Data) -> None:
    assert digits.fingerprint("test") == DIGITS_TEST == data.load("Digits").fingerprint("test")


def test_a_fingerprint_changes_with_a_pixel_a_label_the_number_of_classes_and_the_split(digits: data.Data) -> None:
    x, y = digits.x_test.clone(), digits.y_test.clone()
    x[5, 0, 3, 3] += 0.0625
    y[5] = (y[5] + 1) % 10
    others = [replace(digits, x_test=x), replace(digits, y_test=y), replace(digits, classes=11)]
    prints = [other.fingerprint("test") for other in others]
    assert len({DIGITS_TEST, digits.fingerprint("train"), *prints}) == 5
    assert others[0].fingerprint("train") == digits.fingerprint("train")


def test_a_fingerprint_knows_the_shape_of_the_images(digits: data.Data) -> None:
    assert replace(digits, x_test=digits.x_test.view(360, 1, 4, 16)).fingerprint("test") != DIGITS_TEST


def test_a_fingerprint_does_not_depend_on_the_file(digits: data.Data, tmp_path: Path) -> None:
    arrays = {split: getattr(digits, split).numpy() for split in SPLITS}
    own = data.load(str(written(tmp_path / "mine.npz", np.savez_compressed, **arrays)))
    assert own.fingerprint("test") == DIGITS_TEST
    assert own.info.name == "mine"


# ------------------------------------------------------------------------------------------------ npz

LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "NHWC": lambda x: x,
    "NCHW": lambda x: x.transpose(0, 3, 1, 2),
    "float32": lambda x: x.astype(np.float32) / np.float32(255),
    "float64": lambda x: x / 255,
    "float32 NCHW": lambda x: (x / 255).astype(np.float32).transpose(0, 3, 1, 2),
    "big-endian": lambda x: (x / 255).astype(">f8"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_colour_images_are_the_same_tensor_in_every_layout(layout: str, tmp_path: Path) -> None:
    stored = LAYOUTS[layout](PIXELS)
    made = data.load(str(written(tmp_path / "a.npz", x_train=stored, x_test=stored)))
    assert torch.equal(made.x_train, torch.tensor(PIXELS).permute(0, 3, 1, 2).float() / 255)
    assert torch.equal(made.x_train, made.x_test)
    assert made.x_train.is_contiguous()
    assert (made.shape, made.classes) == ((3, 5, 6), 3)


@pytest.mark.parametrize("shape", [(12, 5, 6), (12, 1, 5, 6), (12, 5, 6, 1)], ids=["NHW", "N1HW", "NHW1"])
def test_grey_images_are_the_same_tensor_in_every_layout(shape: tuple[int, ...], tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    stored = grey.reshape(shape)
    made = data.load(str(written(tmp_path / "a.npz", x_train=stored, x_test=stored / 255)))
    assert torch.equal(made.x_train, torch.tensor(grey)[:, None].float() / 255)
    assert torch.equal(made.x_train, made.x_test)


@pytest.mark.parametrize("kind", ["uint8", "int8", "int32", "uint16", ">i8", "column"])
def test_labels_are_int64_whatever_integers_they_are_stored_as(kind: str, tmp_path: Path) -> None:
    stored = LABELS[:, None] if kind == "column" else LABELS.astype(kind)
    made = data.load(str(written(tmp_path / "a.npz", y_train=stored, y_test=stored)))
    assert made.y_train.dtype == torch.int64
    assert made.y_train.tolist() == LABELS.tolist() == made.y_test.tolist()


def test_a_class_may_be_absent_from_the_test_split(tmp_path: Path) -> None:
    assert data.load(str(written(tmp_path / "a.npz", y_test=LABELS % 2))).classes == 3


@pytest.mark.parametrize("name", DATASETS)
def test_a_file_of_ones_own_is_read_whatever_its_name(name: str, tmp_path: Path) -> None:
    made = data.load(str(written(tmp_path / f"{name}.npz")))
    assert (made.shape, made.classes, made.info.eps) == ((3, 5, 6), 3, None)


FLOATS = PIXELS / 255.0
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "missing key": ({"y_test": None}, "lacks y_test: it must hold x_train, y_train, x_test, y_test"),
    "two missing keys": ({"x_train": None, "y_test": None}, "lacks x_train, y_test"),
    "object array": ({"x_train": np.array([{"a": 1}], dtype=object)}, "not a readable .npz of plain arrays"),
    "int16 images": ({"x_test": PIXELS.astype(np.int16)}, "x_test is int16 (12, 5, 6, 3): images must be uint8"),
    "uint16 images": ({"x_test": PIXELS.astype(np.uint16)}, "x_test is uint16: integer images must be uint8"),
    "boolean images": ({"x_test": PIXELS > 9}, "x_test is bool"),
    "complex images": ({"x_test": FLOATS * 1j}, "x_test is complex128"),
    "flat images": ({"x_test": PIXELS.reshape(12, -1)}, "x_test is uint8 (12, 90): images must be"),
    "5-d images": ({"x_test": PIXELS[None]}, "NHW, NHWC or NCHW"),
    "empty": ({"x_train": PIXELS[:0], "y_train": LABELS[:0]}, "x_train is empty"),
    "empty test": ({"x_test": PIXELS[:0], "y_test": LABELS[:0]}, "x_test is empty"),
    "no labels at all": ({"y_train": LABELS[:0], "y_test": LABELS[:0]}, "y_train is int64 (0,)"),
    "no pixels": ({"x_train": PIXELS[:, :0]}, "x_train is empty"),
    "ambiguous channels": ({"x_train": RNG.uniform(size=(12, 3, 5, 3))}, "channels may be its 2nd or its last axis"),
    "NaN": ({"x_train": np.where(PIXELS == 7, np.nan, 0.5)}, "x_train holds NaN or infinity"),
    "infinity": ({"x_train": np.where(PIXELS == 7, np.inf, 0.5)}, "x_train holds NaN or infinity"),
    "0..255 as floats": ({"x_train": PIXELS * 1.0}, "divide by 255, or store uint8"),
    "below 0": ({"x_train": FLOATS - 0.5}, "x_train lies in [-0.5, 0.5]"),
    "train and test shapes differ": ({"x_test": PIXELS[:, :4]}, "training images are (3, 5, 6), test images (3, 4, 6)"),
    "negative label": ({"y_train": LABELS - 1}, "y_train holds labels -1..1: they must lie in 0..classes-1"),
    "negative test label": ({"y_test": LABELS - 1}, "y_test holds labels -1..1: they must lie in 0..classes-1"),
    "test label out of range": ({"y_test": LABELS + 1}, "y_test holds 3: y_train has labels in 0..2 only"),
    "float labels": ({"y_train": LABELS * 1.0}, "y_train is float64 (12,): labels must be integers"),
    "NaN labels": ({"y_train": np.full(12, np.nan)}, "y_train is float64"),
    "text labels": ({"y_train": np.array(["cat", "dog"] * 6)}, "y_train is <U3"),
    "boolean labels": ({"y_train": LABELS > 0}, "y_train is bool"),
    "one-hot labels": ({"y_train": np.eye(3, dtype=int)[LABELS]}, "one for each of the 12 images"),
    "too few labels": ({"y_train": LABELS[:9]}, "y_train is int64 (9,): labels must be integers, one for each of"),
    "missing class": ({"y_train": np.where(LABELS == 1, 2, LABELS)}, "y_train goes up to 2 and lacks 1"),
    "labels from 1": ({"y_train": LABELS + 1, "y_test": LABELS + 1}, "lacks 0: labels must be 0..classes-1"),
    "label of 2**62": (
        {"y_train": np.where(LABELS == 1, 2**62, LABELS)},
        "y_train holds labels 0..4611686018427387904",
    ),
    "one class": ({"y_train": LABELS * 0, "y_test": LABELS * 0}, "one class only; a classifier needs two"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_arrays_that_are_no_dataset_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    replaced, says = BAD_ARRAYS[case]
    said = refusal(written(tmp_path / "mine.npz", **replaced))
    assert says in said
    assert "mine" in said


def archive(**members: bytes) -> bytes:
    """A zip file of these members."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def flipped(content: bytes, first: int, last: int) -> bytes:
    return content[:first] + bytes(255 - byte for byte in content[first:last]) + content[last:]


BAD_FILES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "nothing": lambda plain, packed: b"",
    "truncated": lambda plain, packed: plain[: len(plain) // 2],
    "without its last byte": lambda plain, packed: plain[:-1],
    "not a zip": lambda plain, packed: b"x_train, y_train\n0.5, 1\n",
    "a pickle": lambda plain, packed: b"\x80\x04]\x94.",
    "one array": lambda plain, packed: npy(PIXELS),
    "no arrays in it": lambda plain, packed: archive(**dict.fromkeys(SPLITS, b"hello")),
    "labels are no array": lambda plain, packed: archive(
        y_train=b"hello", y_test=b"hello", **{"x_train.npy": npy(PIXELS), "x_test.npy": npy(PIXELS)}
    ),
    "a bit flipped": lambda plain, packed: flipped(plain, 500, 501),
    "a compressed bit flipped": lambda plain, packed: flipped(packed, 100, 101),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_broken_npz_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    plain = written(tmp_path / "plain.npz").read_bytes()
    packed = written(tmp_path / "packed.npz", np.savez_compressed).read_bytes()
    path = tmp_path / "mine.npz"
    path.write_bytes(BAD_FILES[case](plain, packed))
    assert "mine" in refusal(path)


def test_a_pickled_array_is_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    trap = np.empty(1, dtype=object)
    trap[0] = Trap()
    path = written(tmp_path / "mine.npz", y_train=trap)
    assert "plain arrays" in refusal(path)
    assert not (tmp_path / "sprung").exists()
    with np.load(path, allow_pickle=True) as live:
        live["y_train"]
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", ["nowhere.npz", "nowhere/at/all", "nowhere.csv"])
def test_a_path_that_does_not_exist_is_refused(name: str, tmp_path: Path) -> None:
    assert f"no dataset at {tmp_path / name}" in refusal(tmp_path / name)


def test_a_folder_named_npz_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.npz").mkdir()
    assert "mine.npz" in refusal(tmp_path / "mine.npz")


@pytest.mark.parametrize(
    ("name", "closest"),
    [("cifar", "cifar10 or cifar100 or cifar10-reduced"), ("digit", "digits"), ("MNIST_", "mnist or fashion-mnist")],
)
def test_an_unknown_name_is_refused_with_the_closest(name: str, closest: str) -> None:
    said = refusal(name)
    assert f"unknown dataset {name!r}: did you mean {closest}?" in said
    assert all(known in said for known in DATASETS)


# ------------------------------------------------------------------------------------------------ folders of images


def folder(path: Path, classes: tuple[str, ...] = ("ant", "bee"), mode: str = "RGB", side: int = 6) -> Path:
    """A folder of two 5-by-`side` PNGs a class in train/ and in test/."""
    rng = np.random.default_rng(1)
    for split in ("train", "test"):
        for name in classes:
            (path / split / name).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (5, side, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(path / split / name / f"{number}.png")
    return path


def test_a_folder_of_images_loads_with_its_folders_as_classes(tmp_path: Path) -> None:
    made = data.load(str(folder(tmp_path / "insects")))
    assert (made.info.name, made.shape, made.classes) == ("insects", (3, 5, 6), 2)
    assert made.y_train.tolist() == made.y_test.tolist() == [0, 0, 1, 1]
    stored = np.asarray(Image.open(tmp_path / "insects" / "test" / "bee" / "1.png"))
    assert torch.equal(made.x_test[3], torch.tensor(stored).permute(2, 0, 1).float() / 255)


def test_a_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    made = data.load(str(folder(tmp_path / "grey", mode="L")))
    assert made.shape == (1, 5, 6)
    stored = np.asarray(Image.open(tmp_path / "grey" / "train" / "ant" / "1.png"))
    assert torch.equal(made.x_train[1, 0], torch.tensor(stored).float() / 255)


def spoil_other_class(path: Path) -> None:
    (path / "test" / "bee").rename(path / "test" / "cat")


def spoil_size(path: Path) -> None:
    Image.new("RGB", (9, 9)).save(path / "train" / "bee" / "0.png")


def spoil_test_size(path: Path) -> None:
    for image in (path / "test").rglob("*.png"):
        Image.new("RGB", (9, 8)).save(image)


def spoil_image(path: Path) -> None:
    (path / "train" / "bee" / "0.png").write_text("no picture\nat all\n")


def spoil_truncated(path: Path) -> None:
    image = path / "train" / "bee" / "0.png"
    image.write_bytes(image.read_bytes()[:60])


def spoil_no_test(path: Path) -> None:
    (path / "test").rename(path / "validation")


def spoil_empty_class(path: Path) -> None:
    (path / "train" / "cat").mkdir()


def spoil_one_class(path: Path) -> None:
    for split in ("train", "test"):
        for image in (path / split / "bee").iterdir():
            image.unlink()
        (path / split / "bee").rmdir()


BAD_FOLDERS = {
    spoil_other_class: "train/ has the classes ['ant', 'bee'], test/ has ['ant', 'cat']: they must be the same",
    spoil_size: "images of 2 shapes, such as (5, 6, 3) and (9, 9, 3): resize them",
    spoil_test_size: "training images are (3, 5, 6), test images (3, 8, 9)",
    spoil_image: "cannot identify image file",
    spoil_truncated: "train is not a folder of images per class",
    spoil_no_test: "test is not a folder of images per class",
    spoil_empty_class: "no valid file for the classes cat",
    spoil_one_class: "one class only; a classifier needs two",
}


@pytest.mark.parametrize("spoil", BAD_FOLDERS, ids=lambda spoil: spoil.__name__.removeprefix("spoil_"))
def test_a_folder_that_is_no_dataset_is_refused_in_one_line(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    spoil(folder(tmp_path / "insects"))
    said = refusal(tmp_path / "insects")
    assert BAD_FOLDERS[spoil] in said
    assert "insects" in said


# ------------------------------------------------------------------------------------------------ torchvision

FROM_TORCHVISION = [name for name, info in DATASETS.items() if info.torchvision]


def stand_in(monkeypatch: pytest.MonkeyPatch, info: Dataset, make: Callable[..., Any]) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{info.torchvision}", make)


@pytest.mark.parametrize(
    "problem", [URLError("no network\nat all"), RuntimeError("not found or corrupted"), OSError(28)]
)
@pytest.mark.parametrize("name", FROM_TORCHVISION)
def test_without_a_network_the_refusal_names_the_folder_and_the_files(
    name: str, problem: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise problem

    info = DATASETS[name]
    stand_in(monkeypatch, info, fails)
    said = refusal(name, folder=tmp_path / "here")
    assert f"cannot get {name}: " in said
    assert f"put {info.files} into {tmp_path / 'here'}" in said
    assert info.files


def test_downloads_live_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(root: str, **options: object) -> None:
        raise OSError(f"asked for {root}")

    stand_in(monkeypatch, DATASETS["cifar10"], fails)
    monkeypatch.setenv("FATBENCH_DATA", str(tmp_path / "shelf"))
    assert f"asked for {tmp_path / 'shelf'};" in refusal("cifar10")


def test_a_download_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    assert "cannot get mnist" in refusal("mnist", folder=tmp_path / "file")


class Fake:
    """A class of torchvision: what it makes keeps `data`, and `targets` or `labels`."""

    def __init__(self, shape: tuple[int, ...], kind: Callable[[np.ndarray], Any], labels: str) -> None:
        self.shape, self.kind, self.labels = shape, kind, labels
        self.asked: list[dict[str, Any]] = []

    def __call__(self, root: str, **options: Any) -> Any:
        self.asked.append({"root": root, **options})
        made = type("Made", (), {})()
        made.data = self.kind(self.pixels(len(self.asked)))
        setattr(made, self.labels, [3, 9, 0, 3] if self.labels == "targets" else np.array([3, 9, 0, 3]))
        return made

    def pixels(self, turn: int) -> np.ndarray:
        return np.random.default_rng(turn).integers(0, 256, (4, *self.shape), dtype=np.uint8)


FAKES: dict[str, tuple[tuple[Any, ...], str, tuple[int, ...]]] = {
    "cifar10": (((32, 32, 3), np.asarray, "targets"), "train", (0, 3, 1, 2)),
    "cifar100": (((32, 32, 3), np.asarray, "targets"), "train", (0, 3, 1, 2)),
    "svhn": (((3, 32, 32), np.asarray, "labels"), "split", (0, 1, 2, 3)),
    "mnist": (((28, 28), torch.as_tensor, "targets"), "train", (0, 1, 2)),
    "fashion-mnist": (((28, 28), torch.as_tensor, "targets"), "train", (0, 1, 2)),
}


@pytest.mark.parametrize("name", FROM_TORCHVISION)
def test_every_torchvision_dataset_comes_in_its_own_layout(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    arguments, option, axes = FAKES[name]
    fake = Fake(*arguments)
    info = DATASETS[name]
    stand_in(monkeypatch, info, fake)
    made = data.load(name.upper().replace("-", "_"), folder=tmp_path)
    assert (made.info, made.shape, made.classes) == (info, info.shape, 100 if name == "cifar100" else 10)
    assert made.y_train.tolist() == made.y_test.tolist() == [3, 9, 0, 3]
    for x, turn in ((made.x_train, 1), (made.x_test, 2)):
        expected = torch.tensor(fake.pixels(turn)).permute(axes).float() / 255
        assert torch.equal(x, expected.view(4, *made.shape))
    splits = ["train", "test"] if option == "split" else [True, False]
    assert fake.asked == [{"root": str(tmp_path), "download": True, option: split} for split in splits]


# ------------------------------------------------------------------------------------------------ take, split, order


@pytest.mark.parametrize("n", [10, 100, 500, 1000, 1436])
def test_take_gives_so_many_training_examples_balanced(n: int, digits: data.Data) -> None:
    taken = data.take(digits, n)
    assert len(taken.x_train) == len(taken.y_train) == n
    assert np.abs(np.array(counts(taken.y_train)) - n * np.array(counts(digits.y_train)) / 1437).max() < 1
    assert taken.fingerprint("test") == digits.fingerprint("test")


def test_take_keeps_images_with_their_labels_and_a_larger_take_holds_the_smaller(digits: data.Data) -> None:
    def rows(taken: data.Data) -> set[tuple[bytes, int]]:
        return {(x.numpy().tobytes(), int(y)) for x, y in zip(taken.x_train, taken.y_train, strict=True)}

    small, large = rows(data.take(digits, 50)), rows(data.take(digits, 200))
    assert small < large < rows(digits)
    assert (len(small), len(large)) == (50, 200)


@pytest.mark.parametrize("n", [None, 1437])
def test_take_of_everything_is_the_dataset_itself(n: int | None, digits: data.Data) -> None:
    assert data.take(digits, n) is digits


@pytest.mark.parametrize("n", [-5, 0, 9, 1438])
def test_take_refuses_more_than_there_are_and_fewer_than_classes(n: int, digits: data.Data) -> None:
    with pytest.raises(Refused, match=re.escape(f"--n-train {n}: digits has 1437 training examples of 10 classes")):
        data.take(digits, n)


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_validation_is_balanced_and_apart_from_training(share: float, digits: data.Data) -> None:
    rows, held = digits.split(share)
    assert sorted([*rows, *held]) == list(range(1437))
    assert len(held) == round(share * 1437)
    every = np.array(counts(digits.y_train))
    assert np.abs(np.bincount(digits.y_train[held], minlength=10) - len(held) * every / 1437).max() < 1


def test_the_validation_split_is_the_same_for_all_seeds(digits: data.Data) -> None:
    splits = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002  (the global stream is what must not matter)
        splits.append(digits.split(0.1))
    assert all(np.array_equal(*pair) for pair in zip(*splits, strict=True))
    assert splits[0][1].tolist()[:5] == [21, 34, 44, 49, 60]


@settings(max_examples=50, deadline=None, derandomize=True)
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=8), key=st.integers())
@example(sizes=[10] * 10, key=0)
@example(sizes=[30, 1, 1, 1, 1, 1, 1, 1], key=0)
def test_each_class_of_a_balanced_order_comes_at_even_intervals(sizes: list[int], key: int) -> None:
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    order = balanced_order(y, key)
    assert sorted(order) == list(range(len(y)))
    taken = np.cumsum(np.eye(len(sizes))[y[order]], axis=0)
    share = np.outer(np.arange(1, len(y) + 1), sizes) / len(y)
    assert np.abs(taken - share).max() <= len(sizes) / 2


@settings(max_examples=30, deadline=None, derandomize=True)
@given(size=st.integers(1, 20), classes=st.integers(2, 10), key=st.integers())
def test_a_balanced_order_of_equal_classes_takes_them_in_rounds(size: int, classes: int, key: int) -> None:
    y = np.tile(np.arange(classes), size)
    taken = np.cumsum(np.eye(classes)[y[balanced_order(y, key)]], axis=0)
    assert (taken.max(axis=1) - taken.min(axis=1)).max() <= 1


def test_a_balanced_order_depends_on_its_key_alone() -> None:
    y = np.arange(60) % 3
    assert np.array_equal(balanced_order(y, "a"), balanced_order(y, "a"))
    assert not np.array_equal(balanced_order(y, "a"), balanced_order(y, "b"))


# ------------------------------------------------------------------------------------------------ augmentation


def crops(image: torch.Tensor, how: str) -> dict[bytes, tuple[int, int, bool]]:
    """Every crop of an image that a shift of -4..4 each way, and perhaps a flip, can give."""
    _, height, width = image.shape
    found = {}
    for flip in (False, True) if how == "crop-flip" else (False,):
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        for i in range(9):
            for j in range(9):
                crop = padded[:, i : i + height, j : j + width]
                found[(crop.flip(2) if flip else crop).numpy().tobytes()] = (i, j, flip)
    return found


@pytest.mark.parametrize("how", ["crop", "crop-flip"])
def test_augmentation_is_every_crop_of_the_padded_image(how: Any) -> None:
    image = torch.rand(2, 7, 10)
    possible = crops(image, how)
    made = data.augmented(image.expand(4000, -1, -1, -1), np.arange(4000), how, 0)
    seen = {possible[one.numpy().tobytes()] for one in made.contiguous()}
    assert seen == set(possible.values())


def test_augmentation_is_keyed_by_example_not_by_batch() -> None:
    x, indices = torch.rand(20, 3, 8, 8), np.arange(100, 120)
    whole = data.augmented(x, indices, "crop-flip", 0, 1)
    order = np.random.default_rng(0).permutation(20)[:7]
    assert torch.equal(data.augmented(x[order], indices[order], "crop-flip", 0, 1), whole[order])
    assert not torch.equal(data.augmented(x, indices, "crop-flip", 0, 2), whole)


def test_no_augmentation_is_the_batch_itself() -> None:
    x = torch.rand(4, 1, 8, 8)
    assert data.augmented(x, np.arange(4), "none", 0) is x


# ------------------------------------------------------------------------------------------------ beginnings


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """cifar10-reduced is the first 20 + 10 here; downloads would lie in the folder."""
    monkeypatch.setitem(DATASETS, "cifar10-reduced", replace(DATASETS["cifar10-reduced"], examples=20, tests=10))
    monkeypatch.setenv("FATBENCH_DATA", str(tmp_path / "shelf"))
    return tmp_path


def file_of(path: Path, n: tuple[int, int] = (40, 30), shape: tuple[int, ...] = (32, 32, 3), seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    x, y = ([rng.integers(0, 256, (k, *shape), dtype=np.uint8) for k in n], [np.arange(k) % 10 for k in n])
    np.savez(path, x_train=x[0], y_train=y[0], x_test=x[1], y_test=y[1])
    return str(path)


def test_the_beginning_of_a_users_file_is_kept_under_its_name(small: Path) -> None:
    source = file_of(small / "mine.npz")
    whole, kept = data.load(source), data.keep("cifar10-reduced", source)
    assert (kept.info.name, len(kept.y_train), len(kept.y_test)) == ("cifar10-reduced", 20, 10)
    assert torch.equal(kept.x_train, whole.x_train[:20])
    assert torch.equal(kept.y_test, whole.y_test[:10])
    again = data.keep("cifar10-reduced", source)
    assert data.load("cifar10-reduced").fingerprint("train") == kept.fingerprint("train") == again.fingerprint("train")
    with pytest.raises(
        Refused, match=r"was laid by from another file than .*other\.npz: remove it, or set FATBENCH_DATA"
    ):
        data.keep("cifar10-reduced", file_of(small / "other.npz", seed=1))


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ({"shape": (28, 28)}, r"images of \(1, 28, 28\) and 10 classes, not those of cifar10"),
        ({"n": (19, 30)}, "has fewer images than the 20 \\+ 10 of cifar10-reduced"),
        ({"n": (40, 9)}, "has fewer images than"),
    ],
)
def test_a_file_that_is_not_the_other_dataset_is_not_kept(small: Path, made: dict[str, Any], told: str) -> None:
    with pytest.raises(Refused, match=told):
        data.keep("cifar10-reduced", file_of(small / "mine.npz", **made))
    assert not (small / "shelf").exists()


def test_without_a_kept_file_it_is_the_beginning_of_what_torchvision_brings(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DATASETS, "cifar10-reduced", replace(DATASETS["cifar10-reduced"], examples=3, tests=2))
    fake = Fake((32, 32, 3), np.asarray, "targets")
    stand_in(monkeypatch, DATASETS["cifar10"], fake)
    made = data.load("cifar10-reduced")
    assert (made.y_train.tolist(), made.y_test.tolist()) == ([3, 9, 0], [3, 9])
    assert torch.equal(made.x_test, torch.tensor(fake.pixels(2)[:2]).permute(0, 3, 1, 2).float() / 255)
