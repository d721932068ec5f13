"""The one loop that trains every contestant, on Lightning Fabric.

Everything random is keyed by seed, epoch and example, and an epoch is the unit of resume: a run killed anywhere and
resumed ends with the same bits. What a run leaves behind is told in fatbench/runs.py.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fatbench import checkpoint, console, data, models, recipe, runs
from fatbench.attacks import Crafted, pgd, uniform
from fatbench.defense import Defense, Verdict
from fatbench.devices import fabric_on, launched, named
from fatbench.draws import Draws, seed_of, shuffled
from fatbench.errors import Refused, RunFailed, first_line
from fatbench.figures import Tally, Yardstick, answers
from fatbench.files import append_line, read_lines, write_atomic, write_json, write_text
from fatbench.folding import layout
from fatbench.quantities import Progress, number, value_at
from fatbench.recipe import Settings
from fatbench.team import Share, Team

SELECTION = "pgd-10"  # best.safetensors: highest validation accuracy under PGD-10 (eps/4, uniform), then natural
COMPARED_EVERY = 250  # batches; and at the end of every epoch


def train(
    settings: Settings,
    out: Path,
    *,
    device: str = "auto",
    devices: int | None = None,
    nodes: int | None = None,
    resume: bool = False,
    force: bool = False,
) -> Path:
    """Trains one contestant into a run folder, and returns the folder.

    Args:
        settings: The run.
        out: The folder; a new one, or with `resume` one that the same settings began. All nodes see it.
        device: auto, cpu, cuda, or cuda:1.
        devices: Processes on each node; as torchrun or SLURM has started them unless given, or 1.
        nodes: Machines, each running this same command.
        resume: Go on from the last epoch that was saved; a finished run stays as it is.
        force: Throw away the run that is in `out`.

    Raises:
        Refused: settings that do not fit the data or the devices, or a folder that is not this run's.
        RunFailed: a loss that is not finite, where the folder says where; or ranks that came apart.
    """
    fabric = fabric_on(device, settings.precision, devices, nodes)
    _fits(settings, fabric)
    return launched(fabric, _train, settings, out, resume, force)


def _fits(settings: Settings, fabric: Fabric) -> None:
    if settings.ranks != fabric.world_size:
        raise Refused(
            f"the settings are for {settings.ranks} processes and there are {fabric.world_size}: --devices times "
            "--nodes must be as many"
        )
    if settings.sync_bn and fabric.device.type != "cuda":
        raise Refused("--sync-bn: torch has it for GPUs only; leave it out on a CPU")
    if settings.sync_bn and getattr(recipe.contestant(settings), "mode", "eval") == "train":
        raise Refused(
            f"--sync-bn: {settings.defense} crafts in train mode, where ranks that take different numbers of steps "
            "would wait for each other for ever; leave it out, or --set mode=eval"
        )


def _train(fabric: Fabric, settings: Settings, out: Path, resume: bool, force: bool) -> Path:
    """What every rank does; the first alone writes, and holds the folder."""
    team = Team(fabric)
    loaded = data.take(team.in_turn(partial(data.load, settings.dataset)), settings.n_train)
    run = Run(settings, out, loaded, team)
    with ExitStack() as held:
        with team.together():
            if team.first:
                held.enter_context(runs.claimed(out, settings, resume=resume, force=force))
        with team.together():
            if (out / "done").exists():
                runs.raise_if_failed(out)
                return out
            run.restore()
        run.go()
    return out


def _network(settings: Settings, loaded: data.Data, examples: int) -> nn.Module:
    """The network as the run begins, its weights from the run's seed.

    Raises:
        Refused: it cannot take the images, or not train on the batches that so many examples make.
    """
    channels, height, _ = loaded.shape
    for what, values in (("mean", settings.mean), ("std", settings.std)):
        if values and len(values) != channels:
            raise Refused(
                f"{what} has {len(values)} numbers, {loaded.info.name} {channels} channels: give one for each"
            )
    torch.manual_seed(seed_of(settings.seed, "weights"))
    net = models.build(settings.arch, loaded.classes, channels, height)
    _takes(net, settings.arch, loaded)
    if examples % settings.batch_size == 1 or settings.batch_size == 1:
        _trains_on_one(net, settings, loaded, examples)
    return models.Normalised(net, settings.mean, settings.std) if settings.mean and settings.std else net


@torch.no_grad()
def _takes(net: nn.Module, arch: str, loaded: data.Data) -> None:
    """Raises Refused where a network cannot take the images: not square, or too small."""
    try:
        net.eval()(torch.zeros(1, *loaded.shape))
    except RuntimeError as error:
        channels, height, width = loaded.shape
        raise Refused(
            f"{arch} cannot take {loaded.info.name}'s images of {channels}x{height}x{width} ({first_line(error)}): use "
            "another --arch"
        ) from None


@torch.no_grad()
def _trains_on_one(net: nn.Module, settings: Settings, loaded: data.Data, examples: int) -> None:
    """Raises Refused where the network cannot train on a batch of one: BatchNorm has no variance of one number."""
    try:
        deepcopy(net).train()(torch.zeros(1, *loaded.shape))
    except ValueError as error:
        raise Refused(
            f"{examples} training examples in batches of {settings.batch_size} leave one for the last, and "
            f"{settings.arch} cannot train on one ({first_line(error)}): use another --batch-size"
        ) from None


class Student(nn.Module):
    """Network and defense in one module: an update is one call, whatever it passes through the network."""

    def __init__(self, net: nn.Module, defense: Defense) -> None:
        super().__init__()
        self.net, self.defense = net, defense

    def training_step(self, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress, weight: float) -> Tensor:
        with self.net.register_forward_hook(_in_float32):
            loss = self.defense.loss(self.net, x, x_adv, y, progress)
        return loss if weight == 1 else loss * weight  # here, in the network's precision: float32 leaves the wrapper


def _in_float32(net: nn.Module, inputs: tuple[Any, ...], logits: Tensor) -> Tensor | None:
    """A network under autocast answers in bfloat16, of which a loss's logarithms and 1 - p would keep two digits."""
    return logits.float() if logits.dtype == torch.bfloat16 else None


class Run:
    """One run under way: what it needs, what it has reached, and how it goes on."""

    def __init__(self, settings: Settings, out: Path, loaded: data.Data, team: Team) -> None:
        self.settings, self.out, self.team, self.fabric = settings, out, team, team.fabric
        self.device = self.fabric.device
        self.defense: Defense = recipe.contestant(settings)
        recipe.fits(settings, loaded.shape, loaded.info.name)
        self.rows, self.held = loaded.split(settings.validation)
        if not len(self.rows) or (settings.validation and not len(self.held)):
            raise Refused(f"{len(loaded.y_train)} training examples leave none for training or for validation")
        if not settings.validation and type(self.defense).after_epoch is not Defense.after_epoch:
            raise Refused(f"{settings.defense} decides by accuracy on validation: --set validation=0.02, say")
        channels, height, _ = loaded.shape
        self.meta: dict[str, Any] = {
            "arch": settings.arch, "classes": loaded.classes, "channels": channels, "size": height,
            "mean": settings.mean, "std": settings.std, "settings": settings.model_dump(mode="json"),
            "data": {"name": loaded.info.name, "train": loaded.fingerprint("train")},
        }  # fmt: skip
        net = _network(settings, loaded, len(self.rows))
        half = torch.bfloat16 if settings.precision == "bf16-mixed" else None
        student = Student(net.to(memory_format=layout(self.device, half)), self.defense)
        sgd = torch.optim.SGD(
            [p for p in net.parameters() if p.requires_grad],
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        if settings.sync_bn:
            student = nn.SyncBatchNorm.convert_sync_batchnorm(student)  # type: ignore[no-untyped-call]
        self.student, self.optimizer = self.fabric.setup(student, sgd)
        self.net: nn.Module = student.net
        self.average: nn.Module | None = None
        if any(self.defense.average(Progress(done, settings.epochs)) is not None for done in range(settings.epochs)):
            self.average = deepcopy(self.net)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.x, self.y = loaded.x_train.to(self.device, dtype), loaded.y_train.to(self.device)
        self.epoch = 0
        self.best: list[float] | None = None
        self.remembered: dict[str, Any] | None = None

    @property
    def subject(self) -> nn.Module:
        """The network that is validated and saved: the moving average where the defense keeps one."""
        return self.net if self.average is None else self.average

    def _seed(self, *purpose: object) -> int:
        return seed_of(self.settings.seed, *purpose)

    # -------------------------------------------------------------------------------------------- the loop

    def go(self) -> None:
        """Epoch after epoch, from where the run stands to its end."""
        title = f"{self.settings.defense} on {self.meta['data']['name']}"
        with console.waiting(title, self.settings.epochs, done=self.epoch) as bar:
            while self.epoch < self.settings.epochs:
                bar.advance(_brief(self.one_epoch()))
        with self.team.together():
            if self.team.first:
                if self.best is not None:
                    checkpoint.relabel(self.out / "best.safetensors", status="done")
                write_json(self.out / "done", {"status": "done", "epochs": self.settings.epochs})

    def one_epoch(self) -> dict[str, Any]:
        """Trains, validates, lets the defense decide, saves; returns the epoch's metrics."""
        began = time.perf_counter()
        before = Progress(self.epoch, self.settings.epochs)
        tally = self.learn(before)
        if batch := tally.first_broken():
            self.fail(f"the loss was not finite at epoch {self.epoch + 1}, batch {batch}")
        self.team.compare(self.student.module, f"after epoch {self.epoch + 1}")
        figures = tally.figures()
        after = Progress(self.epoch + 1, self.settings.epochs)
        key = ("validation", self.settings.seed, self.epoch)
        measure = Yardstick(self.team, self.subject, self.x, self.y, self.held, key, figures["train_accuracy"])
        natural, robust = (measure(), measure(self.selecting)) if len(self.held) else (None, None)
        metrics = {
            "epoch": after.done, **figures, "val_natural": natural, f"val_{SELECTION}": robust,
            "tau": value_at(self.defense.tau, before) if hasattr(self.defense, "tau") else None,
            "K": self.defense.steps_at(before), "eps": self.defense.eps_at(before), "lr": self.settings.lr_at(before),
            "device": named(self.device),
        }  # fmt: skip
        verdict = self.defense.after_epoch(after, self.subject, measure)
        self.epoch += 1
        if robust is not None and natural is not None:
            self.keep_best([robust, natural])  # before a verdict brings other weights back than were measured
        self.obey(verdict)
        metrics["seconds"] = round(time.perf_counter() - began, 3)
        self.save(metrics)
        return metrics

    def learn(self, progress: Progress) -> Tally:
        """One pass over the training examples."""
        tally = Tally(self.device)
        # Dropout and the like, other on each rank; all else is keyed by example.
        torch.manual_seed(self._seed("epoch", progress.done, *([] if self.team.first else [self.team.rank])))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(progress)
        self.student.train()
        for count, batch in enumerate(self.batches(progress.done), start=1):
            share = self.team.share(batch)
            loss, crafted, right = self.update(share, progress)
            if share.counts:
                seen = len(right) * len(share.rows)
                tally.add(loss, crafted, sum(right, torch.zeros((), device=self.device)), seen)
            if count % COMPARED_EVERY == 0:
                self.team.compare(self.student.module, f"after batch {count} of epoch {progress.done + 1}")
        tally.gather(self.team)
        return tally

    def update(self, share: Share, progress: Progress) -> tuple[Tensor, Crafted, list[Tensor]]:
        """One step of the optimizer on this rank's share: the mean loss, what was crafted, the right answers."""
        rows = torch.from_numpy(share.rows).to(self.device)
        x = data.augmented(self.x[rows], share.rows, self.settings.augment, self.settings.seed, progress.done)
        y = self.y[rows]
        draws = Draws(("train", self.settings.seed, progress.done), share.rows)
        # On the inner network: ranks take different numbers of steps, and the wrapper would have them wait for each
        # other. The update is the one wrapped call, and its backward the one place where they meet.
        with self.fabric.autocast():
            crafted = self.defense.craft(self.net, x, y, progress, draws=draws)
        self.optimizer.zero_grad()
        # One device's wrapper passes the call on and no more, so that autocast must be asked for here.
        with answers(self.net, crafted.x_adv, y) as right, self.fabric.autocast():
            loss = self.student.training_step(x, crafted.x_adv, y, progress, share.weight)
        self.fabric.backward(loss)
        self.optimizer.step()
        self.team.level(self.net)
        self.follow(progress)
        return loss.detach() / share.weight, crafted, right

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The training rows in this epoch's order, the last batch as long as it is."""
        order = self.rows[shuffled(len(self.rows), self.settings.seed, epoch)]
        for first in range(0, len(order), self.settings.batch_size):
            yield order[first : first + self.settings.batch_size]

    @torch.no_grad()
    def follow(self, progress: Progress) -> None:
        """The moving average takes a step after the weights; in an epoch without one it is the weights."""
        if self.average is None:
            return
        decay = self.defense.average(progress) or 0.0
        for slow, fast in zip(self.average.state_dict().values(), self.net.state_dict().values(), strict=True):
            slow.lerp_(fast, 1 - decay) if slow.is_floating_point() else slow.copy_(fast)

    def selecting(self, model: nn.Module, x: Tensor, y: Tensor, draws: Draws) -> Tensor:
        """PGD-10 at the run's own eps: what `best` is chosen by, for every defense alike."""
        eps = number(self.settings.eps)
        return pgd(model, x, y, eps=eps, step_size=eps / 4, steps=10, start=partial(uniform, draws=draws)).x_adv

    def obey(self, verdict: Verdict) -> None:
        if verdict.remember:
            self.remembered = deepcopy({"net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()})
        if verdict.reload_best and self.remembered is not None:
            self.net.load_state_dict(self.remembered["net"])
            self.optimizer.load_state_dict(deepcopy(self.remembered["optimizer"]))

    # -------------------------------------------------------------------------------------------- what is kept

    def keep_best(self, score: list[float]) -> None:
        """The network as it stands, where none before it had such a score: robust accuracy, then natural."""
        if self.best is not None and score <= self.best[:2]:
            return
        self.best = [*score, float(self.epoch)]
        with self.team.together():
            if self.team.first:
                self.write("best")

    def save(self, metrics: dict[str, Any]) -> None:
        """Metrics, checkpoint, and last the state to resume from: a kill before it repeats the epoch, bit for bit."""
        with self.team.together():
            if self.team.first:
                append_line(self.out / "metrics.jsonl", metrics)
                self.write("last")
                write_atomic(self.out / "resume.pt", partial(_torch_save, self.state()))

    def state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "memory": json.dumps(self.defense.memory), "best": self.best, "remembered": self.remembered,
        }  # fmt: skip

    def write(self, selection: str) -> None:
        whole = selection == "last" and self.epoch == self.settings.epochs  # `best` is known when the run is over
        reached = {"epoch": self.epoch, "epochs": self.settings.epochs, "selection": selection}
        reached |= {"rule": SELECTION if selection == "best" else "", "status": "done" if whole else "unfinished"}
        checkpoint.save(self.out / f"{selection}.safetensors", self.subject, {**self.meta, **reached})

    def fail(self, reason: str) -> None:
        reached = {"epoch": self.epoch, "epochs": self.settings.epochs, "selection": "last"}
        failed = {**self.meta, **reached, "status": f"failed: {reason}"}
        with self.team.together():
            if self.team.first:
                checkpoint.save(self.out / "failed.safetensors", self.net, failed)
                write_json(self.out / "done", {"status": "failed", "reason": reason})
        raise RunFailed(f"{reason}: the run in {self.out} has failed; a smaller --lr may help")

    def restore(self) -> None:
        """Takes up the state that the last saved epoch left; where none was, the run stands at its beginning."""
        path = self.out / "resume.pt"
        if not path.exists():
            if self.team.first:
                (self.out / "metrics.jsonl").unlink(missing_ok=True)  # of a first epoch whose state was not saved
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.net.load_state_dict(state["net"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
        except Exception as error:  # whatever a damaged file makes torch raise
            raise Refused(f"{path} is damaged: {first_line(error)}; begin again with --force") from error
        self.defense.memory.clear()
        self.defense.memory.update(json.loads(state["memory"]))
        self.epoch, self.best, self.remembered = state["epoch"], state["best"], state["remembered"]
        # A line may have been written for an epoch whose state was not: it is written again.
        if self.team.first:
            lines = read_lines(self.out / "metrics.jsonl")[: self.epoch]
            write_text(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _torch_save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch passes on what the disk said
        raise OSError(errno.EIO, first_line(error)) from error


def _brief(metrics: dict[str, Any]) -> str:
    natural, robust = metrics["val_natural"], metrics[f"val_{SELECTION}"]
    validated = "" if natural is None else f"validation {100 * natural:.1f} natural {100 * robust:.1f} robust, "
    return f"loss {metrics['loss']:.3f}, {validated}{metrics['steps_per_example']:.1f} steps an example"
