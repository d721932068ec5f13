"""One learning rate for every contestant, chosen on the validation split: prints the table of it.

    python benchmarks/choose_lr.py OUT [--eps 0.3] [--epochs 15] [--seeds 2]
    python benchmarks/choose_lr.py OUT --dataset cifar10.npz --rates 0.03 0.1 --defenses madry fat --seeds 1

The choice is the rate with the highest mean, over the adversarially trained contestants and seeds, of the last epoch's
validation accuracy under PGD-10. The test set is not looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from fatbench import demo, trainer
from fatbench.paper import reproduce
from fatbench.paper.contestants import Contestant, world

RATES = (0.01, 0.03, 0.1, 0.3)


def final(folder: Path) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = json.loads(lines[-1])
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", default="digits", help="as `fatbench reproduce` takes it")
    parser.add_argument("--eps", help="the dataset's unless given")
    parser.add_argument("--epochs", type=int, help="the dataset's shortest budget unless given")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=RATES)
    parser.add_argument("--defenses", nargs="+", default=[name for name in demo.DEFENSES if name != "standard"])
    arguments = parser.parse_args()
    here, contestants = world(arguments.dataset), arguments.defenses
    reproduce.lay(here, arguments.dataset)
    eps, epochs = arguments.eps or here.eps, arguments.epochs or here.short
    print("| lr | " + " | ".join(contestants) + " | mean |")
    for lr in arguments.rates:
        scores = {}
        for name in contestants:
            robust = []
            for seed in range(arguments.seeds):
                folder = arguments.out / f"{name}-lr{lr}-seed{seed}"
                wanted = Contestant(name, eps, epochs).settings(here, seed).model_copy(update={"lr": lr})
                trainer.train(wanted, folder, resume=(folder / "settings.toml").exists())
                robust.append(100 * final(folder)[f"val_{trainer.SELECTION}"])
            scores[name] = mean(robust)
        print(
            f"| {lr} | " + " | ".join(f"{s:.1f}" for s in scores.values()) + f" | {mean(scores.values()):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
