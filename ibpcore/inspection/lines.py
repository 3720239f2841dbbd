"""The robust loss along a line in weight space: is a relaxation suitable for optimisation?

According to Jovanović et al. ("On the Paradox of Certified Training") the loss should be
*continuous* in the weights and not too *sensitive* to small changes in them. Here both are
measured along one line: jumps elsewhere are not found, and the sensitivity is local.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.bounds.registry import BOUNDS
from ibpcore.inspection.continuity import (
    HALVINGS,
    Continuity,
    check_points,
    measure_continuity,
    share,
)
from ibpcore.inspection.subject import Subject
from ibpcore.nn.folding import fold

LINE_BATCH = 4
"""Samples at a time: CROWN keeps many rows of each for the gradient."""
LINE_SAMPLES = 32
"""At most this many samples are used, since each is bounded at every point of the line."""
LEAST = 1e-9
"""Rounding error as a fraction of the range; losses are computed in float64."""


class Line(NamedTuple):
    """The mean robust loss at epsilon_max along theta + t * direction, t from 0 to 1.

    Attributes:
        positions: (T,) t.
        losses: (T,).
        continuity: of the loss, as fractions of its range over the line. A discontinuity is
            a step that does not shrink as the grid is refined, see `Continuity.remainder`.
    """

    positions: Tensor
    losses: Tensor
    continuity: Continuity

    @property
    def jump(self) -> float:
        """The size of the discontinuity that was found, as a share of the loss's range; or 0."""
        found = self.continuity
        return float(found.remainder[0]) if bool(found.jumps(LEAST)[0]) else 0.0

    @property
    def sensitivity(self) -> float:
        """How much the slope changes over the line: mean |second difference| times the number
        of steps, relative to the mean |first difference|.

        It is 0 for a straight line, and |b - a| over the mean |slope| if the slope changes from
        a to b. It does not depend on the grid if that is fine, unless the loss jumps: then it
        grows with the number of points.
        """
        first = self.losses.diff()
        second = first.diff().abs().mean() * len(first)
        return float(share(second, first.abs().mean()))

    @property
    def turns(self) -> int:
        """The number of sign changes of the slope."""
        rising = self.losses.diff().sign()
        rising = rising[rising != 0]
        return int((rising[1:] != rising[:-1]).sum())

    def summary(self) -> dict[str, Any]:
        """The line and its continuity as JSON values."""
        found = self.continuity
        return {
            "loss": float(self.losses[0]),
            "loss_change": float(self.losses[-1] - self.losses[0]),
            "largest_step": float(found.step[0]),
            "largest_step_coarse": float(found.coarse_step[0]),
            "halvings": HALVINGS[self.losses.dtype],
            "remainder_of_step": float(share(found.remainder, found.step)[0]),
            "jumps": bool(found.jumps(LEAST)[0]),
            "jump": self.jump,
            "sensitivity": self.sensitivity,
            "turns": self.turns,
            "positions": self.positions.tolist(),
            "losses": self.losses.tolist(),
        }


def weight_lines(
    exact: Subject,
    bounds: Sequence[str],
    epsilon_max: float,
    *,
    direction: str,
    length: float,
    points: int,
    generator: torch.Generator,
) -> dict[str, Line]:
    """One line for each of `bounds`, in evaluation mode with fixed batch norm statistics.

    Args:
        exact: a subject in float64.
        bounds: names in `BOUNDS`.
        direction: "gradient" for a step down the gradient of each relaxation's own loss;
            "random" for Gaussian noise with that step's norm in each filter (output channel).
        length: of the whole line, as a fraction of the norm of all parameters.
        points: odd, at least 5.
        generator: for the random direction, on the CPU.

    Raises:
        UserError: `points` is too small, or even.
    """
    check_points(points, "line points")
    count = len(exact.labels)
    spread = torch.linspace(0, count - 1, min(count, LINE_SAMPLES)).round().long()
    some = exact.at(spread.to(exact.labels.device))
    radii = torch.full_like(some.labels, epsilon_max, dtype=torch.float64)
    lines = {}
    for name in bounds:
        losses = RobustLoss(name, copy.deepcopy(exact.model), some, radii)
        path = losses.downhill(length)
        if direction == "random":
            path = [_random_like(part, generator) for part in path]
        lines[name] = along(losses, path, points)
    return lines


class RobustLoss(NamedTuple):
    """The robust loss of `samples` by a bound, as a function of the model's parameters."""

    bound: str
    model: nn.Module
    samples: Subject
    radii: Tensor

    def batches(self) -> Iterator[Tensor]:
        """Each batch's part of the mean loss, a scalar with a graph of its own."""
        for rows in torch.arange(len(self.radii), device=self.radii.device).split(LINE_BATCH):
            some = self.samples.at(rows)._replace(network=fold(self.model))
            robust_logits = BOUNDS[self.bound].robust_logits
            logits = robust_logits(*some.problem, self.radii[rows], some.bounds)
            yield F.cross_entropy(logits, some.labels, reduction="sum") / len(self.radii)

    def downhill(self, length: float) -> list[Tensor]:
        """The negative gradient, scaled to `length` times the norm of the parameters."""
        parameters = list(self.model.parameters())
        self.model.zero_grad()
        with torch.enable_grad():
            for loss in self.batches():
                loss.backward()
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        scale = -length * share(_norm(parameters), _norm(gradient))
        return [scale * part for part in gradient]


def along(losses: RobustLoss, path: Sequence[Tensor], points: int) -> Line:
    """The loss from the model's parameters to those plus `path`; the parameters are changed."""
    parameters = list(losses.model.parameters())
    start = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def loss(position: Tensor) -> Tensor:
        for parameter, origin, part in zip(parameters, start, path, strict=True):
            parameter.copy_(origin + position * part)
        return torch.stack(list(losses.batches())).sum()

    def function(positions: Tensor) -> Tensor:
        return torch.stack([loss(t) for t in positions.flatten()]).view_as(positions)

    grid = torch.linspace(0, 1, points, dtype=torch.float64, device=losses.radii.device)
    values = function(grid[:, None])
    return Line(grid, values[:, 0], measure_continuity(function, grid, values))


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.detach().norm() for part in parts]).norm()


def _random_like(part: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise with the norm of `part` in each filter, or in total for a vector."""
    noise = torch.randn(part.shape, generator=generator, dtype=part.dtype).to(part.device)
    dims = tuple(range(1 if part.dim() > 1 else 0, part.dim()))
    norms = (torch.linalg.vector_norm(x, dim=dims, keepdim=True) for x in (part, noise))
    return noise * share(*norms)
