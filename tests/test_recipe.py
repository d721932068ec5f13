"""Settings mean exactly what was written, come from the right place, and are refused in one line where they do not."""

import json
import math
import tomllib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from fatbench import recipe
from fatbench.defense import build
from fatbench.errors import Refused
from fatbench.quantities import (
    CountSchedule,
    Eps,
    EpsSchedule,
    Progress,
    StepSize,
    eps_class,
    moment,
    number,
    published,
    step_of,
    value_at,
)
from fatbench.recipe import Settings, contestant, difference, resolve
from fatbench.registry import defenses

few = settings(max_examples=60, deadline=None, derandomize=True)


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """What a refused call says, which must be one line."""
    with pytest.raises(Refused) as refused:
        call(*arguments, **options)
    said = str(refused.value)
    assert said and "\n" not in said
    return said


# ------------------------------------------------------------------------------------ quantities


@few
@given(st.integers(-500, 500), st.integers(1, 500))
def test_a_fraction_is_the_nearest_float(above: int, below: int) -> None:
    assert number(f"{above}/{below}") == above / below
    assert number(f" {above}/{below} ") == above / below


@few
@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**9), 10**9))
def test_a_number_is_itself_as_number_or_text(value: float) -> None:
    assert number(value) == value
    assert number(repr(value)) == value


@pytest.mark.parametrize(
    "bad",
    ["8/0", "8/255/3", "", " ", "/", "8/", "eight", "0.1.2", "1e400", "0x10", "nan", "inf", "-inf", math.nan, math.inf,
     -math.inf, 10**400, True, False, None, [8, 255], {"eps": 1}, b"0.1", 1j],
    ids=repr,
)  # fmt: skip
def test_what_is_no_finite_number_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match=r"not a number|divides by zero|not finite") as refused:
        number(bad)
    assert "\n" not in str(refused.value)


@few
@given(st.text(max_size=8))
def test_any_text_is_a_finite_number_or_a_value_error(text: str) -> None:
    try:
        assert math.isfinite(number(text))
    except ValueError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["8/255", "0.031", "0", "1", "1/1", ".5", "16/510"])
def test_eps_is_kept_to_the_letter(text: str) -> None:
    assert published(text) == text
    assert published(f" {text}\n") == text


def test_eps_given_as_a_number_is_kept_as_python_writes_it() -> None:
    assert [published(value) for value in (0.031, 1, 0.1)] == ["0.031", "1", "0.1"]


@pytest.mark.parametrize("bad", ["-0.1", "-1/255", "1.0001", "256/255", "8", 8, -1, "nan", math.inf, "8/0", True, None])
def test_eps_outside_the_pixels_is_refused(bad: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Eps).validate_python(bad)


@pytest.mark.parametrize(
    ("eps", "group"),
    [
        ("8/255", "8/255"), ("0.031", "8/255"), ("0.0314", "8/255"), ("0.03100", "8/255"), ("16/510", "8/255"),
        (".031", "8/255"), ("16/255", "16/255"), ("0.062", "16/255"), ("0.0627", "16/255"), ("4/255", "4/255"),
        ("0.0157", "4/255"), ("12/255", "12/255"), ("0.3", "0.3"), ("0.30", "0.3"), ("0.1", "0.1"), ("1/100", "0.01"),
        ("0.032", "0.032"), ("0.03", "0.03"), ("0.061", "0.061"), ("0.5/255", None),
    ],
)  # fmt: skip
def test_an_eps_belongs_to_the_class_that_papers_mean(eps: str, group: str | None) -> None:
    if group is None:
        with pytest.raises(ValueError):
            published(eps)
    else:
        assert eps_class(published(eps)) == group


@few
@given(st.integers(1, 254).filter(lambda levels: levels % 51))  # 51/255 is 0.2
def test_a_whole_number_of_grey_levels_is_its_own_class(levels: int) -> None:
    assert eps_class(f"{levels}/255") == f"{levels}/255"
    assert eps_class(f"{3 * levels}/765") == f"{levels}/255"


@pytest.mark.parametrize("good", ["0", "1", "59/120", "0.5", " 1/3", 1, 0.25])
def test_a_moment_is_a_share_of_the_run_kept_to_the_letter(good: object) -> None:
    assert moment(good) == str(good)


@pytest.mark.parametrize(
    "bad", ["1/0", "-1/120", "121/120", "1.01", "half", "", "nan", "inf", None, True, [1, 2], "1/2/3"]
)
def test_what_is_no_share_of_the_run_is_refused(bad: object) -> None:
    with pytest.raises(ValueError, match="fraction"):
        moment(bad)


@few
@given(
    cuts=st.lists(st.integers(1, 119), unique=True, max_size=5).map(sorted),
    times=st.integers(1, 3),
    done=st.integers(0, 119),
)
def test_a_schedule_changes_exactly_at_its_epochs_however_long_the_run(cuts: list[int], times: int, done: int) -> None:
    written = (("0", 0), *((f"{cut}/120", i) for i, cut in enumerate(cuts, start=1)))
    schedule = TypeAdapter(CountSchedule).validate_python(written)
    assert value_at(schedule, Progress(done * times, 120 * times)) == sum(cut <= done for cut in cuts)


@pytest.mark.parametrize("plain", [0, 3, 0.5, "8/255", None])
def test_a_plain_value_says_the_same_throughout(plain: Any) -> None:
    assert {value_at(plain, Progress(done, 3)) for done in range(3)} == {plain}


def test_thirds_of_a_run_are_exact() -> None:
    schedule = (("0", 0), ("1/3", 1), ("2/3", 2))
    assert [value_at(schedule, Progress(done, 9)) for done in range(9)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert Progress(1, 3).fraction == Fraction(1, 3)


@pytest.mark.parametrize(
    ("kind", "bad"),
    [
        (CountSchedule, []), (CountSchedule, [["1/2", 1]]), (CountSchedule, [["0", 0], ["0", 1]]),
        (CountSchedule, [["0", 0], ["2/3", 1], ["1/3", 2]]), (CountSchedule, [["0", -1]]), (CountSchedule, -1),
        (CountSchedule, [["0", 0.5]]), (CountSchedule, "1/2"), (CountSchedule, [["0"]]), (EpsSchedule, [["0", "2"]]),
        (EpsSchedule, [["0", "8/0"]]), (EpsSchedule, "8/255"), (EpsSchedule, [["3/2", "8/255"]]),
    ],
    ids=lambda value: ("counts" if value is CountSchedule else "budgets" if value is EpsSchedule else str(value)),
)  # fmt: skip
def test_a_schedule_that_does_not_start_at_nought_and_rise_is_refused(kind: Any, bad: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(kind).validate_python(bad)


@pytest.mark.parametrize(
    ("text", "size"),
    [("eps", 0.3), ("eps/4", 0.3 / 4), ("eps/10", 0.03), ("2/255", 2 / 255), ("0.003", 0.003), (0.003, 0.003),
     (" eps/4 ", 0.3 / 4)],
)  # fmt: skip
def test_a_step_is_a_number_or_a_share_of_eps(text: object, size: float) -> None:
    assert step_of(TypeAdapter(StepSize).validate_python(text), 0.3) == pytest.approx(size, abs=1e-15)


@pytest.mark.parametrize(
    "bad", ["", "eps/", "eps/0", "eps/eps", "eps*2", "epsilon", "4/eps", "nan", "eps/nan", "1/0", None, True]
)
def test_what_is_no_step_is_refused(bad: object) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(StepSize).validate_python(bad)


# ------------------------------------------------------------------------------------ where a setting comes from


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., str]:
    """Writes a recipe file of these settings (or of this text) and returns its path."""

    def write(text: str | None = None, **said: Any) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps(said) if text is None else text, encoding="utf-8")
        return str(path)

    return write


def test_the_command_line_goes_over_the_recipe_over_the_datasets_defaults(written: Callable[..., str]) -> None:
    plain = resolve("fat", dataset="cifar10")
    assert (plain.eps, plain.arch, plain.augment) == ("8/255", "resnet-18", "crop-flip")
    path = written(dataset="cifar10", eps="4/255", arch="small-cnn", lr=0.05, seed=3)
    cooked = resolve("fat", recipe=path)
    assert (cooked.eps, cooked.arch, cooked.augment) == ("4/255", "small-cnn", "crop-flip")
    assert (cooked.lr, cooked.seed, cooked.epochs) == (0.05, 3, 120)
    ordered = resolve("fat", recipe=path, eps="0.031", seed=0, sets=["lr=0.2"])
    assert (ordered.eps, ordered.seed, ordered.lr, ordered.arch) == ("0.031", 0, 0.2, "small-cnn")


def test_an_option_that_was_not_given_leaves_the_recipe_its_word(written: Callable[..., str]) -> None:
    assert resolve("fat", recipe=written(epochs=7), epochs=None, lr=None).epochs == 7


def test_set_goes_over_the_recipes_fields_and_leaves_the_others(written: Callable[..., str]) -> None:
    path = written(fields={"tau": 3, "omega": 0.001})
    fields = resolve("fat", recipe=path, sets=["tau=1"]).fields
    assert (fields["tau"], fields["omega"]) == (1, 0.001)
    assert tomllib.loads(Path(path).read_text())["fields"] == {"tau": 3, "omega": 0.001}


def test_of_two_sets_of_one_key_the_later_counts() -> None:
    assert resolve("fat", sets=["tau=1", "tau=2"]).fields["tau"] == 2


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("digits", ("0.3", "digits-cnn", "none")), ("cifar100", ("8/255", "resnet-18", "crop-flip")),
        ("svhn", ("4/255", "resnet-18", "crop")), ("mnist", ("0.3", "small-cnn", "none")),
        ("fashion_mnist", ("0.1", "small-cnn", "none")), ("CIFAR10", ("8/255", "resnet-18", "crop-flip")),
    ],
)  # fmt: skip
def test_each_dataset_brings_its_defaults(dataset: str, expected: tuple[str, str, str]) -> None:
    said = resolve("madry", dataset=dataset)
    assert (said.eps, said.arch, said.augment) == expected
    assert said.dataset == dataset.lower().replace("_", "-")


def test_ones_own_data_has_no_budget_unless_given(npz: Callable[..., Path]) -> None:
    path = str(npz())
    assert "give --eps" in refusal(resolve, "fat", dataset=path)
    said = resolve("fat", dataset=path, eps="0.05")
    assert (said.dataset, said.eps, said.arch) == (path, "0.05", "digits-cnn")


@pytest.mark.parametrize(("dataset", "says"), [("mine.npz", "no dataset at"), ("cifar-10", "did you mean cifar10")])
def test_a_dataset_that_is_not_there_is_refused(dataset: str, says: str) -> None:
    assert says in refusal(resolve, "fat", dataset=dataset, eps="0.1")


def test_names_are_taken_with_underscores_too(written: Callable[..., str]) -> None:
    said = resolve("fat_trades", arch="small_cnn", recipe=written(defense="fat_trades"), sets=["step-size=0.01"])
    assert (said.defense, said.arch, said.fields["step_size"]) == ("fat-trades", "small-cnn", 0.01)


def test_a_recipe_may_name_the_defense(written: Callable[..., str]) -> None:
    assert resolve(None, recipe=written(defense="fat_mart")).defense == "fat-mart"
    assert resolve("fat-mart", recipe=written(defense="fat_mart")).defense == "fat-mart"


def test_a_run_without_a_defense_is_refused(written: Callable[..., str]) -> None:
    assert "which defense" in refusal(resolve, None)
    assert "which defense" in refusal(resolve, None, recipe=written(epochs=3))


def test_a_recipe_for_another_defense_is_refused(written: Callable[..., str]) -> None:
    assert "is for trades, not fat" in refusal(resolve, "fat", recipe=written(defense="trades"))


# ------------------------------------------------------------------------------------ what --set takes


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("tau=1", "tau", 1), (" tau = 1 ", "tau", 1), ("omega=0.001", "omega", 0.001), ("omega=1/1000", "omega", 0.001),
        ("tau=[['0', 0], ['1/2', 3]]", "tau", [["0", 0], ["1/2", 3]]), ("start=natural", "start", "natural"),
        ("start = natural ", "start", "natural"), ("start='natural'", "start", "natural"),
        ('start="natural"', "start", "natural"), ("project=false", "project", False),
        ("project=False", "project", False),
        ("clamp_start=no", "clamp_start", False), ("clamp-start=0", "clamp_start", False),
        ("step_size=2/255", "step_size", 2 / 255), ("step_size=eps/10", "step_size", "eps/10"),
        ("step_size=eps", "step_size", "eps"), ("eps_schedule=[['0', '2/255']]", "eps_schedule", [["0", "2/255"]]),
    ],
)  # fmt: skip
def test_set_gives_a_field_its_value_as_toml_or_bare_text(text: str, key: str, value: object) -> None:
    found = resolve("fat", sets=[text]).fields[key]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("lr=0.01", "lr", 0.01), ("lr=1/10", "lr", 0.1), ("batch-size=64", "batch_size", 64),
        ("augment=crop", "augment", "crop"), ("eps=8/255", "eps", "8/255"), ("eps=0.1", "eps", "0.1"),
        ("momentum=0", "momentum", 0.0), ("dataset=svhn", "dataset", "svhn"),
        ("lr_divisors=[['0', 1], ['1/2', 10]]", "lr_divisors", (("0", 1.0), ("1/2", 10.0))),
        ("source=Table 1 = FAT", "source", "Table 1 = FAT"),
    ],
)  # fmt: skip
def test_set_gives_a_setting_its_value_too(text: str, key: str, value: object) -> None:
    assert getattr(resolve("fat", sets=[text]), key) == value


def test_a_set_dataset_brings_its_defaults() -> None:
    assert resolve("fat", sets=["dataset=svhn"]).eps == "4/255"


@pytest.mark.parametrize("text", ["tau", "", "=1", " = 1", "tau:1"])
def test_set_without_key_and_value_is_refused(text: str) -> None:
    assert "write key=value" in refusal(resolve, "fat", sets=[text])


@few
@given(st.text(max_size=8))
def test_whatever_is_set_is_taken_or_refused_in_one_line(text: str) -> None:
    for said in (text, f"tau={text}", f"lr={text}", f"eps={text}", f"{text}=1"):
        try:
            assert isinstance(resolve("fat", sets=[said]), Settings)
        except Refused as refused:
            assert "\n" not in str(refused)


# ------------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"epochs": "many"}, "epochs: "), ({"epochs": 0}, "epochs: "), ({"epochs": 1.5}, "epochs: "),
        ({"batch_size": 0}, "batch_size: "), ({"lr": "fast"}, "lr: 'fast' is not a number"), ({"lr": 0}, "lr: "),
        ({"lr": "-1/10"}, "lr: "), ({"lr": math.nan}, "lr: nan is not finite"),
        ({"lr": True}, "lr: True is not a number"),
        ({"eps": "8"}, "eps: '8' lies outside [0, 1]"), ({"eps": "8/0"}, "eps: '8/0' divides by zero"),
        ({"seed": -1}, "seed: "), ({"seed": 2**31}, "seed: "), ({"n_train": 0}, "n_train: "),
        ({"precision": "16"}, "precision: "), ({"augment": "flip"}, "augment: "),
        ({"validation": -0.1}, "validation: "),
        ({"validation": 1}, "validation: "), ({"momentum": 1}, "momentum: "),
        ({"momentum": -0.1}, "momentum: "), ({"momentum": math.nan}, "momentum: "),
        ({"weight_decay": -1}, "weight_decay: "),
        ({"dataset": 3, "eps": "0.1"}, "unknown dataset '3'"), ({"arch": 18}, "arch: "),
        ({"lr_divisors": [["1/2", 10]]}, "lr_divisors: a schedule starts at '0'"),
        ({"lr_divisors": [["0", 0]]}, "lr_divisors.0.1: "), ({"std": [0.0], "mean": [0.5]}, "std.0: "),
        ({"mean": [0.5]}, "mean and std go together"), ({"std": [0.5]}, "mean and std go together"),
        ({"source": 3}, "source: "),
    ],
    ids=str,
)  # fmt: skip
def test_an_ill_typed_setting_is_refused_by_its_name(options: dict[str, Any], says: str) -> None:
    assert says in refusal(resolve, "fat", **options)


def test_everything_wrong_is_said_at_once() -> None:
    said = refusal(resolve, "fat", epochs=0, lr="fast", seed=-1)
    assert all(f"{key}: " in said for key in ("epochs", "lr", "seed"))


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("fat", "tau=-1", "fat: tau=-1: "), ("fat", "tau=1.5", "fat: tau=1.5: "),
        ("fat", "tau=many", "fat: tau='many': "),
        ("fat", "tau=[['1/2', 1]]", "starts at '0'"), ("fat", "steps=-1", "fat: steps=-1: "),
        ("fat", "omega=-0.1", "fat: omega=-0.1: "), ("fat", "omega=nan", "fat: omega=nan: nan is not finite"),
        ("fat", "project=maybe", "fat: project='maybe': "),
        ("fat", "step_size=-0.1", "no step forward"), ("fat", "step_size=eps/0", "no step forward"),
        ("fat", "step_size=eps*2", "is not a number"), ("fat", "step_size=true", "is not a number"),
        ("fat", "start=gausian", "'uniform', 'gaussian' or 'natural'"),
        ("trades", "beta=-1", "trades: beta=-1: "), ("trades", "forwards=adv", "'nat-adv' or 'nat-adv-nat'"),
        ("dat", "until=3/2", "lies outside the run"), ("dat", "first=2", "dat: first=2: "),
        ("cat", "patience=-1", "cat: patience=-1: "), ("madry", "mode=Train", "'eval' or 'train'"),
        ("madry", "eps_schedule=[['0', '2']]", "lies outside [0, 1]"),
    ],
)  # fmt: skip
def test_an_ill_typed_field_is_refused_by_its_name(name: str, text: str, says: str) -> None:
    assert says in refusal(resolve, name, sets=[text])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"defense": "trade"}, "unknown defense 'trade': did you mean trades"),
        ({"defense": "fat-mat"}, "did you mean fat-mart"),
        ({"defense": "fat", "arch": "resnet18"}, "unknown model 'resnet18': did you mean resnet-18?"),
        ({"defense": "fat", "epoch": 3}, "unknown setting 'epoch': did you mean epochs"),
        ({"defense": "fat", "sets": ["tua=1"]}, "unknown field of fat 'tua': did you mean tau"),
        ({"defense": "trades", "sets": ["betta=1"]}, "unknown field of trades 'betta': did you mean beta?"),
        ({"defense": "madry", "sets": ["tau=1"]}, "unknown field of madry 'tau'"),
        ({"defense": "cat", "sets": ["memory={}"]}, "unknown field of cat 'memory'"),
        ({"defense": "fat", "sets": ["name=other"]}, "unknown field of fat 'name'"),
        ({"defense": "fat", "sets": ["defense=trades"]}, "unknown field of fat 'defense'"),
        ({"defense": "fat", "recipe": "no-such"}, "unknown recipe 'no-such'"),
    ],
    ids=str,
)  # fmt: skip
def test_a_name_that_nobody_has_is_refused_with_the_closest(asked: dict[str, Any], says: str) -> None:
    assert says in refusal(resolve, asked.pop("defense"), **asked)


def test_an_unknown_setting_in_a_recipe_is_refused_with_the_closest(written: Callable[..., str]) -> None:
    assert "unknown setting 'batch-size': did you mean batch_size" in refusal(
        resolve, "fat", recipe=written(**{"batch-size": 3})
    )
    assert "unknown field of fat 'beta'" in refusal(resolve, "fat", recipe=written(fields={"beta": 6}))


@pytest.mark.parametrize("text", ["lr = ", "lr = 0.1\nlr = 0.2", "[fields", "\x00", "lr 0.1"])
def test_a_broken_recipe_is_refused(written: Callable[..., str], text: str) -> None:
    assert "cannot read the recipe" in refusal(resolve, "fat", recipe=written(text))


def test_a_recipe_that_is_not_there_or_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    for name in ("none.toml", "folder.toml", "binary.toml"):
        assert "cannot read the recipe" in refusal(resolve, "fat", recipe=str(tmp_path / name))


def test_a_built_in_recipe_is_found_by_name(monkeypatch: pytest.MonkeyPatch, written: Callable[..., str]) -> None:
    path = Path(written(defense="trades", epochs=76))
    monkeypatch.setattr(recipe, "shelf", lambda: {"trades-paper": path})
    assert resolve(None, recipe="trades_paper").epochs == 76
    assert "did you mean trades-paper?" in refusal(resolve, None, recipe="trades-papr")


def test_every_recipe_on_the_shelf_resolves() -> None:
    for name in recipe.shelf():
        assert all(one.defense in defenses for one in recipe.points(name).values())


# ------------------------------------------------------------------------------------ settings kept and compared

fractions = st.fractions(0, 1, max_denominator=120)
plain = (
    st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
)
some = st.fixed_dictionaries(
    {
        "defense": st.sampled_from(["fat", "trades", "no-such"]),
        "dataset": st.text(min_size=1, max_size=10),
        "arch": st.text(max_size=10),
        "eps": fractions.map(str) | st.floats(0, 1),
    },
    optional={
        "epochs": st.integers(1, 10**6),
        "batch_size": st.integers(1, 10**6),
        "lr": st.floats(1e-9, 1e3) | st.fractions(Fraction(1, 1000), 10, max_denominator=1000).map(str),
        "lr_divisors": st.lists(fractions, unique=True, max_size=4).map(
            lambda cuts: [["0", 1.0], *([str(cut), 10 ** (i + 1)] for i, cut in enumerate(sorted(cuts)) if cut)]
        ),
        "momentum": st.floats(0, 1, exclude_max=True),
        "weight_decay": st.floats(0, 1),
        "seed": st.integers(0, 2**31 - 1),
        "n_train": st.none() | st.integers(1, 10**6),
        "validation": st.floats(0.01, 0.99),
        "augment": st.sampled_from(["none", "crop", "crop-flip"]),
        "precision": st.sampled_from(["32-true", "bf16-mixed", "64-true"]),
        "mean": st.none() | st.lists(st.floats(-1, 1), min_size=1, max_size=3),
        "std": st.none() | st.lists(st.floats(0.01, 2), min_size=1, max_size=3),
        "fields": st.dictionaries(st.text(max_size=6), plain | st.lists(plain, max_size=3), max_size=4),
        "source": st.text(max_size=20),
    },
)


@few
@given(some)
def test_settings_written_as_toml_and_read_again_are_the_same(said: dict[str, Any]) -> None:
    one = Settings.model_validate(said)
    again = Settings.model_validate(tomllib.loads(one.toml()))
    assert again == one
    assert difference(one, again) == ""


@pytest.mark.parametrize("name", list(defenses))
def test_resolved_settings_written_as_a_recipe_make_the_same_run(name: str, written: Callable[..., str]) -> None:
    one = resolve(name, dataset="cifar10", eps="0.031", sets=["steps=7", "start=natural", "mean=[0.5]", "std=[0.25]"])
    again = resolve(None, recipe=written(one.toml()))
    assert again == one
    assert difference(Settings.model_validate(tomllib.loads(one.toml())), one) == ""
    assert contestant(again) == contestant(one)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        resolve("fat").lr = 1.0


@pytest.mark.parametrize("name", list(defenses))
def test_the_contestant_is_built_with_the_budget_and_the_fields_of_its_settings(name: str) -> None:
    made = contestant(resolve(name, eps="16/255", sets=["steps=3", "step_size=2/255"]))
    assert made == build(defenses[name], {"eps": 16 / 255, "steps": 3, "step_size": 2 / 255})


def test_what_is_unset_is_stored_as_unset_and_the_budget_once() -> None:
    said = resolve("fat")
    assert said.fields["step_size"] is None and "eps" not in said.fields
    assert said.fields["tau"] == [["0", 0], ["50/120", 1], ["90/120", 2]]


def segments(shared: Path, name: str) -> list[float]:
    """The official learning rate of each epoch."""
    said = json.loads((shared / "golden" / "schedules.json").read_text())[name]["lr_segments_first_last_value"]
    return [value for first, last, value in said for _ in range(first, last + 1)]


def test_the_learning_rate_is_the_official_one_at_every_epoch_of_fat(shared: Path) -> None:
    said = resolve("fat", dataset="cifar10")
    assert said.lr_divisors == (("0", 1.0), ("59/120", 10.0), ("89/120", 100.0), ("109/120", 200.0))
    rates = [said.lr_at(Progress(epoch - 1, said.epochs)) for epoch in range(1, said.epochs + 1)]
    assert rates == pytest.approx(segments(shared, "FAT"), abs=1e-15)


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "divisors"),
    [
        ("FAT_for_TRADES", 0.1, 85, [["0", 1], ["74/85", 10]]),
        ("FAT_for_MART", 0.1, 90, [["0", 1], ["59/90", 10], ["89/90", 100]]),
        ("TRADES", 0.1, 76, [["0", 1], ["74/76", 10]]),
        ("MART_resnet18", 0.01, 120, [["0", 1], ["74/120", 10], ["89/120", 100], ["99/120", 1000]]),
        ("DAT", 0.01, 120, [["0", 1], ["59/120", 10], ["99/120", 100]]),
    ],
)
def test_every_official_learning_rate_can_be_written(
    shared: Path, written: Callable[..., str], name: str, lr: float, epochs: int, divisors: list[list[Any]]
) -> None:
    said = resolve("fat", recipe=written(lr=lr, epochs=epochs, lr_divisors=divisors))
    rates = [said.lr_at(Progress(epoch, epochs)) for epoch in range(epochs)]
    assert rates == pytest.approx(segments(shared, name), abs=1e-15)


def test_a_shorter_run_keeps_the_shape_of_the_learning_rate() -> None:
    said = resolve("fat", epochs=12, lr="0.2")
    assert [said.lr_at(Progress(done, 12)) for done in range(12)] == pytest.approx(
        [0.2] * 6 + [0.02] * 3 + [0.002] * 2 + [0.001]
    )


def test_a_difference_names_what_changed_and_nothing_else() -> None:
    one = resolve("fat")
    assert difference(one, resolve("fat")) == ""
    assert difference(one, resolve("fat", lr="0.05", seed=1)) == "lr: 0.1 -> 0.05; seed: 0 -> 1"
    assert (
        difference(one, resolve("fat", sets=["omega=0.5", "step_size=0.01"]))
        == "omega: 0.0 -> 0.5; step_size: None -> 0.01"
    )
    assert difference(one, resolve("fat", eps="8/255")) == "eps: 0.3 -> 8/255"
    assert difference(one, resolve("fat", n_train=5)) == "n_train: None -> 5"


def test_a_difference_of_defenses_shows_their_fields_too() -> None:
    said = difference(resolve("madry"), resolve("fat", sets=["tau=1"]))
    assert said == "defense: madry -> fat; tau: None -> 1"


@few
@given(some, some)
def test_a_difference_is_empty_only_between_equals(one: dict[str, Any], other: dict[str, Any]) -> None:
    one, other = ({k: v for k, v in said.items() if k != "fields"} for said in (one, other))
    a, b = Settings.model_validate(one), Settings.model_validate(other)
    assert (difference(a, b) == "") == (a == b)
    assert difference(a, a) == ""


@pytest.mark.parametrize("endless", ["1e9999999", "1e-9999999", "1e-9999999/3"])
def test_a_number_that_nobody_can_write_out_is_refused_at_once(endless: str) -> None:
    with pytest.raises(ValueError, match=r"is not|not finite|outside"):
        published(endless)
    with pytest.raises(ValueError, match="fraction of the run"):
        moment(endless)
