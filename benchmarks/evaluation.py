"""FGSM, PGD-20, PGD-100 and C&W-30 on one batch, ours against foolbox, torchattacks and ART, from equal starts.

torchattacks would overwrite robustbench and ART drags much along: both are installed apart, without dependencies, into
a folder that is put behind everything else on the path. All start at the clean image, so that nothing is drawn.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.timing import over, row, turns
from benchmarks.worlds import EPS, EXAMINED, STEP, pictures, trained
from fatbench.attacks import cw_margin
from fatbench.evaluation import Chunk, examiner, verified

APART = Path(__file__).parent / ".apart"
# (attack, steps, step size, loss)
SUITE = [("fgsm", 1, EPS, "ce"), ("pgd-20", 20, STEP, "ce"), ("pgd-100", 100, STEP, "ce"), ("cw-inf", 30, STEP, "cw")]
Suite = Callable[[Tensor, Tensor], Tensor]  # (x, y) -> (attacks, N) broken


def install() -> None:
    """torchattacks, ART and six, apart."""
    if not APART.exists():
        wanted = ["torchattacks==3.5.1", "adversarial-robustness-toolbox==1.20.1", "six"]
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(APART), *wanted]
        subprocess.run(command, check=True)
    if str(APART) not in sys.path:
        sys.path.append(str(APART))


def _margin(logits: Tensor, y: Tensor) -> Tensor:
    return cw_margin(logits, y).mean()


def ours(net: nn.Module, half: bool) -> Suite:
    """Every outcome verified on the network itself in float32, as the harness does."""
    settings = {"step_size": str(STEP), "start": "natural"}
    attacks = [examiner(name, {**settings, "step_size": "eps"} if name == "fgsm" else settings) for name, *_ in SUITE]

    def run(x: Tensor, y: Tensor) -> Tensor:
        chunk, broken = Chunk(x, y, np.arange(len(x)), 10, 0), []
        for attack in attacks:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                x_adv = attack.attack(net, chunk, EPS).x_adv
            broken.append(verified(net, x, x_adv, y, EPS)[1])
        return torch.stack(broken)

    return run


def by_foolbox(net: nn.Module) -> Suite:
    import foolbox

    class Margin(foolbox.attacks.LinfPGD):  # type: ignore[misc]
        def get_loss_fn(self, model: Any, labels: Any) -> Any:
            import eagerpy as ep

            return lambda x: ep.astensor(cw_margin(model(x).raw, labels.raw).sum())

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    made = [
        (Margin if loss == "cw" else foolbox.attacks.LinfPGD)(abs_stepsize=size, steps=steps, random_start=False)
        for _, steps, size, loss in SUITE
    ]
    return lambda x, y: torch.stack([attack(model, x, y, epsilons=EPS)[2] for attack in made])


def by_torchattacks(net: nn.Module) -> Suite:
    import torchattacks
    from torchattacks.attacks import pgd as module

    def run(x: Tensor, y: Tensor) -> Tensor:
        broken = []
        for _, steps, size, loss in SUITE:
            attack = torchattacks.PGD(net, eps=EPS, alpha=size, steps=steps, random_start=False)
            # Its loss is written into its loop, and found by this name.
            module.nn = SimpleNamespace(CrossEntropyLoss=lambda: _margin) if loss == "cw" else nn
            x_adv = attack(x, y)
            with torch.no_grad():
                broken.append(net(x_adv).argmax(dim=1) != y)
        module.nn = nn
        return torch.stack(broken)

    return run


def by_art(net: nn.Module) -> Suite:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    class Margin(nn.Module):
        reduction = "mean"

        def forward(self, logits: Tensor, y: Tensor) -> Tensor:
            return _margin(logits, y if y.ndim == 1 else y.argmax(dim=1))

    def run(x: Tensor, y: Tensor) -> Tensor:
        broken = []
        for _, steps, size, loss in SUITE:
            classifier = PyTorchClassifier(
                net, loss=Margin() if loss == "cw" else nn.CrossEntropyLoss(), input_shape=tuple(x.shape[1:]),
                nb_classes=10, clip_values=(0.0, 1.0), device_type="cpu",
            )  # fmt: skip
            attack = ProjectedGradientDescentPyTorch(
                classifier, eps=EPS, eps_step=size, max_iter=steps, batch_size=len(x), verbose=False
            )
            x_adv = torch.from_numpy(attack.generate(x.numpy(), y.numpy()))
            with torch.no_grad():
                broken.append(net(x_adv).argmax(dim=1) != y)
        return torch.stack(broken)

    return run


LIBRARIES = {"foolbox": by_foolbox, "torchattacks": by_torchattacks, "art": by_art}


def suites(arch: str, rounds: int) -> Iterator[dict[str, Any]]:
    """Each library against ours in float32 and with bfloat16 crafting; how many outcomes differ.

    All in the first round, after that only the fastest of them: the others' minutes would tell nothing more.
    """
    install()
    net, (x, y) = trained(arch), pictures(EXAMINED[arch], 999)
    found: dict[str, Tensor] = {}

    def way(name: str, suite: Suite) -> Callable[[], None]:
        suite(x[:4], y[:4])  # to warm up
        return lambda: found.update({name: suite(x, y)})

    made = {name: by(deepcopy(net)) for name, by in LIBRARIES.items()}
    ways = {name: way(name, s) for name, s in {**made, **_both(net)}.items()}
    times = turns(ways, 1)
    fastest = min(LIBRARIES, key=lambda name: times[name][0])
    more = turns({name: way for name, way in ways.items() if name == fastest or name not in LIBRARIES}, rounds - 1)
    times = {name: taken + more.get(name, []) for name, taken in times.items()}
    for name, precision in product(LIBRARIES, ("float32", "bf16")):
        one, other = found[name], found[precision]
        robust = [100 * (1 - outcome.any(dim=0).double().mean().item()) for outcome in (one, other)]
        differ = f"{int((one != other).sum())} of {one.numel()} outcomes differ"
        note = f"{len(x)} images, {differ}, robust {robust[0]:.1f}, {robust[1]:.1f} %"
        yield row("evaluate", name, arch, over(times[name], times[precision]), precision=precision, note=note)


def _both(net: nn.Module) -> dict[str, Suite]:
    return {"float32": ours(net, False), "bf16": ours(net, True)}
