"""Checks whether R_cert is continuous and monotone in epsilon, as Theorems 3.2 and A.1 assume."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.inspection.continuity import (
    HALVINGS,
    Continuity,
    check_points,
    measure_continuity,
    share,
    value_range,
)
from ibpcore.inspection.subject import Subject

EVERY = 4
"""Rounding is measured at every fourth point."""


class Curves(NamedTuple):
    """R(epsilon) of the n samples, of B, for which it is finite at all radii.

    Attributes:
        epsilons: (K,) from 0 to epsilon_max.
        margins: (K, n).
        continuity: of these n functions.
        rounding: (n,) bound on the rounding error of a difference of two margins, as a
            fraction of the range: four times the largest measured deviation from float64.
        samples: B.
    """

    epsilons: Tensor
    margins: Tensor
    continuity: Continuity
    rounding: Tensor
    samples: int

    def summary(self) -> dict[str, Any]:
        """Counts, and the largest values over all samples."""
        found = self.continuity
        summary: dict[str, Any] = {
            "samples": self.samples,
            "not_finite": self.samples - self.margins.shape[1],
            "decreasing": int((found.decrease > self.rounding).sum()),
            "jumps": int(found.jumps(self.rounding).sum()),
            "points": len(self.epsilons),
        }
        if self.margins.shape[1] == 0:
            return summary
        worst = int(found.step.argmax())
        shrinkage = share(found.step, found.coarse_step)
        return summary | {
            "largest_decrease": float(found.decrease.max()),
            "rounding": float(self.rounding.max()),
            "largest_step": float(found.step[worst]),
            "largest_step_coarse": float(found.coarse_step.max()),
            "largest_step_at": float(found.place[worst]),
            "step_to_coarse_step_median": float(shrinkage.median()),
            "step_to_coarse_step_largest": float(shrinkage.max()),
            "halvings": HALVINGS[self.margins.dtype],
            "remainder_of_step_largest": float(share(found.remainder, found.step).max()),
        }


@torch.no_grad()
def margin_curves(subject: Subject, exact: Subject, epsilon_max: float, points: int) -> Curves:
    """R(epsilon) of every sample at `points` radii, in one fused pass.

    It uses the arithmetic of the certificates and compares decreases with its rounding errors,
    measured with `exact`, which is `subject.exact()`.

    Raises:
        UserError: `points` is below 5, or even.
    """
    check_points(points, "grid")
    images = subject.images
    grid = torch.linspace(0, epsilon_max, points, dtype=images.dtype, device=images.device)
    margins = subject.margins(grid[:, None].expand(-1, len(images)))
    finite = margins.isfinite().all(0).nonzero()[:, 0]
    margins, subject, exact = margins[:, finite], subject.at(finite), exact.at(finite)
    few = grid[::EVERY, None].double().expand(-1, len(finite))
    error = (margins[::EVERY] - exact.margins(few)).abs().amax(0)
    # Pixels are rounded too, so R is uncertain by its rise over a few of their last digits.
    steepest = margins.diff(dim=0).abs().amax(0) / grid[1]
    floor = 8 * torch.finfo(margins.dtype).eps * torch.maximum(margins.abs().amax(0), steepest)
    rounding = 4 * share(torch.maximum(error, floor), value_range(margins))
    found = measure_continuity(subject.margins, grid, margins)
    return Curves(grid, margins, found, rounding, len(images))
