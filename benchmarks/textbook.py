"""FAT's early-stopped PGD written as its description reads: a Python loop over the samples, gradients of everything.

Made for comparison only, from the published description: each iteration predicts the active samples, walks over them
one by one, collects those that are finished, takes loss.backward() through input and parameters of the whole active
set, and carries on with the rest. Outputs come grouped by the iteration in which they stopped.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def earlystop(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    x_init: Tensor,
    *,
    eps: float,
    step_size: float,
    steps: int,
    tau: int,
    loss: Literal["ce", "kl"] = "ce",
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_adv, y, x), permuted alike: samples in the order in which they stopped."""
    model.eval()
    clean = model(x)
    point, natural, label, control = x_init.clone(), x, y, [tau] * len(x)
    done_x: list[Tensor] = []
    done_y: list[Tensor] = []
    done_natural: list[Tensor] = []
    for _ in range(steps):
        if not len(point):
            break
        point.requires_grad_()
        logits = model(point)
        predicted = logits.max(1)[1]
        moving = []
        for i in range(len(point)):
            if predicted[i] != label[i]:
                if control[i] == 0:
                    done_x.append(point[i : i + 1].detach())
                    done_y.append(label[i : i + 1])
                    done_natural.append(natural[i : i + 1])
                    continue
                control[i] -= 1
            moving.append(i)
        if not moving:
            point, natural = point.detach()[:0], natural[:0]
            break
        model.zero_grad()
        climbed = F.cross_entropy(logits, label)
        if loss == "kl":
            climbed = F.kl_div(F.log_softmax(logits, dim=1), F.softmax(clean, dim=1), reduction="sum")
        torch.autograd.backward(climbed, retain_graph=True)  # the clean forward is needed again
        assert point.grad is not None
        grad, point = point.grad[moving], point.detach()[moving]
        natural, label, clean = natural[moving], label[moving], clean[moving]
        control = [control[i] for i in moving]
        point = point + step_size * grad.sign()
        point = torch.min(torch.max(point, natural - eps), natural + eps).clamp(0, 1)
    left = label[: len(point)]
    return torch.cat([*done_x, point.detach()]), torch.cat([*done_y, left]), torch.cat([*done_natural, natural])
