"""Whatever a file holds, no traceback reaches the user: data, settings and records are read, or refused in one line."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from fatbench import data, recipe, record
from fatbench.errors import Refused

quick = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
DTYPES = st.sampled_from(["u1", "u2", "i8", "f4", "f8", "f2", "?", "c8", "U3", "S2", "M8[s]"])


@st.composite
def some_arrays(draw: st.DrawFn) -> dict[str, np.ndarray]:
    names = draw(st.lists(st.sampled_from(["x_train", "y_train", "x_test", "y_test", "z"]), unique=True, max_size=5))
    shapes = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
    return {name: draw(arrays.arrays(draw(DTYPES), draw(shapes))) for name in names}


@st.composite
def nearly_a_dataset(draw: st.DrawFn) -> dict[str, np.ndarray]:
    n, classes = draw(st.integers(2, 6)), draw(st.integers(1, 3))
    made: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        side = draw(st.sampled_from([(4, 5), (4, 5, 1), (3, 4, 5), (4, 4, 4)]))
        made[f"x_{split}"] = draw(arrays.arrays(draw(st.sampled_from(["u1", "f4"])), (n, *side)))
        labels = st.integers(-1, classes)
        made[f"y_{split}"] = draw(arrays.arrays(draw(st.sampled_from(["i8", "u1", "f8"])), n, elements=labels.map(abs)))
    return made


def read_or_refused(path: Path) -> None:
    try:
        loaded = data.load(str(path))
    except Refused as refusal:
        assert "\n" not in str(refusal)
        return
    for x, y in ((loaded.x_train, loaded.y_train), (loaded.x_test, loaded.y_test)):
        assert 0 <= x.min() <= x.max() <= 1
        assert 0 <= y.min() <= y.max() < loaded.classes


@quick
@given(made=some_arrays() | nearly_a_dataset())
def test_an_npz_of_any_arrays_is_read_or_refused(made: dict[str, np.ndarray], tmp_path: Path) -> None:
    np.savez(tmp_path / "any.npz", **made)
    read_or_refused(tmp_path / "any.npz")


@quick
@given(place=st.integers(0, 5000), value=st.integers(0, 255), cut=st.booleans())
def test_a_damaged_npz_is_read_or_refused(place: int, value: int, cut: bool, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    y = np.arange(12) % 3
    np.savez_compressed(buffer, x_train=np.eye(12)[:, :, None] * y, y_train=y, x_test=np.ones((3, 12, 3)), y_test=y[:3])
    content = bytearray(buffer.getvalue())
    place %= len(content)
    content[place] = value
    (tmp_path / "any.npz").write_bytes(content[:place] if cut else content)
    read_or_refused(tmp_path / "any.npz")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["8/0", "1e999", "59/120"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(key=st.sampled_from([*recipe.Settings.model_fields, "defence"]), value=JSON)
def test_a_setting_of_any_value_is_taken_or_refused(key: str, value: Any) -> None:
    said = {"defense": "fat", "arch": "digits-cnn", "eps": "0.3", key: value}
    try:
        resolved = recipe._validated(recipe._with_defaults(said))
    except Refused as refusal:
        assert "\n" not in str(refusal)
        return
    assert recipe._validated(resolved.model_dump(mode="json")) == resolved


@quick
@given(text=st.text(max_size=40) | st.sampled_from(["tau=1", "tau=[]", "lr=", "=", "eps=8/255", "steps=10**9"]))
def test_a_set_of_any_text_is_taken_or_refused(text: str) -> None:
    try:
        recipe.resolve("fat", sets=[text])
    except Refused as refusal:
        assert "\n" not in str(refusal)


@quick
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_bytes_are_no_record(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "any.json").write_bytes(content)
    with pytest.raises(Refused) as refusal:
        record.read(tmp_path / "any.json")
    assert "\n" not in str(refusal.value)
