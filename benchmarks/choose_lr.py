"""One learning rate for every contestant of the demo, chosen on the validation split: prints the table of it.

    python benchmarks/choose_lr.py OUT [--eps 0.3] [--epochs 15] [--seeds 2]

The choice is the rate with the highest mean, over the adversarially trained contestants and seeds, of the last epoch's
validation accuracy under PGD-10. The test set is not looked at.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

from fatbench import demo, recipe, trainer

RATES = (0.01, 0.03, 0.1, 0.3)


def final(folder: Path) -> dict[str, float]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last: dict[str, float] = json.loads(lines[-1])
    return last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--eps", default="0.3")
    parser.add_argument("--epochs", type=int, default=demo.EPOCHS)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    contestants = [name for name in demo.DEFENSES if name != "standard"]
    print("| lr | " + " | ".join(contestants) + " | mean |")
    for lr in RATES:
        scores = {}
        for name in contestants:
            robust = []
            for seed in range(arguments.seeds):
                folder = arguments.out / f"{name}-lr{lr}-seed{seed}"
                wanted = demo.settings(name, eps=arguments.eps, epochs=arguments.epochs, seed=seed)
                wanted = recipe.Settings.model_validate({**wanted.model_dump(), "lr": lr})
                trainer.train(wanted, folder, resume=(folder / "settings.toml").exists())
                robust.append(100 * final(folder)[f"val_{trainer.SELECTION}"])
            scores[name] = mean(robust)
        print(
            f"| {lr} | " + " | ".join(f"{s:.1f}" for s in scores.values()) + f" | {mean(scores.values()):.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
