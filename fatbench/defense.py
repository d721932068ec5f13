"""The contract of a defense: what a contestant says, and what the harness does for it.

A contestant is one frozen dataclass in a file of its own. Its fields are its hyper-parameters: what `--set` takes and
what a checkpoint stores. The harness owns optimizer, schedules, seeds, modes, logging and checkpoints. The smallest
contestant, FAT as `defenses/fat.py` has it:

    @dataclass(frozen=True)
    class Fat(FriendlyRule, Madry):
        '''FAT ...'''
        name: ClassVar[str] = "fat"

What a defense may say, beside `loss`, which it must: `objective`, `start_at`, `steps_at`, `eps_at`, `stop`, `craft`,
`after_epoch` with a plain JSON `memory`, and `average` for a moving average of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_type_hints

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from fatbench.attacks import STARTS, Crafted, Friendly, Mode, Noise, Objective, Start, StopRule, cross_entropy, pgd
from fatbench.draws import Draws
from fatbench.errors import Refused, unknown
from fatbench.quantities import (
    Count,
    CountSchedule,
    EpsSchedule,
    NonNegative,
    Number,
    Progress,
    Step,
    number,
    step_of,
    value_at,
)

T = TypeVar("T")
Craft = Callable[[nn.Module, Tensor, Tensor, Draws], Tensor]


class Measure(Protocol):
    """What the harness lends to `after_epoch`; the same figures on every rank.

    Attributes:
        train_accuracy: Share of this epoch's training examples, as they were trained on, classified rightly.
    """

    train_accuracy: float

    def __call__(self, craft: Craft) -> float:
        """Accuracy on the validation split at craft(model, x, y, draws) -> (N, C, H, W), in eval mode."""


class Verdict(NamedTuple):
    """What a defense asks of the harness after an epoch.

    Attributes:
        remember: Keep the present weights and optimizer state as this lesson's best.
        reload_best: Go back to what was last remembered.
    """

    remember: bool = False
    reload_best: bool = False


@dataclass(frozen=True)
class Defense:
    """What every defense has: the attack it trains on, PGD-K.

    Attributes:
        name: The registered name; the file's name, with hyphens.
        objective: What its attack climbs.
        memory: State that training changes, plain JSON, saved and restored by the harness.
    """

    name: ClassVar[str]
    objective: ClassVar[Objective] = cross_entropy

    eps: Annotated[Number, Field(ge=0, le=1)] = 8 / 255  # radius; the dataset's unless given
    step_size: Step | None = None  # alpha, a number or a share of the present eps such as eps/10; eps/4 unless given
    steps: Count = 10  # K
    start: Literal["uniform", "gaussian", "natural"] = "uniform"  # Algorithm 1 says natural, FAT.py:58 does uniform
    clamp_start: bool = True  # FAT clamps its start to [0, 1] (earlystop.py:31-35); TRADES and MART do not
    omega: NonNegative = 0.0  # noise a step: 0 in the paper, 0.001 in FAT.py:27
    project: bool = True  # False: search without the eps-ball (FAT, Appendix B)
    mode: Mode = "eval"  # BatchNorm while crafting: eval in FAT, TRADES, MART, DAT; train in Madry's code and CAT
    eps_schedule: EpsSchedule | None = None  # eps growing over training (FAT, section 6.1)
    memory: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def loss(self, model: nn.Module, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        """The scalar to descend, on a batch of clean x and crafted x_adv (N, C, H, W), labels y (N,)."""
        raise NotImplementedError(f"{type(self).__name__} must say what it minimises")

    def eps_at(self, progress: Progress) -> float:
        return self.eps if self.eps_schedule is None else number(value_at(self.eps_schedule, progress))

    def step_at(self, progress: Progress) -> float:
        return step_of("eps/4" if self.step_size is None else self.step_size, self.eps_at(progress))

    def steps_at(self, progress: Progress) -> int:
        return self.steps

    def start_at(self, draws: Draws | None) -> Start:
        """Where the attack begins."""
        return partial(STARTS[self.start], draws=draws, clamp=self.clamp_start)

    def stop(self, progress: Progress, y: Tensor) -> StopRule | None:
        """Who need not go on; None: everyone takes all K steps."""
        return None

    def craft(
        self, model: nn.Module, x: Tensor, y: Tensor, progress: Progress, *, draws: Draws | None = None
    ) -> Crafted:
        """The training examples of a batch. `draws` is the batch's own noise; without it, torch's stream is used."""
        return pgd(
            model,
            x,
            y,
            eps=self.eps_at(progress),
            step_size=self.step_at(progress),
            steps=self.steps_at(progress),
            objective=self.objective,
            start=self.start_at(draws),
            stop=self.stop(progress, y),
            noise=self.step_noise(x, draws),
            project=self.project,
            mode=self.mode,
        )

    def step_noise(self, x: Tensor, draws: Draws | None) -> float | Noise:
        """omega N(0, 1) a step, drawn for each example from its own stream."""
        if not self.omega or draws is None:
            return self.omega
        return lambda k, which: self.omega * draws.rows(which.cpu().numpy()).normal(x[which], f"step {k}")

    def after_epoch(self, progress: Progress, model: nn.Module, measure: Measure) -> Verdict:
        """Called with `progress` counting the epoch just done. A curriculum decides here, in `memory`."""
        return Verdict()

    def average(self, progress: Progress) -> float | None:
        """The decay of a moving average of the weights, kept by the harness and what it saves; None: no average."""
        return None


@dataclass(frozen=True)
class FriendlyRule:
    """The friendly counterpart of a defense: the same defense, its attack stopped early for each example.

    The early-stopped search of FAT (ICML 2020), Algorithm 1; with tau = K the base defense, bit for bit.
    """

    # tau over the epochs: the steps an example still takes once it is misclassified. FAT.py:77-99, epochs 1-50, 51-90,
    # 91-120; the paper's Figure 4 holds it fixed, `--set tau=0`.
    tau: CountSchedule = (("0", 0), ("50/120", 1), ("90/120", 2))

    def stop(self, progress: Progress, y: Tensor) -> StopRule | None:
        friendly = Friendly(value_at(self.tau, progress), y)
        base: StopRule | None = super().stop(progress, y)  # type: ignore[misc]
        return friendly if base is None else base | friendly


def settings_of(cls: type[Any]) -> dict[str, tuple[Any, Any]]:
    """The fields of a contestant or an examiner: name -> (type, default), in order. MISSING where it has no default."""
    hints = get_type_hints(cls, include_extras=True)
    return {
        f.name: (hints[f.name], f.default_factory() if f.default_factory is not MISSING else f.default)
        for f in fields(cls)
        if f.init
    }


def build(cls: type[T], values: dict[str, Any]) -> T:
    """A contestant or an examiner with these fields, each checked against its type.

    Raises:
        Refused: an unknown field (the closest are named), or a value of the wrong type or out of range.
    """
    known = settings_of(cls)
    checked = {}
    for key, value in values.items():
        if key.replace("-", "_") not in known:
            raise unknown(f"field of {getattr(cls, 'name', cls.__name__)}", key, known)
        checked[key.replace("-", "_")] = checked_value(cls, key.replace("-", "_"), known, value)
    return cls(**checked)


def checked_value(cls: type[Any], key: str, known: dict[str, tuple[Any, Any]], value: Any) -> Any:
    """One field's value, made what its type says (lists become tuples, "8/255" a number) or refused."""
    try:
        return TypeAdapter(known[key][0], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reason = "; ".join(dict.fromkeys(e["msg"].removeprefix("Value error, ") for e in error.errors()))
        raise Refused(f"{getattr(cls, 'name', cls.__name__)}: {key}={value!r}: {reason}") from None


def fields_as_stored(defense: Any) -> dict[str, Any]:
    """A contestant's fields as plain JSON: what a checkpoint and a record keep."""
    return {name: _plain(getattr(defense, name)) for name in settings_of(type(defense))}


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


@torch.no_grad()
def eval_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits in eval mode, no gradient, every module's own mode put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    logits: Tensor = model(x)
    for module, mode in modes:
        module.training = mode
    return logits
