"""Every registered defense and evaluation keeps the contract, and each rule of the contract catches who breaks it."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from fatbench import contract
from fatbench.contract import DEFENSE_RULES, EVALUATION_RULES
from fatbench.defense import Defense, Verdict
from fatbench.errors import Refused
from fatbench.registry import defenses, evaluations

Madry: Any = defenses["madry"]
Fat: Any = defenses["fat"]
Pgd: Any = evaluations["pgd"]
WORLD = contract._world()
LATE = contract.PROGRESSES[-1].done


@pytest.fixture(autouse=True)
def _one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contract's network is trained once; every rule gets a copy of its own."""
    monkeypatch.setattr(contract, "_world", lambda: deepcopy(WORLD))


@pytest.mark.parametrize("rule", DEFENSE_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", list(defenses))
def test_every_registered_defense_keeps_every_rule(name: str, rule: Callable[..., None]) -> None:
    rule(defenses[name], name)


@pytest.mark.parametrize("rule", EVALUATION_RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("name", [name for name in evaluations if name != "autoattack"])
def test_every_registered_evaluation_keeps_every_rule(name: str, rule: Callable[..., None]) -> None:
    rule(evaluations[name], name)


def test_autoattack_keeps_every_rule_with_a_small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    cls: Any = evaluations["autoattack"]
    library, ran = cls._library, []

    def small(self: Any, model: Any, chunk: Any, eps: float) -> Any:
        made = library(self, model, chunk, eps)
        made.apgd.n_iter = made.apgd_targeted.n_iter = made.fab.n_iter = 6
        made.square.n_queries = 30
        ran.append(made.attacks_to_run)
        return made

    monkeypatch.setattr(cls, "_library", small)
    assert dict(contract.check("evaluation", "autoattack")) == {rule.__name__: "" for rule in EVALUATION_RULES}
    assert len(ran) == 16  # each rule's runs, stage by stage


def test_the_contract_runs_over_what_the_rooms_hold(root: Path) -> None:
    for registry, room in ((defenses, "defenses"), (evaluations, "evaluations")):
        files = {path.stem.replace("_", "-") for path in (root / room).glob("[!_]*.py")}
        assert files and files <= set(registry)


# ------------------------------------------------------------------------------------ defenses that break it


@dataclass(frozen=True)
class Good(Madry):
    """A contestant that keeps every rule."""

    name: ClassVar[str] = "mine"


@dataclass(frozen=True)
class GoodTwin(Fat):
    """Its friendly counterpart."""

    name: ClassVar[str] = "fat-mine"


@dataclass
class Thawed:
    """A contestant in all but this: its fields can be changed. It cannot derive from Defense, which is frozen."""

    name: ClassVar[str] = "mine"
    eps: float = 0.1

    def __getattr__(self, what: str) -> Any:
        return getattr(Good(eps=self.eps), what)


def spoiled(base: type[Any] = Good, **members: Any) -> type[Any]:
    """A frozen dataclass that is `base` but for these members."""
    return dataclass(frozen=True)(type("Spoiled", (base,), {"__doc__": "Bad on purpose.", **members}))


def late(change: Callable[[Any, Any, torch.Tensor], dict[str, Any]]) -> type[Any]:
    """A defense that goes wrong at the last progress only: `change` says what of its Crafted is replaced."""

    def craft(self: Any, model: Any, x: Any, y: Any, progress: Any, *, draws: Any = None) -> Any:
        crafted = Good.craft(self, model, x, y, progress, draws=draws)
        return replace(crafted, **change(self, crafted, x)) if progress.done == LATE else crafted

    return spoiled(craft=craft)


def meddling(meddle: Callable[[Any, torch.Tensor, torch.Tensor], Any]) -> type[Any]:
    """A defense whose crafting does something to the network or the batch as well."""

    def craft(self: Any, model: Any, x: Any, y: Any, progress: Any, *, draws: Any = None) -> Any:
        meddle(model, x, y)
        return Good.craft(self, model, x, y, progress, draws=draws)

    return spoiled(craft=craft)


def losing(loss: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], base: type[Any] = Good) -> type[Any]:
    """A defense with this loss(model, x_adv, y)."""
    return spoiled(base, loss=lambda self, model, x, x_adv, y, progress: loss(model, x_adv, y))


def remembering(**values: Any) -> type[Any]:
    return spoiled(__post_init__=lambda self: self.memory.update(**values))


def deciding(after_epoch: Callable[[Any, Any, Any], Any], **members: Any) -> type[Any]:
    """A defense with this after_epoch(self, model, measure)."""
    return spoiled(after_epoch=lambda self, progress, model, measure: after_epoch(self, model, measure), **members)


def _ce(model: Any, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(model(x_adv), y)


def _descends_uphill(model: Any, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = _ce(model, x_adv, y)
    return 2 * loss.detach() - loss


def _own_parameter(model: Any, x_adv: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (torch.ones((), requires_grad=True) - 3) ** 2


def _nameless() -> type[Any]:
    @dataclass(frozen=True)
    class Nameless(Defense):
        """It says no name."""

        def loss(self, model: Any, x: Any, x_adv: Any, y: Any, progress: Any) -> torch.Tensor:
            return _ce(model, x_adv, y)

    return Nameless


def _own_stream() -> type[Any]:
    generator = torch.Generator().manual_seed(0)
    return spoiled(
        start_at=lambda self, draws: lambda x, eps: x + eps * (2 * torch.rand(x.shape, generator=generator) - 1)
    )


def _crafts_in_train_mode(self: Any, model: Any, x: Any, y: Any, progress: Any, *, draws: Any = None) -> Any:
    return Good.craft(replace(self, mode="train"), model, x, y, progress, draws=draws)


def _leave_gradient(model: Any) -> None:
    model[0].weight.grad = torch.zeros_like(model[0].weight)


# (what is wrong, the rule that must say so, what it says, the class)
BAD_DEFENSES: list[tuple[str, str, str, type[Any]]] = [
    ("another name", "named", "calls itself 'other'", spoiled(name="other")),
    ("no name", "named", "calls itself None", _nameless()),
    ("no docstring", "named", "no docstring", spoiled(__doc__=None)),
    ("not frozen", "frozen", "not a frozen dataclass", Thawed),
    ("memory holds a tuple", "frozen", "not plain JSON", remembering(seen=(1, 2))),
    ("memory with number keys", "frozen", "not plain JSON",
        spoiled(__post_init__=lambda self: self.memory.update({1: "a"}))),
    ("a field that JSON cannot hold", "frozen", "frozenset",
        spoiled(__annotations__={"seen": frozenset}, seen=frozenset({1}))),
    ("a field changed when made", "frozen", "made again",
        spoiled(__post_init__=lambda self: object.__setattr__(self, "eps", 0.9 * self.eps))),
    ("leaves the ball", "crafts_within", "from x, eps is",
        late(lambda self, c, x: {"x_adv": (c.x_adv + 0.3).clamp(0, 1)})),
    ("leaves [0, 1]", "crafts_within", "leaves [0, 1]", late(lambda self, c, x: {"x_adv": x + self.eps})),
    ("not a number", "crafts_within", "not finite", late(lambda self, c, x: {"x_adv": c.x_adv / 0 * 0})),
    ("loses an example", "crafts_within", "x_adv is (23, 1, 8, 8)", late(lambda self, c, x: {"x_adv": c.x_adv[1:]})),
    ("another order", "crafts_within", "from x, eps is 0.1000", late(lambda self, c, x: {"x_adv": c.x_adv.flip(0)})),
    ("another layout", "crafts_within", "not laid out like x",
        late(lambda self, c, x: {"x_adv": c.x_adv.mT.contiguous().mT})),
    ("steps not whole", "crafts_within", "not (N,) int64", late(lambda self, c, x: {"steps": c.steps.double()})),
    ("steps of others", "crafts_within", "not (N,) int64", late(lambda self, c, x: {"steps": c.steps[1:]})),
    ("more steps than K", "crafts_within", "more steps",
        late(lambda self, c, x: {"steps": c.steps + 1, "backwards": 10**6})),
    ("fewer steps than none", "crafts_within", "steps", late(lambda self, c, x: {"steps": -c.steps})),
    ("hides its backwards", "crafts_within", "count of backwards",
        late(lambda self, c, x: {"backwards": c.backwards - 1})),
    ("changes a weight", "leaves_no_trace", "network's weights",
        meddling(lambda net, x, y: net[0].weight.data.mul_(1.001))),
    ("crafts in train mode unsaid", "leaves_no_trace", "network's weights", spoiled(craft=_crafts_in_train_mode)),
    ("leaves eval mode", "leaves_no_trace", "network's modes", meddling(lambda net, x, y: net.eval())),
    ("leaves train mode", "leaves_no_trace", "network's modes", meddling(lambda net, x, y: net.train())),
    ("leaves gradients", "leaves_no_trace", "network's gradients", meddling(lambda net, x, y: _leave_gradient(net))),
    ("freezes a parameter", "leaves_no_trace", "network's learning",
        meddling(lambda net, x, y: net[-1].bias.requires_grad_(False))),
    ("writes into x", "leaves_no_trace", "the batch", meddling(lambda net, x, y: x[0, 0, 0].fill_(0.5))),
    ("writes into y", "leaves_no_trace", "the batch", meddling(lambda net, x, y: y[0].fill_(1))),
    ("takes from torch's stream", "leaves_no_trace", "torch's random stream",
        meddling(lambda net, x, y: torch.rand(1))),
    ("random without draws", "same_draws_same_examples", "other examples", _own_stream()),
    ("NaN loss", "learns", "the loss is nan", losing(lambda net, x_adv, y: _ce(net, x_adv, y) * torch.nan)),
    ("infinite loss", "learns", "the loss is inf", losing(lambda net, x_adv, y: _ce(net, x_adv, y) + torch.inf)),
    ("a loss an example", "learns", "the loss is tensor",
        losing(lambda net, x_adv, y: F.cross_entropy(net(x_adv), y, reduction="none"))),
    ("constant loss", "learns", "does not require grad", losing(lambda net, x_adv, y: torch.ones(()))),
    ("flat loss", "learns", "no gradient reaches", losing(lambda net, x_adv, y: 0 * _ce(net, x_adv, y) + 1)),
    ("loss that does not reach the network", "learns", "no gradient reaches", losing(_own_parameter)),
    ("loss that rises as it is descended", "learns", "did not lower it", losing(_descends_uphill)),
    ("after_epoch says True", "remembers", "returned bool", deciding(lambda self, net, measure: True)),
    ("after_epoch says nothing", "remembers", "returned NoneType", deciding(lambda self, net, measure: None)),
    ("measures another shape", "remembers", "not shaped like x",
        deciding(lambda self, net, measure: Verdict(bool(measure(lambda net, x, y, draws: x[1:]))))),
    ("decides outside its memory", "remembers", "memory is not all",
        deciding(lambda self, net, measure: object.__setattr__(self, "level", 1) or Verdict(),
                 steps_at=lambda self, progress: self.__dict__.get("level", 2))),
    ("comes to remember a set", "remembers", "JSON",
        deciding(lambda self, net, measure: self.memory.update(seen={1}) or Verdict())),
]  # fmt: skip

BAD_TWINS: list[tuple[str, type[Any]]] = [
    ("another loss", losing(lambda net, x_adv, y: 2 * _ce(net, x_adv, y), GoodTwin)),
    ("another step", spoiled(GoodTwin, step_at=lambda self, progress: self.eps / 5)),
    ("another start", spoiled(GoodTwin, start_at=lambda self, draws: lambda x, eps: x)),
    ("stops at the first mistake",
        spoiled(GoodTwin, stop=lambda self, progress, y: Fat.stop(replace(self, tau=0), progress, y))),
]  # fmt: skip


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, str]]]:
    """Registers a class and says which rules it breaks, with the reasons."""

    def check(kind: str, name: str, cls: type[Any], **others: type[Any]) -> dict[str, str]:
        monkeypatch.setattr(contract, f"{kind}s", {**others, name: cls})
        return {rule: reason for rule, reason in contract.check(kind, name) if reason}

    return check


def test_a_good_defense_and_its_twin_break_nothing(broken: Callable[..., dict[str, str]]) -> None:
    assert broken("defense", "mine", Good) == {}
    assert broken("defense", "fat-mine", GoodTwin, mine=Good) == {}
    assert broken("defense", "fat", spoiled(GoodTwin, name="fat"), madry=Madry) == {}


@pytest.mark.parametrize(("rule", "says", "cls"), [pytest.param(*bad, id=what) for what, *bad in BAD_DEFENSES])
def test_a_bad_defense_is_reported_by_its_rule_alone(
    broken: Callable[..., dict[str, str]], rule: str, says: str, cls: type[Any]
) -> None:
    wrong = broken("defense", "mine", cls)
    assert set(wrong) == {rule}
    assert says in wrong[rule] and "\n" not in wrong[rule]


@pytest.mark.parametrize("cls", [pytest.param(cls, id=what) for what, cls in BAD_TWINS])
def test_a_friendly_twin_that_is_not_its_base_is_reported(
    broken: Callable[..., dict[str, str]], cls: type[Any]
) -> None:
    assert set(broken("defense", "fat-mine", cls, mine=Good)) == {"friendly_twin"}
    assert set(broken("defense", "fat", spoiled(cls, name="fat"), madry=Madry)) == {"friendly_twin"}
    assert broken("defense", "fat-mine", cls) == {}, "without a base of that name there is nothing to equal"


# ------------------------------------------------------------------------------------ evaluations that break it


@dataclass(frozen=True)
class GoodAttack(Pgd):
    """An examiner that keeps every rule."""

    name: ClassVar[str] = "mine"

    steps: int = 2


def attacking(change: Callable[..., dict[str, Any]], **members: Any) -> type[Any]:
    """An examiner of whose Attacked this is replaced: change(model, chunk, eps, attacked)."""

    def attack(self: Any, model: Any, chunk: Any, eps: float) -> Any:
        attacked = GoodAttack.attack(self, model, chunk, eps)
        return attacked._replace(**change(model, chunk, eps, attacked))

    return spoiled(GoodAttack, attack=attack, **members)


def doing(act: Callable[[Any], Any]) -> type[Any]:
    """An examiner that does something to the network as well."""

    def change(model: Any, chunk: Any, eps: float, attacked: Any) -> dict[str, Any]:
        act(model)
        return {}

    return attacking(change)


GENERATOR = torch.Generator().manual_seed(0)

BAD_EVALUATIONS: list[tuple[str, str, str, type[Any]]] = [
    ("another name", "named", "calls itself 'other'", spoiled(GoodAttack, name="other")),
    ("no docstring", "named", "no docstring", spoiled(GoodAttack, __doc__=None)),
    ("loses an example", "attacks_within", "x_adv is (23, 1, 8, 8)",
        attacking(lambda net, chunk, eps, a: {"x_adv": a.x_adv[eps > 0 :]})),
    ("leaves the ball", "attacks_within", "outside the ball",
        attacking(lambda net, chunk, eps, a: {"x_adv": (chunk.x + 1.1 * eps).clamp(0, 1)})),
    ("leaves [0, 1]", "attacks_within", "outside the ball",
        attacking(lambda net, chunk, eps, a: {"x_adv": chunk.x + eps})),
    ("not finite", "attacks_within", "outside the ball",
        attacking(lambda net, chunk, eps, a: {"x_adv": a.x_adv + (torch.inf if eps else 0)})),
    ("counts no forwards", "attacks_within", "no forwards", attacking(lambda net, chunk, eps, a: {"forwards": 0})),
    ("changes a weight", "attacks_within", "network's weights", doing(lambda net: net[0].weight.data.mul_(1.001))),
    ("leaves train mode", "attacks_within", "the attack changed", doing(lambda net: net.train())),
    ("leaves gradients", "attacks_within", "network's gradients", doing(_leave_gradient)),
    ("thaws a parameter", "attacks_within", "network's learning",
        doing(lambda net: net[0].weight.requires_grad_(True))),
    ("random of its own", "repeats", "other examples",
        attacking(lambda net, chunk, eps, a: {
            "x_adv": (chunk.x + eps * (2 * torch.rand(chunk.x.shape, generator=GENERATOR) - 1)).clamp(0, 1)})),
    ("takes from torch's stream", "repeats", "torch's random stream", doing(lambda net: torch.rand(1))),
    ("has a budget of its own", "zero_budget", "with eps 0",
        attacking(lambda net, chunk, eps, a: {"x_adv": (chunk.x + 0.05).clamp(0, 1)})),
]  # fmt: skip


def test_a_good_evaluation_breaks_nothing(broken: Callable[..., dict[str, str]]) -> None:
    assert broken("evaluation", "mine", GoodAttack) == {}


@pytest.mark.parametrize(("rule", "says", "cls"), [pytest.param(*bad, id=what) for what, *bad in BAD_EVALUATIONS])
def test_a_bad_evaluation_is_reported_by_its_rule_alone(
    broken: Callable[..., dict[str, str]], rule: str, says: str, cls: type[Any]
) -> None:
    wrong = broken("evaluation", "mine", cls)
    assert set(wrong) == {rule}
    assert says in wrong[rule] and "\n" not in wrong[rule]


# ------------------------------------------------------------------------------------ the checking itself


def test_every_rule_has_somebody_who_breaks_it() -> None:
    assert {rule for _, rule, *_ in BAD_DEFENSES} | {"friendly_twin"} == {rule.__name__ for rule in DEFENSE_RULES}
    assert {rule for _, rule, *_ in BAD_EVALUATIONS} == {rule.__name__ for rule in EVALUATION_RULES}


def test_whatever_a_plugin_raises_breaks_that_rule_in_one_line_and_the_others_still_run(
    broken: Callable[..., dict[str, str]],
) -> None:
    def explode(net: Any, x_adv: Any, y: Any) -> torch.Tensor:
        raise ZeroDivisionError("one line\nand another")

    assert broken("defense", "mine", losing(explode)) == {"learns": "ZeroDivisionError: one line"}


def test_checking_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(Refused, match="did you mean fat-trades"):
        list(contract.check("defense", "fat-trade"))


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to put on PYTHONPATH: a distribution that registers a defense whose loss is flat."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "flat.py").write_text(
        "from dataclasses import dataclass\nfrom typing import ClassVar\nfrom fatbench.defense import Defense\n\n"
        "@dataclass(frozen=True)\nclass Flat(Defense):\n    'Learns nothing.'\n    name: ClassVar[str] = 'flat'\n\n"
        "    def loss(self, model, x, x_adv, y, progress):\n        return 0 * model(x_adv).sum()\n"
    )
    (folder / "flat-1.0.dist-info").mkdir()
    (folder / "flat-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: flat\nVersion: 1.0\n")
    (folder / "flat-1.0.dist-info" / "entry_points.txt").write_text("[fatbench.defenses]\nflat = flat:Flat\n")
    return folder


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (["fat"], 0, "ok      defense fat"),
        (["flat"], 1, "learns: no gradient reaches the network"),
        (["no-such"], 2, "unknown defense or evaluation 'no-such'"),
    ],
)
def test_check_exits_with_what_it_found(
    cli: Callable[..., Any], plugin: Path, names: list[str], code: int, said: str
) -> None:
    done = cli("check", *names, env={"PYTHONPATH": str(plugin)})
    assert done.returncode == code
    assert said in (done.stdout if code < 2 else done.stderr)
    assert code == 0 or len(done.stderr.strip().splitlines()) == 1
