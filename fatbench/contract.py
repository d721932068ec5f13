"""The rules every contestant and examiner must keep, run by `fatbench check` and by the tests over the whole registry.

Each rule is a function that raises AssertionError, with what is wrong, or returns. They run on a tiny network and
made-up images, in seconds; what a rule cannot see (is it a good defense?) the leaderboard tells.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fatbench.defense import Defense, Measure, Verdict, build, fields_as_stored
from fatbench.draws import Draws
from fatbench.errors import Refused, first_line
from fatbench.evaluation import Chunk, Evaluation, verified
from fatbench.models import DigitsCNN
from fatbench.quantities import Progress
from fatbench.registry import defenses, evaluations

EPS = 0.1
PROGRESSES = (Progress(0, 12), Progress(6, 12), Progress(11, 12))


def _world() -> tuple[nn.Module, Tensor, Tensor]:
    """A small network with some training behind it, and 24 images of three classes it partly knows."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(24) % 3
    patterns = torch.rand(3, 1, 8, 8, generator=generator)
    x = (0.6 * patterns[y] + 0.4 * torch.rand(24, 1, 8, 8, generator=generator)).contiguous()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = DigitsCNN(classes=3, channels=1, width=8)
    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(30):
        sgd.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
        sgd.step()
    sgd.zero_grad()
    return net, x, y


def _snapshot(net: nn.Module) -> dict[str, Any]:
    return {
        "weights": {key: value.clone() for key, value in net.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        "learning": [p.requires_grad for p in net.parameters()],
        "modes": [module.training for module in net.modules()],
    }


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _made(cls: type[Defense]) -> Defense:
    return build(cls, {"eps": EPS})


def _draws(n: int = 24) -> Draws:
    return Draws(("contract",), np.arange(n))


# ------------------------------------------------------------------------------------------------ defenses


def named(cls: type[Defense], name: str) -> None:
    """Its class says the name it is registered under, and its docstring says what it is."""
    assert getattr(cls, "name", None) == name, (
        f"it is registered as {name!r} and calls itself {getattr(cls, 'name', None)!r}"
    )
    assert cls.__doc__ and not cls.__doc__.startswith(f"{cls.__name__}("), "it has no docstring of its own"


def frozen(cls: type[Defense], name: str) -> None:
    """It is a frozen dataclass whose fields survive JSON: what a checkpoint stores makes it again."""
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen, "it is not a frozen dataclass"  # type: ignore[attr-defined]
    one = _made(cls)
    stored = json.loads(json.dumps(fields_as_stored(one)))
    again = build(cls, {key: value for key, value in stored.items() if value is not None})
    assert again == one, "made again from its stored fields it is another"
    assert json.loads(json.dumps(one.memory)) == one.memory, "its memory is not plain JSON"


def crafts_within(cls: type[Defense], name: str) -> None:
    """Its examples come in input order, finite, in [0, 1], within eps of x, with steps between 0 and K."""
    net, x, y = _world()
    for progress in PROGRESSES:
        one = _made(cls)
        crafted = one.craft(net, x, y, progress, draws=_draws())
        assert crafted.x_adv.shape == x.shape, f"x_adv is {tuple(crafted.x_adv.shape)}, not {tuple(x.shape)}"
        assert crafted.x_adv.stride() == x.stride(), "x_adv is not laid out like x"
        assert torch.isfinite(crafted.x_adv).all(), "x_adv is not finite"
        assert crafted.steps.shape == y.shape and crafted.steps.dtype == torch.int64, "steps is not (N,) int64"
        moved = crafted.steps > 0  # an unclamped start is the defense's own affair
        if one.project:
            far = (crafted.x_adv - x)[moved].abs().max() if moved.any() else torch.zeros(())
            assert far <= one.eps_at(progress) + 1e-6, f"x_adv lies {far:.4f} from x, eps is {one.eps_at(progress):.4f}"
        assert not moved.any() or 0 <= crafted.x_adv[moved].min() <= crafted.x_adv[moved].max() <= 1, (
            "x_adv leaves [0, 1]"
        )
        assert crafted.steps.min() >= 0 and crafted.steps.max() <= max(one.steps_at(progress), 0), "more steps than K"
        assert crafted.backwards >= int(crafted.steps.sum()), "it took steps that its count of backwards does not show"


def leaves_no_trace(cls: type[Defense], name: str) -> None:
    """Crafting in eval mode leaves weights, buffers, gradients, flags, labels and images as they were."""
    net, x, y = _world()
    one = _made(cls)
    net[1].eval()  # type: ignore[index]  # a module frozen by its owner stays frozen
    before, images, labels, stream = _snapshot(net), x.clone(), y.clone(), torch.get_rng_state()
    one.craft(net, x, y, PROGRESSES[1], draws=_draws())
    after = _snapshot(net)
    if one.mode == "train":  # crafting in train mode moves BatchNorm's statistics on purpose
        parameters = dict(net.named_parameters())
        for snapshot in (before, after):
            snapshot["weights"] = {key: v for key, v in snapshot["weights"].items() if key in parameters}
    for what in before:
        assert _same(before[what], after[what]), f"crafting changed the network's {what}"
    assert torch.equal(x, images) and torch.equal(y, labels), "crafting changed the batch it was given"
    assert torch.equal(stream, torch.get_rng_state()), "crafting with its own draws moved torch's random stream"


def same_draws_same_examples(cls: type[Defense], name: str) -> None:
    """With the same draws it crafts the same bits: a run can be resumed."""
    net, x, y = _world()
    a, b = (_made(cls).craft(deepcopy(net), x, y, PROGRESSES[1], draws=_draws()) for _ in range(2))
    assert torch.equal(a.x_adv, b.x_adv) and torch.equal(a.steps, b.steps), "the same draws gave other examples"


def learns(cls: type[Defense], name: str) -> None:
    """Its loss is a finite scalar whose gradient reaches the network, and descending it lowers it."""
    net, x, y = _world()
    one = _made(cls)
    net.train()
    sgd = torch.optim.SGD(net.parameters(), lr=1e-3)
    x_adv = one.craft(net, x, y, PROGRESSES[1], draws=_draws()).x_adv
    values = []
    for _ in range(3):
        sgd.zero_grad()
        loss = one.loss(net, x, x_adv, y, PROGRESSES[1])
        assert loss.ndim == 0 and torch.isfinite(loss), f"the loss is {loss.detach()}, not a finite scalar"
        torch.autograd.backward(loss)
        values.append(loss.item())
        sgd.step()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters()), (
        "no gradient reaches the network"
    )
    assert values[-1] < values[0], f"descending its loss did not lower it: {values[0]:.6f} to {values[-1]:.6f}"


def friendly_twin(cls: type[Defense], name: str) -> None:
    """A friendly defense with tau = K is its base, bit for bit."""
    base = name.removeprefix("fat-") if name != "fat" else "madry"
    if base == name or base not in defenses or not any(f.name == "tau" for f in dataclasses.fields(cls)):
        return
    net, x, y = _world()
    steps = _made(cls).steps
    friendly, plain = build(cls, {"eps": EPS, "tau": steps}), build(defenses[base], {"eps": EPS})
    for progress in PROGRESSES:
        a, b = (one.craft(deepcopy(net), x, y, progress, draws=_draws()) for one in (friendly, plain))
        assert torch.equal(a.x_adv, b.x_adv) and torch.equal(a.steps, b.steps), f"with tau = K it is not {base}"
        losses = [one.loss(deepcopy(net).train(), x, a.x_adv, y, progress) for one in (friendly, plain)]
        assert torch.equal(*losses), f"its loss is not that of {base}"


def remembers(cls: type[Defense], name: str) -> None:
    """after_epoch answers with a Verdict, and its memory, saved and restored, decides the same."""
    net, x, y = _world()
    accuracies = iter([0.5, 0.6, 0.6, 0.6, 0.7, 0.7, 0.7, 0.7, 0.8] * 8)

    class Scripted:
        train_accuracy = 1.0

        def __call__(self, craft: Any) -> float:
            point = craft(net, x, y, _draws())
            assert point.shape == x.shape, "what it measures is not shaped like x"
            return next(accuracies)

    measure: Measure = Scripted()
    one = _made(cls)
    for done in range(1, 13):
        verdict = one.after_epoch(Progress(done, 12), net, measure)
        assert isinstance(verdict, Verdict), f"after_epoch returned {type(verdict).__name__}, not Verdict"
        again = _made(cls)
        again.memory.clear()
        again.memory.update(json.loads(json.dumps(one.memory)))
        assert again.steps_at(Progress(min(done, 11), 12)) == one.steps_at(Progress(min(done, 11), 12)), (
            "memory is not all"
        )


DEFENSE_RULES: tuple[Callable[[type[Defense], str], None], ...] = (
    named, frozen, crafts_within, leaves_no_trace, same_draws_same_examples, learns, friendly_twin, remembers,
)  # fmt: skip


# ------------------------------------------------------------------------------------------------ evaluations


def _chunk() -> tuple[nn.Module, Chunk]:
    net, x, y = _world()
    return net.eval().requires_grad_(False), Chunk(x, y, np.arange(24), 3, seed=0)


def attacks_within(cls: type[Evaluation], name: str) -> None:
    """What it hands back is shaped like x, within eps and [0, 1]; the network stays as it was."""
    net, chunk = _chunk()
    before = _snapshot(net)
    attacked = build(cls, {}).attack(net, chunk, EPS)
    assert attacked.x_adv.shape == chunk.x.shape, f"x_adv is {tuple(attacked.x_adv.shape)}"
    invalid = verified(net, chunk.x, attacked.x_adv, chunk.y, EPS)[2]
    assert not invalid, f"{invalid} of its examples lie outside the ball or [0, 1]"
    for what, value in _snapshot(net).items():
        assert _same(before[what], value), f"the attack changed the network's {what}"
    assert attacked.forwards > 0, "it counts no forwards"


def repeats(cls: type[Evaluation], name: str) -> None:
    """The same seed gives the same bits, and torch's random stream stays where it was."""
    stream = torch.get_rng_state()
    net, chunk = _chunk()
    state = torch.get_rng_state()
    a = build(cls, {}).attack(net, chunk, EPS)
    assert torch.equal(state, torch.get_rng_state()), "the attack moved torch's random stream"
    net, chunk = _chunk()
    assert torch.equal(a.x_adv, build(cls, {}).attack(net, chunk, EPS).x_adv), "the same seed gave other examples"
    torch.set_rng_state(stream)


def zero_budget(cls: type[Evaluation], name: str) -> None:
    """With eps = 0 nothing moves."""
    net, chunk = _chunk()
    attacked = build(cls, {}).attack(net, chunk, 0.0)
    assert torch.allclose(attacked.x_adv, chunk.x, atol=1e-6), "with eps 0 it moved the images"


EVALUATION_RULES: tuple[Callable[[type[Evaluation], str], None], ...] = (
    named, attacks_within, repeats, zero_budget,
)  # type: ignore[assignment]  # fmt: skip


def check(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """(rule, what is wrong or "") for every rule that a registered name must keep.

    Raises:
        Refused: the name is unknown or cannot be loaded.
    """
    registry, rules = (defenses, DEFENSE_RULES) if kind == "defense" else (evaluations, EVALUATION_RULES)
    cls = registry[name]
    for rule in rules:
        try:
            rule(cls, name.replace("_", "-"))
            yield rule.__name__, ""
        except (AssertionError, Refused) as error:
            yield rule.__name__, first_line(error)
        except Exception as error:  # whatever a plugin raises breaks the rule, and the other rules still run
            yield rule.__name__, f"{type(error).__name__}: {first_line(error)}"
