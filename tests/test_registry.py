"""One door to defenses and evaluations: names without imports, refusals that say who is at fault, rooms kept apart."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fatbench import registry
from fatbench.cli import app
from fatbench.defense import Defense
from fatbench.errors import Refused
from fatbench.evaluation import Evaluation
from fatbench.registry import Registry, defenses, evaluations

ROOMS = {"defenses": (defenses, Defense), "evaluations": (evaluations, Evaluation)}
BUILT_IN = {room: [n for n in held if held.entry(n).origin == "fatbench"] for room, (held, _) in ROOMS.items()}
PLUGIN = '''
from dataclasses import dataclass
from typing import ClassVar

from fatbench.defense import Defense


@dataclass(frozen=True)
class Mine(Defense):
    """Mine, a plugin.

    And more of it.
    """

    name: ClassVar[str] = "mine"


class Other:
    """No defense."""
'''

World = Callable[..., "Registry[Any]"]


@pytest.fixture
def with_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A fresh registry of defenses with plugins: with_plugins(mine="module:Class"); modules lie in tmp_path."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(*pairs: tuple[str, str], **plugins: str) -> Registry[Any]:
        points = [
            SimpleNamespace(name=name, value=target, dist=SimpleNamespace(name="their-package"))
            for name, target in [*pairs, *plugins.items()]
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: points if group == "fatbench.defenses" else [])
        fresh: Registry[Any] = Registry("defense", "fatbench.defenses", "fatbench.defense:Defense")
        monkeypatch.setattr(registry, "defenses", fresh)
        monkeypatch.setattr("fatbench.contract.defenses", fresh)
        return fresh

    return make


@pytest.fixture
def module(tmp_path: Path) -> Iterator[Callable[[str, str], None]]:
    """Writes a module that can be imported: module("mine", source); forgotten afterwards."""
    before = set(sys.modules)

    def write(name: str, source: str) -> None:
        path = tmp_path / Path(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)

    yield write
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(Refused) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def listed(*arguments: str) -> str:
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return done.output


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("room", ROOMS)
def test_the_files_of_a_room_are_its_names(room: str, root: Path) -> None:
    held, _ = ROOMS[room]
    stems = {path.stem.replace("_", "-") for path in (root / room).glob("*.py") if path.stem[0] != "_"}
    assert set(BUILT_IN[room]) == stems
    assert list(held) == sorted(held)
    assert len(held) == len(list(held))


@pytest.mark.parametrize("room", ROOMS)
def test_every_name_gives_a_class_that_agrees(room: str) -> None:
    held, base = ROOMS[room]
    for name in BUILT_IN[room]:
        assert issubclass(held[name], base)
        assert held[name].name == name


def test_the_contestants_are_the_ten_the_margin_rule_and_the_reference() -> None:
    bases = {"madry", "cat", "dat", "trades", "mart"}
    friendly = {"fat"} | {f"fat-{base}" for base in bases - {"madry"}}
    assert set(BUILT_IN["defenses"]) == bases | friendly | {"standard", "fat-margin"}


def test_underscores_are_accepted_for_hyphens() -> None:
    assert defenses["fat_trades"] is defenses["fat-trades"]
    assert "fat_trades" in defenses
    assert evaluations.summary("cw_inf") == evaluations.summary("cw-inf")


@pytest.mark.parametrize(("name", "closest"), [("trade", "trades"), ("fat_tades", "fat-trades"), ("MADRY", "madry")])
def test_an_unknown_name_is_refused_with_the_closest(name: str, closest: str) -> None:
    assert refusal(lambda: defenses[name]).startswith(f"unknown defense {name!r}: did you mean {closest}")
    assert f"unknown defense {name!r}" in refusal(lambda: defenses.summary(name))
    assert name not in defenses


def test_a_registry_is_a_mapping() -> None:
    with pytest.raises(KeyError):
        evaluations["nothing-like-it"]
    assert evaluations.get("nothing-like-it") is None
    assert 7 not in evaluations


@pytest.mark.parametrize("room", ROOMS)
def test_a_summary_is_the_first_line_of_the_classs_docstring(room: str) -> None:
    held, _ = ROOMS[room]
    for name in BUILT_IN[room]:
        assert held.summary(name) == held[name].__doc__.partition("\n")[0] != ""


# ------------------------------------------------------------------------------------------------ laziness

ASKED = [
    ["--help"],
    ["--version"],
    ["train", "--help"],
    ["evaluate", "--help"],
    *(["list", kind] for kind in ("defenses", "evaluations", "models", "datasets", "protocols", "recipes")),
    ["list", "defenses", "--names"],
]
HEAVY = "torch", "torchvision", "lightning_fabric", "sklearn", "pandas", "matplotlib", "pyautoattack", "robustbench"
TELL = f"import json; print('LOADED', json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"


def loaded(source: str, *arguments: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded at the end of this source."""
    text = f"import sys\n{source}\n{TELL}"
    done = subprocess.run([sys.executable, "-c", text, *arguments], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.rpartition("LOADED ")[2]))


@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_asking_what_there_is_loads_nothing_heavy(arguments: list[str]) -> None:
    run = (
        "from fatbench.cli import app\ntry:\n    app()\nexcept SystemExit as left:\n    assert not left.code, left.code"
    )
    assert loaded(run, *arguments) == []


def test_names_and_summaries_load_nothing_heavy_and_a_class_does() -> None:
    ask = "from fatbench.registry import defenses, evaluations\n"
    names = (
        ask
        + "assert 'fat' in defenses and len(evaluations)\n[r.summary(n) for r in (defenses, evaluations) for n in r]"
    )
    assert loaded(names) == []
    assert "torch" in loaded(ask + "defenses['fat']")


# ------------------------------------------------------------------------------------------------ plugins


def test_a_plugin_is_a_defense_like_any_other(with_plugins: World, module: Any) -> None:
    module("theirs", PLUGIN)
    held = with_plugins(mine="theirs:Mine", twice_mine="theirs:Mine")
    assert held["mine"].name == "mine"
    assert held["twice-mine"] is held["mine"]
    assert held.summary("mine") == "Mine, a plugin."
    assert held.entry("mine").origin == "their-package"
    assert set(held) == {"mine", "twice-mine", *BUILT_IN["defenses"]}
    assert "Mine, a plugin." in listed("list", "defenses")


def test_a_name_that_two_claim_is_refused_for_both_and_the_rest_go_on(with_plugins: World, module: Any) -> None:
    module("theirs", PLUGIN)
    held = with_plugins(fat="theirs:Mine")
    for ask in (held.__getitem__, held.summary):
        said = refusal(lambda ask=ask: ask("fat"))
        assert "the defense name 'fat' is taken twice" in said
        assert "fatbench.defenses.fat (fatbench) and theirs:Mine (their-package)" in said
    assert held["fat-trades"] is defenses["fat-trades"]
    lines = listed("list", "defenses").splitlines()
    assert [line.split()[0] for line in lines] == BUILT_IN["defenses"]
    assert [line for line in lines if "UNUSABLE" in line] == [line for line in lines if "taken twice" in line] != []


def test_two_plugins_of_one_name_are_refused(with_plugins: World, module: Any) -> None:
    module("theirs", PLUGIN)
    held = with_plugins(("my-own", "theirs:Mine"), ("my_own", "theirs:Other"))
    assert "'my-own' is taken twice, by theirs:Mine" in refusal(lambda: held["my-own"])


FAILING = {
    "raises": ("theirs", "raise RuntimeError('no luck\\nand more')", "theirs:Mine", "RuntimeError: no luck"),
    "lacks a package": ("theirs", "import a_package_that_nobody_has", "theirs:Mine", "a_package_that_nobody_has"),
    "is no Python": ("theirs", "def (:", "theirs:Mine", "SyntaxError"),
    "lacks the class": ("theirs", PLUGIN, "theirs:Absent", "no attribute 'Absent'"),
    "is not there": ("unrelated", "", "theirs:Mine", "No module named 'theirs'"),
    "lies in no package": ("unrelated", "", "a_package_that_nobody_has.mine:Mine", "a_package_that_nobody_has"),
    "lies in a broken package": ("theirs.__init__", "raise RuntimeError('no luck')", "theirs.mine:Mine", "no luck"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_plugin_that_cannot_be_loaded_is_named_with_its_reason(case: str, with_plugins: World, module: Any) -> None:
    name, source, target, reason = FAILING[case]
    module(name, source)
    held = with_plugins(mine=target)
    said = refusal(lambda: held["mine"])
    assert said.startswith("defense 'mine' of their-package cannot be loaded: ")
    assert reason in said
    assert held["fat"] is defenses["fat"]


@pytest.mark.parametrize("case", FAILING)
def test_a_plugin_that_cannot_be_loaded_does_not_stop_the_list(case: str, with_plugins: World, module: Any) -> None:
    name, source, target, _ = FAILING[case]
    module(name, source)
    with_plugins(mine=target)
    lines = listed("list", "defenses").splitlines()
    assert [line.split()[0] for line in lines] == sorted(["mine", *BUILT_IN["defenses"]])
    # What only an import shows, `check` tells; a list imports no plugin.
    if case in ("is no Python", "is not there", "lies in no package", "lies in a broken package"):
        assert "UNUSABLE" in next(line for line in lines if line.startswith("mine"))


def test_check_names_a_broken_plugin_and_goes_on(with_plugins: World, module: Any, monkeypatch: Any) -> None:
    module("theirs", "raise RuntimeError('no luck')")
    with_plugins(mine="theirs:Mine")
    monkeypatch.setattr("fatbench.contract.DEFENSE_RULES", [])
    done = CliRunner().invoke(app, ["check", "mine", "fat"])
    assert "broken  defense mine\n        loads: defense 'mine' of their-package cannot be loaded" in done.output
    assert "ok      defense fat" in done.output
    assert "1 of 2" in str(done.exception)


@pytest.mark.parametrize("target", ["theirs:Other", "theirs:ClassVar", "theirs:dataclass"])
def test_a_plugin_that_is_no_defense_is_refused(target: str, with_plugins: World, module: Any) -> None:
    module("theirs", PLUGIN)
    held = with_plugins(mine=target)
    said = refusal(lambda: held["mine"])
    assert f"'mine' of their-package: {target} does not derive from fatbench.defense:Defense" in said


# ------------------------------------------------------------------------------------------------ a room

HEAD = "from dataclasses import dataclass\nfrom fatbench.defense import Defense\n"
CLASS = '@dataclass(frozen=True)\nclass {0}(Defense):\n    """{0}."""\n'


@pytest.fixture
def room(module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """A room of four files: one class, a helper, none, two."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "entry_points", lambda group: [])
    for name, source in {
        "__init__": "",
        "_shared": HEAD + CLASS.format("Base"),
        "has_one": HEAD + "from ._shared import Base\n" + CLASS.format("One").replace("(Defense)", "(Base)"),
        "has_none": HEAD + "from ._shared import Base\n",
        "has_two": HEAD + CLASS.format("One") + CLASS.format("Two"),
    }.items():
        module(f"my_room.{name}", source)
    return Registry("defense", "my_room", "fatbench.defense:Defense")


def test_a_file_added_to_a_room_is_a_name(room: Registry[Any]) -> None:
    assert list(room) == ["has-none", "has-one", "has-two"]
    assert room["has-one"].__name__ == "One"
    assert room.summary("has-one") == "One."


@pytest.mark.parametrize(("name", "number"), [("has-none", 0), ("has-two", 2)])
def test_a_file_of_a_room_holds_one_class(name: str, number: int, room: Registry[Any]) -> None:
    said = refusal(lambda: room[name])
    assert said == f"my_room.{name.replace('-', '_')} must hold one defense, it holds {number}"


# ------------------------------------------------------------------------------------------------ who may import whom


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(level, dotted name) of every import beneath, each imported name by itself: level 0 is absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, f"{node.module or ''}.{alias.name}".strip(".")) for alias in node.names)


def at_import(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """The imports that run when the module is imported: none of a function's."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from imports(node)
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def trees(*folders: Path) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            yield path, ast.parse(path.read_text())


def test_a_room_imports_neighbours_relatively_and_the_harness_absolutely(root: Path) -> None:
    for path, tree in trees(*(root / room for room in ROOMS)):
        neighbours = {other.stem for other in path.parent.glob("*.py")}
        for level, name in imports(tree):
            first, _, rest = name.partition(".")
            if level:
                assert level == 1, (path, name)
                assert first in neighbours, (path, name)
            else:
                assert first not in {*neighbours, *ROOMS}, (path, name)
                assert not (first == "fatbench" and rest.partition(".")[0] in ROOMS), (path, name)


def test_the_harness_enters_a_room_only_through_the_registry(root: Path) -> None:
    for path, tree in trees(root / "fatbench"):
        for level, name in imports(tree):
            parts = (f"fatbench.{name}" if level else name).split(".")
            assert level <= 1, (path, name)
            assert parts[0] not in ROOMS, (path, name)
            assert not (parts[0] == "fatbench" and parts[1:2] in [[room] for room in ROOMS]), (path, name)


def test_attack_libraries_load_only_when_an_attack_runs(root: Path) -> None:
    for path, tree in trees(root / "fatbench", *(root / room for room in ROOMS)):
        if path.name != "robustbench.py":
            assert not {"pyautoattack", "robustbench"} & {name.split(".")[0] for _, name in at_import(tree)}, path


def test_one_file_alone_knows_robustbench(root: Path) -> None:
    for path, tree in trees(root / "fatbench", *(root / room for room in ROOMS)):
        if path != root / "fatbench" / "robustbench.py":
            assert "robustbench" not in {name.split(".")[0] for level, name in imports(tree) if not level}, path
