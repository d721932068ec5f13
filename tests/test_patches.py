"""A small change's logits, computed only where the change is felt, are those of the whole network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fatbench import autoattack, data, models
from fatbench.evaluation import Chunk
from fatbench.patches import Patches, Window, patches
from fatbench.registry import evaluations
from fatbench.swift import swift


def build(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return models.build(arch).eval()


class Pooled(nn.Module):
    """Strides, pools, a shortcut, layers in place, and a kernel that skips pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 5, 2, 2), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.one, self.two = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 1)
        self.pool, self.mean, self.skip = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1, 2)
        self.last = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.one(x)
        out += self.two(x)
        out = F.relu(out, inplace=True)
        return self.last((self.pool(out) + self.mean(out) + self.skip(out)).flatten(1)[:, : 8 * 4 * 4])


def asked(net: nn.Module, precision: str = "float32", n: int = 6) -> tuple[Patches, nn.Module, Tensor]:
    x = torch.rand(n, 3, 32, 32)
    copy = swift(net, x, precision)  # type: ignore[arg-type]
    assert copy is not None
    made = patches(copy, x)
    assert made is not None
    made.known = {}
    return made, copy, x


@torch.no_grad()
@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("arch", ["small-cnn", "resnet-18", "wrn-10-1", "digits-cnn", "pooled"])
def test_logits_are_those_of_the_whole_network_whoever_is_kept_and_whoever_leaves(arch: str, precision: str) -> None:
    torch.manual_seed(1)
    made, copy, x = asked(Pooled().eval() if arch == "pooled" else build(arch), precision)
    everyone = torch.ones(len(x), dtype=torch.bool)
    made.ask(x)
    made.keep(everyone, everyone)
    for size in (1, 2, 5, 30, 3, 1):
        top, left = torch.randint(0, 33 - size, (2,)).tolist()
        new = x.clone()
        new[:, :, top : top + size, left : left + size] = torch.rand(len(x), 3, 1, 1)
        expected = copy(new)
        slack = float(expected.abs().max()) * (1e-5 if precision == "float32" else 3e-2)
        torch.testing.assert_close(made.ask(new), expected, rtol=0, atol=slack)
        kept, going = torch.rand(len(x)) < 0.5, torch.arange(len(x)) != size
        made.keep(kept, going)
        x = torch.where(kept[:, None, None, None], new, x)[going]
    assert len(x) < 6


@torch.no_grad()
def test_images_at_the_border_and_images_that_do_not_change_are_answered_too() -> None:
    made, copy, x = asked(build("small-cnn"))
    everyone = torch.ones(len(x), dtype=torch.bool)
    made.ask(x)
    made.keep(everyone, everyone)
    torch.testing.assert_close(made.ask(x), copy(x))
    for rows, columns in ((slice(0, 1), slice(0, 1)), (slice(31, 32), slice(31, 32)), (slice(0, 2), slice(30, 32))):
        new = x.clone()
        new[:, :, rows, columns] = 0.5
        torch.testing.assert_close(made.ask(new), copy(new), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_other_images_than_those_known_are_answered_all_the_same() -> None:
    made, copy, x = asked(build("small-cnn"))
    made.ask(x)
    made.keep(torch.ones(6, dtype=torch.bool), torch.ones(6, dtype=torch.bool))
    for other in (torch.rand_like(x), x.flip(0), torch.rand(3, 3, 32, 32)):
        torch.testing.assert_close(made.ask(other), copy(other), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_small_change_costs_less_than_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    made, copy, x = asked(build("small-cnn"))
    pixels = 0
    convolve = F.conv2d

    def counting(image: Tensor, *args: object, **more: object) -> Tensor:
        nonlocal pixels
        pixels += image.shape[2] * image.shape[3]
        return convolve(image, *args, **more)  # type: ignore[arg-type]

    everyone = torch.ones(len(x), dtype=torch.bool)
    made.ask(x)
    made.keep(everyone, everyone)
    monkeypatch.setattr(F, "conv2d", counting)
    new = x.clone()
    new[:, :, 10:12, 10:12] = 0.5
    copy(new)
    whole, pixels = pixels, 0
    made.ask(new)
    assert 0 < pixels < whole / 3


def test_a_network_that_is_not_traced_or_does_not_fit_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, 3, 32, 32)
    assert patches(build("small-cnn"), x) is None
    copy = swift(build("small-cnn"), x)
    assert copy is not None
    monkeypatch.setattr("fatbench.patches.MEMORY", 1000)
    assert patches(copy, x) is None


def test_answers_that_are_not_the_networks_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.rand(4, 3, 32, 32)
    copy = swift(build("small-cnn"), x)
    assert copy is not None
    monkeypatch.setattr(Patches, "_around", lambda self, source, part, window: 0 * window.of(self.known[source]))
    assert patches(copy, x) is None


def test_windows_meet_and_part() -> None:
    one, other = Window(0, 4, 2, 6), Window(3, 8, 0, 3)
    assert one.union(other) == Window(0, 8, 0, 6)
    assert one.common(other) == Window(3, 4, 2, 3)
    assert one.common(Window(5, 6, 5, 6)) == Window(5, 5, 5, 6)
    assert Window(3, 4, 2, 3).within(other) == Window(0, 1, 2, 3)


def test_square_finds_the_same_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = data.load("digits")
    torch.manual_seed(0)
    net = models.DigitsCNN(10, 1, 8)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(30):
        rows = torch.arange(step * 64, step * 64 + 64) % len(digits.x_train)
        sgd.zero_grad()
        F.cross_entropy(net.train()(digits.x_train[rows]), digits.y_train[rows]).backward()
        sgd.step()
    net.eval().requires_grad_(False)
    rows = np.arange(40)
    x, y = digits.x_test[rows].contiguous(), digits.y_test[rows]
    right = (net(x).argmax(dim=1) == y).numpy()
    chunk = Chunk(x, y, rows, 10, 0).part(np.flatnonzero(right))
    chunk = replace(chunk, craft=swift(net, chunk.x))
    built = autoattack.built

    def short(*args: object) -> object:
        library = built(*args)  # type: ignore[arg-type]
        library.square.n_queries = 150
        return library

    monkeypatch.setattr("fatbench.evaluations.autoattack.built", short)
    examiner = evaluations["autoattack"]()
    with_patches = examiner.stage("square", net, chunk, 0.1)
    monkeypatch.setattr(autoattack, "patches", lambda craft, x: None)
    without = examiner.stage("square", net, chunk, 0.1)
    assert torch.equal(with_patches.x_adv, without.x_adv)
    assert with_patches.forwards == without.forwards
    fell = (with_patches.x_adv != chunk.x).flatten(1).any(dim=1)
    assert 0 < int(fell.sum()) < len(chunk.x)


@pytest.mark.parametrize(("n", "piece", "tried"), [(16, None, [16]), (15, None, []), (16, 4, [])])
def test_few_images_and_those_that_memory_splits_are_asked_about_whole(
    n: int, piece: int | None, tried: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(autoattack, "patches", lambda craft, x: asked.append(len(x)))
    network = autoattack.Watched(nn.Identity(), piece=piece)
    queries = autoattack._Queries(lambda x, y: (torch.ones(len(x)), torch.ones(len(x))), network)
    queries(torch.rand(n, 3, 8, 8), torch.zeros(n))
    queries(torch.rand(n, 3, 8, 8), torch.zeros(n))
    assert asked == tried


def test_layers_in_place_are_made_not_to_be() -> None:
    net = Pooled().eval()
    copy = swift(net, torch.rand(4, 3, 32, 32))
    assert copy is not None
    made = patches(copy, torch.rand(4, 3, 32, 32))
    assert made is not None
    assert isinstance(copy.network, fx.GraphModule)
    for network, some in ((made.network, False), (copy.network, True)):
        named = any(getattr(layer, "inplace", False) for layer in network.modules())
        assert (named or any(node.kwargs.get("inplace") for node in network.graph.nodes)) == some
    assert net.stem[2].inplace, "the network itself is left as it was"  # type: ignore[union-attr]
