"""What the tests share: the golden arrays, the tiny network they were made on, and small worlds to work in."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _threads_and_stream() -> Iterator[None]:
    """Every test begins with the same random stream and default dtype."""
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and golden arrays that lie beside a checkout; tests that need them skip where they are absent."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden arrays and real data), which is not beside this checkout")
    return SHARED


@pytest.fixture(scope="session")
def golden(shared: Path) -> Callable[[str], Any]:
    """A golden file by its stem."""
    return lambda name: np.load(shared / "golden" / f"{name}.npz")


def tiny() -> nn.Sequential:
    """The network of the golden arrays: 32x32 colour images, ten classes, two convolutions with BatchNorm."""
    net = nn.Sequential()
    for name, module in (
        ("conv1", nn.Conv2d(3, 8, 3, 2, 1)), ("bn1", nn.BatchNorm2d(8)), ("relu1", nn.ReLU()),
        ("conv2", nn.Conv2d(8, 16, 3, 2, 1)), ("bn2", nn.BatchNorm2d(16)), ("relu2", nn.ReLU()),
        ("pool", nn.AvgPool2d(4)), ("flatten", nn.Flatten()), ("fc", nn.Linear(64, 10)),
    ):  # fmt: skip
        net.add_module(name, module)
    return net


@pytest.fixture
def golden_world(golden: Callable[[str], Any]) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(network, x, y) of the golden arrays, in float64, eval mode."""
    arrays = golden("tiny_model")
    net = tiny().double()
    net.load_state_dict({k[2:]: torch.as_tensor(arrays[k]) for k in arrays.files if k.startswith("w/")})
    return net.eval(), torch.as_tensor(arrays["X_uint8"] / 255.0), torch.as_tensor(arrays["Y"])


@pytest.fixture
def world() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(network, x, y): a small float64 network partly trained on 24 made-up 8x8 images of three classes, eval mode."""
    net, x, y = deepcopy(_trained())
    return net.double().eval(), x.double(), y


@pytest.fixture
def lab(
    world: tuple[nn.Module, torch.Tensor, torch.Tensor],
) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """The same world with three labels changed, so that some examples are wrong before any step."""
    net, x, y = world
    y[[2, 11, 18]] = (y[[2, 11, 18]] + 1) % 3
    return net, x, y


@cache
def _trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    from fatbench.contract import _world

    return _world()


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the command line in a process of its own: cli("train", "fat", cwd=...)."""

    def run(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None, timeout: float = 240
    ) -> Any:
        return subprocess.run(
            [sys.executable, "-m", "fatbench", *map(str, arguments)],
            cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip

    return run


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Writes a small separable dataset: npz(classes=3, shape=(20, 20), n=60) -> path."""

    def make(classes: int = 3, shape: tuple[int, ...] = (8, 8), n: int = 60, seed: int = 0, **replaced: Any) -> Path:
        rng = np.random.default_rng(seed)
        patterns = rng.uniform(size=(classes, *shape))
        arrays: dict[str, Any] = {}
        for split, size in (("train", n), ("test", n // 2)):
            y = np.arange(size) % classes
            x = 0.7 * patterns[y] + 0.3 * rng.uniform(size=(size, *shape))
            arrays |= {f"x_{split}": (255 * x).astype(np.uint8), f"y_{split}": y.astype(np.int64)}
        path = tmp_path_factory.mktemp("data") / "made-up.npz"
        np.savez(path, **{key: value for key, value in {**arrays, **replaced}.items() if value is not None})
        return path

    return make


@pytest.fixture(scope="session")
def no_file_beyond() -> Callable[[int], AbstractContextManager[None]]:
    """A disk that takes the first `size` bytes of any file and refuses the rest: `with no_file_beyond(size):`."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limit(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit
