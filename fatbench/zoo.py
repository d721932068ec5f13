"""RobustBench's model zoo, loaded by its own code, around the faults of its wheel and of its downloads."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fatbench.errors import Refused, first_line, unknown
from fatbench.files import head

if TYPE_CHECKING:
    from torch import nn


def models(dataset: str = "cifar10", threat_model: str = "Linf") -> dict[str, list[str]]:
    """The ids of the installed zoo, each with the Drive ids of its files; () of one that another package brings.

    Raises:
        Refused: robustbench cannot be imported, or has no such board.
    """
    boards = _boards_of_the_zoo()
    if (dataset, threat_model) not in boards:
        raise Refused(f"robustbench has no models for {dataset} under {threat_model}")
    found = {name: entry.get("gdrive_id") for name, entry in boards[dataset, threat_model].items()}
    return {name: [ids] if isinstance(ids, str) else list(ids or ()) for name, ids in found.items()}


def ids() -> dict[str, str]:
    """Every id of the installed zoo, and the boards it stands on: `cifar10 Linf, cifar100 Linf`."""
    found: dict[str, list[str]] = {}
    for (dataset, threat_model), models in _boards_of_the_zoo().items():
        for name in models:
            found.setdefault(name, []).append(f"{dataset} {threat_model}")
    return {name: ", ".join(boards) for name, boards in sorted(found.items())}


def _boards_of_the_zoo() -> dict[tuple[str, str], Any]:
    with imported():
        known = importlib.import_module("robustbench.model_zoo").model_dicts
    return {(data.value, threat.value): board for data, boards in known.items() for threat, board in boards.items()}


def live(name: str, folder: Path = Path("models"), dataset: str = "cifar10", threat_model: str = "Linf") -> nn.Module:
    """A network of the zoo by its id, from `folder/DATASET/THREAT/ID.pt` or, where that is not there, from the net.

    Raises:
        Refused: an unknown id, no file and no network (the file wanted, where it belongs, its Drive id), or a file that
            holds something else.
    """
    known = models(dataset, threat_model)
    if name not in known:
        hint = str(unknown(f"robustbench {dataset} {threat_model} model", name, known)).partition(" (known:")[0]
        raise Refused(f"{hint}; fatbench list robustbench names them all")
    wanted = _files(name, known[name], folder / dataset / threat_model)
    for path in filter(_web_page, wanted):
        raise Refused(f"{path} is a web page, not weights: remove it and {_by_hand({path: wanted[path]})}")
    missing = {path: drive for path, drive in wanted.items() if not path.exists()}
    with imported():
        utils = importlib.import_module("robustbench.utils")
        try:
            with contextlib.redirect_stdout(sys.stderr):
                model = utils.load_model(name, model_dir=folder, dataset=dataset, threat_model=threat_model)
        except Exception as error:  # gdown, requests, urllib and torch each have errors of their own
            if missing or not wanted:
                _leave_nothing(missing, folder / dataset / threat_model)
                why = type(error).__name__
                raise Refused(f"robustbench:{name} could not be downloaded ({why}): {_by_hand(missing)}") from None
            raise Refused(f"{next(iter(wanted))} does not fit robustbench:{name}: {first_line(error)}") from None
    loaded: nn.Module = model.eval()
    return loaded


def _files(name: str, drive: list[str], folder: Path) -> dict[Path, str]:
    """The files of a model, as the zoo names them, each with its Drive id."""
    if len(drive) == 1:
        return {folder / f"{name}.pt": drive[0]}
    return {folder / f"{name}.pt_m{i}.pt": one for i, one in enumerate(drive)}


def _web_page(path: Path) -> bool:
    """Whether it is what Drive says instead of a file: over its quota, or asking for a confirmation."""
    return path.exists() and head(path, 64).lstrip().lower().startswith((b"<!doctype", b"<html"))


def _leave_nothing(missing: Mapping[Path, str], folder: Path) -> None:
    """Removes what a download that failed has left."""
    for path in filter(_web_page, missing):
        path.unlink()
    for place in (folder, folder.parent, folder.parent.parent):
        with contextlib.suppress(OSError):  # not there, or not empty
            place.rmdir()


def _by_hand(files: Mapping[Path, str]) -> str:
    if not files:
        return "its package downloads it, and needs the network once"
    return "; ".join(
        f"fetch https://drive.google.com/uc?id={drive} and save it as {path}" for path, drive in files.items()
    )


@contextlib.contextmanager
def imported() -> Iterator[None]:
    """robustbench 1.1.1, which imports two modules that its wheel does not bring: stand-ins are lent for the import.

    It asks for `autoattack`, and depends on pyautoattack; and for pkg_resources, which setuptools 82 removed. It uses
    the latter for the names of two files.
    """
    if "robustbench.eval" not in sys.modules:
        pkg_resources = types.ModuleType("pkg_resources")
        pkg_resources.resource_filename = _resource  # type: ignore[attr-defined]
        lent = {
            "autoattack": importlib.import_module("pyautoattack"),
            "autoattack.state": importlib.import_module("pyautoattack.state"), "pkg_resources": pkg_resources,
        }  # fmt: skip
        lent = {name: module for name, module in lent.items() if name not in sys.modules}
        sys.modules.update(lent)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module("robustbench")
        except ImportError as error:
            raise Refused(f"robustbench cannot be imported: {first_line(error)}; pip install robustbench") from error
        finally:
            for name in lent:
                sys.modules.pop(name, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _resource(package: str, name: str) -> str:
    return str(files(package.rpartition(".")[0] or package).joinpath(name))
