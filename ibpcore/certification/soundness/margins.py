"""Margins that hold under rounding errors, by interval bounds and by linear bounds.

Numbers in parentheses are equations of docs/soundness.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ibpcore.bounds.chunking import default_budget, in_chunks
from ibpcore.bounds.ibp import largest_difference
from ibpcore.bounds.interval import Interval
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import Proof, bound_named
from ibpcore.certification.soundness.arithmetic import WORKING, above, ball, raised
from ibpcore.certification.soundness.network import SoundNetwork
from ibpcore.certification.soundness.rules import (
    EndpointRule,
    FactorsRule,
    ForkRule,
    ProductRule,
    RearrangeRule,
    RelaxedRule,
    ReshapeRule,
    Rule,
    RuleLines,
    SumRule,
)

IS_LINEAR = {Proof.INTERVAL: False, Proof.LINEAR: True, Proof.LINEAR_THROUGHOUT: True}
"""Whether rows are propagated backwards through the rules; any other kind of proof fails here."""
ROUND = 4 * WORKING.unit
"""Exceeds the relative error of two or three roundings of a number."""
FLUSHED = 2.0**-960
"""Exceeds the errors of underflow in a coefficient, a sum of up to 2^60 products."""


class Visit(NamedTuple):
    """A rule with its input and its output; for a `ForkRule` also the visits in its branches."""

    rule: Rule
    x: Interval
    y: Interval
    branches: tuple[tuple[Visit, ...], ...] = ()

    @property
    def parts(self) -> list[Interval]:
        """The outputs of its branches."""
        return [branch[-1].y if branch else self.x for branch in self.branches]


class SoundBounds(NamedTuple):
    """f_i - f_y <= value + slack + row . (x - mid) for all x that a rule may receive: (12).

    Attributes:
        rows: (B, classes, ...).
        value: (B, classes), computed at the midpoints.
        slack: (B, classes), not negative.
    """

    rows: Tensor
    value: Tensor
    slack: Tensor


def sound_margins(
    network: SoundNetwork, images: Tensor, labels: Tensor, epsilons: Tensor, options: BoundOptions
) -> Tensor:
    """R_cert (eq. 3) including rounding errors: a negative value proves the claim of `network`.

    Args:
        images: (B, C, H, W) in pixel units; the claim is about exactly these numbers.
        labels: (B,) class indices.
        epsilons: (B,) in pixel units, taken as exact.
        options: those used for the radii. A last layer that is not linear is not merged;
            linear bounds always merge a linear one.

    Returns:
        (B,) float64, +inf where anything overflows or is NaN.
    """
    if len(epsilons) == 0:
        return epsilons.double()
    linear_bounds = IS_LINEAR[bound_named(options.bound).proof]

    def chunk(epsilons: Tensor, samples: slice) -> Tensor:
        box = ball(images[samples].double(), epsilons.flatten(), options.clip)
        upper = _differences(network.rules, box, labels[samples], options.elide, linear_bounds)
        margin = largest_difference(upper, labels[samples])
        trusted = upper.isfinite().all(1)
        return torch.where(trusted, margin, torch.inf)[None]

    size = _lanes(network.rules, images[:1], linear_bounds, options.budget)
    return in_chunks(chunk, epsilons.double(), size)


def midpoint_logits(network: SoundNetwork, images: Tensor) -> Tensor:
    """Logits (B, classes) of images (B, C, H, W), in float64, without their rounding errors."""
    box = Interval(images.double(), torch.zeros_like(images, dtype=torch.float64))
    return _run(network.rules, box, keep=False)[-1].y.mid


def _differences(
    rules: Sequence[Rule], box: Interval, labels: Tensor, elide: bool, linear_bounds: bool
) -> Tensor:
    """(B, classes) upper bounds on f_i - f_y; the values at i = y have no meaning."""
    passed = _run(rules, box, keep=linear_bounds)
    last = passed[-1]
    merges = isinstance(last.rule, ProductRule) and last.rule.weight.dim() == 2
    merged = _merged(last, labels) if merges and (elide or linear_bounds) else None
    upper = _of_bounds(merged, last.x) if merged and elide else _apart(last.y, labels)
    if not linear_bounds:
        return upper
    back = _back(passed[:-1], merged) if merged else _back(passed, _rows(last.y, labels))
    return torch.minimum(upper, _of_bounds(back, box))


def _run(rules: Sequence[Rule], x: Interval, keep: bool) -> tuple[Visit, ...]:
    """Runs `x` through all rules; returns all visits if `keep`, else only the last one."""
    passed: list[Visit] = []
    for rule in rules:
        if isinstance(rule, ForkRule):
            branches = tuple(_run(branch, x, keep) for branch in rule.branches)
            visit = Visit(rule, x, x, branches)
            visit = visit._replace(y=rule.of(*visit.parts))
        else:
            visit = Visit(rule, x, rule(x))
        passed = [*passed, visit] if keep else [visit]
        x = visit.y
    return tuple(passed)


def _apart(logits: Interval, labels: Tensor) -> Tensor:
    """Upper ends of f_i minus the lower end of f_y."""
    index = labels[:, None]
    value = logits.mid - logits.mid.gather(1, index)
    return _sum(value, logits.rad + logits.rad.gather(1, index))


def _rows(logits: Interval, labels: Tensor) -> SoundBounds:
    """f_i - f_y as rows over the logits."""
    index = labels[:, None]
    identity = torch.eye(logits.shape[1], dtype=torch.float64, device=labels.device)
    value = logits.mid - logits.mid.gather(1, index)
    return SoundBounds(identity - identity[index], value, torch.zeros_like(value))


def _merged(last: Visit, labels: Tensor) -> SoundBounds:
    """f_i - f_y as rows over the last layer's input: (17)."""
    index, rule = labels[:, None], cast(ProductRule, last.rule)
    logits, errors = last.y.mid, rule.errors(last.x)
    rows = rule.weight - rule.weight[index]
    slack = errors + errors.gather(1, index) + _dot(rows.abs(), ROUND * last.x.rad)
    return SoundBounds(rows, logits - logits.gather(1, index), raised(slack, 4))


def _of_bounds(bounds: SoundBounds, box: Interval) -> Tensor:
    """The maximum of `bounds` over `box`, (B, classes): (18)."""
    return _sum(bounds.value, bounds.slack + _dot(bounds.rows.abs(), box.rad))


def _sum(value: Tensor, slack: Tensor) -> Tensor:
    """Upper bound on value + slack, for a computed difference `value` and a sum `slack`."""
    return above(value + raised(slack + ROUND * value.abs(), 4))


def _back(passed: Sequence[Visit], bounds: SoundBounds) -> SoundBounds:
    """Propagates bounds from the output of the last rule to the input of the first."""
    for visit in reversed(passed):
        bounds = _through(visit, bounds)
        bounds = bounds._replace(slack=raised(bounds.slack + _flushed(visit.x), 4))
    return bounds


def _through(visit: Visit, bounds: SoundBounds) -> SoundBounds:
    rule, x, y = visit[:3]
    rows, slack = bounds.rows, bounds.slack
    if isinstance(rule, RelaxedRule):
        return _along(rule.lines(x, y), bounds, x)
    if isinstance(rule, EndpointRule):
        # Only the ends of its output are known.
        slack = slack + _dot(rows.abs(), y.rad)
        return bounds._replace(rows=rows.new_zeros(*slack.shape, *x.shape[1:]), slack=slack)
    if isinstance(rule, ForkRule):
        return _forked(visit, rule, bounds)
    if not isinstance(rule, ReshapeRule | RearrangeRule):
        slack = slack + _dot(rows.abs(), rule.slack(x, y))
    back = rule.back(rows.flatten(0, 1), x).unflatten(0, slack.shape)
    return bounds._replace(rows=back, slack=slack)


def _along(lines: RuleLines, bounds: SoundBounds, x: Interval) -> SoundBounds:
    """Uses the upper line where a coefficient is positive, else the lower one."""
    rows, slack = bounds.rows, bounds.slack
    rising, falling = rows.clamp(min=0), rows.clamp(max=0).neg()
    slack = slack + _dot(rising, lines.upper_gap) + _dot(falling, lines.lower_gap)
    slopes = torch.where(rows > 0, lines.upper_slope[:, None], lines.lower_slope[:, None])
    return _rounded(bounds._replace(rows=rows * slopes, slack=slack), x)


def _forked(visit: Visit, rule: ForkRule, bounds: SoundBounds) -> SoundBounds:
    """Propagates through all branches, the last one first, each with the rows for its part."""
    rows, value, slack = bounds
    if isinstance(rule, SumRule):
        shares = [rows, rows]
        slack = slack + _dot(rows.abs(), rule.errors(*visit.parts))
    elif isinstance(rule, FactorsRule):
        first, second = visit.parts
        shares = []
        for lines, part in zip(rule.planes(first, second, visit.y), visit.parts, strict=True):
            along = _along(lines, SoundBounds(rows, value, slack), part)
            slack, shares = raised(along.slack + _flushed(part), 6), [*shares, along.rows]
    else:
        sizes = [part.shape[rule.dim] for part in visit.parts]
        shares = list(rows.split(sizes, rule.dim + 1))
    total = _back(visit.branches[-1], SoundBounds(shares[-1], value, slack))
    for branch, share in zip(visit.branches[-2::-1], shares[-2::-1], strict=True):
        more = _back(branch, SoundBounds(share, value, total.slack))
        total = _rounded(more._replace(rows=more.rows + total.rows), visit.x)
        total = total._replace(slack=raised(total.slack, 4))
    return total


def _rounded(bounds: SoundBounds, x: Interval) -> SoundBounds:
    """Adds the slack for one rounding of each coefficient of x - mid."""
    return bounds._replace(slack=bounds.slack + _dot(bounds.rows.abs(), ROUND * x.rad))


def _flushed(x: Interval) -> Tensor:
    """The slack, (B, 1), for coefficients of x - mid that underflow."""
    return FLUSHED * x.rad.flatten(1).sum(1, keepdim=True)


def _dot(rows: Tensor, x: Tensor) -> Tensor:
    """Upper bounds, (B, R), on products of (B, R, ...) and (B, ...), neither negative."""
    total = (rows.flatten(2) @ x.flatten(1)[..., None])[..., 0]
    return raised(total, x[0].numel() + 4, x[0].numel())


def _lanes(rules: Sequence[Rule], image: Tensor, linear_bounds: bool, budget: int | None) -> int:
    """The number of samples that fit the budget, see `ibpcore.bounds.chunking`."""
    box = ball(image.double(), image.new_zeros(1, dtype=torch.float64), None)
    passed = _flat(_run(rules, box, keep=True))
    classes = passed[-1].y.mid.numel()
    copies = classes if linear_bounds else 4
    kept = sum(2 * visit.x.mid.numel() for visit in passed) if linear_bounds else 0
    widest = max(_numbers(visit) for visit in passed)
    merged = 3 * classes * passed[-1].x.mid.numel()
    bytes_each = 8 * (kept + max(copies * widest, merged))
    return max(1, (default_budget(image.device) if budget is None else budget) // bytes_each)


def _numbers(visit: Visit) -> int:
    """Live numbers for a single row, forwards and backwards through a rule."""
    patches = visit.rule.patches if isinstance(visit.rule, ProductRule) else 1
    return (patches + 1) * visit.x.mid.numel() + 2 * visit.y.mid.numel()


def _flat(passed: Sequence[Visit]) -> list[Visit]:
    return [
        inner
        for visit in passed
        for inner in (*(p for branch in visit.branches for p in _flat(branch)), visit)
    ]
