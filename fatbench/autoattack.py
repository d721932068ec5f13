"""pyautoattack's attacks one at a time: guarded, counted, and asking nothing more about whom they have broken.

The library is used as it is; what it gets in place of the network is `Watched`. Its random streams stay those of a
stock run: it draws for the whole batch, whoever has fallen. So the flags are a stock run's too, sample by sample.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fatbench.attacks import crafting
from fatbench.patches import Patches, patches

Version = Literal["standard", "plus", "rand"]
STAGES: dict[Version, tuple[str, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}


def stages(version: Version, classes: int) -> tuple[str, ...]:
    """The attacks that a version makes on so many classes: the DLR loss needs three of them, its targeted form four."""
    wanted = STAGES[version]
    if classes == 3:
        wanted = tuple("apgd-dlr" if attack == "apgd-t" else attack for attack in wanted)
    if classes < 3:
        wanted = tuple(attack for attack in wanted if attack not in ("apgd-dlr", "apgd-t"))
    return tuple(dict.fromkeys(wanted))


def built(network: nn.Module, version: Version, classes: int, eps: float, seed: int, device: torch.device) -> Any:
    """The library's object, with the budgets of a version, and no more targets than there are classes."""
    import pyautoattack

    # A seed must be given: without one the library takes the clock.
    made = pyautoattack.AutoAttack(network, device=device, eps=eps, seed=seed, version=version)
    made.apgd_targeted.n_target_classes = made.fab.n_target_classes = min(9, classes - 1)
    return made


def perturbed(library: Any, attack: str, x: Tensor, y: Tensor) -> Tensor:
    """One attack of the library on one batch: its run_standard_evaluation without the bookkeeping.

    Images lying channels last would crash it after half of its work, labels of another type before.
    """
    if attack in ("apgd-ce", "apgd-dlr"):
        library.apgd.loss = attack.removeprefix("apgd-")
    if attack in ("fab", "fab-t"):
        library.fab.targeted = attack == "fab-t"
        library.fab.n_restarts = 1 if attack == "fab-t" else library.fab.n_restarts
    one = {"apgd-t": library.apgd_targeted, "square": library.square, "fab": library.fab, "fab-t": library.fab}
    with torch.no_grad():
        found: Tensor = one.get(attack, library.apgd).perturb(x.clone(memory_format=torch.contiguous_format), y.long())
    return found


# ------------------------------------------------------------------------------------------------ the network, watched


class _NobodyLeft(Exception):
    """Everyone in a run of an attack has fallen: the rest of its iterations would change nothing."""


class Watched(nn.Module):
    """The network as the library sees it.

    Within a run of one attack (`spares`) those who have fallen are not asked again: the library is told that they are
    right, so that it keeps the point at which they fell. Attacks are made on `craft`, and whom it calls broken
    `judge` looks at: what the library hears of them is the judge's answer, with the other's gradient.

    Attributes:
        judge: The network itself.
        craft: What attacks are made on; the network itself, or a swifter copy.
        forwards, backwards: Examples passed through either, example gradients taken.
        piece: The most examples that pass together, for memory; None for no limit.
    """

    def __init__(self, judge: nn.Module, craft: nn.Module | None = None, piece: int | None = None) -> None:
        super().__init__()
        self.judge, self.craft, self.piece = judge, craft or judge, piece
        self.forwards = self.backwards = 0
        self.run: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.judge, x) if self.run is None else self.run(x)

    def answer(self, network: nn.Module, x: Tensor) -> Tensor:
        """Logits (N, classes), a tensor of its own."""
        self.forwards += len(x)
        x = x.contiguous()  # the library hands on the strides of whoever called it
        parts = [x] if self.piece is None else list(torch.split(x, self.piece))
        if len(parts) == 1:
            logits = network(x)
        elif torch.is_grad_enabled():  # the graph of one piece at a time: it is computed again on the way back
            logits = torch.cat([checkpoint(network, part, use_reentrant=False) for part in parts])
        else:
            logits = torch.cat([network(part) for part in parts])
        if logits.requires_grad:
            logits.register_hook(self._count)
        answered: Tensor = logits.float()
        return answered

    def judged(self, x: Tensor, y: Tensor, logits: Tensor, which: Tensor) -> Tensor:
        """Logits that are the judge's own wherever `which` (N,) bool asks; gradients stay the crafting network's."""
        if self.craft is self.judge or not which.any():
            return logits
        rows = which.nonzero().squeeze(1)
        with torch.no_grad():
            true = self.answer(self.judge, x[rows].detach())
        return logits.index_add(0, rows, true - logits.detach()[rows])

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)


class _Run:
    """One run of an attack on one batch: who still stands, and the points at which the others fell.

    Attributes:
        x, y: (N, C, H, W), (N,) the batch.
        standing: (N,) bool.
        points: (N, C, H, W) where each fell; its clean image while it stands.
    """

    def __init__(self, network: Watched, x: Tensor, y: Tensor) -> None:
        self.network, self.x, self.y = network, x, y
        self.standing = torch.ones_like(y, dtype=torch.bool)
        self.points = x.detach().clone()

    def counts(self, x: Tensor, rows: Tensor) -> Tensor:
        """(M,) bool: whether points x (M, C, H, W) of these rows may count."""
        return torch.ones_like(rows, dtype=torch.bool)

    def __call__(self, x: Tensor) -> Tensor:
        rows = self.standing.nonzero().squeeze(1)
        if not len(rows):
            raise _NobodyLeft
        everyone = len(rows) == len(x)
        part, y = (x, self.y) if everyone else (x[rows], self.y[rows])
        logits = self.network.answer(self.network.craft, part)
        doubtful = (logits.detach().argmax(dim=1) != y) & self.counts(part.detach(), rows)
        logits = self.network.judged(part, y, logits, doubtful)
        fell = (logits.detach().argmax(dim=1) != y) & doubtful
        self.points[rows[fell]] = part.detach()[fell]
        self.standing[rows[fell]] = False
        return logits if everyone else self._blank(x, logits).index_copy(0, rows, logits)

    def _blank(self, x: Tensor, logits: Tensor) -> Tensor:
        """What is said of the fallen: right beyond doubt, with a gradient that divides by no zero."""
        others = x.flatten(1).mean(dim=1, keepdim=True).expand(-1, logits.shape[1])
        return others.scatter_add(1, self.y[:, None], torch.full_like(others[:, :1], 8.0))


class _Nearest(_Run):
    """A run of FAB, which seeks the nearest point of another class: what lies beyond eps does not count.

    It first asks for labels at the clean images, and after that moves only those who are right. It keeps only points
    whose label it has asked for, not those where it takes a gradient.
    """

    def __init__(self, network: Watched, x: Tensor, y: Tensor, eps: float, targeted: bool) -> None:
        super().__init__(network, x, y)
        self.eps, self.first = eps, 1 + targeted

    def counts(self, x: Tensor, rows: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return torch.zeros_like(rows, dtype=torch.bool)
        return (x - self.x[rows]).abs().flatten(1).amax(dim=1) <= self.eps

    def __call__(self, x: Tensor) -> Tensor:
        if not self.first:
            return super().__call__(x)
        self.first -= 1
        logits = self.network.answer(self.network.judge, x)
        if not self.first:
            right = logits.argmax(dim=1) == self.y
            self.x, self.y, self.standing = self.x[right], self.y[right], self.standing[right]
            self.points, self.right = self.points[right], right
        return logits


def spares(library: Any, network: Watched) -> None:
    """Lets the library's gradient attacks spare the fallen, and judges what its query attack finds.

    Not where an attack takes expectations over several forwards: the library's own verdict is then its last forward's.
    """
    for attack in (library.apgd, library.apgd_targeted):
        if attack.eot_iter == 1:
            attack.attack_single_run = _sparing(attack.attack_single_run, network)
    library.fab.attack_single_run = _nearing(library.fab, network)
    if network.craft is not network.judge:
        library.square.margin_and_loss = _Queries(library.square.margin_and_loss, network)


def _sparing(single: Callable[..., Any], network: Watched) -> Callable[..., Any]:
    def run(x: Tensor, y: Tensor, x_init: Tensor | None = None) -> Any:
        kept = _Run(network, x, y)
        network.run = kept
        try:
            return single(x, y, x_init)
        except _NobodyLeft:
            return x, torch.zeros_like(y, dtype=torch.bool), torch.zeros_like(y, dtype=x.dtype), kept.points
        finally:
            network.run = None

    return run


def _nearing(fab: Any, network: Watched) -> Callable[..., Any]:
    single = fab.attack_single_run

    def run(x: Tensor, y: Tensor, use_rand_start: bool = False, is_targeted: bool = False) -> Any:
        kept = _Nearest(network, x, y, fab.eps, is_targeted)
        network.run = kept
        try:
            return single(x, y, use_rand_start, is_targeted)
        except _NobodyLeft:
            found = x.clone()
            found[kept.right] = kept.points
            return found
        finally:
            network.run = None

    return run


FEW = 16  # images: of fewer the whole network takes no longer than the bookkeeping of what has changed


class _Queries:
    """Square's questions, asked of the swift copy and judged: most change one small square of what was asked before.

    Square keeps a query that lowers its loss, and goes on with those whose margin is above 0.
    """

    def __init__(self, margin: Callable[..., Any], network: Watched) -> None:
        self.margin, self.network = margin, network
        self.patches: Patches | None = None
        self.best: Tensor | None = None

    def __call__(self, x: Tensor, y: Tensor) -> Any:
        if self.best is None:
            worth = len(x) >= FEW and self.network.piece is None
            self.patches = patches(self.network.craft, x) if worth else None
        self.network.run = partial(self._asked, y=y)
        try:
            margins, losses = self.margin(x, y)
        finally:
            self.network.run = None
        self._keep(margins, losses)
        return margins, losses

    def _asked(self, x: Tensor, y: Tensor) -> Tensor:
        if self.patches is None:
            logits = self.network.answer(self.network.craft, x)
        else:
            logits = self.patches.ask(x)
            self.network.forwards += len(x)
        return self.network.judged(x, y, logits, logits.argmax(dim=1) != y)

    def _keep(self, margins: Tensor, losses: Tensor) -> None:
        if self.best is None or len(self.best) != len(losses):
            self.best = torch.full_like(losses, torch.inf)
        better, going = (losses < self.best) | (margins <= 0), margins > 0
        if self.patches is not None:
            self.patches.keep(better, going)
        self.best = torch.where(better, losses, self.best)[going]


# ------------------------------------------------------------------------------------------------ guards


class _Heard(logging.Handler):
    """Keeps what the library says at WARNING, which is how it reports that it may not be trusted."""

    def __init__(self, heard: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.heard = heard

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append(record.getMessage().partition(" See flags_doc")[0])


@contextmanager
def guarded(model: nn.Module, x: Tensor) -> Iterator[list[str]]:
    """Undoes what the library leaves behind: torch's random stream, gradients, the tracer, its own counters and log.

    Yields what it warns of.
    """
    from pyautoattack import checks

    warnings: list[str] = []
    logger, handler, tracer = logging.getLogger("auto-attack"), _Heard(warnings), sys.gettrace()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    devices = [x.device] if x.device.type == "cuda" else []
    for name in checks.funcs:  # counted over the whole process, and never reset: one dynamic model marks all later ones
        checks.funcs[name] = 0
    try:
        with torch.random.fork_rng(devices=devices), crafting(model):
            yield warnings
    finally:
        sys.settrace(tracer)
        logger.removeHandler(handler)
        logger.propagate = propagate


def looked_at(network: nn.Module, version: Version, x: Tensor, y: Tensor) -> None:
    """The library's own checks of a network, on one batch; what they find it logs (`guarded` hears it)."""
    from pyautoattack import checks

    logger = logging.getLogger("auto-attack")
    if version != "rand":
        checks.check_randomized(network, x, y, bs=len(x), logger=logger)
    checks.check_range_output(network, x, logger=logger)
    checks.check_dynamic(network, x[:8], logger=logger)  # it keeps a graph, and a few images show as much as many


def takes_gradients(model: nn.Module, x: Tensor) -> bool:
    """Whether the network takes gradients while it answers, by the library's own check."""
    from pyautoattack import checks

    with guarded(model, x):
        checks.check_dynamic(model, x, logger=logging.getLogger("auto-attack"))
        return any(checks.funcs.values())
