"""The one door to defenses and evaluations. Lazy: names are known without importing torch, classes load when asked for.

The built-in rooms are folders: a file's name is the registered name. Third parties use the entry-point groups
`fatbench.defenses` and `fatbench.evaluations`. A plugin that cannot be imported is named with its reason, and the rest
go on; a name that two claim is refused for both.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Generic, TypeVar

from fatbench.errors import Refused, first_line, unknown

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One registered name: where its class lives (`module:Class`, or a module of a room) and who brings it."""

    name: str
    target: str
    origin: str


@dataclass(frozen=True)
class Registry(Mapping[str, type[T]], Generic[T]):
    """name -> class, loaded on access: `defenses["fat-trades"]`. Underscores are accepted for hyphens.

    Attributes:
        kind: What it holds, for messages: "defense", "evaluation".
        room: The built-in package, one module a name; also the entry-point group.
        contract: "module:Class" that every registered class derives from.
    """

    kind: str
    room: str
    contract: str

    @cached_property
    def claims(self) -> dict[str, list[Entry]]:
        """Every name, with all who claim it."""
        claims: dict[str, list[Entry]] = {}
        spec = importlib.util.find_spec(self.room)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for file in sorted(Path(folder).glob("[!_]*.py")):
                name = file.stem.replace("_", "-")
                claims.setdefault(name, []).append(Entry(name, f"{self.room}.{file.stem}", "fatbench"))
        for point in entry_points(group=self.room):
            origin = point.dist.name if point.dist else "an unnamed distribution"
            name = point.name.replace("_", "-")
            claims.setdefault(name, []).append(Entry(name, point.value, origin))
        return claims

    def entry(self, name: str) -> Entry:
        """Raises Refused for a name that nobody, or more than one, has."""
        claims = self.claims.get(name.replace("_", "-"))
        if claims is None:
            raise unknown(self.kind, name, self.claims)
        if len(claims) > 1:
            owners = " and ".join(f"{e.target} ({e.origin})" for e in claims)
            raise Refused(f"the {self.kind} name {name!r} is taken twice, by {owners}: uninstall or rename one")
        return claims[0]

    def __getitem__(self, name: str) -> type[T]:
        entry = self.entry(name)
        try:
            module, _, attribute = entry.target.partition(":")
            loaded = importlib.import_module(module)
            cls = getattr(loaded, attribute) if attribute else None
        except Exception as error:  # whatever a plugin's import may raise is its reason
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise Refused(f"{self.kind} {name!r} of {entry.origin} cannot be loaded: {reason}") from error
        cls = cls or self._own_class(loaded)
        if not (isinstance(cls, type) and issubclass(cls, self._base)):
            raise Refused(
                f"{self.kind} {name!r} of {entry.origin}: {entry.target} does not derive from {self.contract}"
            )
        return cls

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.replace("_", "-") in self.claims

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.claims))

    def __len__(self) -> int:
        return len(self.claims)

    def summary(self, name: str) -> str:
        """The first line of its docstring, read from the source: nothing is imported."""
        entry = self.entry(name)
        module, _, attribute = entry.target.partition(":")
        try:
            spec = importlib.util.find_spec(module)
            tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8")) if spec and spec.origin else None
        except Exception as error:  # looking for a module imports the packages it lies in
            raise Refused(f"cannot be read: {first_line(error)}") from error
        if tree is None:
            raise Refused(f"cannot be loaded: no module {module}")
        classes = [
            n for n in tree.body if isinstance(n, ast.ClassDef) and n.name[0] != "_" and attribute in ("", n.name)
        ]
        text = (ast.get_docstring(classes[-1]) if classes else None) or ast.get_docstring(tree) or ""
        return text.partition("\n")[0]

    @property
    def _base(self) -> type[T]:
        module, _, name = self.contract.partition(":")
        base: type[T] = getattr(importlib.import_module(module), name)
        return base

    def _own_class(self, module: Any) -> type[T]:
        own = [
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, self._base) and value.__module__ == module.__name__
        ]
        if len(own) != 1:
            raise Refused(f"{module.__name__} must hold one {self.kind}, it holds {len(own)}")
        return own[0]


defenses: Registry[Any] = Registry("defense", "fatbench.defenses", "fatbench.defense:Defense")
evaluations: Registry[Any] = Registry("evaluation", "fatbench.evaluations", "fatbench.evaluation:Evaluation")
