"""What a protocol says reaches its examiners, and what is wrong with one is refused; the spread over seeds."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st

from fatbench import protocol
from fatbench.errors import Refused, Unknown
from fatbench.evaluation import Evaluation, examiner
from fatbench.quantities import number, step_of
from fatbench.stats import over_seeds

MINE: dict[str, Any] = {
    "name": "mine", "version": 3, "summary": "one line", "source": "a table", "attacks": ["fgsm", "pgd-20"],
}  # fmt: skip


def examiners(said: protocol.Protocol) -> dict[str, Evaluation]:
    return {attack: examiner(attack, said.settings_for(attack)) for attack in said.attacks}


@pytest.fixture
def mine(tmp_path: Path) -> Callable[..., str]:
    """A user's own protocol file: MINE with some keys replaced, those given as None left out."""

    def make(**replaced: Any) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(tomli_w.dumps({key: value for key, value in {**MINE, **replaced}.items() if value is not None}))
        return str(path)

    return make


def refusal(name: str) -> str:
    """The one line with which loading a protocol, or making its examiners, is refused."""
    with pytest.raises(Refused) as refused:
        examiners(protocol.load(name))
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------ the built-in ones


def test_the_default_protocol_is_on_the_shelf(root: Path) -> None:
    assert protocol.DEFAULT in protocol.shelf()
    assert {path.name for path in protocol.shelf().values()} == {
        path.name for path in (root / "evaluations" / "protocols").glob("*.toml")
    }


@pytest.mark.parametrize("name", list(protocol.shelf()))
def test_a_built_in_protocol_bears_its_files_name(name: str) -> None:
    assert protocol.load(name).name == protocol.load(name.replace("-", "_")).name == name


@pytest.mark.parametrize("name", list(protocol.shelf()))
def test_every_setting_of_a_built_in_protocol_reaches_its_examiner(name: str) -> None:
    said = tomllib.loads(protocol.shelf()[name].read_text())
    made = examiners(protocol.load(name))
    assert list(made) == said["attacks"]
    used = set()
    for attack, one in made.items():
        family, _, steps = attack.partition("@")[0].rpartition("-")
        key = attack if attack in said["families"] else family
        used.add(key)
        wanted = {**said["families"].get(key, {}), **({"steps": int(steps)} if steps.isdigit() else {})}
        assert one.name == key
        assert {setting: asdict(one)[setting] for setting in wanted} == wanted
    assert used == set(said["families"])


def test_the_house_protocol_is_what_its_readers_expect() -> None:
    made = {name: asdict(one) for name, one in examiners(protocol.load("fatbench-linf")).items()}
    assert list(made) == ["fgsm", "pgd-20", "pgd-100", "cw-inf", "autoattack"]
    assert [made[name].get("steps") for name in made] == [1, 20, 100, 30, None]
    assert made["fgsm"] | {"start": "natural", "step_size": "eps"} == made["fgsm"]
    assert made["cw-inf"]["kappa"] == 50
    assert {made[name]["restarts"] for name in ("pgd-20", "pgd-100", "cw-inf")} == {1}
    assert made["autoattack"]["version"] == "standard"


# ------------------------------------------------------------------------------------------------ a user's own


def test_a_users_protocol_is_a_path(mine: Callable[..., str]) -> None:
    said = protocol.load(mine(eps="0.031", families={"pgd": {"restarts": 5, "step_size": "2/255", "start": "natural"}}))
    assert (said.name, said.version, said.eps, said.attacks) == ("mine", 3, "0.031", ("fgsm", "pgd-20"))
    made = asdict(examiners(said)["pgd-20"])
    assert made == {
        "steps": 20, "step_size": "2/255", "start": "natural", "clamp_start": True, "restarts": 5,
        "loss": "cross-entropy", "kappa": 50, "iterate": "last",
    }  # fmt: skip


def test_an_attack_may_have_settings_of_its_own(mine: Callable[..., str]) -> None:
    said = protocol.load(mine(attacks=["pgd-20", "pgd-7"], families={"pgd": {"restarts": 5}, "pgd-7": {"restarts": 2}}))
    assert [asdict(one)["restarts"] for one in examiners(said).values()] == [5, 2]


@pytest.mark.parametrize("attack", ["pgd_20", "PGD-20"])
def test_settings_reach_an_attack_however_its_name_is_written(attack: str, mine: Callable[..., str]) -> None:
    said = protocol.load(mine(attacks=[attack], families={"pgd": {"restarts": 5}}))
    assert [asdict(one)["restarts"] for one in examiners(said).values()] == [5]


@pytest.mark.parametrize(
    ("replaced", "why"),
    [
        ({"atacks": ["fgsm"]}, "atacks: Extra inputs"),
        ({"version": None}, "version: Field required"),
        ({"attacks": None}, "attacks: Field required"),
        ({"source": None}, "source: Field required"),
        ({"attacks": []}, "attacks: "),
        ({"attacks": "fgsm"}, "attacks: "),
        ({"version": 0}, "version: "),
        ({"version": "second"}, "version: "),
        ({"name": "My Protocol"}, "name: "),
        ({"name": "../mine"}, "name: "),
        ({"name": "fatbench-linf"}, "as a built-in one does: rename it"),
        ({"eps": "8/0"}, "divides by zero"),
        ({"eps": "-0.1"}, "outside"),
        ({"eps": "8"}, "outside"),
        ({"eps": "nan"}, "eps: "),
        ({"eps": "large"}, "not a number"),
        ({"families": {"pgd": 3}}, "families.pgd: "),
        ({"attacks": ["fgsm", "pdg-20"]}, "unknown attack 'pdg-20': did you mean pgd-20"),
        ({"attacks": ["pgd-0"]}, "unknown attack 'pgd-0'"),
        ({"families": {"pgd": {"restart": 3}}}, "unknown field of pgd 'restart': did you mean restarts"),
        ({"families": {"pgd": {"restarts": 0}}}, "pgd: restarts=0"),
        ({"families": {"pgd": {"restarts": "many"}}}, "pgd: restarts='many'"),
        ({"families": {"pgd": {"start": "zero"}}}, "pgd: start='zero'"),
        ({"families": {"pgd": {"step_size": "eps/x"}}}, "pgd: step_size='eps/x'"),
        ({"families": {"pgd": {"step_size": "eps/0"}}}, "pgd: step_size='eps/0'"),
        ({"families": {"pgd": {"step_size": "inf"}}}, "pgd: step_size='inf'"),
        ({"families": {"fgsm": {"steps": 2}}}, "fgsm: steps=2"),
        ({"attacks": ["cw-inf"], "families": {"cw-inf": {"kappa": -1}}}, "cw-inf: kappa=-1"),
        ({"attacks": ["autoattack"], "families": {"autoattack": {"version": "fast"}}}, "autoattack: version='fast'"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_protocol_is_refused_by_name(
    replaced: dict[str, Any], why: str, mine: Callable[..., str]
) -> None:
    assert why in refusal(mine(**replaced))


def test_settings_of_a_family_that_nobody_asks_are_refused(mine: Callable[..., str]) -> None:
    assert "pdg" in refusal(mine(families={"pdg": {"restarts": 5}}))


@pytest.mark.parametrize("broken", [b"name = ", b"name = 1\nname = 2", b"\xff\xfe", b"", b"[]"])
def test_a_file_that_is_no_protocol_is_refused(broken: bytes, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(broken)
    assert "mine.toml" in refusal(str(path))


def test_a_protocol_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(str(tmp_path / "absent.toml"))
    (tmp_path / "folder.toml").mkdir()
    assert "cannot read" in refusal(str(tmp_path / "folder.toml"))
    assert "did you mean fatbench-linf" in refusal("fatbench-lnf")


def test_a_built_in_protocol_under_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "other.toml"
    path.write_text(tomli_w.dumps(MINE))
    monkeypatch.setattr(protocol, "shelf", lambda: {"other": path})
    assert "calls itself 'mine'" in refusal("other")


# ------------------------------------------------------------------------------------------------ attacks by name


def test_attacks_chosen_by_name_are_normalised_and_asked_once() -> None:
    house = protocol.load(protocol.DEFAULT)
    chosen = house.only([" PGD_20", "fgsm", "pgd-20 ", "", "cw_inf"])
    assert chosen.attacks == ("pgd-20", "fgsm", "cw-inf")
    assert (chosen.name, chosen.version, chosen.families) == (house.name, house.version, house.families)
    assert house.attacks[-1] == "autoattack"


@pytest.mark.parametrize("attacks", [[], [""], [" ", ""]])
def test_no_attack_at_all_is_refused(attacks: list[str]) -> None:
    with pytest.raises(Refused, match="no attack named"):
        protocol.load(protocol.DEFAULT).only(attacks)


def test_a_name_with_steps_sets_the_steps() -> None:
    assert examiner("pgd-7", {"steps": 3, "restarts": 2}) == examiner("PGD_7", {"restarts": 2})
    assert asdict(examiner("pgd-7", {"steps": 3}))["steps"] == 7
    assert asdict(examiner("cw-inf-5", {}))["steps"] == 5
    assert asdict(examiner("cw-inf", {"steps": 5})) == asdict(examiner("cw-inf-5", {}))
    assert asdict(examiner("pgd", {}))["steps"] == 20
    assert examiner("fgsm-1", {}) == examiner("fgsm", {})


@pytest.mark.parametrize(
    ("attack", "why"),
    [
        ("fgsm-3", "fgsm: steps=3"),
        ("autoattack-3", "autoattack has no steps; write autoattack"),
        ("pgd-", "unknown attack"),
        ("pgd-0", "unknown attack"),
        ("pgd--3", "unknown attack"),
        ("pgd-1.5", "unknown attack"),
        ("pgd-9999999", "unknown attack"),
        ("clean", "unknown attack"),
        ("", "unknown attack"),
        ("auto-attack", "did you mean autoattack"),
        ("cw", "did you mean cw-inf"),
        ("fsgm", "did you mean fgsm"),
        ("pgd20", "did you mean pgd-20"),
    ],
)
def test_an_attack_that_does_not_exist_is_refused_with_the_closest(attack: str, why: str) -> None:
    with pytest.raises(Refused, match=why) as refused:
        examiner(attack, {})
    assert isinstance(refused.value, Unknown) == ("unknown" in str(refused.value))


# ------------------------------------------------------------------------------------------------ seeds


def test_seeds_give_median_and_sample_deviation() -> None:
    assert over_seeds([50.0, 40.0, 45.0]) == (45.0, 5.0)
    assert over_seeds([1.0, 2.0]) == (1.5, pytest.approx(0.5**0.5))


def test_one_seed_has_no_spread() -> None:
    assert over_seeds([44.5]) == (44.5, 0.0)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_the_order_of_seeds_does_not_matter(values: list[float]) -> None:
    middle, spread = over_seeds(values)
    again = over_seeds(values[::-1])
    assert (middle, spread) == (again[0], pytest.approx(again[1]))
    assert min(values) <= middle <= max(values)
    assert spread == pytest.approx(stdev(values))


@pytest.mark.parametrize("backwards", ["eps/-4", "-0.1", "eps/0"])
def test_a_step_that_does_not_climb_is_refused(backwards: str) -> None:
    with pytest.raises(Refused, match="step_size"):
        examiner("pgd-3", {"step_size": backwards})


# ------------------------------------------------------------------------------------------------ the papers' own

# By hand from FAT's Tables 1-4, Figures 4-20 and appendix H: eps, start, alpha in pixel units, attacks, test examples.
FOUR = ["fgsm", "pgd-20", "cw-inf", "pgd-100"]
THREE = ["fgsm", "pgd-20", "cw-inf"]
PAPERS: dict[str, tuple[str, str, float, list[str], int]] = {
    "dat-2019": ("0.031", "uniform", 0.00775, FOUR, 10_000),
    "trades-2019": ("0.031", "natural", 0.003, FOUR, 10_000),
    "trades-2019-rs": ("0.031", "uniform", 0.003, THREE, 10_000),
    "trades-2019-mnist": ("0.3", "uniform", 0.01, ["pgd-40"], 10_000),
    "mart-2020": ("8/255", "uniform", 0.8 / 255, THREE, 10_000),
    "mart-2020-script": ("0.031", "uniform", 0.003, THREE, 10_000),
    "fat-fig4": ("8/255", "uniform", 0.003, ["fgsm", "pgd-10", "pgd-20", "pgd-100", "cw-inf"], 10_000),
    "fat-6.1-cifar10": (
        "8/255", "uniform", 2 / 255, ["fgsm", "pgd-20", "pgd-100", "cw-inf", "pgd-20@16/255"], 10_000,
    ),
    "fat-6.1-svhn": ("4/255", "uniform", 2 / 255, ["fgsm", "pgd-20", "pgd-100", "cw-inf", "pgd-20@8/255"], 26_032),
}  # fmt: skip
STEPS = {"fgsm": 1, "pgd-10": 10, "pgd-20": 20, "pgd-40": 40, "pgd-100": 100, "cw-inf": 30}


@pytest.mark.parametrize("name", PAPERS)
def test_a_papers_protocol_says_the_papers_numbers(name: str) -> None:
    eps, start, alpha, attacks, n = PAPERS[name]
    said = protocol.load(name)
    assert (said.eps, list(said.attacks), said.n, said.standing) == (eps, attacks, n, False)
    for attack, made in examiners(said).items():
        plain = attack.partition("@")[0]
        told = asdict(made)
        radius = number(protocol.budget_of(attack) or eps)
        wanted = radius if plain == "fgsm" else alpha
        assert step_of(told["step_size"], radius) == pytest.approx(wanted, abs=1e-15), attack
        assert (told["steps"], told["start"], told["clamp_start"]) == (STEPS[plain], start, name != "trades-2019-mnist")
        assert (told["loss"], told["kappa"]) == ("cw-margin" if plain == "cw-inf" else "cross-entropy", 50)
        assert (told["iterate"], told["restarts"]) == ("last", 1)


def test_robustbenchs_protocol_is_autoattack_standard_on_the_first_ten_thousand() -> None:
    said = protocol.load("robustbench-linf")
    assert (said.eps, said.n, said.attacks) == ("8/255", 10_000, ("autoattack",))
    assert asdict(examiners(said)["autoattack"])["version"] == "standard"


def test_every_shelved_protocol_cites_its_source() -> None:
    for name in protocol.shelf():
        said = protocol.load(name)
        assert re.search(r"Table|Figure|\.py|\.sh|\(20\d\d\)|robustbench\.eval", said.source), name


# ------------------------------------------------------------------------------------------------ budgets of their own


@pytest.mark.parametrize(
    ("typed", "attack", "eps"),
    [
        ("pgd-20@16/255", "pgd-20@16/255", "16/255"),
        (" PGD_20@0.062 ", "pgd-20@0.062", "0.062"),
        ("pgd-20", "pgd-20", None),
    ],
)
def test_an_attacks_name_may_carry_its_budget(typed: str, attack: str, eps: str | None) -> None:
    said = protocol.load(protocol.DEFAULT).only([typed])
    assert said.attacks == (attack,)
    assert protocol.budget_of(attack) == eps
    assert said.settings_for(attack) == said.settings_for("pgd-20")
    assert examiner(attack, {}).name == "pgd"


@pytest.mark.parametrize("eps", ["8/0", "2", "x", ""])
def test_a_budget_that_is_none_is_refused(eps: str, mine: Callable[..., str]) -> None:
    with pytest.raises(Refused, match=r"--attacks pgd-20@"):
        protocol.load(protocol.DEFAULT).only([f"pgd-20@{eps}"])
    assert "attacks" in refusal(mine(attacks=[f"pgd-20@{eps}"]))


def test_attacks_on_the_standing_share_one_budget(mine: Callable[..., str]) -> None:
    assert "pgd-20@16/255 has its own" in refusal(mine(attacks=["fgsm", "pgd-20@16/255"], standing=True))
