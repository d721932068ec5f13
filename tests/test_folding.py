"""A folded network answers as the network itself does in eval mode, follows its weights, and leaves it as it was."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from fatbench import folding, models
from fatbench.attacks import pgd
from fatbench.folding import folded

SMALL: dict[str, Callable[[], nn.Module]] = {
    "digits-cnn": lambda: models.build("digits-cnn", 10, 3, 8),
    "small-cnn": lambda: models.build("small-cnn", 10, 3, 8),
    "trades-mnist-cnn": lambda: models.build("trades-mnist-cnn", 10, 3, 28),
    "resnet-18": lambda: models.build("resnet-18", 10, 3, 8),
    "wrn": lambda: models.build("wrn-10-1"),
    "wrn with its unused block": lambda: models.build("wrn-10-1-sub-block1"),
}


def shaken(net: nn.Module) -> nn.Module:
    """The network in eval mode and float64, its BatchNorms no longer at their initial values."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                assert values is not None
                nn.init.uniform_(values, 0.5, 1.5)
    return net.double().eval()


@pytest.fixture(params=SMALL)
def net(request: pytest.FixtureRequest) -> nn.Module:
    return shaken(SMALL[request.param]())


def image(net: nn.Module) -> Tensor:
    size = 28 if isinstance(net, models.TradesMnistCNN) else 8
    return torch.rand(4, 3, size, size, dtype=torch.float64)


def test_the_logits_and_input_gradients_are_the_networks_own(net: nn.Module) -> None:
    x = image(net)
    answers = []
    for model in (net, folded(net)):
        point = x.clone().requires_grad_()
        logits = model(point)
        answers.append((logits, torch.autograd.grad(logits.logsumexp(dim=1).sum(), point)[0]))
    torch.testing.assert_close(answers[1], answers[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("threads", "together"), [(1, [1, 1, 1, 1]), (2, [2, 2]), (8, [2, 2])])
def test_images_that_pass_a_few_at_a_time_are_answered_as_all_at_once(
    net: nn.Module, threads: int, together: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, passes = image(net), []
    monkeypatch.setattr(folding, "PIECE", x.shape[2] * x.shape[3])
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    expected = torch.autograd.grad(net(point := x.clone().requires_grad_()).logsumexp(dim=1).sum(), point)[0]
    copy = folded(net)
    assert isinstance(copy, folding._Folded)
    copy.graph.register_forward_hook(lambda module, given, answer: passes.append(len(given[0])))
    point = x.clone().requires_grad_()
    found = torch.autograd.grad(copy(point).logsumexp(dim=1).sum(), point)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert passes == together


def test_no_batchnorm_is_left_behind_a_convolution() -> None:
    for name in ("digits-cnn", "small-cnn", "resnet-18"):
        copy = folded(shaken(SMALL[name]()))
        assert isinstance(copy, folding._Folded)
        assert not any(isinstance(module, nn.BatchNorm2d) for module in copy.graph.modules()), name


def test_the_network_is_left_as_it_was(net: nn.Module) -> None:
    before, training = deepcopy(net.state_dict()), [module.training for module in net.modules()]
    folded(net)(image(net))
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == training
    assert all(p.grad is None for p in net.parameters())


def changed_by_a_step(net: nn.Module) -> None:
    net.train()
    sgd = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    torch.autograd.backward(net(image(net)).logsumexp(dim=1).sum())
    sgd.step()
    net.eval()


def changed_by_statistics(net: nn.Module) -> None:
    net.train()
    with torch.no_grad():
        net(image(net))
    net.eval()


def changed_by_loading(net: nn.Module) -> None:
    net.load_state_dict({key: value * 1.01 for key, value in net.state_dict().items()})


def changed_by_new_tensors(net: nn.Module) -> None:
    net.load_state_dict({key: value * 1.01 for key, value in net.state_dict().items()}, assign=True)


def changed_unseen(net: nn.Module) -> None:
    for parameter in net.parameters():
        parameter.data.mul_(1.01)


@pytest.mark.parametrize(
    "change",
    [changed_by_a_step, changed_by_statistics, changed_by_loading, changed_by_new_tensors, changed_unseen],
)
def test_the_copy_follows_every_change_of_the_network(change: Callable[[nn.Module], None]) -> None:
    net = shaken(SMALL["digits-cnn"]())
    x = image(net)
    before = folded(net)(x)
    change(net)
    after = folded(net)(x)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, net(x), rtol=1e-10, atol=1e-12)


def test_nothing_is_copied_anew_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    net = shaken(SMALL["digits-cnn"]())
    first = folded(net)
    monkeypatch.setattr(folding, "_Folded", None)
    assert folded(net) is first


def test_a_copy_goes_when_its_network_goes() -> None:
    net = shaken(SMALL["digits-cnn"]())
    copy = weakref.ref(folded(net))
    gc.collect()
    assert copy() is not None
    del net
    gc.collect()
    assert copy() is None


def test_a_normalisation_stays_in_front() -> None:
    net = models.Normalised(shaken(SMALL["digits-cnn"]()), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)).double().eval()
    x = image(net.net)
    torch.testing.assert_close(folded(net)(x), net(x), rtol=1e-10, atol=1e-12)
    assert folded(net) is not net


def test_under_autocast_the_copy_is_of_its_type_and_answers_in_float32() -> None:
    net = shaken(SMALL["digits-cnn"]()).float()
    x = image(net).float()
    with torch.autocast("cpu", torch.bfloat16):
        copy = folded(net)
        logits = copy(x)
    assert isinstance(copy, folding._Folded)
    assert {value.dtype for value in copy.graph.parameters()} == {torch.bfloat16}
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, net(x), rtol=0.05, atol=0.05)
    assert folded(net) is not copy  # and without autocast it is float32's own


class Theirs(models.DigitsCNN):
    pass


def hooked() -> nn.Module:
    net = SMALL["digits-cnn"]()
    net[0].register_forward_hook(lambda module, given, made: None)  # type: ignore[index]
    return net


def patched() -> nn.Module:
    net = SMALL["digits-cnn"]()
    net.forward = lambda x: x.flatten(1)  # type: ignore[method-assign]
    return net


@pytest.mark.parametrize("make", [Theirs, hooked, patched, lambda: nn.Linear(2, 2)])
def test_anybody_elses_network_is_run_as_it_is(make: Callable[[], nn.Module]) -> None:
    net = make().eval()
    assert folded(net) is net


def test_an_attack_in_train_mode_crafts_on_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    net = shaken(SMALL["digits-cnn"]())
    x, y = image(net), torch.arange(4)
    by_fold = pgd(net, x, y, eps=0.1, step_size=0.05, steps=3, start=lambda x, eps: x)
    monkeypatch.setattr("fatbench.attacks.folded", lambda model: model)
    by_net = pgd(net, x, y, eps=0.1, step_size=0.05, steps=3, start=lambda x, eps: x)
    torch.testing.assert_close(by_fold.x_adv, by_net.x_adv, rtol=0, atol=1e-12)
    monkeypatch.setattr("fatbench.attacks.folded", lambda model: pytest.fail("folded in train mode"))
    pgd(net, x, y, eps=0.1, step_size=0.05, steps=1, mode="train")
