"""How many ReLUs keep their sign over the whole ball; for the others the bounds are loose."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.ibp import robust_logits
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.operators import Operator, Relu
from ibpcore.inspection.subject import Subject

STABILITY_BATCH = 64


class _Counts:
    """An observer of interval passes that counts stable ReLUs per layer and keeps no interval."""

    def __init__(self) -> None:
        self.layers: list[Tensor] = []

    def __call__(self, operator: Operator, x: Interval) -> None:
        if isinstance(operator, Relu):
            # A ReLU whose interval only touches 0 is stable; [0, 0] counts as active.
            active = x.lower >= 0
            inactive = (x.upper <= 0) & ~active
            self.layers.append(torch.stack([part.double().mean() for part in (active, inactive)]))


@torch.no_grad()
def stable_shares(subject: Subject, epsilons: Tensor) -> Tensor:
    """(L, 3): the fractions of always active, always inactive and unstable ReLUs in each layer.

    They are means over all neurons and samples, with balls of radii `epsilons` (B,) in pixel
    units; (0, 3) without samples or ReLUs.
    """
    total, samples = torch.zeros(0, 2, dtype=torch.float64), len(epsilons)
    if samples == 0:
        return torch.zeros(0, 3, dtype=torch.float64)
    for rows in torch.arange(samples, device=epsilons.device).split(STABILITY_BATCH):
        counts = _Counts()
        robust_logits(*subject.at(rows).problem, epsilons[rows], subject.bounds, counts)
        if counts.layers:
            part = torch.stack(counts.layers).cpu() * (len(rows) / samples)
            total = total + part if len(total) > 0 else part
    return torch.cat([total, 1 - total.sum(1, keepdim=True)], 1)
