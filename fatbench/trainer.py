"""The one loop that trains every contestant, on Lightning Fabric.

Everything random is keyed by seed, epoch and example, and an epoch is the unit of resume: a run killed anywhere and
resumed ends with the same bits. What a run leaves behind is told in fatbench/runs.py.
"""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from fatbench import checkpoint, console, data, models, recipe, runs
from fatbench.attacks import crafting, pgd, uniform
from fatbench.defense import Craft, Defense, Verdict
from fatbench.device import named
from fatbench.draws import Draws, hashed, shuffled
from fatbench.errors import Refused, RunFailed, first_line
from fatbench.files import append_line, read_lines, write_atomic, write_json, write_text
from fatbench.quantities import Progress, number, value_at
from fatbench.recipe import Settings

SELECTION = "pgd-10"  # best.safetensors: highest validation accuracy under PGD-10 (eps/4, uniform), then natural


def train(settings: Settings, out: Path, *, device: str = "auto", resume: bool = False, force: bool = False) -> Path:
    """Trains one contestant into a run folder, and returns the folder.

    Args:
        settings: The run.
        out: The folder; a new one, or with `resume` one that the same settings began.
        device: auto, cpu, cuda, or cuda:1.
        resume: Go on from the last epoch that was saved; a finished run stays as it is.
        force: Throw away the run that is in `out`.

    Raises:
        Refused: settings that do not fit the data, or a folder that is not this run's.
        RunFailed: a loss that is not finite; the folder says where.
    """
    loaded = data.take(data.load(settings.dataset), settings.n_train)
    run = Run(settings, out, loaded, fabric_on(device, settings.precision))
    with runs.claimed(out, settings, resume=resume, force=force):
        if (out / "done").exists():
            runs.raise_if_failed(out)
            return out
        run.restore()
        run.go()
    return out


def fabric_on(device: str, precision: str = "32-true") -> Fabric:
    """Lightning Fabric on one device."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and not index.isdigit()):
        raise Refused(f"--device {device!r}: auto, cpu, cuda, or cuda:1")
    if kind == "cuda" and not torch.cuda.is_available():
        raise Refused("--device cuda: torch sees no CUDA device here; use --device cpu")
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if precision == "bf16-mixed" and kind == "cuda" and not torch.cuda.is_bf16_supported():
        raise Refused("--precision bf16-mixed: this GPU has no bfloat16; use 32-true")
    return Fabric(accelerator=kind, devices=[int(index)] if index else 1, precision=precision)  # type: ignore[arg-type]


class Student(nn.Module):
    """Network and defense in one module: an update is one call, whatever it passes through the network."""

    def __init__(self, net: nn.Module, defense: Defense) -> None:
        super().__init__()
        self.net, self.defense = net, defense

    def training_step(self, x: Tensor, x_adv: Tensor, y: Tensor, progress: Progress) -> Tensor:
        return self.defense.loss(self.net, x, x_adv, y, progress)


@dataclass
class Tally:
    """What an epoch adds up, on the device: nothing waits for the GPU before the epoch is over."""

    device: torch.device
    examples: int = 0
    batches: int = 0
    forwards: int = 0
    backwards: int = 0
    sums: Tensor = field(init=False)  # loss, steps, right, seen
    broken: Tensor = field(init=False)  # the first batch whose loss was not finite

    def __post_init__(self) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        self.broken = torch.full((), -1, dtype=torch.int64, device=self.device)

    def add(self, loss: Tensor, crafted: Any, right: Tensor, seen: int) -> None:
        n = len(crafted.x_adv)
        loss = loss.detach().double()
        here = torch.where(torch.isfinite(loss), -1, self.batches)
        self.broken = torch.where(self.broken < 0, here, self.broken)
        self.sums += torch.stack(
            [loss * n, crafted.steps.sum().double(), right.double(), right.new_full((), seen).double()]
        )
        self.examples, self.batches = self.examples + n, self.batches + 1
        self.forwards, self.backwards = self.forwards + crafted.forwards, self.backwards + crafted.backwards

    def figures(self) -> dict[str, float]:
        loss, steps, right, seen = self.sums.tolist()
        return {
            "loss": loss / self.examples,
            "train_accuracy": right / seen if seen else 0.0,
            "steps_per_example": steps / self.examples,
            "examples": self.examples,
            "forwards": self.forwards,
            "backwards": self.backwards,
        }


@dataclass
class Yardstick:
    """Accuracy on the validation split under an attack: what the harness selects by, and lends to a curriculum."""

    run: Run
    epoch: int
    train_accuracy: float

    def __call__(self, craft: Craft | None = None) -> float:
        run, right = self.run, torch.zeros((), dtype=torch.int64, device=self.run.device)
        for rows in np.array_split(run.held, max(1, -(-len(run.held) // 250))):
            x, y = run.x[rows], run.y[rows]
            draws = Draws(("validation", run.settings.seed, self.epoch), rows)
            with crafting(run.subject), run.fabric.autocast():
                point = x if craft is None else craft(run.subject, x, y, draws)
                with torch.no_grad():
                    right += (run.subject(point).argmax(dim=1) == y).sum()
        return float(right.item()) / len(run.held)


class Run:
    """One run under way: what it needs, what it has reached, and how it goes on."""

    def __init__(self, settings: Settings, out: Path, loaded: data.Data, fabric: Fabric) -> None:
        self.settings, self.out, self.fabric = settings, out, fabric
        self.device = fabric.device
        self.defense: Defense = recipe.contestant(settings)
        recipe.fits(settings, loaded.shape, loaded.info.name)
        channels, height, width = loaded.shape
        if height != width and settings.arch == "small-cnn":
            raise Refused(f"small-cnn takes square images, {loaded.info.name} has {height}x{width}: use another --arch")
        self.meta: dict[str, Any] = {
            "arch": settings.arch, "classes": loaded.classes, "channels": channels, "size": height,
            "mean": settings.mean, "std": settings.std, "settings": settings.model_dump(mode="json"),
            "data": {"name": loaded.info.name, "train": loaded.fingerprint("train")},
        }  # fmt: skip
        torch.manual_seed(self._seed("weights"))
        net = models.build(settings.arch, loaded.classes, channels, height)
        if settings.mean and settings.std:
            net = models.Normalised(net, settings.mean, settings.std)
        student = Student(net, self.defense)
        sgd = torch.optim.SGD(
            [p for p in net.parameters() if p.requires_grad],
            lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.student, self.optimizer = fabric.setup(student, sgd)
        self.net: nn.Module = student.net
        self.average: nn.Module | None = None
        if self.defense.average(Progress(0, settings.epochs)) is not None:
            self.average = deepcopy(self.net)
        dtype = torch.float64 if settings.precision == "64-true" else torch.float32
        self.x, self.y = loaded.x_train.to(self.device, dtype), loaded.y_train.to(self.device)
        self.rows, self.held = loaded.split(settings.validation)
        if not len(self.rows) or not len(self.held):
            raise Refused(f"{len(loaded.y_train)} training examples leave none for training or for validation")
        self.epoch = 0
        self.best: list[float] | None = None
        self.remembered: dict[str, Any] | None = None

    @property
    def subject(self) -> nn.Module:
        """The network that is validated and saved: the moving average where the defense keeps one."""
        return self.net if self.average is None else self.average

    def _seed(self, *purpose: object) -> int:
        return int(hashed(np.zeros(1), self.settings.seed, *purpose)[0] >> np.uint64(32))

    # -------------------------------------------------------------------------------------------- the loop

    def go(self) -> None:
        """Epoch after epoch, from where the run stands to its end."""
        title = f"{self.settings.defense} on {self.meta['data']['name']}"
        with console.waiting(title, self.settings.epochs, done=self.epoch) as bar:
            while self.epoch < self.settings.epochs:
                bar.advance(_brief(self.one_epoch()))
        checkpoint.relabel(self.out / "best.safetensors", status="done")
        write_json(self.out / "done", {"status": "done", "epochs": self.settings.epochs})

    def one_epoch(self) -> dict[str, Any]:
        """Trains, validates, lets the defense decide, saves; returns the epoch's metrics."""
        began = time.perf_counter()
        before = Progress(self.epoch, self.settings.epochs)
        tally = self.learn(before)
        if tally.broken.item() >= 0:
            self.fail(f"the loss was not finite at epoch {self.epoch + 1}, batch {int(tally.broken.item()) + 1}")
        figures = tally.figures()
        after = Progress(self.epoch + 1, self.settings.epochs)
        measure = Yardstick(self, self.epoch, figures["train_accuracy"])
        natural, robust = measure(), measure(self.selecting)
        metrics = {
            "epoch": after.done, **figures, "val_natural": natural, f"val_{SELECTION}": robust,
            "tau": value_at(self.defense.tau, before) if hasattr(self.defense, "tau") else None,
            "K": self.defense.steps_at(before), "eps": self.defense.eps_at(before), "lr": self.settings.lr_at(before),
            "device": named(self.device),
        }  # fmt: skip
        verdict = self.defense.after_epoch(after, self.subject, measure)
        self.obey(verdict)
        metrics["seconds"] = round(time.perf_counter() - began, 3)
        self.epoch += 1
        self.save(metrics, [robust, natural])
        return metrics

    def learn(self, progress: Progress) -> Tally:
        """One pass over the training examples."""
        tally = Tally(self.device)
        torch.manual_seed(self._seed("epoch", progress.done))  # dropout and the like; all else is keyed by example
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr_at(progress)
        self.student.train()
        for indices in self.batches(progress.done):
            rows = torch.from_numpy(indices).to(self.device)
            x = data.augmented(self.x[rows], indices, self.settings.augment, self.settings.seed, progress.done)
            y = self.y[rows]
            draws = Draws(("train", self.settings.seed, progress.done), indices)
            with self.fabric.autocast():
                crafted = self.defense.craft(self.net, x, y, progress, draws=draws)
            self.optimizer.zero_grad()
            with _answers(self.net, crafted.x_adv, y) as right:
                loss = self.student.training_step(x, crafted.x_adv, y, progress)
            self.fabric.backward(loss)
            self.optimizer.step()
            self.follow(progress)
            tally.add(loss, crafted, sum(right, torch.zeros((), device=self.device)), len(right) * len(y))
        return tally

    def batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The training rows in this epoch's order, the last batch as long as it is."""
        order = self.rows[shuffled(len(self.rows), self.settings.seed, epoch)]
        for first in range(0, len(order), self.settings.batch_size):
            yield order[first : first + self.settings.batch_size]

    @torch.no_grad()
    def follow(self, progress: Progress) -> None:
        """The moving average takes a step after the weights."""
        decay = self.defense.average(progress)
        if self.average is None or decay is None:
            return
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

    def save(self, metrics: dict[str, Any], score: list[float]) -> None:
        """Metrics, checkpoints, and last the state to resume from: a kill before it repeats the epoch, bit for bit."""
        append_line(self.out / "metrics.jsonl", metrics)
        self.write("last")
        if self.best is None or score > self.best[:2]:
            self.best = [*score, float(self.epoch)]
            self.write("best")
        state = {
            "epoch": self.epoch, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "memory": json.dumps(self.defense.memory), "best": self.best, "remembered": self.remembered,
        }  # fmt: skip
        write_atomic(self.out / "resume.pt", partial(_torch_save, state))

    def write(self, selection: str) -> None:
        whole = selection == "last" and self.epoch == self.settings.epochs  # `best` is known when the run is over
        reached = {"epoch": self.epoch, "epochs": self.settings.epochs, "selection": selection}
        reached |= {"rule": SELECTION if selection == "best" else "", "status": "done" if whole else "unfinished"}
        checkpoint.save(self.out / f"{selection}.safetensors", self.subject, {**self.meta, **reached})

    def fail(self, reason: str) -> None:
        reached = {"epoch": self.epoch, "epochs": self.settings.epochs, "selection": "last"}
        failed = {**self.meta, **reached, "status": f"failed: {reason}"}
        checkpoint.save(self.out / "failed.safetensors", self.net, failed)
        write_json(self.out / "done", {"status": "failed", "reason": reason})
        raise RunFailed(f"{reason}: the run in {self.out} has failed; a smaller --lr may help")

    def restore(self) -> None:
        """Takes up the state that the last saved epoch left; where none was, the run stands at its beginning."""
        path = self.out / "resume.pt"
        if not path.exists():
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
        lines = read_lines(self.out / "metrics.jsonl")[: self.epoch]
        write_text(self.out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


def _torch_save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # how torch passes on what the disk said
        raise OSError(errno.EIO, first_line(error)) from error


class _answers:
    """How many of the adversarial examples the update's own forwards classify rightly; costs no forward."""

    def __init__(self, net: nn.Module, x_adv: Tensor, y: Tensor) -> None:
        self.x_adv, self.y, self.right = x_adv, y, list[Tensor]()
        self.hook = net.register_forward_hook(self._look)

    def _look(self, net: nn.Module, inputs: tuple[Tensor, ...], logits: Tensor) -> None:
        if inputs[0] is self.x_adv:
            self.right.append((logits.detach().argmax(dim=1) == self.y).sum())

    def __enter__(self) -> list[Tensor]:
        return self.right

    def __exit__(self, *exc: object) -> None:
        self.hook.remove()


def _brief(metrics: dict[str, Any]) -> str:
    robust = metrics[f"val_{SELECTION}"]
    return (
        f"loss {metrics['loss']:.3f}, validation {100 * metrics['val_natural']:.1f} natural {100 * robust:.1f} robust, "
        f"{metrics['steps_per_example']:.1f} steps an example"
    )
