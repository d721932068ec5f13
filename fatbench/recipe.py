"""The typed settings of a training run: what a recipe file, the command line and `--set` may say, and nothing else.

A recipe is settings with a name, the source of its numbers, the protocols that its row or curve is examined under, and,
where it is a curve, the values swept: `defenses/recipes/*.toml`, or anybody's own file. Reading one imports no torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from fatbench.catalogue import described, network, shape_of
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
        default=None, ge=1, description="so many training examples, each class at its share; all unless given"
    )
    validation: float = Field(
        default=0.1, ge=0, lt=1,
        description="share of the training examples held for selection; 0, as the papers train, leaves no `best`",
    )  # fmt: skip
    augment: Literal["none", "crop", "crop-flip"] = Field(default="none", description="the dataset's unless given")
    precision: Literal["32-true", "bf16-mixed", "64-true"] = Field(
        default="32-true", description="as Lightning names it"
    )
    ranks: int = Field(default=1, ge=1, description="processes that share a batch: --devices times --nodes")
    sync_bn: bool = Field(
        default=False, description="BatchNorm's batch is the whole batch, not a rank's share; GPUs only"
    )
    mean: tuple[float, ...] | None = Field(default=None, description="of each channel, taken off inside the network")
    std: tuple[Positive, ...] | None = Field(default=None, description="of each channel, divided by inside the network")
    fields: dict[str, Any] = Field(default_factory=dict, description="the defense's own hyper-parameters")
    source: str = Field(default="", description="where a recipe's numbers come from")
    shape: tuple[int, int, int] | None = Field(
        default=None, description="(C, H, W) that the data must have: a recipe's, where the data is not its own"
    )

    def lr_at(self, progress: Progress) -> float:
        return float(self.lr / value_at(self.lr_divisors, progress))

    def toml(self) -> str:
        """These settings as a recipe file; what is unset is left out."""
        return tomli_w.dumps(without_none(self.model_dump(mode="json")))


def without_none(value: Any) -> Any:
    """What is said, without what is unset, all the way down: TOML knows no null."""
    if isinstance(value, dict):
        return {key: without_none(v) for key, v in value.items() if v is not None}
    return value


def shared(settings: dict[str, Any]) -> dict[str, Any]:
    """What the runs of one contestant share, of a run's settings: all but the seed, and who says so."""
    return {key: value for key, value in without_none(settings).items() if key not in ("seed", "source", "shape")}


class Recipe(BaseModel):
    """What a recipe file says: settings at the top level, `[fields]` of the defense, and these."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9.-]*)?$", description="as the shelf lists it")
    summary: str = Field(default="", description="one line")
    source: str = Field(default="", description="the table or figure, and the file, that its numbers are taken from")
    protocols: tuple[str, ...] = Field(default=(), description="what its row or curve is examined under, by name")
    sweep: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)]] = Field(
        default_factory=dict, description="a setting or a field -> its values; every combination is a run"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="all else that the file says")

    @model_validator(mode="after")
    def _each_value_once(self) -> Recipe:
        for key, values in self.sweep.items():
            if key in ("defense", "fields", "source", "shape"):
                raise ValueError(f"sweep: {key!r} cannot be swept: write a recipe for each")
            if any(value in values[:i] for i, value in enumerate(values)):
                raise ValueError(f"sweep.{key} names a value twice")
            if key in self.settings or key in self.settings.get("fields", {}):
                raise ValueError(f"{key!r} is both set and swept: leave one out")
        return self


@cache
def shelf() -> dict[str, Path]:
    """The built-in recipes: name -> file."""
    return {path.stem: path for path in sorted((Path(str(files("fatbench.defenses"))) / "recipes").glob("*.toml"))}


def file_of(recipe: str) -> Path:
    """Where a recipe lies: one of the shelf by name, or a user's own `path.toml`."""
    path = Path(recipe) if recipe.endswith(".toml") else shelf().get(recipe.replace("_", "-"))
    if path is None:
        raise unknown("recipe", recipe, shelf(), listed_by="fatbench list recipes")
    return path


def load(recipe: str) -> Recipe:
    """A recipe by name, or from a user's own `path.toml`.

    Raises:
        Refused: no such recipe, a file that is none, or one of the user's under a built-in one's name.
    """
    path = file_of(recipe)
    return page_of(said_in(path), path)


def said_in(path: Path) -> dict[str, Any]:
    """A recipe file's content, not yet looked at."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise Refused(f"cannot read the recipe {path}: {first_line(error)}") from None


def page_of(said: dict[str, Any], path: Path) -> Recipe:
    """The recipe that a file's content is; what it takes out of `said` is gone from there."""
    own = {key: said.pop(key) for key in Recipe.model_fields.keys() - {"settings"} if key in said}
    if not isinstance(said.get("fields", {}), dict):
        raise Refused(f"the recipe {path}: fields is a table: write [fields] and the defense's own settings below it")
    try:
        page = Recipe.model_validate({**own, "settings": said})
    except ValidationError as error:
        raise Refused(f"the recipe {path}: {told(error)}") from None
    if page.name in shelf() and path.resolve() != shelf()[page.name].resolve():
        raise Refused(f"the recipe {path} calls itself {page.name!r}, as a built-in one does: rename it")
    return page


def resolve(defense: str | None, *, recipe: str | None = None, sets: Sequence[str] = (), **options: Any) -> Settings:
    """The settings of a run: the command line over the recipe over the dataset's defaults.

    Args:
        defense: A registered name; may be left out where the recipe names one.
        recipe: A recipe's name or file.
        sets: `key=value`, a setting or a field of the defense; the value as TOML writes it, or bare text.
        options: Settings from the command line, None where not given.

    Raises:
        Refused: an unknown name, key or recipe, a value that does not fit, a swept value that was not chosen, or data
            of another shape than the recipe's; everything wrong in one line.
    """
    page = load(recipe) if recipe else Recipe()
    return _resolved(page, recipe or "", defense, list(map(_pair, sets)), options)


def points(recipe: str, *, sets: Sequence[str] = (), **options: Any) -> dict[str, Settings]:
    """Every run of a recipe, in its file's order: `"eps=0.03 tau=1"` -> its settings, `""` where nothing is swept.

    What `sets` and `options` choose (as in `resolve`) is not swept any more.
    """
    page, pairs = load(recipe), list(map(_pair, sets))
    chosen = {key for key, _ in pairs} | {key for key, value in options.items() if value is not None}
    axes = {key: values for key, values in page.sweep.items() if key not in chosen}
    found = {}
    for values in product(*axes.values()):
        point = list(zip(axes, values, strict=True))
        label = " ".join(f"{key}={value}" for key, value in point)
        found[label] = _resolved(page, recipe, None, pairs + point, options)
    return found


def _resolved(
    page: Recipe, recipe: str, defense: str | None, pairs: Sequence[tuple[str, Any]], options: Mapping[str, Any]
) -> Settings:
    said = dict(page.settings)
    if defense and str(said.get("defense", defense)).replace("_", "-") != defense.replace("_", "-"):
        raise Refused(
            f"the recipe {recipe} is for {said['defense']}, not {defense}: leave the defense out, or the recipe"
        )
    said |= {"source": page.source} if page.source else {}
    said |= {key: value for key, value in options.items() if value is not None}
    said["defense"] = (defense or str(said.get("defense", ""))).replace("_", "-")
    if not said["defense"]:
        raise Refused("which defense? name one (fatbench list defenses), or give a recipe that does")
    said["fields"] = dict(said.get("fields", {}))
    for key, value in pairs:
        place = said if key in Settings.model_fields and key not in ("fields", "defense") else said["fields"]
        place[key] = value
    if open_ := {k: values for k, values in page.sweep.items() if k not in said and k not in said["fields"]}:
        raise Refused(_unchosen(recipe, open_))
    said = _with_defaults(said)
    own = str(page.settings.get("dataset", ""))
    if own and said["dataset"] not in (own, own.lower().replace("_", "-")):
        said.setdefault("shape", shape_of(own))  # kept: a user's data tells its shape when it is loaded
    settings = _validated(said)
    fits(settings, shape_of(settings.dataset), settings.dataset)
    return settings


# What `fatbench train` has an option for; anything else is chosen by --set.
_OPTIONS = ("dataset", "arch", "epochs", "batch_size", "lr", "eps", "seed", "n_train", "precision")


def chosen_by(key: str, value: object) -> str:
    """How the command line says it: `--eps 0.06`, `--set tau=3`."""
    return f"--{key.replace('_', '-')} {value}" if key in _OPTIONS else f"--set {key}={value}"


def _unchosen(recipe: str, sweep: Mapping[str, Sequence[Any]]) -> str:
    values = " and ".join(f"{key} ({', '.join(map(str, values))})" for key, values in sweep.items())
    how = " ".join(chosen_by(key, values[0]) for key, values in sweep.items())
    return f"the recipe {recipe} sweeps {values}: choose one run of it, such as {how}"


def fits(settings: Settings, shape: tuple[int, int, int] | None, name: str) -> None:
    """Raises Refused where a recipe's numbers are for images of another shape (C, H, W) than these."""
    if settings.shape and shape and settings.shape != shape:
        wanted, found = ("x".join(map(str, sides)) for sides in (settings.shape, shape))
        raise Refused(
            f"the recipe is for images of {wanted}, and {name} has {found}: leave --dataset out, give data of that "
            "shape, or name the defense and its settings without the recipe"
        )


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
    if "eps" in settings.fields:
        raise Refused("settings: eps stands above [fields], among the run's own settings")
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
