"""A record is whole or absent, comes back as it was written, and is refused in one line after any tampering."""

from __future__ import annotations

import copy
import errno
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from fatbench import files, record
from fatbench.errors import Refused

N = 40
ATTACKS = ("fgsm", "pgd-20")

Limit = Callable[[int], AbstractContextManager[None]]


def outcomes() -> pd.DataFrame:
    """30 of 40 right when clean, 20 under FGSM, 15 under PGD-20; PGD-20 makes two of the wrong ones right."""
    index = np.arange(N)
    y = index % 10
    columns = {"index": index, "label": y, "clean_pred": np.where(index < 30, y, (y + 1) % 10)}
    for attack, broken in (("fgsm", index >= 20), ("pgd-20", (index >= 13) & (index < 38))):
        columns |= {f"{attack}.pred": np.where(broken, (y + 1) % 10, y), f"{attack}.broken": broken}
    return pd.DataFrame(columns)


def said(table: pd.DataFrame | None = None, **run: Any) -> dict[str, Any]:
    """What `write` is given for these outcomes."""
    table = outcomes() if table is None else table
    correct = record.count(table, list(ATTACKS))
    network = {
        "fingerprint": "f" * 64, "arch": "digits-cnn", "defense": "fat", "fields": {"tau": [["0", 0]]},
        "settings": {"defense": "fat", "lr": 0.1}, "seed": 0, "eps_train": "0.3", "selection": "last", "epoch": 3,
        "epochs": 3, "status": "done",
    }  # fmt: skip
    data = {
        "name": "digits", "fingerprint": "d" * 64, "shape": [1, 8, 8], "classes": 10, "n": N, "of": N, "rule": "all",
    }  # fmt: skip
    return {
        "id": "fat-digits-1",
        "protocol": {"name": "p", "version": 1, "source": "ours", "attacks": {"pgd-20": {"steps": 20}}},
        "result": {
            "network": network, "data": data, "norm": "linf", "eps": "0.3", "eps_value": 0.3, "seed": 0, "chunk": 250,
            "correct": correct, "accuracies": {name: right / N for name, right in correct.items()},
            "stages": {"autoattack": {"square": 1}}, "collapsed": False, "outcomes": record.outcomes_hash(table),
            "warnings": ["a doubt"],
        },
        "run": {"device": "cpu", "seconds": 1.5, **run},
    }  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A record's JSON, its parquet beside it."""
    return tmp_path / f"{record.write(tmp_path, said(), outcomes()).id}.json"


def refusal(path: Path) -> str:
    with pytest.raises(Refused) as refused:
        record.read(path)
    assert "\n" not in str(refused.value)
    assert str(path.with_suffix("")) in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ as it was written


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = record.write(tmp_path, said(), outcomes())
    back = record.read(tmp_path / "fat-digits-1.json")
    assert back == written
    assert back.result.correct == {"clean": 30, "fgsm": 20, "pgd-20": 15, "worst": 13}
    assert back.attacks == ["fgsm", "pgd-20"]
    pd.testing.assert_frame_equal(record.read_outcomes(tmp_path / "fat-digits-1.parquet"), outcomes())


def test_a_records_files_are_one_json_and_one_parquet(path: Path) -> None:
    assert sorted(p.name for p in path.parent.iterdir()) == ["fat-digits-1.json", "fat-digits-1.parquet"]
    assert list(json.loads(path.read_text())) == ["schema", "id", "protocol", "result", "run", "hash"]


def test_worst_is_counted_example_by_example() -> None:
    table = pd.DataFrame({
        "label": [0, 0, 0, 0, 0], "clean_pred": [0, 0, 0, 0, 1],
        "a.broken": [True, False, False, True, False], "b.broken": [False, True, False, True, False],
    })  # fmt: skip
    assert record.count(table, ["a", "b"]) == {"clean": 4, "a": 3, "b": 3, "worst": 1}
    assert record.count(table, []) == {"clean": 4, "worst": 4}


def test_the_run_is_not_hashed_and_everything_else_is(tmp_path: Path) -> None:
    hashes = [record.write(tmp_path, said(seconds=s), outcomes()).hash for s in (1, 2)]
    assert hashes[0] == hashes[1]
    other = said()
    other["protocol"]["version"] = 2
    assert record.write(tmp_path, other, outcomes()).hash != hashes[0]


def test_how_parquet_packs_the_outcomes_does_not_matter(path: Path) -> None:
    before = record.read(path)
    outcomes().astype({"label": np.int16}).to_parquet(path.with_suffix(".parquet"), index=False, compression=None)
    assert record.read(path) == before


def test_a_failed_networks_record_needs_no_outcomes(tmp_path: Path) -> None:
    failed = said()
    failed["result"] |= {"correct": {}, "accuracies": {}, "outcomes": "", "warnings": ()}
    failed["result"]["network"]["status"] = "failed: the loss was not finite"
    written = record.write(tmp_path, failed, None)
    assert record.read(tmp_path / "fat-digits-1.json") == written
    assert [p.suffix for p in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize("ident", ["../escape", "a/b", ".hidden", "", "a b", "a\nb"])
def test_an_id_is_a_plain_file_name(ident: str, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="id"):
        record.write(tmp_path / "records", {**said(), "id": ident}, outcomes())
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ tampering


def changed(path: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool = False) -> None:
    """Changes a record's JSON, and where asked its hash with it."""
    text = json.loads(path.read_text())
    change(text)
    if reseal:
        text["hash"] = files.digest({key: text[key] for key in ("schema", "id", "protocol", "result")})
    path.write_text(json.dumps(text))


def right(attack: str, number: float) -> Callable[[dict[str, Any]], object]:
    """Another count of an attack, with the accuracy that belongs to it."""

    def change(text: dict[str, Any]) -> None:
        text["result"]["correct"][attack] = number
        text["result"]["accuracies"][attack] = number / N

    return change


NOT_THE_HASH = "its hash does not match"
TAMPERINGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "accuracy": (lambda t: t["result"]["accuracies"].update(fgsm=0.9), "fgsm: 20 of 40 right is not 0.9"),
    "count": (lambda t: t["result"]["correct"].update(fgsm=36), "fgsm: 36 of 40 right is not 0.5"),
    "count and accuracy": (right("fgsm", 36), NOT_THE_HASH),
    "negative": (right("fgsm", -1), "fgsm: -1 of 40"),
    "more than n": (right("fgsm", N + 1), "fgsm: 41 of 40"),
    "half an example": (right("fgsm", 20.5), "correct.fgsm: "),
    "NaN accuracy": (lambda t: t["result"]["accuracies"].update(fgsm=float("nan")), "accuracies.fgsm: "),
    "infinite accuracy": (lambda t: t["result"]["accuracies"].update(fgsm=float("inf")), "accuracies.fgsm: "),
    "NaN count": (lambda t: t["result"]["correct"].update(fgsm=float("nan")), "correct.fgsm: "),
    "NaN eps": (lambda t: t["result"].update(eps_value=float("nan")), "eps_value: "),
    "no accuracy": (lambda t: t["result"]["accuracies"].pop("worst"), "worst: 13 of 40 right is not None"),
    "no count": (lambda t: t["result"]["correct"].pop("worst"), "name different attacks"),
    "no attack": (lambda t: [t["result"][key].pop("pgd-20") for key in ("correct", "accuracies")], NOT_THE_HASH),
    "no attacks": (lambda t: t["result"].update(correct={}, accuracies={}), NOT_THE_HASH),
    "protocol relabelled": (lambda t: t["protocol"].update(name="fatbench-linf"), NOT_THE_HASH),
    "attack weakened": (lambda t: t["protocol"]["attacks"]["pgd-20"].update(steps=100), NOT_THE_HASH),
    "eps": (lambda t: t["result"].update(eps="8/255"), NOT_THE_HASH),
    "eps outside": (lambda t: t["result"].update(eps="8"), "eps: '8' lies outside"),
    "status": (lambda t: t["result"]["network"].update(status="failed: no"), NOT_THE_HASH),
    "defense": (lambda t: t["result"]["network"].update(defense="trades"), NOT_THE_HASH),
    "weights": (lambda t: t["result"]["network"].update(fingerprint="0" * 64), NOT_THE_HASH),
    "setting": (lambda t: t["result"]["network"]["settings"].update(lr=0.2), NOT_THE_HASH),
    "warning": (lambda t: t["result"].update(warnings=[]), NOT_THE_HASH),
    "stage": (lambda t: t["result"]["stages"].clear(), NOT_THE_HASH),
    "rule": (lambda t: t["result"]["data"].update(rule="best"), "data.rule: "),
    "id": (lambda t: t.update(id="fat-digits-2"), NOT_THE_HASH),
    "hash": (lambda t: t.update(hash="0" * 64), NOT_THE_HASH),
    "no hash": (lambda t: t.pop("hash"), "hash: Field required"),
    "empty hash": (lambda t: t.update(hash=""), NOT_THE_HASH),
    "schema": (lambda t: t.update(schema=3), "is no record of schema 2: schema: "),
    "no schema": (lambda t: t.pop("schema"), "schema: Field required"),
    "unknown key": (lambda t: t.update(comment="trust me"), "comment: Extra inputs"),
    "unknown result": (lambda t: t["result"].update(best=1.0), "result.best: Extra inputs"),
    "no network": (lambda t: t["result"].pop("network"), "result.network: Field required"),
    "no classes": (lambda t: t["result"]["data"].update(classes=1), "classes: "),
    "no examples": (lambda t: t["result"]["data"].update(n=0), "data.n: "),
}


@pytest.mark.parametrize("how", list(TAMPERINGS))
def test_a_changed_record_is_refused(how: str, path: Path) -> None:
    change, why = TAMPERINGS[how]
    changed(path, change)
    assert why in refusal(path)


@pytest.mark.parametrize(
    "change",
    [
        right("fgsm", 36),
        right("worst", 20),
        right("clean", 31),
        right("autoattack", 20),
        lambda t: [t["result"][key].pop("pgd-20") for key in ("correct", "accuracies")],
        lambda t: [
            t["result"]["data"].update(n=2 * N),
            t["result"]["accuracies"].update({name: k / (2 * N) for name, k in t["result"]["correct"].items()}),
        ],
        lambda t: t["result"].update(outcomes="0" * 64),
    ],
    ids=["fgsm", "worst", "clean", "an attack without outcomes", "an attack left out", "twice n", "outcomes"],
)
def test_a_resealed_record_is_held_against_its_outcomes(change: Callable[[dict[str, Any]], object], path: Path) -> None:
    changed(path, change, reseal=True)
    refusal(path)


def flipped(table: pd.DataFrame) -> pd.DataFrame:
    table.loc[3, "fgsm.broken"] ^= True
    return table


@pytest.mark.parametrize(
    "change",
    [
        flipped,
        lambda t: t.assign(label=(t["label"] + 1) % 10),
        lambda t: t.assign(clean_pred=t["label"]),
        lambda t: t.assign(index=t["index"] + 1),
        lambda t: t[::-1],
        lambda t: t.iloc[:-1],
        lambda t: pd.concat([t, t]),
        lambda t: t.drop(columns="pgd-20.broken"),
        lambda t: t.drop(columns="pgd-20.pred"),
        lambda t: t.rename(columns={"fgsm.pred": "pgd.pred"}),
        lambda t: t[t.columns[::-1]],
        lambda t: t.assign(more=0),
        lambda t: t.assign(label="seven"),
        lambda t: t.assign(label=[[1, 2]] * N),
        lambda t: pd.DataFrame({"a": ["x"]}),
        lambda t: pd.DataFrame(),
    ],
    ids=[
        "flipped", "label", "clean", "index", "order", "row less", "doubled", "no broken", "no pred", "renamed",
        "columns turned", "column more", "words", "lists", "another table", "empty table",
    ],
)  # fmt: skip
def test_changed_outcomes_are_refused(change: Callable[[pd.DataFrame], pd.DataFrame], path: Path) -> None:
    change(outcomes()).to_parquet(path.with_suffix(".parquet"), index=False)
    refusal(path)


def test_missing_outcomes_are_refused(path: Path) -> None:
    path.with_suffix(".parquet").unlink()
    assert "is missing" in refusal(path)


@pytest.mark.parametrize("kept", [0, 1, 4, 0.5, 0.99, -1])
def test_truncated_outcomes_are_refused(kept: float, path: Path) -> None:
    parquet = path.with_suffix(".parquet")
    whole = parquet.read_bytes()
    parquet.write_bytes(whole[: int(kept * len(whole)) if 0 < kept < 1 else int(kept)])
    assert "is corrupt" in refusal(path)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b'{"schema": 1', b"not JSON", b"\xff\xfe\x00", b"null", b"3", b"[]", b"{}", b"NaN", b'"\\ud800"',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_a_file_that_is_no_record_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    assert "is no record" in refusal(path)


def test_no_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no record at" in refusal(tmp_path / "absent.json")
    assert "is no record" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["protocol", "network"])
def test_text_that_is_no_unicode_is_refused(where: str, path: Path) -> None:
    # JSON may spell half of a surrogate pair, which no UTF-8 holds.
    changed(
        path,
        lambda t: (t["protocol"] if where == "protocol" else t["result"]["network"]["settings"]).update(name="\ud800"),
    )
    refusal(path)


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*at, key)
        yield from places(one, (*at, key))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A record that every random example starts from: its JSON file, and what that holds."""
    folder = tmp_path_factory.mktemp("kept")
    return folder / "fat-digits-1.json", record.write(folder, said(), outcomes()).model_dump(mode="json", by_alias=True)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(value=JSONISH)
def test_reading_any_json_does_nothing_but_refuse(value: Any, kept: tuple[Path, dict[str, Any]]) -> None:
    kept[0].write_text(json.dumps(value))
    with pytest.raises(Refused):
        record.read(kept[0])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(data=st.data(), value=JSONISH)
def test_no_random_change_gets_into_what_is_hashed(
    data: st.DataObject, value: Any, kept: tuple[Path, dict[str, Any]]
) -> None:
    path, text = kept
    *way, last = data.draw(st.sampled_from(list(places(text))))
    inner = mutated = copy.deepcopy(text)
    for key in way:
        inner = inner[key]
    inner[last] = value
    path.write_text(json.dumps(mutated))
    try:
        back = record.read(path).model_dump(mode="json", by_alias=True)
    except Refused:
        return
    assert {**back, "run": 0} == {**text, "run": 0}


# ------------------------------------------------------------------------------------------------ a disk that fails


def test_a_disk_that_takes_no_outcomes_leaves_nothing(tmp_path: Path, no_file_beyond: Limit) -> None:
    with no_file_beyond(100), pytest.raises(Refused, match=r"cannot write .*\.parquet") as refused:
        record.write(tmp_path, said(), outcomes())
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_json_leaves_no_record(tmp_path: Path, no_file_beyond: Limit) -> None:
    with no_file_beyond(20_000), pytest.raises(Refused, match=r"cannot write .*\.json: File too large"):
        record.write(tmp_path, said(log="x" * 30_000), outcomes())
    assert [p.name for p in tmp_path.iterdir()] == ["fat-digits-1.parquet"]
    again = record.write(tmp_path, said(log="x" * 30_000), outcomes())
    assert record.read(tmp_path / "fat-digits-1.json") == again


@pytest.mark.parametrize("full", ["parquet", "json"])
def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Path.replace

    def no_space(self: Path, target: Path) -> Path:
        if target.suffix == f".{full}":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", no_space)
    with pytest.raises(Refused, match="No space left on device"):
        record.write(tmp_path, said(), outcomes())
    assert [p.suffix for p in tmp_path.iterdir()] == ([] if full == "parquet" else [".parquet"])


def test_the_json_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved, replace = [], Path.replace

    def watched(self: Path, target: Path) -> Path:
        moved.append(Path(target).suffix)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    record.write(tmp_path, said(), outcomes())
    assert moved == [".parquet", ".json"]


def test_a_folder_that_may_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "records").write_text("a file")
    with pytest.raises(Refused, match="cannot write"):
        record.write(tmp_path / "records", said(), outcomes())


# ------------------------------------------------------------------------------------------------ older records


def test_records_of_the_first_schema_are_read_as_they_were(root: Path) -> None:
    paths = sorted((root / "leaderboard" / "records").glob("*.json"))
    old = [path for path in paths if json.loads(path.read_text())["schema"] == 1]
    assert len(old) >= 30
    for path in old[::6]:
        assert record.read(path).said() == json.loads(path.read_text())


def test_a_field_that_came_later_is_hashed_where_a_record_says_it(tmp_path: Path) -> None:
    without, given = said(), said()
    given["result"]["after"] = {}
    hashes = {record.write(tmp_path, one, outcomes()).hash for one in (without, given)}
    assert len(hashes) == 2
