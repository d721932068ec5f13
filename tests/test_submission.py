"""An outside record is looked through before it goes on a board, and a board's changes are told row by row."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from fatbench import data, evidence, leaderboard, publish, record
from fatbench.changes import diff
from fatbench.errors import Refused
from fatbench.record import Record
from fatbench.submission import check


@pytest.fixture
def board(root: Path) -> Path:
    """The published records."""
    return root / "leaderboard" / "records"


@pytest.fixture
def one(board: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a published record, changed: one(lambda said: ...), sealed again unless told otherwise."""

    def make(change: Callable[[dict[str, Any]], object] = lambda said: None, *, sealed: bool = True) -> Path:
        fat = sorted(board.glob("fat-digits-*.json"))
        source = next(path for path in fat if json.loads(path.read_text())["schema"] == 1)
        said = json.loads(source.read_text())
        change(said)
        if sealed:
            said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
        path = tmp_path / f"{said['id']}.json"
        path.write_text(json.dumps(said))
        shutil.copy(source.with_suffix(".parquet"), path.with_suffix(".parquet"))
        return path

    return make


def test_an_honest_record_is_ok_and_is_told_what_it_lacks(one: Callable[..., Path]) -> None:
    (finding,) = check([one()])
    assert not finding.refused
    assert finding.missing == ["what training took: examine the run's folder, which holds its metrics.jsonl"]
    assert finding.lines()[0].startswith("ok      ")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda said: said["result"]["correct"].update(fgsm=1), "1 of 360 right is not"),
        (lambda said: said["result"]["accuracies"].update(fgsm=float("nan")), "finite number"),
        (lambda said: said["result"].update(outcomes="0" * 64), "is not what its record was made from"),
        (lambda said: said["protocol"].pop("version"), "protocol.version: Field required"),
        (lambda said: said["protocol"]["attacks"]["pgd-20"].update(steps=10), "says nothing"),
    ],
)
def test_what_is_wrong_with_a_record_is_said(change: Any, why: str, one: Callable[..., Path]) -> None:
    try:
        path = one(change)
    except (ValueError, KeyError):  # no hash can be made of it
        path = one(change, sealed=False)
    (finding,) = check([path])
    if why == "says nothing":  # steps are in the attack's name, and no family's setting
        assert not finding.refused
        return
    assert why in finding.refused
    assert "\n" not in finding.refused


def test_a_broken_hash_and_missing_evidence_are_said(one: Callable[..., Path]) -> None:
    path = one(lambda said: said["result"].update(chunk=7), sealed=False)
    assert "its hash does not match" in check([path])[0].refused
    path = one()
    path.with_suffix(".parquet").unlink()
    assert "needs its per-example outcomes beside it" in check([path])[0].refused


def test_a_protocol_that_is_named_and_not_followed_is_said(one: Callable[..., Path]) -> None:
    def relabel(said: dict[str, Any]) -> None:
        said["protocol"] |= {"name": "trades-2019", "version": 1}

    assert "calls its protocol trades-2019 v1, whose fgsm has" in check([one(relabel)])[0].refused


def test_what_a_row_lacks_to_be_ranked_is_told(one: Callable[..., Path]) -> None:
    def lean(said: dict[str, Any]) -> None:
        said["protocol"]["name"] = "my-own"
        said["result"]["network"] |= {"settings": {}, "defense": None}
        said["result"]["data"] |= {"of": 1000, "rule": "first"}

    (finding,) = check([one(lean)])
    assert not finding.refused
    assert finding.missing == [
        "640 of 1000 test examples: examine without --n",
        "a protocol that others can follow: my-own is none of fatbench list protocols",
        "how it was trained: defense, settings and seed are unknown, and it is its own contestant",
    ]


def test_an_older_protocol_and_a_failure_are_noted(one: Callable[..., Path]) -> None:
    (finding,) = check([one(lambda said: said["result"].update(collapsed=True))])
    assert "it will stand as failed or unfinished, without a number" in finding.notes
    (finding,) = check([one(lambda said: said["protocol"].update(version=77))])
    assert any(note.startswith("its protocol is fatbench-linf v77, today's v") for note in finding.notes)


def test_copies_are_refused(one: Callable[..., Path], board: Path) -> None:
    published = leaderboard.gather(board)
    (finding,) = check([one()], published)
    assert finding.refused.endswith("is on the board, the same")
    other = one(lambda said: said.update(id="another-name"))
    (finding,) = check([other], published)
    assert finding.refused.endswith("is the same network under the same protocol, with the same outcomes")
    twice = check([one(), other])
    assert [bool(finding.refused) for finding in twice] == [False, True]


def test_adversarial_examples_beside_a_record_are_held_to_the_ball(one: Callable[..., Path]) -> None:
    path = one()
    said = json.loads(path.read_text())
    outcomes = pd.read_parquet(path.with_suffix(".parquet"))
    hurt = outcomes["clean_pred"] != outcomes["label"]
    for attack in said["protocol"]["attacks"]:
        hurt |= outcomes[f"{attack}.broken"]
    clean = data.load("digits").x_test
    broken = torch.tensor(hurt.tolist())[:, None, None, None]
    kept = evidence.path(path.parent, said["id"])

    def found(x_adv: torch.Tensor, of: str = said["result"]["outcomes"], index: Any = outcomes["index"]) -> Any:
        tensors = {"x_adv": x_adv.float().contiguous(), "index": torch.as_tensor(list(index))}
        save_file(tensors, kept, metadata={"fatbench": json.dumps({"outcomes": of})})
        (finding,) = check([path])
        return finding

    edge = (clean + 0.4).clamp(0, 1)
    assert found(edge).notes[0].startswith("its adversarial examples lie in the ball")
    assert not found(torch.where(broken, edge, torch.tensor(7.0))).refused  # who held has no example
    for wrong in ((clean + 0.41).clamp(0, 1), edge + 0.01, clean - 0.1, torch.full_like(clean, float("nan"))):
        assert "who counts as broken lies outside the ball of 0.4 or [0, 1]" in found(wrong).refused
    assert "holds the examples of another record" in found(edge, of="f" * 64).refused
    assert "not one example for each" in found(edge, index=outcomes["index"][::-1]).refused
    assert "not one example for each" in found(edge[:7], index=outcomes["index"][:7]).refused
    kept.write_text("nothing")
    assert "is no safetensors file" in check([path])[0].refused


def test_outcomes_of_examples_that_do_not_exist_are_refused(one: Callable[..., Path]) -> None:
    path = one()
    said = json.loads(path.read_text())
    outcomes = pd.read_parquet(path.with_suffix(".parquet"))
    outcomes["index"] += 1000
    outcomes.to_parquet(path.with_suffix(".parquet"), index=False)
    said["result"]["outcomes"] = record.outcomes_hash(outcomes)
    said["hash"] = record.digest({key: said[key] for key in ("schema", "id", "protocol", "result")})
    path.write_text(json.dumps(said))
    tensors = {"x_adv": torch.zeros(360, 1, 8, 8), "index": torch.tensor(outcomes["index"].tolist())}
    header = {"fatbench": json.dumps({"outcomes": said["result"]["outcomes"]})}
    save_file(tensors, evidence.path(path.parent, said["id"]), metadata=header)
    assert "tells of test examples that digits does not have" in check([path])[0].refused


def test_the_command_says_each_and_refuses_if_one_is_refused(
    one: Callable[..., Path], cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, board: Path
) -> None:
    done = cli("leaderboard", "check", one(), cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0].startswith("ok ")
    done = cli("leaderboard", "check", one(), "--against", board, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout.startswith("refused ")
    assert done.stderr == "fatbench: 1 of 1 records cannot go on a board\n"
    for words in (("check",), ("diff", "a"), ("one", "two")):
        done = cli("leaderboard", *words, cwd=tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


# ------------------------------------------------------------------------------------------------ diff


def test_the_same_board_has_no_changes(board: Path, root: Path, tmp_path: Path) -> None:
    records: list[Record] = leaderboard.gather(board)
    publish.publish(records, tmp_path / "again")
    assert diff(tmp_path / "again", board) == []  # a board.json against the records that it was made of
    beside = [line for line in diff(tmp_path / "again", root / "leaderboard") if not line.startswith("+ ")]
    assert beside == []
    assert [line for line in diff(root / "leaderboard", board) if "measured" not in line] == []


def test_rows_that_came_went_or_changed_are_told(board: Path, tmp_path: Path) -> None:
    publish.publish(leaderboard.gather(board), tmp_path / "old")
    told = json.loads((tmp_path / "old" / "board.json").read_text())
    fat = next(row for row in told["rows"] if row["defense"] == "fat" and row["eps"] == "0.3")
    fat |= {"worst": 99.0, "rank": 1, "masking": None}
    gone = told["rows"].pop()
    told["rows"].append({**gone, "defense": "new"})
    (tmp_path / "new.json").write_text(json.dumps(told))
    lines = diff(tmp_path / "old" / "board.json", tmp_path / "new.json")
    assert [line[0] for line in lines] == ["-", "~", "+"]
    assert gone["defense"] in lines[0]
    assert lines[1].startswith(
        "~ digits, linf, eps 0.3, fatbench-linf v2: fat (digits-cnn, trained at 0.3, 60 epochs, "
    )
    assert re.search(r"worst \d\d\.\d+ -> 99", lines[1])
    assert "masking suspected" in lines[1]
    assert ": new (" in lines[2]


@pytest.mark.parametrize("text", ["{}", '{"schema": 99, "rows": []}', "[]", "", '{"schema": 1, "rows": [1]}'])
def test_what_is_no_board_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "board.json").write_text(text)
    with pytest.raises(Refused, match=r"is no board\.json") as refused:
        diff(tmp_path, tmp_path)
    assert "\n" not in str(refused.value)
    with pytest.raises(Refused, match="no record in"):
        (tmp_path / "board.json").unlink()
        diff(tmp_path, tmp_path)
