"""Files are whole or absent whatever the disk does, a log loses at most its cut-off last line, a value has one hash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import given, settings
from hypothesis import strategies as st

from fatbench import files
from fatbench.errors import Refused

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
few = settings(max_examples=40, deadline=None, derandomize=True)

Limit = Callable[[int], AbstractContextManager[None]]


def full(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@contextlib.contextmanager
def refused(path: Path, reason: str = "No space left on device") -> Iterator[None]:
    """What is tried within ends in one line that names the file and the disk's answer."""
    with pytest.raises(Refused) as caught:
        yield
    assert str(caught.value) == f"cannot write {path}: {reason}; what was there before is untouched"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "here" / "it.json"


@pytest.fixture
def before(path: Path) -> bytes:
    """What `path` holds already."""
    path.parent.mkdir()
    path.write_bytes(b"what was there before\n")
    return path.read_bytes()


def only(path: Path) -> bytes:
    """The content of the one file in its folder."""
    assert list(path.parent.iterdir()) == [path]
    return path.read_bytes()


# ------------------------------------------------------------------------------------------------ write_atomic


def test_a_file_is_written_with_its_folders_and_nothing_beside_it(path: Path) -> None:
    files.write_text(path, "größer\n")
    assert only(path) == "größer\n".encode()


def test_a_file_takes_the_place_of_the_one_before(path: Path, before: bytes) -> None:
    files.write_json(path, {"ä": 1.5})
    assert only(path) == '{\n "ä": 1.5\n}\n'.encode()


def test_the_file_before_is_whole_while_the_new_one_is_written(path: Path, before: bytes) -> None:
    seen = []

    def write(to: Path) -> None:
        to.write_bytes(b"half")
        seen.append((path.read_bytes(), to.parent))

    files.write_atomic(path, write)
    assert seen == [(before, path.parent)]
    assert only(path) == b"half"


@pytest.mark.parametrize("written", [b"", b"half of it"])
def test_a_full_disk_leaves_what_was_there_before(written: bytes, path: Path, before: bytes) -> None:
    def write(to: Path) -> None:
        to.write_bytes(written)
        full()

    with refused(path):
        files.write_atomic(path, write)
    assert only(path) == before


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_refuses_at_the_end_leaves_what_was_there_before(
    call: str, path: Path, before: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*((os, "fsync") if call == "fsync" else (Path, "replace")), full)
    with refused(path):
        files.write_text(path, "new")
    assert only(path) == before


def test_a_disk_that_takes_half_leaves_what_was_there_before(path: Path, before: bytes, no_file_beyond: Limit) -> None:
    with no_file_beyond(1000), refused(path, os.strerror(errno.EFBIG)):
        files.write_text(path, "x" * 5000)
    assert only(path) == before


def test_where_nothing_was_nothing_is_left(path: Path) -> None:
    with refused(path):
        files.write_atomic(path, full)
    assert list(path.parent.iterdir()) == []


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_what_was_there_before(
    raised: type[BaseException], path: Path, before: bytes
) -> None:
    def write(to: Path) -> None:
        to.write_bytes(b"half")
        raise raised

    with pytest.raises(raised):
        files.write_atomic(path, write)
    assert only(path) == before


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with refused(tmp_path / "file" / "it", os.strerror(errno.EEXIST)):
        files.write_text(tmp_path / "file" / "it", "new")


def test_a_folder_in_the_way_is_refused(path: Path) -> None:
    path.mkdir(parents=True)
    with refused(path, os.strerror(errno.EISDIR)):
        files.write_text(path, "new")
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_json_is_not_written(path: Path, before: bytes) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(path, {"loss": float("nan")})
    assert only(path) == before


# ------------------------------------------------------------------------------------------------ append_line


@few
@given(values=st.lists(JSON, max_size=4))
def test_a_log_gives_back_the_lines_it_was_given(values: list[Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    for number, value in enumerate(values, start=1):
        files.append_line(log, value)
        assert files.read_lines(log) == values[:number]


def test_a_log_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert files.read_lines(tmp_path / "log.jsonl") == []


def test_a_log_cut_anywhere_keeps_its_whole_lines_and_no_other(tmp_path: Path) -> None:
    log, entries = tmp_path / "log.jsonl", [{"epoch": 1}, {"note": "größer\u2028\r\n"}, 7, "{", {"epoch": 12}]
    for entry in entries:
        files.append_line(log, entry)
    whole = log.read_bytes()
    for cut in range(len(whole) + 1):
        log.write_bytes(whole[:cut])
        assert files.read_lines(log) == entries[: whole[:cut].count(b"\n")]


def test_a_log_ends_at_its_first_line_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_bytes(b'{"a": 1}\n\xff\xfe broken\n{"a": 2}\n')
    assert files.read_lines(tmp_path / "log.jsonl") == [{"a": 1}]


def test_a_line_that_the_disk_does_not_confirm_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"epoch": 1})
    with monkeypatch.context() as patch, refused(log):
        patch.setattr(os, "fsync", full)
        files.append_line(log, {"epoch": 2})
    assert files.read_lines(log) == [{"epoch": 1}]
    files.append_line(log, {"epoch": 3})
    assert log.read_bytes() == b'{"epoch": 1}\n{"epoch": 3}\n'


@pytest.mark.parametrize("room", [0, 1, 10, 39])
def test_a_line_of_which_a_part_fits_is_taken_back_whole(room: int, tmp_path: Path, no_file_beyond: Limit) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"epoch": 1})
    whole = log.read_bytes()
    with no_file_beyond(len(whole) + room), refused(log, os.strerror(errno.EFBIG)):
        files.append_line(log, {"note": "x" * 30})
    assert log.read_bytes() == whole
    files.append_line(log, {"epoch": 2})
    assert files.read_lines(log) == [{"epoch": 1}, {"epoch": 2}]


def test_a_line_that_is_no_json_is_not_appended(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    files.append_line(log, {"epoch": 1})
    for value in ({"loss": float("inf")}, {"what": object()}):
        with pytest.raises((ValueError, TypeError)):
            files.append_line(log, value)
    assert log.read_bytes() == b'{"epoch": 1}\n'


# ------------------------------------------------------------------------------------------------ read_json


@few
@given(value=JSON)
def test_what_is_written_as_json_is_read_back(value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("json") / "it.json"
    files.write_json(path, value)
    assert files.read_json(path, "thing") == value


BAD_JSON: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": lambda path: path.write_bytes(b'{"a": 1,\n "b'),
    "two values": lambda path: path.write_bytes(b"1\n2\n"),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "\xff"}'),
    "a folder": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_what_is_no_json_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    BAD_JSON[case](tmp_path / "it.json")
    with pytest.raises(Refused) as caught:
        files.read_json(tmp_path / "it.json", "record")
    assert str(caught.value).startswith(f"{tmp_path / 'it.json'} is no record: ")
    assert "\n" not in str(caught.value)


def test_a_missing_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused) as caught:
        files.read_json(tmp_path / "it.json", "record")
    assert str(caught.value) == f"no record at {tmp_path / 'it.json'}"


# ------------------------------------------------------------------------------------------------ canonical, digest


def test_canonical_json_is_one_text_for_one_value() -> None:
    assert files.canonical({"b": [1, 2.5, None], "ä": True, "a": {"y": "é\n", "x": ()}}) == (
        '{"a":{"x":[],"y":"é\\n"},"b":[1,2.5,null],"ä":true}'
    )


@few
@given(value=st.dictionaries(st.text(), JSON, min_size=2, max_size=4))
def test_a_digest_does_not_depend_on_the_order_of_keys(value: dict[str, Any]) -> None:
    turned = dict(reversed(value.items()))
    assert files.canonical(turned) == files.canonical(value)
    assert files.digest(turned) == files.digest(value)


def test_a_digest_is_the_sha256_of_the_canonical_text() -> None:
    assert files.digest({"ä": [1, 2]}) == hashlib.sha256('{"ä":[1,2]}'.encode()).hexdigest()
    assert files.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


@pytest.mark.parametrize(("a", "b"), [([1, 2], [2, 1]), (1, 1.5), ("1", 1), ({"a": None}, {}), (0.1, 0.1 + 2**-56)])
def test_different_values_have_different_digests(a: object, b: object) -> None:
    assert files.digest(a) != files.digest(b)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_json_does_not_know_have_no_canonical_text(value: float) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.canonical({"a": [value]})


# ------------------------------------------------------------------------------------------------ locked


def test_a_lock_is_held_by_one_process_and_let_go(tmp_path: Path) -> None:
    lock = tmp_path / ".run.lock"
    holds = f"from pathlib import Path; from fatbench.files import locked\nwith locked(Path({str(lock)!r}), 'here'): "
    with files.locked(lock, "here"):
        other = subprocess.run([sys.executable, "-c", holds + "pass"], capture_output=True, text=True, check=False)
        assert other.returncode != 0
        assert "Refused: another process is at work here: wait for it, or choose another --out" in other.stderr
    killed = subprocess.run([sys.executable, "-c", holds + "import os; os.kill(os.getpid(), 9)"], check=False)
    assert killed.returncode == -9
    with files.locked(lock, "here"):
        pass


def test_who_only_asks_whether_a_lock_is_held_stops_nobody(tmp_path: Path) -> None:
    lock = tmp_path / ".run.lock"
    asking = FileLock(lock, thread_local=False)
    asking.acquire()
    let_go = threading.Timer(0.1, asking.release)
    let_go.start()
    with files.locked(lock, "here"):
        assert not asking.is_locked
    let_go.join()


def test_a_lock_that_is_let_go_leaves_the_next_holders_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, other = tmp_path / ".run.lock", FileLock(tmp_path / ".run.lock")

    class TakenAtOnce(FileLock):
        def release(self, force: bool = False) -> None:
            super().release(force)
            if not other.is_locked:
                other.acquire(timeout=0)

    with monkeypatch.context() as patched:
        patched.setattr(files, "FileLock", TakenAtOnce)
        with files.locked(lock, "here"):
            pass
    with pytest.raises(Refused, match="another process"), files.locked(lock, "here"):
        pass
    other.release()


def test_a_lock_clears_what_killed_writers_left_and_nothing_else(tmp_path: Path) -> None:
    for name in (".it.json.4711.tmp", "mine.tmp", "it.json"):
        (tmp_path / name).write_text("half")
    with files.locked(tmp_path / ".it.json.lock", "here"):
        left = {path.name for path in tmp_path.iterdir()}
    assert left - {".it.json.lock"} == {"mine.tmp", "it.json"}
