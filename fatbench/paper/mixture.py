"""Figures 3, 11 and 12 of FAT: does PGD mix the classes inside the network, and does early-stopped PGD?

A network is warmed up on natural images; then its last layers are looked at for natural images, for PGD-20's and for
PGD-20-0's (stopped where they are first misclassified). The paper shows pictures: by PCA (Figure 3) and t-SNE
(Figure 11) for two classes, and for three classes of ten (Figure 12). Here the pictures have a measure beside them,
taken in the layer's own space and not in the picture's: the share of points whose nearest natural points are of other
classes (crossed), of points whose nearest points of the same attack are (mixed), and the silhouette of the classes over
natural and adversarial points together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor, nn

from fatbench import data, recipe
from fatbench.attacks import Friendly, crafting, natural, pgd
from fatbench.data import Data
from fatbench.draws import balanced_order
from fatbench.errors import Refused, unknown
from fatbench.paper.claims import Claim, Finding, sided, within
from fatbench.paper.pictured import grouped, mean_difference, rounded, scatter, strangers, trained
from fatbench.plots import STYLE
from fatbench.quantities import number

EPOCHS, STEPS = 15, 20
EACH, SHOWN = 100, 60  # examples of a class that are measured, and drawn
MARGIN = 10.0  # points of mixture that early-stopped PGD may add to be called unmixed
TITLES = {"natural": "natural", "pgd": f"PGD-{STEPS}", "friendly": f"PGD-{STEPS}-0"}


class Spec(NamedTuple):
    """What a figure shows.

    Attributes:
        classes: Labels shown; the paper's of CIFAR-10, bird and deer, or deer, horse and truck.
        alone: The network is trained on these classes alone.
        layers: Counted from the end, among convolutions and linear layers: the paper's 6, 7, 8, and 38, 40, 41.
    """

    place: str
    classes: tuple[int, ...]
    alone: bool
    layers: tuple[int, ...]
    by: Literal["PCA", "t-SNE"]


FIGURES = {
    "fig3": Spec("Figure 3", (2, 4), True, (-3, -2, -1), "PCA"),
    "fig11": Spec("Figure 11", (2, 4), True, (-3, -2, -1), "t-SNE"),
    "fig12": Spec("Figure 12", (4, 7, 9), False, (-4, -2, -1), "PCA"),
}


def claims(figure: str) -> tuple[Claim, Claim, Claim]:
    """That PGD crosses over more than early-stopped PGD, that it mixes more, and that the latter hardly mixes."""
    place = FIGURES[figure].place
    return (
        Claim(
            f"{figure}-crossing", place, "inside the network PGD-20 puts more data among another class than PGD-20-0"
        ),
        Claim(
            f"{figure}-mixture", place, "inside the network PGD-20's data of the classes are mixed more than PGD-20-0's"
        ),
        Claim(
            f"{figure}-apart",
            place,
            f"PGD-20-0's data stay apart: at most {MARGIN:g} points more of them are mixed than natural",
        ),
    )


# ------------------------------------------------------------------------------------------------ measured


def measured(
    dataset: str, seed: int, *, figure: str = "fig3", picture: bool = True, arch: str | None = None,
    eps: str | None = None, epochs: int = EPOCHS, lr: float = 0.1, batch_size: int = 64, device: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Trains on natural images, attacks training images of the shown classes, looks inside: plain JSON.

    Raises:
        Refused: an unknown figure, or a dataset without the classes that it shows.
    """
    spec, loaded = _asked(figure, dataset)
    settings = recipe.resolve(
        "standard", dataset=dataset, arch=arch, eps=eps, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed
    )
    shown = _of_classes(loaded, spec.classes)
    *_, (_, net) = trained(settings, shown if spec.alone else loaded, device)
    x, y = _balanced(shown)
    labels = y if spec.alone else torch.tensor(spec.classes)[y]
    where = next(net.parameters()).device
    sets = _attacked(net, x.to(where), labels.to(where), number(settings.eps))
    inside = {which: _layers(net, found, spec.layers) for which, found in sets.items()}
    layers = [_layer(name, {which: inside[which][name] for which in sets}, y) for name in inside["natural"]]
    said = {"figure": figure, "dataset": dataset, "arch": settings.arch, "seed": seed, "epochs": epochs}
    evidence = {**said, "eps": settings.eps, "n": len(y), "layers": layers}
    if picture:
        first = SHOWN * len(spec.classes)
        evidence["picture"] = {
            "labels": [spec.classes[label] for label in y[:first].tolist()],
            "layers": [
                _embedded({which: inside[which][name][:first] for which in sets}, spec.by) for name in inside["natural"]
            ],
        }
    return rounded(evidence)


def _asked(figure: str, dataset: str) -> tuple[Spec, Data]:
    if figure not in FIGURES:
        raise unknown("figure of layers", figure, FIGURES)
    spec, loaded = FIGURES[figure], data.load(dataset)
    if loaded.classes <= max(spec.classes):
        raise Refused(
            f"{spec.place} shows the classes {', '.join(map(str, spec.classes))}, and {dataset} has {loaded.classes}: "
            "use a dataset with as many"
        )
    return spec, loaded


def _of_classes(loaded: Data, classes: Sequence[int]) -> Data:
    """The dataset's examples of these classes, labelled 0, 1, ... in their order."""

    def part(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        label = (y[:, None] == torch.tensor(classes)).long()
        mine = label.any(dim=1)
        return x[mine].contiguous(), label[mine].argmax(dim=1)

    (x_train, y_train), (x_test, y_test) = part(loaded.x_train, loaded.y_train), part(loaded.x_test, loaded.y_test)
    return replace(loaded, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test, classes=len(classes))


def _balanced(shown: Data) -> tuple[Tensor, Tensor]:
    """EACH training images of each class, or as many as the rarest has; the classes take turns."""
    most = min(EACH, int(shown.y_train.bincount().min())) * shown.classes
    rows = torch.from_numpy(balanced_order(shown.y_train.numpy(), "mixture"))
    per = [rows[shown.y_train[rows] == label][: most // shown.classes] for label in range(shown.classes)]
    order = torch.stack(per, dim=1).flatten()
    return shown.x_train[order], shown.y_train[order]


def _attacked(net: nn.Module, x: Tensor, y: Tensor, eps: float) -> dict[str, Tensor]:
    """Natural images, PGD-20's and PGD-20-0's; steps of .007 for an eps of .031, as the paper's."""
    attack: dict[str, Any] = {"eps": eps, "step_size": eps * 0.007 / 0.031, "steps": STEPS, "start": natural}
    return {
        "natural": x,
        "pgd": pgd(net, x, y, **attack).x_adv,
        "friendly": pgd(net, x, y, **attack, stop=Friendly(0, y)).x_adv,
    }


def _layers(net: nn.Module, x: Tensor, which: Sequence[int]) -> dict[str, Tensor]:
    """(N, D) what some layers put out, by name; layers are convolutions and linear ones, in the order they work."""
    order: list[nn.Module] = []
    _watched(net, x[:1], [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))], order.append)
    chosen = [order[at] for at in which]
    found: dict[str, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}
    _watched(net, x, chosen, lambda module: None, outputs)
    for at, module in zip(which, chosen, strict=True):
        found[f"layer {len(order) + 1 + at} of {len(order)}"] = outputs[module].flatten(1).cpu()
    return found


def _watched(
    net: nn.Module, x: Tensor, modules: Sequence[nn.Module], seen: Any, outputs: dict[nn.Module, Tensor] | None = None
) -> None:
    """One pass in eval mode; `seen(module)` as each of the modules has worked, and its output kept where asked for."""

    def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
        seen(module)
        if outputs is not None:
            outputs[module] = output

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        with crafting(net), torch.no_grad():
            net(x)
    finally:
        for handle in handles:
            handle.remove()


def _layer(name: str, sets: dict[str, Tensor], y: Tensor) -> dict[str, Any]:
    """One layer's measures, shares in percent."""
    from sklearn.metrics import silhouette_score

    clean, twice = sets["natural"], torch.cat([y, y]).numpy()
    return {
        "name": name,
        "crossed": {which: 100 * strangers(found, clean, y).mean().item() for which, found in sets.items()},
        "mixed": {which: 100 * strangers(found, found, y).mean().item() for which, found in sets.items()},
        "silhouette": {
            which: float(silhouette_score(torch.cat([clean, found]).numpy(), twice)) for which, found in sets.items()
        },
    }


def _embedded(sets: dict[str, Tensor], by: str) -> dict[str, list[list[float]]]:
    """(N, D) -> N places in the plane for each set, all together, so that they share their axes."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    made = PCA(2, svd_solver="full") if by == "PCA" else TSNE(2, init="pca", random_state=0)
    places = made.fit_transform(torch.cat(list(sets.values())).numpy())
    return {which: part.tolist() for which, part in zip(sets, np.split(places, len(sets)), strict=True)}


# ------------------------------------------------------------------------------------------------ drawn and found


def drawn(evidence: Sequence[dict[str, Any]]) -> Figure:
    """The first points that were kept: a row a layer; natural, PGD's, early-stopped PGD's, natural ones behind them."""
    one = next(one for one in evidence if "picture" in one)
    spec, layers, labels = FIGURES[one["figure"]], one["layers"], one["picture"]["labels"]
    with rc_context(STYLE):
        figure = Figure(figsize=(8.4, 2.6 * len(layers) + 0.7))
        axes = figure.subplots(len(layers), len(TITLES), sharex="row", sharey="row", squeeze=False)
        on = "these classes" if spec.alone else "all classes"
        said = (
            f"{spec.by} of a {one['arch']}'s layers, {one['epochs']} epochs on natural images of {on}, eps {one['eps']}"
        )
        figure.suptitle(f"{one['dataset']}: {said}", fontsize=9)
        for row, layer, places in zip(axes, layers, one["picture"]["layers"], strict=True):
            row[0].set_ylabel(layer["name"])
            for axis, (which, title) in zip(row, TITLES.items(), strict=True):
                if which != "natural":
                    scatter(axis, places["natural"], labels, alpha=0.15)
                scatter(axis, places[which], labels, alpha=0.8)
                shares = f"{layer['crossed'][which]:.0f} % crossed, {layer['mixed'][which]:.0f} % mixed"
                axis.set_title(f"{title}: {shares}", fontsize=8)
                axis.set(xticks=[], yticks=[])
        handles = axes[0][0].collections
        names = [f"class {label}" for label in sorted(set(labels))]
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize=8)
    return figure


def found(evidence: Sequence[dict[str, Any]]) -> list[Finding]:
    """The verdicts at each budget, by a t interval over seeds of shares that are means over the layers shown."""
    return [finding for runs in grouped(evidence, "epochs").values() for finding in _found_of(runs)]


def _found_of(evidence: Sequence[dict[str, Any]]) -> list[Finding]:
    first, seeds = evidence[0], len(evidence)
    command = f"fatbench reproduce {first['figure']} --dataset {first['dataset']} --seeds {seeds}"
    rest = first["n"], seeds, f"{first['epochs']} epochs", command
    crossed, blended, shapes = (_means(evidence, measure) for measure in ("crossed", "mixed", "silhouette"))
    told = "; silhouette " + ", ".join(f"{fmean(shapes[which]):.2f} {title}" for which, title in TITLES.items())
    crossing, mixture, apart = claims(first["figure"])
    over, more = (mean_difference(_less(shares["pgd"], shares["friendly"])) for shares in (crossed, blended))
    added = mean_difference(_less(blended["friendly"], blended["natural"]))
    return [
        Finding(crossing, sided(*over[:2]), f"crossed: {_told(crossed)}; PGD-20 less PGD-20-0 {over[2]}{told}", *rest),
        Finding(mixture, sided(*more[:2]), f"mixed: {_told(blended)}; PGD-20 less PGD-20-0 {more[2]}", *rest),
        Finding(apart, within(*added[:2], MARGIN), f"mixed: {_told(blended)}; PGD-20-0 less natural {added[2]}", *rest),
    ]


def _means(evidence: Sequence[dict[str, Any]], measure: str) -> dict[str, list[float]]:
    """A measure of each set of points: of every seed, the mean over layers."""
    return {which: [fmean(layer[measure][which] for layer in one["layers"]) for one in evidence] for which in TITLES}


def _less(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [one - other for one, other in zip(a, b, strict=True)]


def _told(shares: dict[str, list[float]]) -> str:
    return ", ".join(f"{fmean(shares[which]):.1f} % of {title}" for which, title in TITLES.items())
