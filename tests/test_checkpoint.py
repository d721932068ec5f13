"""Checkpoints keep weights and metadata to the bit, foreign weights load strictly, and nothing of theirs is run."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import pickle
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fatbench import checkpoint, models
from fatbench.errors import Refused

META: dict[str, Any] = {"arch": "digits-cnn", "classes": 10, "channels": 1, "size": 8, "mean": None, "std": None}
# The fingerprint of Linear(2, 1) with weights 1, 2 and bias 3.
PINNED = "4297e6beae3ec2a06621cdd1bbef61b41b1479a53926f2be87e4462e459fa594"
State = dict[str, Tensor]

Limit = Callable[[int], AbstractContextManager[None]]


def network(arch: str = "digits-cnn", channels: int = 1, size: int = 8) -> nn.Module:
    """A network whose BatchNorm buffers, too, are its own."""
    net = models.build(arch, 10, channels, size)
    for key, value in net.state_dict().items():
        if "running" in key:
            value.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture
def net() -> nn.Module:
    return network()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.safetensors"


def refusal(source: Path, **options: Any) -> str:
    """What load says, in one line, on refusing it."""
    with pytest.raises(Refused) as caught:
        checkpoint.load(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(a: State, b: State) -> bool:
    return list(a) == list(b) and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


# ------------------------------------------------------------------------------------------------ our own


def test_weights_and_metadata_come_back_as_they_were(net: nn.Module, path: Path) -> None:
    meta = {**META, "settings": {"lr": 0.1, "eps": "8/255"}, "epoch": 3, "epochs": 5, "status": "done"}
    checkpoint.save(path, net, meta)
    back = checkpoint.load(path)
    assert equal(back.model.state_dict(), net.state_dict())
    assert back.meta == {"schema": checkpoint.SCHEMA, **meta}
    assert back.fingerprint == checkpoint.fingerprint(net)
    assert not any(module.training for module in back.model.modules())


def test_a_normalised_network_comes_back_with_its_normalisation(path: Path) -> None:
    net = models.Normalised(network(channels=3), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()
    checkpoint.save(path, net, {**META, "channels": 3, "mean": net.mean.flatten().tolist(), "std": [0.2, 0.3, 0.4]})
    back = checkpoint.load(path)
    x = torch.rand(2, 3, 8, 8)
    assert isinstance(back.model, models.Normalised)
    assert torch.equal(back.model(x), net(x))
    assert back.fingerprint == checkpoint.fingerprint(net)


def test_a_checkpoint_replaces_the_one_before_and_leaves_nothing_else(net: nn.Module, path: Path) -> None:
    checkpoint.save(path, network(), META)
    checkpoint.save(path, net, META)
    assert checkpoint.load(path).fingerprint == checkpoint.fingerprint(net)
    assert list(path.parent.iterdir()) == [path]


def test_on_a_full_disk_the_checkpoint_before_stays(net: nn.Module, path: Path, no_file_beyond: Limit) -> None:
    checkpoint.save(path, net, META)
    before = path.read_bytes()
    with no_file_beyond(20_000), pytest.raises(Refused, match="cannot write") as caught:
        checkpoint.save(path, network(), META)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_relabelling_changes_what_is_said_and_no_weight(net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, {**META, "status": "unfinished", "epoch": 4})
    checkpoint.relabel(path, status="done")
    back = checkpoint.load(path)
    assert equal(back.model.state_dict(), net.state_dict())
    assert back.meta == {"schema": checkpoint.SCHEMA, **META, "status": "done", "epoch": 4}


def test_our_checkpoint_is_a_safetensors_that_others_can_read(net: nn.Module, path: Path) -> None:
    from safetensors.torch import load_file

    checkpoint.save(path, net, META)
    state = load_file(path)
    assert equal(dict(sorted(state.items())), dict(sorted(net.state_dict().items())))


# ------------------------------------------------------------------------------------------------ fingerprints

FORMS: dict[str, Callable[[nn.Module, Path], None]] = {
    "ours.safetensors": lambda net, path: checkpoint.save(path, net, META),
    "plain.safetensors": lambda net, path: save_file(net.state_dict(), path),
    "plain.pt": lambda net, path: torch.save(net.state_dict(), path),
    "legacy.pth": lambda net, path: torch.save(net.state_dict(), path, _use_new_zipfile_serialization=False),
    "wrapped.pt": lambda net, path: torch.save({"state_dict": net.state_dict(), "epoch": 3}, path),
    "model.pt": lambda net, path: torch.save({"model": net.state_dict(), "args": {"lr": 0.1}}, path),
    "twice.pt": lambda net, path: torch.save({"model": {"net": net.state_dict()}}, path),
    "parallel.pt": lambda net, path: torch.save({f"module.{k}": v for k, v in net.state_dict().items()}, path),
    "both.pt": lambda net, path: torch.save(
        {"state_dict": {f"module.model.{k}": v for k, v in net.state_dict().items()}}, path
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_weights_have_one_fingerprint_in_whatever_form_they_come(
    form: str, net: nn.Module, tmp_path: Path
) -> None:
    FORMS[form](net, tmp_path / form)
    subject = checkpoint.load(tmp_path / form, size=8)
    assert subject.fingerprint == checkpoint.fingerprint(net)
    assert subject.meta["arch"] == "digits-cnn"
    assert torch.equal(subject.model(torch.ones(1, 1, 8, 8)), net(torch.ones(1, 1, 8, 8)))


def test_a_fingerprint_is_the_same_in_every_version() -> None:
    net = nn.Linear(2, 1)
    net.load_state_dict({"weight": torch.tensor([[1.0, 2.0]]), "bias": torch.tensor([3.0])})
    assert checkpoint.fingerprint(net) == PINNED


def test_a_fingerprint_changes_with_every_single_tensor(net: nn.Module) -> None:
    prints = {checkpoint.fingerprint(net)}
    for value in net.state_dict().values():
        value.view(-1)[-1] += 1
        prints.add(checkpoint.fingerprint(net))
    assert len(prints) == 1 + len(net.state_dict())


def test_a_fingerprint_changes_with_the_last_bit_and_the_type_of_a_weight() -> None:
    net = nn.Linear(2, 2)
    first = checkpoint.fingerprint(net)
    assert checkpoint.fingerprint(net.double()) != first == checkpoint.fingerprint(net.float())
    with torch.no_grad():
        net.weight[0, 0] = torch.nextafter(net.weight[0, 0], torch.tensor(math.inf))
    assert checkpoint.fingerprint(net) != first


def test_a_fingerprint_changes_with_the_normalisation(net: nn.Module) -> None:
    wrapped = [models.Normalised(net, mean, std) for mean, std in (([0.5], [0.2]), ([0.4], [0.2]), ([0.5], [0.3]))]
    assert len({checkpoint.fingerprint(model) for model in [net, *wrapped]}) == 4


# ------------------------------------------------------------------------------------------------ files of another kind


def torch_bytes(value: object, **options: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


HTML = b"\n<!DOCTYPE html>\n<html><body>Sign in to download</body></html>\n"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
NOISE = np.random.default_rng(0).bytes(4000)
BAD_FILES: dict[str, tuple[Callable[[State], bytes], str]] = {
    "empty": (lambda state: b"", "is empty: copy or download it again"),
    "random bytes": (lambda state: NOISE, "{path}"),
    "web page": (lambda state: HTML, "is a web page, not weights"),
    "web page with a comment": (lambda state: b"\xef\xbb\xbf<!-- saved -->" + HTML, "is a web page, not weights"),
    "Git LFS pointer": (lambda state: LFS, "is a Git LFS pointer, not weights: run git lfs pull"),
}


@pytest.mark.parametrize("name", ["net.pt", "net.pth", "net.safetensors"])
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_holds_no_weights_is_refused_in_one_line(
    case: str, name: str, net: nn.Module, tmp_path: Path
) -> None:
    content, says = BAD_FILES[case]
    (tmp_path / name).write_bytes(content(net.state_dict()))
    assert says.format(path=tmp_path / name) in refusal(tmp_path / name)


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "net.pt") == f"no checkpoint at {tmp_path / 'net.pt'}"


@pytest.mark.parametrize("left", [9, 100, 2000, 30_000])
def test_a_truncated_safetensors_is_refused(left: int, net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, META)
    path.write_bytes(path.read_bytes()[:left])
    assert f"{path} is truncated or no safetensors file" in refusal(path)


@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_pt_is_refused(share: float, zipped: bool, net: nn.Module, tmp_path: Path) -> None:
    whole = torch_bytes(net.state_dict(), _use_new_zipfile_serialization=zipped)
    (tmp_path / "net.pt").write_bytes(whole[: round(share * len(whole))])
    assert str(tmp_path / "net.pt") in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pt_with_a_flipped_byte_is_refused_or_read_never_worse(zipped: bool, net: nn.Module, tmp_path: Path) -> None:
    whole, rng = torch_bytes(net.state_dict(), _use_new_zipfile_serialization=zipped), np.random.default_rng(0)
    for place in rng.integers(0, 3000, size=100):
        spoilt = bytearray(whole)
        spoilt[place] ^= int(rng.integers(1, 256))
        (tmp_path / "net.pt").write_bytes(spoilt)
        with contextlib.suppress(Refused):
            checkpoint.load(tmp_path / "net.pt", arch="digits-cnn")


class Trap:
    """Unpickled as code, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


TRAPS: dict[str, Callable[[Trap, State], bytes]] = {
    "bare pickle": lambda trap, state: pickle.dumps(trap),
    "torch.save": lambda trap, state: torch_bytes(trap),
    "legacy torch.save": lambda trap, state: torch_bytes(trap, _use_new_zipfile_serialization=False),
    "beside a state_dict": lambda trap, state: torch_bytes({"state_dict": state, "args": trap}),
    "inside a state_dict": lambda trap, state: torch_bytes({**state, "extra": trap}),
}


@pytest.mark.parametrize("name", ["net.pt", "net.pkl", "net"])
@pytest.mark.parametrize("case", TRAPS)
def test_code_in_a_pickle_is_never_run(case: str, name: str, net: nn.Module, tmp_path: Path) -> None:
    mark = tmp_path / "sprung"
    content = TRAPS[case](Trap(mark), net.state_dict())
    (tmp_path / name).write_bytes(content)
    assert "pickled code" in refusal(tmp_path / name, arch="digits-cnn")
    assert not mark.exists()
    # The trap is a live one.
    pickle.loads(content) if case == "bare pickle" else torch.load(io.BytesIO(content), weights_only=False)
    assert mark.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_whole_pickled_module_is_refused(zipped: bool, net: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "net.pt").write_bytes(torch_bytes(net, _use_new_zipfile_serialization=zipped))
    assert "pickled code or is no checkpoint, and is not opened: save model.state_dict()" in refusal(
        tmp_path / "net.pt"
    )


def test_a_state_dict_beside_objects_of_classes_is_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save({"state_dict": net.state_dict(), "where": Path("here")}, tmp_path / "net.pt")
    assert "save model.state_dict()" in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("module", "zipped"),  # a zip's checksums do not let its text be changed
    [(b"numpy._core.multiarray", True), (b"numpy._core.multiarray", False), (b"numpy.core.multiarray", False)],
    ids=["zip", "legacy", "legacy of numpy 1"],
)
def test_arguments_and_figures_that_numpy_counted_may_lie_beside_the_weights(
    module: bytes, zipped: bool, net: nn.Module, tmp_path: Path
) -> None:
    figures = {"acc": np.float64(0.5), "bp": np.float32(3), "n": np.int64(2), "done": np.bool_(True)}
    said = {"state_dict": net.state_dict(), "args": argparse.Namespace(lr=0.1), **figures}
    whole = torch_bytes(said, _use_new_zipfile_serialization=zipped)
    (tmp_path / "net.pt").write_bytes(whole.replace(b"numpy._core.multiarray", module))
    assert checkpoint.load(tmp_path / "net.pt", size=8).fingerprint == checkpoint.fingerprint(net)


@pytest.mark.parametrize(
    "value",
    [[1, 2], torch.zeros(3), 7, None, "text", {}, {"epoch": 3}, {"state_dict": {}}, {"state_dict": [torch.zeros(2)]}],
    ids=str,
)
def test_what_is_no_state_dict_is_refused(value: object, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "net.pt")
    assert "holds no state_dict: save model.state_dict() and give that" in refusal(tmp_path / "net.pt")


# ------------------------------------------------------------------------------------------------ metadata


@pytest.mark.parametrize("schema", [0, 2, 99, "1"])
def test_a_schema_that_is_not_ours_is_refused(schema: object, net: nn.Module, path: Path) -> None:
    save_file(net.state_dict(), path, metadata={"fatbench": json.dumps({**META, "schema": schema})})
    assert f"has checkpoint schema {schema}, this fatbench reads {checkpoint.SCHEMA}" in refusal(path)


@pytest.mark.parametrize("header", ["", "{", "[]", "3", "null", "{}", '{"schema": 1}', '{"schema": 1,\n"arch": }'])
def test_broken_metadata_is_refused(header: str, net: nn.Module, path: Path) -> None:
    save_file(net.state_dict(), path, metadata={"fatbench": header})
    assert f"{path} has broken fatbench metadata" in refusal(path)


@pytest.mark.parametrize("missing", META)
def test_metadata_without_what_builds_the_network_is_refused(missing: str, net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, {key: value for key, value in META.items() if key != missing})
    assert f"{path} has broken fatbench metadata: KeyError '{missing}'" in refusal(path)


@pytest.mark.parametrize(
    "wrong",
    [{"arch": 5}, {"classes": "ten"}, {"channels": -1}, {"mean": 3, "std": 3}, {"arch": "small-cnn", "size": None}],
    ids=str,
)
def test_metadata_of_the_wrong_types_is_refused(wrong: dict[str, Any], net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, {**META, **wrong})
    assert str(path) in refusal(path)


def test_an_unknown_network_in_the_metadata_is_refused_with_the_closest(net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, {**META, "arch": "digit-cnn"})
    assert "unknown model 'digit-cnn': did you mean digits-cnn" in refusal(path)


def test_a_long_header_is_not_mistaken_for_a_web_page(net: nn.Module, path: Path) -> None:
    # A safetensors file begins with the length of its header, and the length 0x3c20 reads " <".
    note, length = "", 0
    while length < 0x3C20:
        checkpoint.save(path, net, {**META, "note": note})
        length = int.from_bytes(path.read_bytes()[:8], "little")
        note += "x" * max(1, 0x3C20 - length - 8)
    assert length == 0x3C20
    assert checkpoint.load(path).fingerprint == checkpoint.fingerprint(net)


# ------------------------------------------------------------------------------------------------ misfits


def changed(state: State, case: str) -> State:
    state = dict(state)
    if case == "missing":
        del state["15.bias"]
    elif case == "extra":
        state["16.weight"] = torch.zeros(2, 2, 2)
    else:
        state["1.weight"] = torch.zeros(9)
    return state


MISFITS = {
    "missing": "lacks 15.bias",
    "extra": "has 16.weight",
    "shape": "1.weight is (9,), not (16,)",
}


@pytest.mark.parametrize("form", ["ours", "plain.safetensors", "plain.pt"])
@pytest.mark.parametrize("case", MISFITS)
def test_weights_must_fit_every_key_and_shape(case: str, form: str, net: nn.Module, tmp_path: Path) -> None:
    state, path = changed(net.state_dict(), case), tmp_path / (form if "." in form else "ours.safetensors")
    if form == "plain.pt":
        torch.save(state, path)
    else:
        meta = json.dumps({"schema": checkpoint.SCHEMA, **META})
        save_file(state, path, metadata={"fatbench": meta} if form == "ours" else None)
    said = refusal(path, arch="digits-cnn")
    assert f"{path} does not fit digits-cnn: it {MISFITS[case]}" in said
    assert "check --arch" in said


def test_weights_of_a_misfit_never_load_in_part(net: nn.Module, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = network()
    monkeypatch.setattr(models, "build", lambda *arguments: other)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    torch.save(changed(net.state_dict(), "missing"), path.with_suffix(".pt"))
    refusal(path.with_suffix(".pt"), arch="digits-cnn")
    assert equal(other.state_dict(), before)


def test_foreign_weights_under_another_arch_are_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert "does not fit resnet-18: it lacks" in refusal(tmp_path / "net.pt", arch="resnet-18")
    assert "unknown model 'resnet18': did you mean resnet-18" in refusal(tmp_path / "net.pt", arch="resnet18")


def test_our_own_weights_under_another_arch_are_refused(net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, META)
    assert checkpoint.load(path, arch="digits_cnn").meta["arch"] == "digits-cnn"
    assert "resnet-18" in refusal(path, arch="resnet-18")


def test_a_normalisation_is_not_silently_left_off_our_own_weights(net: nn.Module, path: Path) -> None:
    checkpoint.save(path, net, META)
    assert str(path) in refusal(path, mean=(0.5,), std=(0.2,))


def test_a_normalisation_of_other_channels_than_the_network_has_is_refused(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    assert "mean" in refusal(tmp_path / "net.pt", size=8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))


def test_foreign_weights_get_the_normalisation_that_is_asked_for(net: nn.Module, tmp_path: Path) -> None:
    torch.save(net.state_dict(), tmp_path / "net.pt")
    subject = checkpoint.load(tmp_path / "net.pt", size=8, mean=(0.5,), std=(0.2,))
    x = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(subject.model(x), net((x - 0.5) / 0.2))
    assert (subject.meta["mean"], subject.meta["std"]) == ((0.5,), (0.2,))


# ------------------------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize("form", ["plain.pt", "plain.safetensors"])
@pytest.mark.parametrize("arch", ["digits-cnn", "small-cnn", "resnet-18", "wrn-40-4"])
def test_a_network_is_recognised_by_its_weights(arch: str, form: str, tmp_path: Path) -> None:
    net = models.build(arch)
    FORMS[form](net, tmp_path / form)
    subject = checkpoint.load(tmp_path / form)
    assert subject.meta == {"arch": arch, "mean": None, "std": None}
    assert subject.fingerprint == checkpoint.fingerprint(net)


@pytest.mark.parametrize(("classes", "channels", "size"), [(3, 1, 28), (43, 3, 32), (7, 2, 8)])
def test_classes_channels_and_size_are_read_from_the_weights(
    classes: int, channels: int, size: int, tmp_path: Path
) -> None:
    torch.save(models.build("small-cnn", classes, channels, size).state_dict(), tmp_path / "net.pt")
    subject = checkpoint.load(tmp_path / "net.pt", size=size)
    assert subject.meta["arch"] == "small-cnn"
    assert subject.model(torch.rand(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize(
    ("blocks", "width", "dead", "arch"),
    [
        (1, 1, False, "wrn-10-1"), (2, 4, False, "wrn-16-4"), (1, 2, True, "wrn-10-2-sub-block1"),
        (6, 4, True, "wrn-40-4"), (6, 4, False, "wrn-40-4-plain"),
    ],
)  # fmt: skip
def test_a_wide_resnet_of_any_depth_and_width_is_recognised(
    blocks: int, width: int, dead: bool, arch: str, prefix: str, tmp_path: Path
) -> None:
    net = models.WideResNet(blocks, width, sub_block1=dead, classes=7)
    torch.save({"epoch": 76, "state_dict": {prefix + k: v for k, v in net.state_dict().items()}}, tmp_path / "net.pt")
    subject = checkpoint.load(tmp_path / "net.pt")
    assert subject.meta["arch"] == arch
    assert subject.model(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert checkpoint.load(tmp_path / "net.pt", arch=arch.replace("-", "_")).fingerprint == subject.fingerprint


def test_weights_of_no_known_network_ask_for_a_factory(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2)).state_dict(), tmp_path / "net.pt")
    said = refusal(tmp_path / "net.pt")
    assert "its 4 tensors fit none of" in said
    assert "--model file.py:factory" in said


def test_weights_without_convolutions_ask_for_a_factory(tmp_path: Path) -> None:
    torch.save(nn.Linear(8, 2).state_dict(), tmp_path / "net.pt")
    assert "holds no convolution and linear layer: give the network with --model" in refusal(tmp_path / "net.pt")


# ------------------------------------------------------------------------------------------------ factories

FACTORY = """
from torch import nn

def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))

class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make()

    def forward(self, x):
        return self.model(x)

def raises():
    raise RuntimeError("no luck\\nand more")

def number():
    return 7
"""


@pytest.fixture
def foreign(tmp_path: Path) -> tuple[Path, Path]:
    """(weights, file of factories)."""
    (tmp_path / "mine.py").write_text(FACTORY)
    torch.save(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).state_dict(), tmp_path / "net.pt")
    return tmp_path / "net.pt", tmp_path / "mine.py"


def test_a_factory_builds_the_network_that_the_weights_fill(foreign: tuple[Path, Path]) -> None:
    weights, file = foreign
    subject = checkpoint.load(weights, factory=f"{file}:make")
    assert equal(subject.model.state_dict(), torch.load(weights))
    code = sha256(file.read_bytes()).hexdigest()
    assert subject.meta == {"arch": f"{file}:make", "mean": None, "std": None, "code": code}
    assert not subject.model.training


def test_a_users_network_on_our_weights_goes_by_its_own_name(net: nn.Module, path: Path, tmp_path: Path) -> None:
    checkpoint.save(path, net, META)
    layers = f"{type(net).__name__}({META['classes']}, {META['channels']})"
    (tmp_path / "mine.py").write_text(f"from fatbench.models import *\ndef make(): return {layers}\n")
    factory = f"{tmp_path / 'mine.py'}:make"
    found = checkpoint.load(path, factory=factory).meta
    assert found == {**checkpoint.load(path).meta, "arch": factory, "code": found["code"]}


def test_a_network_that_is_an_attribute_of_its_module_is_filled_too(foreign: tuple[Path, Path]) -> None:
    weights, file = foreign
    state = {f"model.{key}": value for key, value in torch.load(weights).items()}
    torch.save(state, weights)
    assert equal(checkpoint.load(weights, factory=f"{file}:Whole").model.state_dict(), state)


@pytest.mark.parametrize(
    ("which", "says"),
    [
        ("{file}:raises", "failed: RuntimeError: no luck"),
        ("{file}:number", "returned int, not a torch.nn.Module"),
        ("{file}:absent", "failed: AttributeError: module .* has no attribute 'absent'"),
        ("{file}:FACTORY", "failed"),
        ("{folder}/absent.py:make", "write path.py:function; there is no file {folder}/absent.py"),
        ("{file}", "write path.py:function"),
        ("{folder}/net.pt:make", "net.pt is no Python file"),
        ("{folder}/broken.py:make", "failed: SyntaxError"),
    ],
)
def test_a_factory_that_builds_no_network_is_refused(which: str, says: str, foreign: tuple[Path, Path]) -> None:
    weights, file = foreign
    file.with_name("broken.py").write_text("def make(:\n")
    factory = which.format(file=file, folder=file.parent)
    said = refusal(weights, factory=factory)
    assert said.startswith(f"--model {factory}")
    assert re.search(says.format(folder=file.parent), said)


def test_weights_that_do_not_fit_the_factorys_network_are_refused(foreign: tuple[Path, Path], net: nn.Module) -> None:
    weights, file = foreign
    torch.save(net.state_dict(), weights)
    assert f"does not fit {file}:make: it " in refusal(weights, factory=f"{file}:make")


# ------------------------------------------------------------------------------------------------ run folders


def run_folder(folder: Path, **marks: str) -> Path:
    """A run folder as far as these files say: settings, done."""
    folder.mkdir()
    for name, text in marks.items():
        (folder / ("settings.toml" if name == "settings" else name)).write_text(text)
    return folder


def test_a_finished_run_is_its_last_checkpoint(net: nn.Module, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", settings="", done='{"status": "done"}')
    checkpoint.save(run / "last.safetensors", net, META)
    checkpoint.save(run / "best.safetensors", network(), META)
    assert checkpoint.load(run).fingerprint == checkpoint.fingerprint(net)


def test_a_failed_run_is_what_it_last_saved(net: nn.Module, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", settings="", done='{"status": "failed", "reason": "a loss"}')
    checkpoint.save(run / "failed.safetensors", net, {**META, "status": "failed: a loss"})
    assert checkpoint.load(run).meta["status"] == "failed: a loss"


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ({}, "{run} is no run folder: it has no settings.toml"),
        ({"done": '{"status": "done"}'}, "{run} is no run folder"),
        ({"settings": ""}, "the run in {run} is not finished: go on with fatbench train --resume --out {run}"),
        ({"settings": "", "done": '{"sta'}, "{run}/done is no end-of-run mark"),
        ({"settings": "", "done": "[]"}, "{run}/done"),
        ({"settings": "", "done": '{"status": "done"}'}, "no checkpoint at {run}/last.safetensors"),
    ],
)
def test_a_folder_without_a_finished_run_is_refused(marks: dict[str, str], says: str, tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", **marks)
    assert says.format(run=run) in refusal(run)


# ------------------------------------------------------------------------------------------------ published networks

WONG_KOLTER = """
from torch import nn

def make():
    return nn.Sequential(
        nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(1568, 100), nn.ReLU(), nn.Linear(100, 10),
    )
"""
TRADES = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature_extractor, self.classifier = nn.Sequential(), nn.Sequential()
        for layer, (inputs, outputs) in enumerate([(1, 32), (32, 32), (32, 64), (64, 64)], start=1):
            self.feature_extractor.add_module(f"conv{layer}", nn.Conv2d(inputs, outputs, 3))
            self.feature_extractor.add_module(f"relu{layer}", nn.ReLU())
            if layer % 2 == 0:
                self.feature_extractor.add_module(f"pool{layer}", nn.MaxPool2d(2))
        for layer, (inputs, outputs) in enumerate([(1024, 200), (200, 200), (200, 10)], start=1):
            self.classifier.add_module(f"fc{layer}", nn.Linear(inputs, outputs))
            if layer < 3:
                self.classifier.add_module(f"relu{layer}", nn.ReLU())

    def forward(self, x):
        return self.classifier(self.feature_extractor(x).flatten(1))
"""


@pytest.mark.parametrize(
    ("file", "source", "factory", "errors"),
    [
        ("mipverify_mnist_WK17a.pth", WONG_KOLTER, "make", 189),  # published: clean error 1.89 %
        ("trades_mnist_smallcnn.pt", TRADES, "Net", 52),  # published: clean accuracy 99.48 %
        ("trades_mnist_smallcnn.pt", "", "", 52),  # recognised
    ],
    ids=["wong-kolter", "trades", "trades recognised"],
)
def test_a_published_network_has_its_published_accuracy(
    file: str, source: str, factory: str, errors: int, shared: Path, tmp_path: Path
) -> None:
    (tmp_path / "theirs.py").write_text(source)
    weights = shared / "data" / "checkpoints" / file
    given = f"{tmp_path / 'theirs.py'}:{factory}" if factory else None
    subject = checkpoint.load(weights, factory=given, size=28)
    assert subject.meta["arch"] == (given or "trades-mnist-cnn")
    with np.load(shared / "data" / "mnist.npz") as mnist:
        x, y = torch.from_numpy(mnist["x_test"])[:, None].float() / 255, torch.from_numpy(mnist["y_test"])
    with torch.no_grad():
        logits = torch.cat([subject.model(part) for part in x.split(500)])
    assert int((logits.argmax(dim=1) != y).sum()) == errors
