"""The networks are those of the official code: keys, shapes, sizes and logits; and weights pass through unchanged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fatbench import checkpoint, models
from fatbench.catalogue import DATASETS, NETWORKS
from fatbench.errors import Refused

OFFICIAL = {
    "small-cnn": "SmallCNN",
    "resnet-18": "ResNet18",
    "wrn-32-10": "Wide_ResNet_Madry_32_10",
    "wrn-34-10": "Wide_ResNet_34_10",
    "wrn-40-4": "Wide_ResNet_40_4",
    "wrn-58-10": "Wide_ResNet_58_10",
}
# Parameters in all, those that forward uses, and convolutions, linear layers and BatchNorms.
SIZES = {
    "small-cnn": (1_639_282, 1_639_282, (6, 2, 6)),
    "narrow-cnn": (337_498, 337_498, (6, 2, 6)),
    "resnet-18": (11_173_962, 11_173_962, (20, 1, 20)),
    "wrn-32-10": (46_160_474, 46_160_474, (34, 1, 31)),
    "wrn-34-10": (48_262_586, 46_160_474, (45, 1, 41)),
    "wrn-58-10": (88_833_466, 84_885_594, (77, 1, 73)),
    "wrn-40-4": (9_366_394, 8_949_210, (53, 1, 49)),
    "digits-cnn": (8_186, 8_186, (4, 1, 4)),
    "trades-mnist-cnn": (312_202, 312_202, (4, 3, 0)),
}
# The images that a network is told of with: the others take colour images of 32x32.
IMAGES = {"digits-cnn": (10, 1, 8), "trades-mnist-cnn": (10, 1, 28)}
WIDE = [name for name in OFFICIAL if name.startswith("wrn")]


@pytest.fixture(scope="module")
def official(shared: Path) -> Callable[[str], dict[str, Any]]:
    """What is recorded of the official class of an architecture: total_params, and keys with shapes in order."""
    recorded = json.loads((shared / "golden" / "arch_state_dict_keys.json").read_text())
    return lambda arch: recorded[OFFICIAL[arch]]


def weightless(arch: str, *arguments: int) -> nn.Module:
    with torch.device("meta"):
        return models.build(arch, *arguments)


def shaken(net: nn.Module) -> nn.Module:
    """The network in eval mode, its BatchNorms no longer at their initial values."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)
    return net.eval()


# ------------------------------------------------------------------------------------------------ keys and sizes


@pytest.mark.parametrize("arch", OFFICIAL)
def test_the_state_dict_has_the_official_keys_in_order_with_their_shapes(arch: str, official: Any) -> None:
    net = weightless(arch)
    assert [[key, list(value.shape)] for key, value in net.state_dict().items()] == official(arch)["keys"]
    assert sum(p.numel() for p in net.parameters()) == official(arch)["total_params"]


@pytest.mark.parametrize("arch", OFFICIAL)
def test_an_official_state_dict_loads_strictly_and_comes_back(arch: str, official: Any) -> None:
    keys = official(arch)["keys"]
    weights = {key: torch.tensor(float(place)).expand(shape) for place, (key, shape) in enumerate(keys)}
    net = weightless(arch)
    net.load_state_dict(weights, strict=True, assign=True)
    back = net.state_dict()
    assert [(key, value.view(-1)[0].item()) for key, value in back.items()] == [
        (key, place) for place, key in enumerate(weights)
    ]


@pytest.mark.parametrize("arch", ["digits-cnn", "small-cnn", "resnet-18", "wrn-40-4"])
def test_weights_survive_a_checkpoint_bit_for_bit(arch: str, tmp_path: Path) -> None:
    net = shaken(models.build(arch))
    about = {"arch": arch, "classes": 10, "channels": 3, "size": 32, "mean": None, "std": None}
    checkpoint.save(tmp_path / "net.safetensors", net, about)
    back = checkpoint.load(tmp_path / "net.safetensors").model.state_dict()
    assert list(back) == list(net.state_dict())
    assert all(torch.equal(back[key], value) for key, value in net.state_dict().items())


@pytest.mark.parametrize("arch", SIZES)
def test_the_number_of_parameters_and_layers_is_the_published_one(arch: str) -> None:
    total, used, layers = SIZES[arch]
    net = weightless(arch, *(IMAGES["trades-mnist-cnn"] if arch == "trades-mnist-cnn" else ()))
    assert sum(p.numel() for p in net.parameters()) == total
    assert sum(p.numel() for p in net.parameters() if p.requires_grad) == used
    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm2d)
    assert tuple(sum(isinstance(m, kind) for m in net.modules()) for kind in kinds) == layers


def test_the_catalogue_names_exactly_the_networks_that_can_be_built() -> None:
    assert set(NETWORKS) == set(models.ARCHITECTURES) == set(SIZES)
    assert {info.arch for info in DATASETS.values()} <= set(NETWORKS)


@pytest.mark.parametrize("arch", SIZES)
def test_the_catalogue_tells_the_size_of_a_network(arch: str) -> None:
    total = sum(p.numel() for p in weightless(arch, *IMAGES.get(arch, ())).parameters())
    told = f"{total / 1e3:.1f}".removesuffix(".2") + " k" if total < 1e6 else f"{total / 1e6:.1f} M"
    assert f"{told} parameters" in NETWORKS[arch]


# ------------------------------------------------------------------------------------------------ logits


def plain_bn(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    """BatchNorm in eval mode, by its formula."""
    mean, var, scale, bias = (
        w[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + bias


def plain_small_cnn(w: dict[str, Tensor], x: Tensor) -> Tensor:
    for block in (1, 2, 3):
        for layer in (1, 2):
            name = f"block{block}_conv{layer}"
            x = F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)
            x = plain_bn(x, w, f"batchnorm{block}_{layer}").clamp(min=0)
        x = F.max_pool2d(x, 2, 2)
    x = F.linear(x.flatten(1), w["fc1.weight"], w["fc1.bias"]).clamp(min=0)
    return F.linear(x, w["fc2.weight"], w["fc2.bias"])


def plain_resnet_18(w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = plain_bn(F.conv2d(x, w["conv1.weight"], padding=1), w, "bn1").clamp(min=0)
    for layer in (1, 2, 3, 4):
        for block in (0, 1):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = F.conv2d(x, w[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.conv2d(plain_bn(out, w, f"{name}.bn1").clamp(min=0), w[f"{name}.conv2.weight"], padding=1)
            if f"{name}.shortcut.0.weight" in w:
                x = plain_bn(F.conv2d(x, w[f"{name}.shortcut.0.weight"], stride=stride), w, f"{name}.shortcut.1")
            x = (plain_bn(out, w, f"{name}.bn2") + x).clamp(min=0)
    return F.linear(F.avg_pool2d(x, 4).flatten(1), w["linear.weight"], w["linear.bias"])


def plain_wide(w: dict[str, Tensor], x: Tensor) -> Tensor:
    x = F.conv2d(x, w["conv1.weight"], padding=1)
    for group in (1, 2, 3):
        blocks = len({key.split(".")[2] for key in w if key.startswith(f"block{group}.")})
        for block in range(blocks):
            name, stride = f"block{group}.layer.{block}", 2 if group > 1 and block == 0 else 1
            active = plain_bn(x, w, f"{name}.bn1").clamp(min=0)
            out = plain_bn(F.conv2d(active, w[f"{name}.conv1.weight"], stride=stride, padding=1), w, f"{name}.bn2")
            out = F.conv2d(out.clamp(min=0), w[f"{name}.conv2.weight"], padding=1)
            if f"{name}.convShortcut.weight" in w:
                x = F.conv2d(active, w[f"{name}.convShortcut.weight"], stride=stride)
            x = x + out
    x = F.avg_pool2d(plain_bn(x, w, "bn1").clamp(min=0), 8)
    return F.linear(x.flatten(1), w["fc.weight"], w["fc.bias"])


PLAIN: dict[str, Callable[[dict[str, Tensor], Tensor], Tensor]] = {
    "small-cnn": plain_small_cnn,
    "resnet-18": plain_resnet_18,
    "wrn-40-4": plain_wide,
}


@pytest.mark.parametrize("arch", PLAIN)
def test_the_logits_are_those_of_the_network_written_out(arch: str) -> None:
    net, x = shaken(models.build(arch)).double(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(net(x), PLAIN[arch](net.state_dict(), x), rtol=1e-9, atol=1e-9)


def test_wrn_32_10_and_wrn_34_10_are_one_network() -> None:
    with_dead_block = shaken(models.build("wrn-34-10"))
    state = with_dead_block.state_dict()
    shared_weights = {key: value for key, value in state.items() if not key.startswith("sub_block1.")}
    madry = weightless("wrn-32-10")
    madry.load_state_dict(shared_weights, strict=True, assign=True)
    x = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(madry.eval()(x), with_dead_block(x))


@pytest.mark.parametrize("arch", WIDE)
def test_sub_block1_and_nothing_else_is_never_trained(arch: str) -> None:
    net = weightless(arch)
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    dead = {name for name, _ in net.named_parameters() if name.startswith("sub_block1.")}
    assert frozen == dead
    assert bool(dead) == (arch != "wrn-32-10")


def test_sub_block1_never_touches_the_logits_and_never_moves() -> None:
    net = models.WideResNet(1, 1, sub_block1=True)
    x = torch.rand(2, 3, 32, 32)
    before = net.eval()(x)
    for tensor in net.sub_block1.state_dict().values():
        tensor.fill_(math.nan if tensor.is_floating_point() else 7)
    assert torch.equal(net.eval()(x), before)
    net.train()(x).sum().backward()
    assert net.fc.weight.grad is not None
    assert all(p.grad is None for p in net.sub_block1.parameters())
    assert {int(m.num_batches_tracked) for m in net.sub_block1.modules() if isinstance(m, nn.BatchNorm2d)} == {7}


# ------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("arch", ["digits-cnn", "small-cnn", "resnet-18"])
@pytest.mark.parametrize(("classes", "channels", "size"), [(3, 1, 20), (10, 3, 32), (2, 4, 8)])
def test_classes_channels_and_size_are_free(arch: str, classes: int, channels: int, size: int) -> None:
    net = models.build(arch, classes, channels, size).eval()
    assert net(torch.rand(2, channels, size, size)).shape == (2, classes)


@pytest.mark.parametrize("arch", WIDE)
def test_wide_networks_take_their_classes_and_channels(arch: str) -> None:
    state = weightless(arch, 3, 1).state_dict()
    assert (state["conv1.weight"].shape, state["fc.weight"].shape[0]) == ((16, 1, 3, 3), 3)


@pytest.mark.parametrize("sides", [(2, 2), (3, 5), (28, 28)])
def test_digits_cnn_takes_any_image_from_2x2_on(sides: tuple[int, int]) -> None:
    assert models.build("digits-cnn", 4, 1).eval()(torch.rand(1, 1, *sides)).shape == (1, 4)


def test_small_cnn_refuses_images_that_it_would_halve_to_nothing() -> None:
    with pytest.raises(Refused, match="at least 8x8, not 7x7"):
        models.build("small-cnn", size=7)


def test_underscores_are_accepted_for_hyphens() -> None:
    assert isinstance(weightless("resnet_18"), models.ResNet18)


@pytest.mark.parametrize(
    ("name", "closest"), [("resnet18", "resnet-18"), ("wrn-33-10", "wrn-34-10"), ("SmallCNN", "small-cnn")]
)
def test_an_unknown_name_is_refused_with_the_closest(name: str, closest: str) -> None:
    with pytest.raises(Refused) as caught:
        models.build(name)
    said = str(caught.value)
    assert said.startswith(f"unknown model {name!r}: did you mean {closest}")
    assert all(known in said for known in NETWORKS)
    assert "\n" not in said


@pytest.mark.parametrize("arch", ["digits-cnn", "small-cnn", "resnet-18", "wrn-40-4"])
def test_the_weights_are_those_of_torchs_seed(arch: str) -> None:
    def first(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return next(models.build(arch).parameters())

    assert torch.equal(first(3), first(3))
    assert not torch.equal(first(3), first(4))


def test_wide_networks_begin_at_the_variance_of_the_official_code() -> None:
    net = models.build("wrn-40-4")
    checked = 0
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            spread = math.sqrt(2 / (module.kernel_size[0] * module.kernel_size[1] * module.out_channels))
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(spread, rel=5 / math.sqrt(2 * n)), name
            assert abs(module.weight.mean().item()) < 5 * spread / math.sqrt(n), name
            checked += 1
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight.unique().tolist(), module.bias.unique().tolist()) == ([1], [0]), name
    assert checked == 53
    assert net.get_parameter("fc.bias").unique().tolist() == [0]


# ------------------------------------------------------------------------------------------------ normalisation

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)


def test_normalised_is_the_network_on_images_less_mean_over_std() -> None:
    net, x = models.build("digits-cnn").eval(), torch.rand(4, 3, 8, 8)
    by_hand = torch.stack([(x[:, c] - MEAN[c]) / STD[c] for c in range(3)], dim=1)
    torch.testing.assert_close(models.Normalised(net, MEAN, STD)(x), net(by_hand), rtol=1e-6, atol=1e-6)


def test_normalised_passes_gradients_in_pixel_units() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 1, bias=False))
    x = torch.rand(1, 3, 1, 1, requires_grad=True)
    (grad,) = torch.autograd.grad(models.Normalised(net, MEAN, STD)(x).sum(), x)
    torch.testing.assert_close(grad.flatten(), net[1].weight[0] / torch.tensor(STD))


def test_mean_and_std_are_no_weights_and_follow_the_network() -> None:
    net = models.build("digits-cnn")
    wrapped = models.Normalised(net, MEAN, STD)
    assert list(wrapped.state_dict()) == [f"net.{key}" for key in net.state_dict()]
    assert wrapped.double().mean.dtype == torch.float64
    assert models.inner(wrapped) is net is models.inner(net)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        (MEAN, (0.2, 0.0, 0.2)),
        (MEAN, (0.2, -0.1, 0.2)),
        (MEAN, (0.2, 0.2)),
        ((0.5,), STD),
        (MEAN, (0.2, math.nan, 0.2)),
    ],
    ids=["zero", "negative", "too few", "too many", "not a number"],
)
def test_a_std_that_cannot_divide_is_refused(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(Refused, match=r"^mean .* and std .* must be .*$"):
        models.Normalised(nn.Identity(), mean, std)
