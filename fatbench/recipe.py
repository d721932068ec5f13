"""The typed settings of a training run: what a recipe file, the command line and `--set` may say, and nothing else."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from fatbench.catalogue import described, network
from fatbench.errors import Refused, first_line, unknown
from fatbench.protocol import told
from fatbench.quantities import Eps, Moment, NonNegative, Positive, Progress, ascending, number, value_at

Divisors = Annotated[tuple[tuple[Moment, Positive], ...], AfterValidator(ascending)]


class Settings(BaseModel):
    """One run, whole: the same settings on the same data train the same network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    defense: str = Field(description="a registered defense")
    dataset: str = Field(default="digits", description="a name, path.npz, or a folder with train/ and test/")
    arch: str = Field(description="the network; the dataset's default unless given")
    eps: Eps = Field(description="l-inf budget in pixel units, 8/255 or 0.031; the dataset's unless given")
    epochs: int = Field(default=120, ge=1, description="passes over the training examples; 120 in FAT.py")
    batch_size: int = Field(default=128, ge=1, description="examples a step, over all devices; 128 in the papers")
    lr: Positive = Field(default=0.1, description="learning rate of SGD at the start")
    lr_divisors: Divisors = Field(
        default=(("0", 1.0), ("59/120", 10.0), ("89/120", 100.0), ("109/120", 200.0)),
        description="lr is divided by so much from this share of the epochs on; FAT.py: epochs 60, 90, 110 of 120",
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="of SGD, without Nesterov")
    weight_decay: NonNegative = Field(default=2e-4, description="on all parameters, as in FAT, TRADES and MART")
    seed: int = Field(default=0, ge=0, le=2**31 - 1, description="of initial weights, order, crops and noise")
    n_train: int | None = Field(
        default=None, ge=1, description="so many class-balanced training examples; all unless given"
    )
    validation: float = Field(default=0.1, gt=0, lt=1, description="share of the training examples held for selection")
    augment: Literal["none", "crop", "crop-flip"] = Field(default="none", description="the dataset's unless given")
    precision: Literal["32-true", "bf16-mixed", "64-true"] = Field(
        default="32-true", description="as Lightning names it"
    )
    mean: tuple[float, ...] | None = Field(default=None, description="of each channel, taken off inside the network")
    std: tuple[Positive, ...] | None = Field(default=None, description="of each channel, divided by inside the network")
    fields: dict[str, Any] = Field(default_factory=dict, description="the defense's own hyper-parameters")
    source: str = Field(default="", description="where a recipe's numbers come from")

    def lr_at(self, progress: Progress) -> float:
        return float(self.lr / value_at(self.lr_divisors, progress))

    def toml(self) -> str:
        """These settings as a recipe file; what is unset is left out."""
        return tomli_w.dumps(_without_none(self.model_dump(mode="json")))


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return value


@cache
def shelf() -> dict[str, Path]:
    """The built-in recipes: name -> file."""
    return {path.stem: path for path in sorted((Path(str(files("fatbench.defenses"))) / "recipes").glob("*.toml"))}


def read(recipe: str) -> dict[str, Any]:
    """What a recipe says, by name or from a user's own `path.toml`."""
    path = Path(recipe) if recipe.endswith(".toml") else shelf().get(recipe.replace("_", "-"))
    if path is None:
        raise unknown("recipe", recipe, shelf())
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"cannot read the recipe {path}: {first_line(error)}") from None


def resolve(defense: str | None, *, recipe: str | None = None, sets: Sequence[str] = (), **options: Any) -> Settings:
    """The settings of a run: the command line over the recipe over the dataset's defaults.

    Args:
        defense: A registered name; may be left out where the recipe names one.
        recipe: A recipe's name or file.
        sets: `key=value`, a setting or a field of the defense; the value as TOML writes it, or bare text.
        options: Settings from the command line, None where not given.

    Raises:
        Refused: an unknown name, key or recipe, or a value that does not fit; everything wrong in one line.
    """
    said = read(recipe) if recipe else {}
    if defense and said.get("defense", defense).replace("_", "-") != defense.replace("_", "-"):
        raise Refused(
            f"the recipe {recipe} is for {said['defense']}, not {defense}: leave the defense out, or the recipe"
        )
    said |= {key: value for key, value in options.items() if value is not None}
    said["defense"] = (defense or said.get("defense") or "").replace("_", "-")
    if not said["defense"]:
        raise Refused("which defense? name one (fatbench list defenses), or give a recipe that does")
    said["fields"] = dict(said.get("fields", {}))
    for key, value in map(_pair, sets):
        place = said if key in Settings.model_fields and key not in ("fields", "defense") else said["fields"]
        place[key] = value
    return _validated(_with_defaults(said))


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise Refused(f"--set {text!r}: write key=value, such as --set tau=1")
    try:
        return key.strip().replace("-", "_"), tomllib.loads(f"v = {value.strip()}")["v"]
    except tomllib.TOMLDecodeError:
        return key.strip().replace("-", "_"), value.strip()


def _with_defaults(said: dict[str, Any]) -> dict[str, Any]:
    name = str(said.get("dataset", "digits"))
    info = described(name)
    said["dataset"] = info.name if info.shape else name
    said = {"arch": info.arch, "augment": info.augment} | ({"eps": info.eps} if info.eps else {}) | said
    if "eps" not in said:
        raise Refused(f"{name} has no default budget: give --eps, such as --eps 8/255")
    if isinstance(said["arch"], str):
        said["arch"] = said["arch"].replace("_", "-")
    return said


def _validated(said: dict[str, Any]) -> Settings:
    from fatbench.defense import build, fields_as_stored
    from fatbench.registry import defenses

    for key in said:
        if key not in Settings.model_fields:
            raise unknown("setting", key, Settings.model_fields)
    try:
        settings = Settings.model_validate(said)
    except ValidationError as error:
        raise Refused(f"settings: {told(error)}") from None
    network(settings.arch)
    if (settings.mean is None) != (settings.std is None):
        raise Refused("settings: mean and std go together")
    contestant = build(defenses[settings.defense], {**settings.fields, "eps": number(settings.eps)})
    stored = {key: value for key, value in fields_as_stored(contestant).items() if key != "eps"}
    return settings.model_copy(update={"fields": stored})


def contestant(settings: Settings) -> Any:
    """The defense that these settings describe."""
    from fatbench.defense import build
    from fatbench.registry import defenses

    fields = {key: value for key, value in settings.fields.items() if value is not None}
    return build(defenses[settings.defense], {**fields, "eps": number(settings.eps)})


def difference(ours: Settings, theirs: Settings) -> str:
    """How two runs' settings differ, `lr: 0.1 -> 0.05; seed: 0 -> 1`; empty where they do not."""
    a, b = ours.model_dump(mode="json"), theirs.model_dump(mode="json")
    flat_a = {**a.pop("fields"), **a}
    flat_b = {**b.pop("fields"), **b}
    keys = sorted(flat_a.keys() | flat_b.keys())
    return "; ".join(f"{k}: {flat_a.get(k)} -> {flat_b.get(k)}" for k in keys if flat_a.get(k) != flat_b.get(k))
