"""An examination counts only what is verified, and its result is the same however often it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from fatbench import checkpoint, data, examination, examine, files, findings, record
from fatbench import evaluate as harness
from fatbench import ledger as ledgers
from fatbench.catalogue import Dataset
from fatbench.checkpoint import Subject
from fatbench.errors import Refused
from fatbench.evaluate import Examination, evaluate
from fatbench.evaluation import Attacked, Chunk, Evaluation, Staged, examiner, verified
from fatbench.models import DigitsCNN
from fatbench.protocol import Protocol
from fatbench.record import Record
from fatbench.registry import evaluations

FOREIGN = {"arch": "digits-cnn", "mean": None, "std": None}
QUICK = Protocol(
    name="quick", version=1, summary="cheap", source="these tests", attacks=("fgsm", "pgd-3", "pgd-10", "cw-inf"),
    families={"cw-inf": {"steps": 4}},
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ small worlds


@pytest.fixture(scope="module")
def dataset(npz: Callable[..., Path]) -> data.Data:
    """30 test images of three classes, 8x8; every seventh has a label that nobody would give it."""
    labels = np.arange(30) % 3
    labels[::7] = (labels[::7] + 1) % 3
    return data.load(str(npz(y_test=labels)))


def trained(dataset: data.Data) -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, dataset.classes))
    net = nn.Sequential(nn.Flatten(), *layers)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        sgd.zero_grad()
        nn.functional.cross_entropy(net(dataset.x_train), dataset.y_train).backward()
        sgd.step()
    sgd.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def _trained(dataset: data.Data) -> nn.Module:
    return trained(dataset)


@pytest.fixture
def net(_trained: nn.Module) -> nn.Module:
    """A network that is right on most of the images and gives way to some of the attacks."""
    return deepcopy(_trained)


def subject(net: nn.Module, **meta: Any) -> Subject:
    return Subject(net, {**FOREIGN, **meta}, checkpoint.fingerprint(net))


@pytest.fixture
def task(net: nn.Module, dataset: data.Data) -> Examination:
    """Three chunks, four attacks; some examples break, some do not."""
    return Examination(subject(net), dataset, QUICK, "0.18", n=20, chunk=8)


class Threshold(nn.Module):
    """Two classes: is the mean of an image above one half?"""

    def forward(self, x: Tensor) -> Tensor:
        mean = x.flatten(1).mean(dim=1)
        return torch.stack([0.5 - mean, mean - 0.5], dim=1)


def grey(values: list[float], y: list[int], classes: int = 2) -> data.Data:
    """A dataset of 2x2 images of one grey value each."""
    x = torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).contiguous()
    labels = torch.tensor(y)
    return data.Data(Dataset("grey", "one grey value an image"), x, labels, x, labels, classes)


Attack = Callable[[nn.Module, Chunk, float], Attacked]


def scripted(attack: Attack | dict[str, Attack]) -> Evaluation:
    """An examiner that does what a test says, in stages where it says several."""
    if isinstance(attack, dict):
        steps = {
            "stages": lambda self, classes: tuple(attack),
            "stage": lambda self, name, *given: attack[name](*given),
        }
        return type("Scripted", (Staged,), {"name": "scripted", **steps})()
    members = {"name": "scripted", "attack": lambda self, *given: attack(*given)}
    return type("Scripted", (Evaluation,), members)()


def up(by: float) -> Attack:
    return lambda model, chunk, eps: Attacked((chunk.x + by).clamp(0, 1), 0, 0)


@pytest.fixture
def asking(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Protocol]:
    """A protocol of scripted attacks: asking(flip=function)."""

    def make(**attacks: Attack | dict[str, Attack]) -> Protocol:
        monkeypatch.setattr(examination, "examiner", lambda name, settings: scripted(attacks[name]))
        return QUICK.only(list(attacks))

    return make


def outcomes(out: Path, done: Record) -> pd.DataFrame:
    return record.read_outcomes(out / f"{done.id}.parquet")


def refusal(task: Examination, out: Path) -> str:
    with pytest.raises(Refused) as refused:
        evaluate(task, out)
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ what is written


def test_a_record_says_what_was_examined_and_what_was_found(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path)
    assert record.read(tmp_path / f"{done.id}.json") == done
    assert done.id.startswith("digits-cnn-made-up-quick-")
    result = done.result
    assert (result.eps, result.eps_value, result.norm, result.seed, result.chunk) == ("0.18", 0.18, "linf", 0, 8)
    assert (result.data.name, result.data.n, result.data.of, result.data.rule) == ("made-up", 20, 30, "first")
    assert result.data.fingerprint == task.data.fingerprint("test")
    assert result.network.fingerprint == task.subject.fingerprint
    assert list(result.correct) == ["clean", *QUICK.attacks, "worst"]
    assert done.protocol.attacks["cw-inf"] == {
        "family": "cw-inf", "steps": 4, "step_size": "eps/4", "start": "uniform", "clamp_start": True, "restarts": 1,
        "loss": "cw-margin", "kappa": 50.0, "iterate": "last",
    }  # fmt: skip
    assert 0 < result.correct["worst"] < result.correct["clean"]  # or the tests below would see little
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == [
        f"{done.id}.json", f"{done.id}.parquet",
    ]  # fmt: skip


def test_the_outcomes_have_the_documented_columns_and_add_up(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path)
    table = outcomes(tmp_path, done)
    columns = [f"{attack}.{what}" for attack in QUICK.attacks for what in ("pred", "broken")]
    assert list(table.columns) == ["index", "label", "clean_pred", *columns]
    assert [table[c].dtype.kind for c in table.columns] == ["i", "i", "i", *["i", "b"] * len(QUICK.attacks)]
    assert table["index"].tolist() == list(range(20))
    assert table["label"].tolist() == task.data.y_test[:20].tolist()
    worst = table["clean_pred"] == table["label"]
    right = {"clean": int(worst.sum())}
    for attack in QUICK.attacks:
        assert (table[f"{attack}.broken"] == (table[f"{attack}.pred"] != table["label"])).all()
        right[attack] = int((~table[f"{attack}.broken"]).sum())
        worst &= ~table[f"{attack}.broken"]
    assert done.result.correct == {**right, "worst": int(worst.sum())}
    assert done.result.accuracies == {name: count / 20 for name, count in done.result.correct.items()}


def test_the_run_says_how_much_was_computed(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path)
    counted = {name: (of["forwards"], of["backwards"]) for name, of in done.run["attacks"].items()}
    # One forward more an example: the harness looks for itself. PGD-10 goes on from PGD-3.
    assert counted == {"fgsm": (40, 20), "pgd-3": (80, 60), "pgd-10": (160, 140), "cw-inf": (100, 80)}
    assert (done.run["device"].partition(" ")[0], done.run["resumed_steps"]) == ("cpu", 0)


def test_last_iterates_count_and_the_worst_case_is_each_examples_own(
    asking: Callable[..., Protocol], tmp_path: Path
) -> None:
    def moving(by: list[float]) -> Callable[[nn.Module, Chunk, float], Attacked]:
        return lambda model, chunk, eps: Attacked(chunk.x + torch.tensor(by)[:, None, None, None], 0, 0)

    protocol = asking(up=moving([0, 0.09, 0, 0, 0]), mend=moving([0, 0, -0.09, -0.09, 0]))
    # Right, right, wrong, right, wrong; `up` breaks the second; `mend` breaks the fourth and puts the third right.
    world = grey([0.2, 0.45, 0.55, 0.55, 0.8], [0, 0, 0, 1, 0])
    done = evaluate(Examination(subject(Threshold()), world, protocol, "0.1"), tmp_path)
    assert done.result.correct == {"clean": 3, "up": 2, "mend": 3, "worst": 1}
    table = outcomes(tmp_path, done)
    assert table["up.broken"].tolist() == [False, True, True, False, True]
    assert table["mend.broken"].tolist() == [False, False, False, True, True]


# ------------------------------------------------------------------------------------------------ killed and resumed


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it, and the examination's files stay as they are."""


def dying(number: int, how: str) -> Callable[[Path, Any], None]:
    """append_line that dies at its number-th entry: before, within or after it, or on a full disk."""
    entries = iter(range(1000))

    def append(path: Path, value: Any) -> None:
        if next(entries) != number:
            return files.append_line(path, value)
        if how == "full":
            raise Refused("cannot write: No space left on device")
        whole = (json.dumps(value) + "\n").encode()
        with path.open("ab") as log:
            log.write({"before": b"", "within": whole[: len(whole) // 2], "almost": whole[:-1], "after": whole}[how])
        raise Killed

    return append


def cut_short(task: Examination, out: Path, number: int, how: str = "before") -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Refused if how == "full" else Killed):
        patch.setattr(ledgers, "append_line", dying(number, how))
        evaluate(task, out)
    assert not list(out.glob("*.json"))
    assert len(list(out.glob("*.partial.jsonl"))) == 1


def left_behind(out: Path, done: Record) -> tuple[Any, str, bytes, list[str]]:
    """All that an examination leaves, but for its times."""
    names = sorted(path.name for path in out.iterdir() if path.suffix != ".lock")
    return done.result, done.hash, (out / f"{done.id}.parquet").read_bytes(), names


@pytest.mark.parametrize("how", ["before", "within", "almost", "after", "full"])
def test_killed_at_any_entry_and_resumed_gives_the_same_result(how: str, task: Examination, tmp_path: Path) -> None:
    task = replace(task, n=9, chunk=5, protocol=QUICK.only(["fgsm", "pgd-3", "pgd-10"]))
    whole = left_behind(tmp_path / "whole", evaluate(task, tmp_path / "whole"))
    for number in range(2 * 4):
        out = tmp_path / f"killed-{number}"
        cut_short(task, out, number, how)
        done = evaluate(task, out)
        assert left_behind(out, done) == whole, f"killed at entry {number}"
        assert done.run["resumed_steps"] == number + (how == "after")


def test_killed_again_and_again_gives_the_same_result(task: Examination, tmp_path: Path) -> None:
    whole = left_behind(tmp_path / "whole", evaluate(task, tmp_path / "whole"))
    for _ in range(7):
        cut_short(task, tmp_path / "killed", 2, "within")
    done = evaluate(task, tmp_path / "killed")
    assert left_behind(tmp_path / "killed", done) == whole
    assert done.run["resumed_steps"] == 14  # of 15: what was done before each kill is kept


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_killed_while_the_record_is_written_gives_the_same_result(when: str, task: Examination, tmp_path: Path) -> None:
    whole = left_behind(tmp_path / "whole", evaluate(task, tmp_path / "whole"))
    out = tmp_path / "killed"

    def die(*given: Any) -> None:
        if when == "after":
            record.write(*given)
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*((record, "write_json") if when == "between" else (harness, "write")), die)
        evaluate(task, out)
    done = evaluate(task, out)
    assert left_behind(out, done) == whole
    assert record.read(out / f"{done.id}.json") == done


def test_what_is_done_is_not_done_again(task: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_short(task, tmp_path, 12)
    asked = []

    def watched(self: Any, step: ledgers.Step, chunk: Chunk) -> Any:
        asked.append((int(chunk.indices[0]), step.attack))
        return attacked(self, step, chunk)

    attacked = examine._Bench.attacked
    monkeypatch.setattr(examine._Bench, "attacked", watched)
    evaluate(task, tmp_path)
    assert asked == [(16, "pgd-3"), (16, "pgd-10"), (16, "cw-inf")]


def test_a_line_cut_within_a_letter_is_left_out(asking: Callable[..., Protocol], tmp_path: Path) -> None:
    protocol = asking(odd=lambda model, chunk, eps: Attacked(chunk.x, 0, 0, ("größer als ε",)))
    task = Examination(subject(Threshold()), grey([0.2, 0.8], [0, 1]), protocol, "0.1")
    whole = evaluate(task, tmp_path / "whole")
    out = tmp_path / "killed"
    cut_short(task, out, 1, "before")
    ledger = next(out.glob("*.partial.jsonl"))
    files.append_line(ledger, {"chunk": 0, "attack": "odd", "warnings": ["größer als ε"]})
    ledger.write_bytes(ledger.read_bytes().partition("ε".encode())[0] + "ε".encode()[:1])
    assert evaluate(task, out).result == whole.result


@pytest.mark.parametrize("content", [b"", b'{"plan": "'])
def test_a_ledger_without_a_first_line_is_begun_anew(content: bytes, task: Examination, tmp_path: Path) -> None:
    whole = evaluate(task, tmp_path / "whole")
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / f"{whole.id}.partial.jsonl").write_bytes(content)
    assert evaluate(task, tmp_path / "again").result == whole.result


def test_another_examinations_ledger_is_refused_and_kept(task: Examination, tmp_path: Path) -> None:
    ident = evaluate(task, tmp_path / "whole").id
    cut_short(replace(task, seed=1), tmp_path / "other", 3)
    foreign = next((tmp_path / "other").glob("*.partial.jsonl")).read_bytes()
    ledger = tmp_path / "other" / f"{ident}.partial.jsonl"
    ledger.write_bytes(foreign)
    assert "belongs to another examination" in refusal(task, tmp_path / "other")
    assert ledger.read_bytes() == foreign


def test_a_finished_record_is_left_as_it_is(task: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = evaluate(task, tmp_path)
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    monkeypatch.setattr(harness, "examine", lambda *_: pytest.fail("examined again"))
    assert evaluate(task, tmp_path) == done
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()} == before


def test_a_users_network_is_another_one_when_its_file_says_something_else(task: Examination, tmp_path: Path) -> None:
    def built_by(code: str) -> Record:
        subject = replace(task.subject, meta={**task.subject.meta, "code": code})
        return evaluate(replace(task, subject=subject), tmp_path)

    first = built_by("a" * 64)
    assert built_by("a" * 64) == first  # found again
    assert first.result.network.code == "a" * 64
    assert len({first.id, built_by("b" * 64).id, evaluate(task, tmp_path).id}) == 3


def test_a_finished_record_of_another_examination_is_refused_and_kept(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path)
    other = replace(task, seed=1)
    theirs = evaluate(other, tmp_path / "other")
    text = theirs.model_dump(mode="json")
    said = {"id": done.id, **{key: text[key] for key in ("protocol", "result", "run")}}
    record.write(tmp_path, said, outcomes(tmp_path / "other", theirs))
    before = (tmp_path / f"{done.id}.json").read_bytes()
    assert "another examination" in refusal(task, tmp_path)
    assert (tmp_path / f"{done.id}.json").read_bytes() == before


def test_a_finished_record_that_was_tampered_with_is_refused(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path)
    (tmp_path / f"{done.id}.parquet").unlink()
    assert "is missing" in refusal(task, tmp_path)


def test_two_processes_do_not_share_an_examination(task: Examination, tmp_path: Path) -> None:
    ident = evaluate(task, tmp_path / "whole").id
    out = tmp_path / "out"
    out.mkdir()
    with files.locked(out / f".{ident}.lock", "here"):
        assert "another process is at work" in refusal(task, out)
        evaluate(replace(task, seed=1), out)
    assert evaluate(task, out).id == ident


def test_what_killed_writers_left_is_cleared(task: Examination, tmp_path: Path) -> None:
    ident = evaluate(task, tmp_path / "whole").id
    out = tmp_path / "out"
    out.mkdir()
    for name in (f".{ident}.json.99.tmp", f".{ident}.parquet.99.tmp", ".another.json.99.tmp"):
        (out / name).write_text("half")
    evaluate(task, out)
    assert [path.name for path in out.glob(".*.tmp")] == [".another.json.99.tmp"]


# ------------------------------------------------------------------------------------------------ the plan


def changed(task: Examination, net: nn.Module) -> dict[str, Examination]:
    other = deepcopy(net)
    with torch.no_grad():
        next(other.parameters()).add_(1e-3)
    pixel = task.data.x_test.clone()
    pixel[-1, 0, 0, 0] = 1 - pixel[-1, 0, 0, 0]
    return {
        "seed": replace(task, seed=1),
        "eps": replace(task, eps="0.19"),
        "eps as published": replace(task, eps="9/50"),
        "n": replace(task, n=19),
        "balanced": replace(task, balanced=True),
        "chunk": replace(task, chunk=7),
        "protocol's version": replace(task, protocol=QUICK.model_copy(update={"version": 2})),
        "protocol's name": replace(task, protocol=QUICK.model_copy(update={"name": "other"})),
        "attacks": replace(task, protocol=QUICK.only(["fgsm"])),
        "a family's setting": replace(task, protocol=QUICK.model_copy(update={"families": {"cw-inf": {"steps": 5}}})),
        "weights": replace(task, subject=subject(other)),
        "status": replace(task, subject=subject(net, status="unfinished")),
        "a test image": replace(task, data=replace(task.data, x_test=pixel)),
    }


def test_whatever_changes_the_result_changes_the_id(task: Examination, net: nn.Module) -> None:
    plans = {"as it was": files.digest(task.plan())}
    plans |= {what: files.digest(other.plan()) for what, other in changed(task, net).items()}
    assert len(set(plans.values())) == len(plans)


def test_the_device_and_the_training_images_do_not(task: Examination, tmp_path: Path) -> None:
    done = evaluate(task, tmp_path, device="cpu")
    more = replace(task.data, x_train=task.data.x_train[:9], y_train=task.data.y_train[:9])
    assert evaluate(replace(task, data=more), tmp_path, device=torch.device("cpu", 0)) == done
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_chunks_make_no_difference_to_what_is_found_here(task: Examination, tmp_path: Path) -> None:
    found = [outcomes(tmp_path, evaluate(replace(task, chunk=chunk), tmp_path)) for chunk in (3, 20, 250)]
    pd.testing.assert_frame_equal(found[0], found[1])
    pd.testing.assert_frame_equal(found[0], found[2])


@pytest.mark.parametrize("n", [0, -1, 31])
def test_more_examples_than_there_are_and_none_are_refused(n: int, task: Examination, tmp_path: Path) -> None:
    assert refusal(replace(task, n=n), tmp_path / "out") == f"--n {n}: made-up has 30 test examples"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("balanced", [False, True])
def test_all_examples_are_all_examples(balanced: bool, task: Examination, tmp_path: Path) -> None:
    for n in (None, 30):
        done = evaluate(replace(task, n=n, balanced=balanced, protocol=QUICK.only(["fgsm"])), tmp_path)
        assert (done.result.data.rule, done.result.data.n) == ("all", 30)
    assert outcomes(tmp_path, done)["index"].tolist() == list(range(30))


def test_a_balanced_draw_is_balanced_and_says_so(net: nn.Module, npz: Callable[..., Path], tmp_path: Path) -> None:
    sorted_labels = data.load(str(npz(y_test=np.sort(np.arange(30) % 3))))
    fgsm = QUICK.only(["fgsm"])
    for n in (3, 7, 12):
        done = evaluate(Examination(subject(net), sorted_labels, fgsm, "0.18", n=n, balanced=True), tmp_path)
        table = outcomes(tmp_path, done)
        assert done.result.data.rule == "balanced"
        assert table["index"].is_monotonic_increasing
        assert table["index"].is_unique
        assert table["label"].tolist() == sorted_labels.y_test[table["index"].tolist()].tolist()
        sizes = np.bincount(table["label"], minlength=3)
        assert sizes.sum() == n
        assert sizes.max() - sizes.min() <= 1
    assert table["index"].tolist() != list(range(12))


# ------------------------------------------------------------------------------------------------ networks


def broken(net: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        next(net.parameters())[0, 0, 0, 0] = value
    return net


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("three channels only\nplease")


class Deaf(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.detach().flatten(1)[:, :3]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return torch.zeros(len(x), 3), None


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (lambda: DigitsCNN(4, 1, 8), "answers with 4 classes, made-up has 3"),
        (lambda: DigitsCNN(2, 1, 8), "answers with 2 classes, made-up has 3"),
        (lambda: DigitsCNN(3, 3, 8), r"cannot take made-up's images \(1, 8, 8\)"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(65, 3)), r"cannot take made-up's images \(1, 8, 8\)"),
        (lambda: nn.Conv2d(1, 3, 3), r"answers with .* classes"),
        (lambda: broken(DigitsCNN(3, 1, 8), float("nan")), "not finite"),
        (lambda: broken(DigitsCNN(3, 1, 8), float("inf")), "not finite"),
        (Raises, "three channels only"),
        (Pair, "made-up"),
        (Deaf, "have no gradient"),
    ],
    ids=["more", "fewer", "colour", "size", "no logits", "NaN", "infinity", "raises", "a tuple", "no gradient"],
)
def test_a_network_that_does_not_fit_is_refused(
    made: Callable[[], nn.Module], why: str, task: Examination, tmp_path: Path
) -> None:
    with pytest.raises(Refused, match=why) as refused:
        evaluate(replace(task, subject=subject(made().eval())), tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_surrogate_that_does_not_fit_is_refused(task: Examination, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="answers with 4 classes"):
        evaluate(replace(task, checked=True, surrogate=subject(DigitsCNN(4, 1, 8).eval())), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_attack_that_nobody_knows_is_refused_before_anything_is_written(task: Examination, tmp_path: Path) -> None:
    assert "did you mean fgsm" in refusal(replace(task, protocol=QUICK.only(["fgsn"])), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["größe", "cifar (1)", "a|b", "_own", "x@y+z"])
def test_a_datasets_name_may_be_any_files_name(name: str, task: Examination, tmp_path: Path) -> None:
    own = replace(task, data=replace(task.data, info=Dataset(name, "mine")), protocol=QUICK.only(["fgsm"]))
    done = evaluate(own, tmp_path)
    assert record.read(tmp_path / f"{done.id}.json").result.data.name == name


def test_a_users_network_is_named_by_its_file(task: Examination, net: nn.Module, tmp_path: Path) -> None:
    own = replace(task, subject=subject(net, arch="nets/my net.py:make"), protocol=QUICK.only(["fgsm"]))
    assert evaluate(own, tmp_path).id.startswith("my-net-made-up-quick-")


def test_an_unfinished_network_is_examined_and_says_so(task: Examination, net: nn.Module, tmp_path: Path) -> None:
    settings = {"defense": "fat", "seed": 3, "eps": "0.1", "fields": {"tau": 0}}
    unfinished = subject(net, status="unfinished", epoch=2, epochs=9, selection="last", settings=settings)
    done = evaluate(replace(task, subject=unfinished), tmp_path)
    network = done.result.network
    assert done.id.startswith("fat-made-up-quick-")
    assert (network.status, network.epoch, network.epochs, network.selection) == ("unfinished", 2, 9, "last")
    assert (network.defense, network.seed, network.eps_train, network.fields) == ("fat", 3, "0.1", {"tau": 0})
    assert done.result.correct


def test_a_failed_network_gets_no_number(
    task: Examination, net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "examine", lambda *_: pytest.fail("examined"))
    failed = replace(task, subject=subject(net, status="failed: the loss was not finite at epoch 1, batch 2"))
    done = evaluate(failed, tmp_path)
    assert done.result.network.status == "failed: the loss was not finite at epoch 1, batch 2"
    assert (done.result.correct, done.result.accuracies, done.attacks) == ({}, {}, [])
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]
    assert evaluate(failed, tmp_path) == done


@pytest.mark.parametrize(
    ("predictions", "labels", "collapsed"),
    [
        ([0] * 60, [0, 1, 2] * 20, True),
        ([0] * 59 + [2], [0, 1, 2] * 20, True),  # right more often than one answer would be, but not to tell
        ([0] * 30 + [2] * 30, [0] * 30 + [1] * 30, True),  # two answers, no better than one
        ([0] * 20 + [1] * 40, [0] * 20 + [1] * 20 + [2] * 20, False),
        ([0, 1, 2] * 20, [0, 1, 2] * 20, False),
        ([0] * 59_410 + [1] * 590, [0] * 30_000 + [1] * 30_000, True),  # surely better, and yet one answer
        ([0] * 49, [0, 1] * 24 + [0], False),  # too few to tell
        ([0] * 60, [0] * 54 + [1] * 6, False),  # nearly all are of this class
    ],
)
def test_a_network_that_is_no_better_than_one_answer_has_collapsed(
    predictions: list[int], labels: list[int], collapsed: bool
) -> None:
    assert findings.collapsed(pd.DataFrame({"clean_pred": predictions, "label": labels})) is collapsed


def test_the_record_says_whether_the_network_has_collapsed(asking: Callable[..., Protocol], tmp_path: Path) -> None:
    nothing = asking(nothing=lambda model, chunk, eps: Attacked(chunk.x, 0, 0))
    for values, expected in (([0.2] * 60, True), ([0.2, 0.8] * 30, False)):
        task = Examination(subject(Threshold()), grey(values, [0, 1] * 30), nothing, "0.1")
        assert evaluate(task, tmp_path).result.collapsed is expected


def test_the_network_and_the_random_stream_are_left_as_they_were(
    task: Examination, net: nn.Module, tmp_path: Path
) -> None:
    first, second = list(net.parameters())[:2]
    first.grad = torch.ones_like(first)
    second.requires_grad_(False)
    net[3].train()  # a ReLU: a flag of its own, and nothing that would move
    state = {key: value.clone() for key, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()], [p.requires_grad for p in net.parameters()]
    streams = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    evaluate(replace(task, protocol=QUICK.only([*QUICK.attacks, "pgd-2"])), tmp_path)
    assert all(torch.equal(state[key], value) for key, value in net.state_dict().items())
    assert ([module.training for module in net.modules()], [p.requires_grad for p in net.parameters()]) == flags
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(net.parameters())[1:])
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()  # noqa: NPY002


def test_an_attack_takes_fewer_images_at_once_where_memory_is_short(
    task: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(replace(task, protocol=QUICK), tmp_path / "whole")
    family = evaluations["pgd"]
    attack, sizes = family.attack, []

    def short(self: Any, model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        sizes.append(len(chunk.x))
        if len(chunk.x) > most:
            raise torch.OutOfMemoryError
        found: Attacked = attack(self, model, chunk, eps)
        return found

    monkeypatch.setattr(family, "attack", short)
    most = 4
    assert evaluate(replace(task, protocol=QUICK), tmp_path / "short").result == whole.result
    assert max(sizes) > most >= min(sizes)
    most = 0
    assert "does not hold one image's gradient" in refusal(replace(task, protocol=QUICK), tmp_path / "none")


class Noisy(nn.Module):
    """A network whose answer is never quite the same."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x + 0.3 * torch.randn_like(x))
        return logits


def test_a_random_network_is_examined_to_the_same_outcome_again_and_after_a_kill(
    task: Examination, net: nn.Module, tmp_path: Path
) -> None:
    noisy = replace(task, n=12, chunk=5, subject=subject(Noisy(net).eval()), protocol=QUICK.only(["fgsm", "pgd-3"]))
    whole = evaluate(noisy, tmp_path / "whole")
    torch.rand(7)
    assert evaluate(noisy, tmp_path / "again").result == whole.result
    cut_short(noisy, tmp_path / "killed", 4)
    assert evaluate(noisy, tmp_path / "killed").result == whole.result
    other = evaluate(replace(noisy, seed=1), tmp_path / "other").result
    assert (other.outcomes, other.correct) != (whole.result.outcomes, whole.result.correct)


def test_float32_is_float32_while_examining_and_afterwards_as_before(
    asking: Callable[..., Protocol], tmp_path: Path
) -> None:
    switches = torch.backends.cuda.matmul, torch.backends.cudnn
    seen = []

    def look(model: nn.Module, chunk: Chunk, eps: float) -> Attacked:
        seen.append([switch.allow_tf32 for switch in switches])
        if len(seen) == 2:
            raise Killed
        return Attacked(chunk.x, 0, 0)

    task = Examination(subject(Threshold()), grey([0.2, 0.8], [0, 1]), asking(look=look), "0.1", chunk=1)
    before = [switch.allow_tf32 for switch in switches]
    try:
        switches[0].allow_tf32 = switches[1].allow_tf32 = True
        with pytest.raises(Killed):
            evaluate(task, tmp_path)
        assert [switch.allow_tf32 for switch in switches] == [True, True]
    finally:
        switches[0].allow_tf32, switches[1].allow_tf32 = before
    assert seen == [[False, False]] * 2


def test_a_float64_network_is_examined_in_float32(task: Examination, net: nn.Module, tmp_path: Path) -> None:
    single = evaluate(task, tmp_path / "single").result
    double = evaluate(replace(task, subject=subject(deepcopy(net).double())), tmp_path / "double").result
    assert double.correct == single.correct


# ------------------------------------------------------------------------------------------------ what counts


def at(*values: float) -> Tensor:
    return torch.tensor(values)[:, None, None, None].expand(-1, 1, 2, 2).clone()


def test_only_what_misleads_within_the_ball_and_the_image_is_broken() -> None:
    x = at(0.45, 0.45, 0.45, 0.45, 0.95, 0.05, 0.55)
    x_adv = at(0.54, 0.49, 0.56, 0.55, 1.01, -0.01, 0.45)
    x_adv[0, 0, 1, 1] = 0.35  # every other pixel is up
    y = torch.tensor([0, 0, 0, 0, 0, 1, 0])
    predictions, broken, invalid = verified(Threshold(), x, x_adv, y, 0.1)
    assert predictions.tolist() == [0, 0, 1, 1, 1, 0, 0]
    assert broken.tolist() == [False, False, False, True, False, False, False]
    assert invalid == 3


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_breaks_nothing(odd: float) -> None:
    x_adv = at(0.55, 0.55)
    x_adv[1, 0, 0, 0] = odd
    _, broken, invalid = verified(Threshold(), at(0.5, 0.5), x_adv, torch.tensor([0, 0]), 0.1)
    assert (broken.tolist(), invalid) == ([True, False], 1)


def test_one_pixel_outside_is_outside() -> None:
    x = at(0.5)
    for beyond, allowed in ((0.1, True), (0.1 + 2e-7, True), (0.1 + 4e-7, False), (0.11, False)):
        x_adv = at(0.52)
        x_adv[0, 0, 1, 0] = 0.5 + beyond
        _, broken, invalid = verified(Threshold(), x, x_adv, torch.tensor([0]), 0.1)
        assert (broken.item(), invalid) == (allowed, not allowed), beyond


def test_float64_examples_are_judged_as_the_float32_ones_that_they_become() -> None:
    x = at(0.4)
    x_adv = at(0.5).double() + 1e-12  # one half in float32, which the network calls 0
    predictions, broken, invalid = verified(Threshold(), x, x_adv, torch.tensor([0]), 0.1)
    assert (predictions.item(), broken.item(), invalid) == (0, False, 0)


def test_an_attack_that_breaks_the_rules_is_named_and_not_counted(
    asking: Callable[..., Protocol], tmp_path: Path
) -> None:
    protocol = asking(
        cheat=lambda model, chunk, eps: Attacked(1 - chunk.x, 0, 0, ("I cheat",)),
        fair=lambda model, chunk, eps: Attacked(chunk.x, 0, 0),
    )
    task = Examination(subject(Threshold()), grey([0.2, 0.45, 0.7, 0.8], [0, 0, 1, 1]), protocol, "0.1", chunk=4)
    done = evaluate(task, tmp_path)
    assert done.result.correct == {"clean": 4, "cheat": 3, "fair": 4, "worst": 3}
    assert done.result.warnings == (
        "cheat: I cheat",
        "cheat: 3 examples lay outside the ball or [0, 1] and were not counted",
    )
    assert outcomes(tmp_path, done)["cheat.broken"].tolist() == [False, True, False, False]


def test_stages_add_up_over_chunks(asking: Callable[..., Protocol], tmp_path: Path) -> None:
    protocol = asking(
        staged={"one": up(0.1), "two": up(0.3)},
        plain=lambda model, chunk, eps: Attacked(chunk.x, 0, 0),
    )
    world = grey([0.45, 0.3, 0.1, 0.7, 0.42], [0, 0, 0, 0, 0])
    done = evaluate(Examination(subject(Threshold()), world, protocol, "0.3", chunk=2), tmp_path)
    assert done.result.stages == {"staged": {"one": 2, "two": 1}}
    assert done.result.after == {"staged": {"one": 2, "two": 1}}
    assert done.result.correct == {"clean": 4, "staged": 1, "plain": 4, "worst": 1}
    table = outcomes(tmp_path, done)
    assert table["staged.stage"].tolist() == [1, 2, -1, 0, 1]
    assert table["staged.pred"].tolist() == [1, 1, 0, 1, 1]
    assert table["staged.broken"].tolist() == [True, True, False, True, True]
    assert done.run["attacks"]["staged"]["stages"]["two"]["forwards"] == 2  # the harness's own, of those still standing


@pytest.mark.parametrize(("n", "square", "doubted"), [(99, 1, False), (99, 2, True), (1500, 3, False), (1499, 3, True)])
def test_breaking_what_gradients_left_is_doubted(
    n: int, square: int, doubted: bool, asking: Callable[..., Protocol], tmp_path: Path
) -> None:
    protocol = asking(aa={"apgd-ce": up(0.01), "square": up(0.1)})
    world = grey([0.495] * 9 + [0.45] * square + [0.2] * (n - 9 - square), [0] * n)
    done = evaluate(Examination(subject(Threshold()), world, protocol, "0.1", chunk=5000), tmp_path)
    why = f"aa: Square broke {square} of {n} that white-box attacks left: gradients may be masked"
    assert done.result.warnings == ((why,) if doubted else ())


def test_the_same_warning_from_many_chunks_is_said_once(asking: Callable[..., Protocol], tmp_path: Path) -> None:
    protocol = asking(loud=lambda model, chunk, eps: Attacked(chunk.x, 0, 0, ("I am loud",)))
    done = evaluate(
        Examination(subject(Threshold()), grey([0.2] * 4, [0, 1, 0, 1]), protocol, "0.1", chunk=1), tmp_path
    )
    assert done.result.warnings == ("loud: I am loud",)


# ------------------------------------------------------------------------------------------------ PGD, FGSM, C&W


def whole(dataset: data.Data, rows: slice = slice(None), seed: int = 0) -> Chunk:
    indices = np.arange(len(dataset.y_test))[rows]
    return Chunk(dataset.x_test[indices], dataset.y_test[indices], indices, dataset.classes, seed)


def starts(net: nn.Module, chunk: Chunk, eps: float = 0.1, attack: str = "pgd-1", **settings: Any) -> Tensor:
    """Where an attack begins: with a step of no length it stays there."""
    one = examiner(attack, {"step_size": "0", **settings})
    return one.attack(net.requires_grad_(False), chunk, eps).x_adv


@pytest.mark.parametrize("start", ["uniform", "gaussian"])
def test_an_example_has_the_same_start_wherever_it_stands(start: str, net: nn.Module, dataset: data.Data) -> None:
    everyone = starts(net, whole(dataset), start=start)
    assert not torch.equal(everyone, dataset.x_test)
    for rows in (slice(0, 1), slice(7, 9), slice(3, 30, 4)):
        assert torch.equal(starts(net, whole(dataset, rows), start=start), everyone[rows])
    assert torch.equal(starts(net, whole(dataset), attack="cw-inf", steps=1, start=start), everyone)
    assert torch.equal(starts(net, whole(dataset), attack="pgd-5", start=start), everyone)
    assert not torch.equal(starts(net, whole(dataset, seed=1), start=start), everyone)


def test_examples_and_restarts_and_kinds_have_starts_of_their_own(net: nn.Module, dataset: data.Data) -> None:
    chunk = whole(dataset)
    noise = [(starts(net, chunk, start=kind) - chunk.x).round(decimals=5) for kind in ("uniform", "gaussian")]
    assert len(torch.unique(noise[0], dim=0)) == len(torch.unique(noise[1], dim=0)) == 30
    one = evaluations["pgd"](steps=1, step_size="0")
    runs = [one._run(net.requires_grad_(False), whole(dataset), 0.1, restart).x_adv for restart in range(3)]
    assert torch.equal(runs[0], starts(net, chunk))
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert not (runs[a] == runs[b]).flatten(1).all(dim=1).any()


def test_starts_lie_in_the_ball_and_the_image(net: nn.Module, dataset: data.Data) -> None:
    begun = starts(net, whole(dataset), 0.3)
    assert (begun - dataset.x_test).abs().max() <= 0.3 + 1e-6
    assert begun.min() == 0.0
    assert begun.max() <= 1.0
    assert torch.equal(starts(net, whole(dataset), 0.3, start="natural"), dataset.x_test)
    assert starts(net, whole(dataset), 0.3, clamp_start=False, steps=1).min() >= 0.0  # the step's own clamp


def test_whoever_examines_them_the_same_examples_get_the_same_attack(
    task: Examination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor]] = {}

    def watched(model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, eps: float) -> Any:
        for image, moved in zip(x, x_adv, strict=True):
            where = int((task.data.x_test == image).flatten(1).all(dim=1).nonzero())
            seen.setdefault(where, []).append(moved - image)
        return verified(model, x, x_adv, y, eps)

    monkeypatch.setattr(examine, "verified", watched)
    still = QUICK.only(["pgd-1"]).model_copy(update={"families": {"pgd": {"step_size": "0"}}})
    for options in ({"n": 20, "chunk": 8}, {"n": 9, "chunk": 2}, {"n": 11, "balanced": True}):
        evaluate(replace(task, protocol=still, **{"balanced": False, **options}), tmp_path)
    for moves in seen.values():
        assert all(torch.equal(move, moves[1]) for move in moves[1::2])
    assert max(len(moves) for moves in seen.values()) == 6


def test_a_longer_pgd_goes_on_from_a_shorter_one_with_the_same_numbers(task: Examination, tmp_path: Path) -> None:
    def found(*attacks: str) -> pd.DataFrame:
        done = evaluate(replace(task, protocol=QUICK.only(attacks)), tmp_path)
        return outcomes(tmp_path, done)

    alone = {attack: found(attack) for attack in ("pgd-3", "pgd-10")}
    for together in (found("pgd-3", "pgd-10"), found("pgd-10", "pgd-3"), found("pgd-3", "fgsm", "cw-inf", "pgd-10")):
        for attack, table in alone.items():
            for column in (f"{attack}.pred", f"{attack}.broken"):
                assert together[column].tolist() == table[column].tolist()


def test_a_path_is_shared_bit_for_bit_and_only_by_its_own_kind(net: nn.Module, dataset: data.Data) -> None:
    net.requires_grad_(False)

    def made(chunk: Chunk, attack: str, **settings: Any) -> tuple[Tensor, int]:
        attacked = examiner(attack, settings).attack(net, chunk, 0.1)
        return attacked.x_adv, attacked.forwards

    shared = whole(dataset)
    for attack, settings, forwards in (
        ("pgd-3", {}, 90), ("pgd-10", {}, 210), ("pgd-10", {"start": "natural"}, 300), ("pgd-10", {}, 0),
        ("pgd-11", {"step_size": "eps/8"}, 330), ("cw-inf", {"steps": 12}, 360), ("cw-inf", {"steps": 13}, 30),
        ("cw-inf", {"steps": 13, "kappa": 0}, 390), ("pgd-4", {}, 120), ("pgd-12", {"restarts": 2}, 630),
        ("pgd-13", {"clamp_start": False}, 390),
    ):  # fmt: skip
        x_adv, spent = made(shared, attack, **settings)
        assert torch.equal(x_adv, made(whole(dataset), attack, **settings)[0]), (attack, settings)
        assert spent == forwards, (attack, settings)


def test_restarts_break_what_any_one_of_them_breaks(net: nn.Module, dataset: data.Data) -> None:
    net.requires_grad_(False)
    chunk, eps = whole(dataset), 0.22
    one = evaluations["pgd"](steps=1, step_size="eps")
    runs = [one._run(net, chunk, eps, restart).x_adv for restart in range(6)]
    alone = torch.stack([verified(net, chunk.x, run, chunk.y, eps)[1] for run in runs])
    assert len(torch.unique(alone, dim=0)) > 1  # they differ, or this shows nothing
    for restarts in (1, 2, 6):
        attacked = replace(one, restarts=restarts).attack(net, whole(dataset), eps)
        assert torch.equal(verified(net, chunk.x, attacked.x_adv, chunk.y, eps)[1], alone[:restarts].any(dim=0))
        assert (attacked.forwards, attacked.backwards) == (30 * (2 * restarts - 1), 30 * restarts)


def test_fgsm_is_one_signed_step_from_the_clean_image(net: nn.Module, dataset: data.Data) -> None:
    x = dataset.x_test.clone().requires_grad_()
    nn.functional.cross_entropy(net(x), dataset.y_test, reduction="sum").backward()
    by_hand = (dataset.x_test + 0.1 * x.grad.sign()).clamp(0, 1)
    attacked = examiner("fgsm", {}).attack(net.requires_grad_(False), whole(dataset), 0.1)
    assert torch.allclose(attacked.x_adv, by_hand, atol=1e-6)
    assert (attacked.forwards, attacked.backwards) == (30, 30)


def test_cw_climbs_the_margin_and_kappa_holds_it_back(net: nn.Module, dataset: data.Data) -> None:
    net.requires_grad_(False)
    chunk = whole(dataset)
    cw = examiner("cw-inf", {"steps": 4}).attack(net, chunk, 0.1).x_adv
    assert not torch.equal(cw, examiner("pgd-4", {}).attack(net, chunk, 0.1).x_adv)
    # With kappa 0 an example that is misclassified has no gradient left and stays where it is.
    start = starts(net, whole(dataset), 0.1)
    wrong = net(start).argmax(dim=1) != chunk.y
    assert wrong.any()
    assert not wrong.all()
    still = (examiner("cw-inf-4", {"kappa": 0}).attack(net, whole(dataset), 0.1).x_adv == start).flatten(1).all(dim=1)
    assert torch.equal(still, wrong)


# ------------------------------------------------------------------------------------------------ places


def test_nothing_is_examined_in_a_place_that_cannot_be_written(task: Examination, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    assert "cannot write" in refusal(task, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
