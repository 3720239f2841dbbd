"""Certified radii: roots of the margins of `bounds`, bracketed by the solvers of `roots`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_batch, check_fit
from ibpcore.bounds.epsilons import without_text
from ibpcore.bounds.ibp import clean_margins, margins
from ibpcore.bounds.interval import at_least, check_epsilon
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions, Clip
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.formatting import in_digits
from ibpcore.errors import UserError
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision
from ibpcore.roots import Ends, LaneFunction, RootOptions, Roots, RootStatus
from ibpcore.roots.base import ZERO, constant

AnyNetwork = TypeVar("AnyNetwork")
LOWEST = constant(-torch.inf)


class RadiusStatus(IntEnum):
    """How the radius of a sample was determined."""

    MISCLASSIFIED = 0
    """R(0) >= 0: radius 0."""
    EPSILON_MAX = 1
    """R(epsilon_max) < 0: radius epsilon_max."""
    CONVERGED = 2
    """The leftmost root is bracketed within the tolerances."""
    ITERATION_LIMIT = 3
    """Bracketed, but wider than the tolerances."""
    NOT_FINITE = 4
    """The logits are not finite: radius 0."""
    UNPROVED = 5
    """R(0) < 0 in an unchecked pass, but the claim could not be proved even at 0: radius 0."""


class Radii(NamedTuple):
    """Certified radii, one entry per sample, each (B,), in pixel units.

    Attributes:
        radius: largest epsilon at which a bound pass was evaluated and succeeded, or 0.
            For epsilon_max it is the nearest float of the images' type not below that.
        upper: smallest epsilon at which a pass was evaluated and failed (0 if R(0) >= 0);
            epsilon_max if that was certified, or if no pass failed within the iterations.
        root: the solver's estimate of the root in [radius, upper], for training; it need
            not be certified.
        status: a `RadiusStatus`.
        evaluations: number of bound passes for the sample.
        rung: place in `BOUNDS` of the bound that certified the radius; -1 for radius 0.
    """

    radius: Tensor
    upper: Tensor
    root: Tensor
    status: Tensor
    evaluations: Tensor
    rung: Tensor

    def __repr__(self) -> str:
        return f"Radii({in_short(self.radius, self.status)}, {self.radius.device})"


def in_short(radius: Tensor, status: Tensor) -> str:
    """How many radii, (N,) in pixel units, their range, and how many have each `RadiusStatus`."""
    if len(radius) == 0:
        return "0 samples"
    ends = (radius.min(), radius.max(), radius.mean())
    least, most, mean = (in_digits(float(x), digits=4) for x in ends)
    counts = Counter(status.tolist())
    kinds = (f"{counts[kind]} {kind.name.lower()}" for kind in RadiusStatus if kind in counts)
    spread = f"radius {least} to {most}, mean {mean}"
    return f"{len(radius)} samples, {spread}; {', '.join(kinds)}"


class CleanSamples(NamedTuple):
    """Images (B, C, H, W) in pixel units, labels (B,), and R(0), (B,), of their clean pass."""

    images: Tensor
    labels: Tensor
    at_zero: Tensor


def certified_radii(
    model: nn.Module | FoldedNetwork,
    images: Tensor,
    labels: Tensor,
    epsilon_max: float | str,
    *,
    solver: str = "brentq",
    xtol: float = 1e-6,
    rtol: float = 1e-4,
    max_iterations: int = 100,
    candidates: int = 8,
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    budget: int | None = None,
    slope_steps: int = 20,
    inner_slopes: bool = False,
) -> Radii:
    """E_cert(x) for each sample (Def. 3.1, leftmost root by Thm. A.1).

    Only correctly classified samples are bounded at epsilon_max, and only those that are
    not certified there are bracketed. It runs in full precision and without gradient.

    Args:
        model: interval layers in evaluation mode, or the network folded from them.
        images: (B, C, H, W) in pixel units.
        labels: (B,) class indices.
        epsilon_max: largest radius to certify, in pixel units; a text such as "8/255" too.
        solver, xtol, rtol, max_iterations, candidates: see `RootOptions`.
        bound: a name in `ibpcore.bounds.registry.BOUNDS`: all bounds up to that one are tried
            one after the other, each where those before left radii open; or several names
            separated by commas, for these alone.
        elide, clip, budget, slope_steps, inner_slopes: see `certified_margins`.

    Raises:
        UserError: an argument has the wrong shape or values, a layer has no interval
            rule, or batch norm is in training mode.
    """
    roots = RootOptions(solver, xtol, rtol, max_iterations, candidates)
    bounds = BoundOptions(bound, elide, clip, budget, slope_steps, inner_slopes)
    rungs(bound)
    check_batch(images, labels, clip)
    epsilon_max = without_text(epsilon_max, "epsilon_max")
    check_epsilon_max(epsilon_max, images.dtype)
    epsilon_max = float(epsilon_max)
    with torch.no_grad(), full_precision():
        # Batch statistics are not allowed: perturbed images would change them too.
        network = model if isinstance(model, FoldedNetwork) else fold(model)
        check_fit(network, images, labels)
        labels = labels.long()
        samples = CleanSamples(images, labels, clean_margins(network(images), labels))
        return find_radii(network, samples, epsilon_max, roots, bounds)


def check_epsilon_max(epsilon_max: Any, dtype: torch.dtype) -> None:
    """Raises UserError unless `epsilon_max` is a number above 0 and finite in `dtype`."""
    try:
        good = 0 < float(epsilon_max) <= torch.finfo(dtype).max
        good = good and not isinstance(epsilon_max, str | bool)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        good = False
    if not good:
        raise UserError(f"epsilon_max must be finite and above 0, a number, but is {epsilon_max!r}")


def check_radii(radii: Any, images: Tensor) -> None:
    """Raises UserError unless `radii` are `Radii` of as many samples as `images`, (B, ...)."""
    if not isinstance(radii, Radii) or not all(isinstance(part, Tensor) for part in radii):
        raise UserError(
            f"radii must be the result of certified_radii, but are a {type(radii).__name__}"
        )
    for name, part in radii._asdict().items():
        if part.shape != images.shape[:1] or part.device != images.device:
            raise UserError(
                f"radii must be those of the {len(images)} images: their {name} has shape"
                f" {tuple(part.shape)}, on {part.device}"
            )
        if part.is_complex() or part.is_floating_point() != (name in ("radius", "upper", "root")):
            raise UserError(f"radii must be the result of certified_radii: {name} is {part.dtype}")
    check_epsilon(radii.radius, "radii")


def certifiable(at_zero: Tensor) -> Tensor:
    """(B,) where R(0), (B,), is finite and below 0; all other samples have radius 0."""
    return (at_zero < ZERO) & (at_zero > LOWEST)


def indices_of(chosen: Tensor) -> Tensor:
    """(n,) indices of the True entries of `chosen`, (B,).

    On CUDA this synchronises the host, since n determines the shapes of all that follows.
    """
    return chosen.nonzero().squeeze(1)


@torch.no_grad()
def ibp_radii(
    network: FoldedNetwork,
    samples: CleanSamples,
    epsilon_max: float,
    roots: RootOptions,
    bounds: BoundOptions,
    *,
    rows: Tensor | None = None,
) -> Radii:
    """`certified_radii` after a clean pass, by IBP, whichever bound `bounds` names.

    `rows` are `indices_of(certifiable(samples.at_zero))`, if known.
    """
    rows = indices_of(certifiable(samples.at_zero)) if rows is None else rows
    none = _uncertified(samples)
    if len(rows) == 0:
        return none
    ceiling = torch.full_like(none.radius[rows], at_least(epsilon_max, none.radius.dtype))
    chosen = CleanSamples(*(part[rows] for part in samples))
    margin = on_lanes(margins, network, chosen.images, chosen.labels, bounds)
    values = chosen.at_zero.to(ceiling.dtype), None
    found = leftmost_roots(margin, values, torch.zeros_like(ceiling), ceiling, roots)
    radii = _from_roots(found, ceiling, "ibp")
    # The solver counts both ends; the left one was the clean pass.
    return scatter_rows(radii._replace(evaluations=radii.evaluations - 1), rows, none)


def _uncertified(samples: CleanSamples) -> Radii:
    """Radius 0 for all samples, misclassified or not finite."""
    images, at_zero = samples.images, samples.at_zero
    zero = torch.zeros(at_zero.shape, dtype=images.dtype, device=images.device)
    status = torch.where(
        at_zero.isfinite(), int(RadiusStatus.MISCLASSIFIED), int(RadiusStatus.NOT_FINITE)
    )
    none = torch.zeros_like(status)
    return Radii(zero, zero, zero, status, none, none - 1)


@torch.no_grad()
def find_radii(
    network: FoldedNetwork,
    samples: CleanSamples,
    epsilon_max: float,
    roots: RootOptions,
    bounds: BoundOptions,
    climbed: Climbed | None = None,
) -> Radii:
    """The largest radii that the rungs of `bounds.bound` certify, see `rungs`.

    Each rung searches on from the radius of the rung below, only where that is not epsilon_max.

    Args:
        climbed: called after each rung.

    Raises:
        UserError: there is no such bound.
    """
    radii, rows = _uncertified(samples), indices_of(certifiable(samples.at_zero))
    for name in rungs(bounds.bound):
        start = time.perf_counter()
        if name == "ibp":
            radii = ibp_radii(network, samples, epsilon_max, roots, bounds, rows=rows)
        elif len(rows) > 0:
            rung = replace(bounds, bound=name)
            higher = _higher_radii(network, samples, radii, rows, epsilon_max, roots, rung)
            radii = scatter_rows(higher, rows, radii)
        if climbed is not None:
            climbed(name, len(rows), time.perf_counter() - start)
        rows = rows[radii.status[rows] != RadiusStatus.EPSILON_MAX]
    return radii


Climbed = Callable[[str, int, float], None]
"""Called with the name of a bound, the number of samples that it tried, and the seconds it took."""


def _higher_radii(
    network: FoldedNetwork,
    samples: CleanSamples,
    radii: Radii,
    rows: Tensor,
    epsilon_max: float,
    roots: RootOptions,
    bounds: BoundOptions,
) -> Radii:
    """Radii of the samples `rows`, (n,), by one bound, at least those in `radii`.

    Its margins need not be monotone, and may be positive below the radius that is already
    certified. So epsilon_max is tried first. If that is not certified, a root is bracketed between
    it and that radius.
    """
    radii = Radii(*(part[rows] for part in radii))
    margins_of = BOUNDS[bounds.bound].margins
    margin = on_lanes(margins_of, network, samples.images[rows], samples.labels[rows], bounds)
    lower = radii.radius
    ceiling = torch.full_like(lower, at_least(epsilon_max, lower.dtype))
    lanes = torch.arange(len(rows), device=rows.device)
    at_ceiling = margin(ceiling, lanes)
    full = at_ceiling < 0
    status = torch.full_like(radii.status, int(RadiusStatus.EPSILON_MAX))
    certified = Radii(ceiling, ceiling, ceiling, status, radii.evaluations + 1, radii.rung)
    rest = (~full).nonzero().squeeze(1)
    if len(rest) > 0:
        # A rung below certifies `lower`, even if this one does not, or rounding differs.
        tiny = torch.finfo(lower.dtype).tiny
        at_lower = margin(lower[rest], rest).nan_to_num(posinf=-tiny).clamp(max=-tiny)
        found = leftmost_roots(
            lambda epsilons, some: margin(epsilons, rest[some]),
            (at_lower, at_ceiling[rest]),
            lower[rest],
            ceiling[rest],
            roots,
        )
        higher = _from_roots(found, ceiling[rest], bounds.bound)
        evaluations = higher.evaluations + radii.evaluations[rest]
        certified = scatter_rows(higher._replace(evaluations=evaluations), rest, certified)
    grown = certified.radius > radii.radius
    rung = torch.where(grown, _place(bounds.bound), radii.rung)
    return certified._replace(rung=rung)


def _place(name: str) -> int:
    """The place of a bound in `BOUNDS`."""
    return [*BOUNDS].index(name)


def on_lanes(
    margins_of: Callable[[AnyNetwork, Tensor, Tensor, Tensor, BoundOptions], Tensor],
    network: AnyNetwork,
    images: Tensor,
    labels: Tensor,
    bounds: BoundOptions,
) -> LaneFunction:
    """Margins of images (n, C, H, W) with labels (n,), as a function for the solvers."""

    def margin(epsilons: Tensor, lanes: Tensor) -> Tensor:
        some, classes = images.index_select(0, lanes), labels.index_select(0, lanes)
        return margins_of(network, some, classes, epsilons, bounds)

    return margin


def _from_roots(roots: Roots, ceiling: Tensor, bound: str) -> Radii:
    """`Radii` from roots of margins with R < 0 at the left end, which counts as a pass.

    `bound` is the name of the one that bounds these margins.
    """
    # R < 0 at both ends.
    full = roots.status == RootStatus.NO_BRACKET
    converged = roots.status == RootStatus.CONVERGED
    status = torch.where(
        full,
        int(RadiusStatus.EPSILON_MAX),
        torch.where(converged, int(RadiusStatus.CONVERGED), int(RadiusStatus.ITERATION_LIMIT)),
    )
    ends = roots.lower, roots.upper, roots.root
    lower, upper, root = (torch.where(full, ceiling, end) for end in ends)
    rung = torch.where(lower > 0, _place(bound), -1)
    return Radii(lower, upper, root, status, roots.evaluations, rung)


def scatter_rows(found: Radii, rows: Tensor, others: Radii) -> Radii:
    """`found`, each (n,), for the samples `rows`, (n,); `others`, each (B,), for the rest."""
    pairs = zip(others, found, strict=True)
    return Radii(*[whole.index_copy(0, rows, part) for whole, part in pairs])


def leftmost_roots(
    margin: LaneFunction,
    values: Ends,
    lower: Tensor,
    ceiling: Tensor,
    options: RootOptions,
) -> Roots:
    """Roots of margins with R < 0 at `lower`, each (n,); leftmost if R is non-decreasing."""
    tiny = torch.finfo(ceiling.dtype).tiny

    def positive_at_root(epsilons: Tensor, lanes: Tensor) -> Tensor:
        return positive(margin(epsilons, lanes))

    def positive(values: Tensor) -> Tensor:
        # Certified means R < 0, so R = 0 belongs to the right end. A solver that finds
        # no exact zero converges to the leftmost root (Remark A.3). No other value changes,
        # but for those as tiny, which then count as not certified.
        return values + tiny

    values = values[0], None if values[1] is None else positive(values[1])
    return options.make()(positive_at_root, lower, ceiling, values=values)
