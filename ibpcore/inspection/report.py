"""Runs all inspections, of a finished model or during training, and reports the results."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibpcore.attacks.pgd import pgd_attacker
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.radii import certified_radii, check_epsilon_max
from ibpcore.choices import DIRECTIONS
from ibpcore.errors import UserError
from ibpcore.inspection.continuity import check_points
from ibpcore.inspection.curves import Curves, margin_curves
from ibpcore.inspection.lines import Line, weight_lines
from ibpcore.inspection.slopes import Slopes, slopes_at_radii
from ibpcore.inspection.stability import stable_shares
from ibpcore.inspection.subject import Subject, make_subject
from ibpcore.inspection.tightness import Tightness, measure_tightness
from ibpcore.precision import full_precision
from ibpcore.progress import Advance, Watch, unwatched

IBP = BoundOptions()
PARTS = ("margins", "slopes", "ReLUs", "radii and attacks", "loss")
"""The parts of an inspection in their order, for progress reports."""


@dataclass(frozen=True)
class InspectionOptions:
    """The resolution of an inspection, and the effort of its attacks.

    Attributes:
        grid: number of radii at which R is evaluated, odd.
        line_points: number of points on the line in weight space, odd.
        line_length: of that line, relative to the norm of all parameters.
        direction: a name in `ibpcore.choices.DIRECTIONS`.
        bound: which bounds to inspect, besides IBP, see `ibpcore.bounds.ladder.rungs`: a name
            stands for all bounds up to that one.
        bisections, attack_steps, restarts: of the search for attackable radii.
        seed: of attacks and random directions.
    """

    grid: int = 65
    line_points: int = 33
    line_length: float = 0.01
    direction: str = "gradient"
    bisections: int = 8
    attack_steps: int = 10
    restarts: int = 3
    seed: int = 0
    bound: str = "crown-ibp"

    def __post_init__(self) -> None:
        rungs(self.bound)  # raises if there is no such bound
        check_points(self.grid, "grid")
        check_points(self.line_points, "line_points")
        if not (math.isfinite(self.line_length) and self.line_length > 0):
            raise UserError(f"line_length must be above 0, but is {self.line_length:g}")
        if self.direction not in DIRECTIONS:
            raise UserError(f"direction must be one of {', '.join(DIRECTIONS)}")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed must be from 0 to 2**32 - 1, but is {self.seed}")
        for name in ("bisections", "attack_steps", "restarts"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, but is {getattr(self, name)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The bounds to inspect, from the loosest to the tightest."""
        return tuple(dict.fromkeys(["ibp", *rungs(self.bound)]))


class Assumptions(NamedTuple):
    """What the theory assumes about R, and how many ReLUs are stable.

    Attributes:
        radii: (B,) certified by IBP, in pixel units.
        stable_at_radius: (L, 3) `stable_shares` of the samples with a radius above 0.
        stable_at_epsilon_max: (L, 3) the same of all samples.
    """

    curves: Curves
    slopes: Slopes
    radii: Tensor
    stable_at_radius: Tensor
    stable_at_epsilon_max: Tensor

    def summary(self) -> dict[str, Any]:
        """The results as JSON values."""
        relus = {
            "at_radius": _layers(self.stable_at_radius),
            "at_epsilon_max": _layers(self.stable_at_epsilon_max),
        }
        parts = {"margins": self.curves.summary(), "slopes": self.slopes.summary()}
        return plain({**parts, "relus": relus})


class Inspection(NamedTuple):
    """The results of a complete inspection."""

    assumptions: Assumptions
    tightness: Tightness
    lines: dict[str, Line]

    def report(self, epsilon_max: float) -> dict[str, Any]:
        """The results as JSON values; infinities, as where no attack succeeded, become null."""
        curves, slopes = self.assumptions.curves, self.assumptions.slopes
        return plain(
            {
                **self.assumptions.summary(),
                "tightness": self.tightness.summary(epsilon_max),
                "lines": {name: line.summary() for name, line in self.lines.items()},
                "alarms": self.tightness.alarms(),
                "samples": {
                    "radius": self.tightness.radii,
                    "attackable_radius": self.tightness.attackable,
                    "slope": slopes.slope,
                    "epsilons": curves.epsilons,
                    "margins": curves.margins.T,
                },
            }
        )


def _layers(shares: Tensor) -> list[dict[str, float]]:
    names = ("active", "inactive", "unstable")
    return [dict(zip(names, row, strict=True)) for row in shares.tolist()]


def plain(value: Any) -> Any:
    """`value` as numbers, lists and dictionaries, with None for numbers that are not in JSON."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _begin(part: str, advance: Advance | None) -> None:
    if advance is not None:
        advance(PARTS.index(part), [part])


def _assumptions(
    found: Subject, exact: Subject, epsilon_max: float, points: int, advance: Advance | None = None
) -> Assumptions:
    _begin("margins", advance)
    curves = margin_curves(found, exact, epsilon_max, points)
    _begin("slopes", advance)
    slopes = slopes_at_radii(exact, epsilon_max)
    _begin("ReLUs", advance)
    radii = certified_radii(
        *found.problem, epsilon_max, elide=found.bounds.elide, clip=found.bounds.clip
    ).radius
    rows = (radii > 0).nonzero()[:, 0]
    at_radius = stable_shares(found.at(rows), radii[rows])
    at_limit = stable_shares(found, torch.full_like(radii, epsilon_max))
    return Assumptions(curves, slopes, radii, at_radius, at_limit)


def inspect_assumptions(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon_max: float,
    *,
    points: int = 65,
    bounds: BoundOptions = IBP,
) -> Assumptions:
    """The parts that need bound passes only; `model` and all random states are unchanged.

    Arguments and errors are those of `inspect_model`; `points` is the number of radii.
    """
    check_epsilon_max(epsilon_max, images.dtype)
    with full_precision():
        found = make_subject(model, images, labels, bounds)
        return _assumptions(found, found.exact(), epsilon_max, points)


def inspect_model(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    epsilon_max: float,
    options: InspectionOptions | None = None,
    *,
    bounds: BoundOptions = IBP,
    watch: Watch = unwatched,
) -> Inspection:
    """A complete inspection of a copy of `model`, in evaluation mode and full precision.

    Args:
        model: interval layers.
        images: (B, C, H, W) in pixel units, with the device and the type of the model.
        labels: (B,) class indices.
        epsilon_max: largest radius inspected, in pixel units.
        bounds: how balls are bounded; `options` say by which bounds.
        watch: reports each of `PARTS` before it begins.

    Raises:
        UserError: an argument has the wrong shape or values, or a layer has no interval rule.
    """
    options = options or InspectionOptions()
    check_epsilon_max(epsilon_max, images.dtype)
    with full_precision(), watch("inspecting", len(PARTS)) as advance:
        found = make_subject(model, images, labels, bounds)
        exact = found.exact()
        assumptions = _assumptions(found, exact, epsilon_max, options.grid, advance)
        _begin("radii and attacks", advance)
        generator = torch.Generator(images.device).manual_seed(options.seed)
        attack = pgd_attacker(found.network, options.attack_steps, options.restarts, generator)
        tight = measure_tightness(found, options.names, epsilon_max, options.bisections, attack)
        _begin("loss", advance)
        lines = weight_lines(
            exact,
            options.names,
            epsilon_max,
            direction=options.direction,
            length=options.line_length,
            points=options.line_points,
            generator=torch.Generator().manual_seed(options.seed),
        )
    return Inspection(assumptions, tight, lines)
