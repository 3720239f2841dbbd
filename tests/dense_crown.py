"""CROWN on dense matrices, in float64: an oracle for linear bounds of all layers but max pooling.

It shares no rule with the package: layers become matrices by differentiation, lines become
offsets at the ends and kinks of an interval, and bounds stand for lower and upper ends.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ibpcore import nn as il
from ibpcore.bounds import relaxations
from ibpcore.bounds.alpha_crown import MARGINS
from ibpcore.bounds.interval import between
from ibpcore.nn.layers import IntervalLayer

Ends = tuple[Tensor, Tensor]
CURVED = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardtanh)
CURVED += (il.IntervalAbs, il.IntervalMaximum, il.IntervalMinimum)


class Dense:
    """Bounds of a model over the box of one input.

    Attributes:
        narrowed: the ends of what each nonlinear layer reads, in its shape, in order of execution.
    """

    def __init__(self, box: Ends, shape: tuple[int, ...], slopes):
        self.box = tuple(end.flatten() for end in box)
        self.shape, self.slopes = shape, slopes
        self.narrowed: list[Ends] = []

    def differences(self, model: nn.Sequential, label: int) -> Tensor:
        """The smaller of CROWN's and interval bounds on f_i - f_y, (classes,)."""
        *body, last = model
        path, ends, _ = self.through(body, [], self.box, self.shape)
        weight, bias = last.weight - last.weight[label], last.bias - last.bias[label]
        mid, rad = (ends[0] + ends[1]) / 2, (ends[1] - ends[0]) / 2
        by_ends = weight @ mid + weight.abs() @ rad + bias
        slopes = self.slopes.get(MARGINS, {})
        return torch.minimum(by_ends, self.upper(path, weight, slopes) + bias)

    def upper(self, path: list, rows: Tensor, slopes) -> Tensor:
        """Upper bounds (R,) on rows (R, n) of what comes after `path`."""
        value = torch.zeros(len(rows), dtype=rows.dtype)
        for step in reversed(path):
            rows, value = step(rows, value, slopes)
        low, high = self.box
        return value + rows.clamp(min=0) @ high + rows.clamp(max=0) @ low

    def through(self, layers, path: list, ends: Ends, shape):
        """The path, ends and shape after `layers`."""
        for layer in layers:
            path, ends, shape = self.one(layer, path, ends, shape)
        return path, ends, shape

    def one(self, layer: IntervalLayer, path: list, ends: Ends, shape):
        if isinstance(layer, nn.Sequential):
            return self.through(layer, path, ends, shape)
        if isinstance(layer, il.IntervalResidual):
            return self.joined(layer.branch, layer.shortcut, path, ends, shape)
        if isinstance(layer, il.IntervalProduct):
            return self.product(layer, path, ends, shape)
        if isinstance(layer, il.IntervalConcat):
            return self.concatenated(layer, path, ends, shape)
        if isinstance(layer, CURVED):
            number = len(self.narrowed)
            where = bends(ends, kinks_of(layer, shape))
            ends, middle = self.narrow(path, ends, where, number)
            self.narrowed.append((ends[0].view(shape), ends[1].view(shape)))
            step, ends = bent(layer, ends, middle, shape, number)
            return [*path, step], ends, shape
        zero = torch.zeros(1, *shape, dtype=torch.float64)
        out = layer(zero)
        matrix = torch.autograd.functional.jacobian(layer, zero).reshape(out.numel(), zero.numel())
        bias = out.flatten().detach()
        up, down = matrix.clamp(min=0), matrix.clamp(max=0)
        low, high = ends
        ends = up @ low + down @ high + bias, up @ high + down @ low + bias

        def step(rows, value, slopes):
            return rows @ matrix, value + rows @ bias

        return [*path, step], ends, tuple(out.shape[1:])

    def narrow(self, path: list, ends: Ends, where: Tensor, number=None) -> tuple[Ends, Tensor]:
        """The ends met with linear bounds, `where` these are needed, and the middle of these."""
        slopes = self.slopes.get(number, {})
        eye = torch.eye(len(ends[0]), dtype=torch.float64)
        signs = torch.cat([eye, -eye])
        upper = self.upper(path, signs, slopes)
        low, high = (
            torch.where(where, found, end)
            for found, end in zip((-upper[len(eye) :], upper[: len(eye)]), ends, strict=True)
        )
        met = torch.maximum(ends[0], low), torch.minimum(ends[1], high)
        return met, (low + high) / 2

    def branches(self, layer, path, ends, shape):
        found = []
        for branch in layer:
            inside, part, out = self.through([branch], [*path], ends, shape)
            found.append((inside[len(path) :], part, out))
        return found

    def joined(self, branch, shortcut, path, ends, shape):
        (a, one, out), (b, other, _) = self.branches([branch, shortcut], path, ends, shape)

        def step(rows, value, slopes):
            first, value = walked(a, rows, value, slopes)
            second, value = walked(b, rows, value, slopes)
            return first + second, value

        return [*path, step], (one[0] + other[0], one[1] + other[1]), out

    def concatenated(self, layer, path, ends, shape):
        found = self.branches(layer.branches, path, ends, shape)
        places = torch.cat(
            [
                torch.arange(p[0].numel()).view(out) + 10**6 * i
                for i, (_, p, out) in enumerate(found)
            ],
            layer.dim - 1,
        )
        flat = places.flatten()

        def step(rows, value, slopes):
            total = 0
            for i, (inside, part, _) in enumerate(found):
                columns = rows.new_zeros(len(rows), part[0].numel())
                mine = flat // 10**6 == i
                columns[:, flat[mine] % 10**6] = rows[:, mine]
                back, value = walked(inside, columns, value, slopes)
                total = total + back
            return total, value

        low, high = (
            torch.cat([p[end].view(out) for _, p, out in found], layer.dim - 1).flatten()
            for end in (0, 1)
        )
        return [*path, step], (low, high), tuple(places.shape)

    def product(self, layer, path, ends, shape):
        (a, one, out), (b, other, _) = self.branches(layer.branches, path, ends, shape)
        one, other = (
            self.narrow([*path, *inside], ends, ends[0] < ends[1])[0]
            for inside, ends in ((a, one), (b, other))
        )
        x, y = between(*one), between(*other)
        corners = torch.stack([p * q for p in one for q in other])
        first, second = relaxations.product(x, y)
        points = [(p, q) for p in one for q in other]

        def step(rows, value, slopes):
            up, down = rows.clamp(min=0), rows.clamp(max=0)
            above = [p * q - first.upper_slope * p - second.upper_slope * q for p, q in points]
            below = [p * q - first.lower_slope * p - second.lower_slope * q for p, q in points]
            value = value + up @ torch.stack(above).amax(0) + down @ torch.stack(below).amin(0)
            left = up * first.upper_slope + down * first.lower_slope
            right = up * second.upper_slope + down * second.lower_slope
            left, value = walked(a, left, value, slopes)
            right, value = walked(b, right, value, slopes)
            return left + right, value

        return [*path, step], (corners.amin(0), corners.amax(0)), out


def walked(path, rows, value, slopes):
    for step in reversed(path):
        rows, value = step(rows, value, slopes)
    return rows, value


def kinks_of(layer, shape) -> list[Tensor]:
    """Each kink in the flattened shape of an input."""
    if isinstance(layer, il.IntervalHardtanh):
        kinks = layer.min_val, layer.max_val
    elif isinstance(layer, il.IntervalMaximum | il.IntervalMinimum):
        kinks = layer.spread(layer.constant)
    else:
        kinks = (0.0,)
    along = (-1, *[1] * (len(shape) - 1))
    kinks = [torch.as_tensor(kink, dtype=torch.float64) for kink in kinks]
    return [
        (kink.view(along) if kink.dim() else kink).expand(1, *shape).flatten() for kink in kinks
    ]


def bends(ends: Ends, kinks: list[Tensor]) -> Tensor:
    low, high = ends
    return torch.stack([(low < kink) & (kink < high) for kink in kinks]).any(0)


def bent(layer, ends: Ends, middle: Tensor, shape, number: int):
    """A step through an activation, and the ends of its output."""
    kinks = kinks_of(layer, shape)
    where, (low, high) = bends(ends, kinks), ends
    (operator,) = layer.operators()
    lines = operator.lines(between(low.view(1, *shape), high.view(1, *shape)))
    given = [line.detach().reshape(1, -1) for line in lines[:2]]
    if isinstance(layer, nn.ReLU | nn.LeakyReLU):
        slope = getattr(layer, "negative_slope", 0.0)
        given[0] = torch.where(where, torch.where(middle > 0, 1.0, slope), given[0])
    points = [low, high, *(torch.minimum(torch.maximum(kink, low), high) for kink in kinks)]
    values = [layer(point.view(1, *shape)).detach().flatten() for point in points]

    def offsets(slope):
        return torch.stack([v - slope * p for p, v in zip(points, values, strict=True)])

    def step(rows, value, slopes):
        lower, upper = given
        if number in slopes:
            lower = torch.where(where, slopes[number].flatten(1), lower)
        up, down = rows.clamp(min=0), rows.clamp(max=0)
        value = value + (up * offsets(upper).amax(0)).sum(1)
        value = value + (down * offsets(lower).amin(0)).sum(1)
        return up * upper + down * lower, value

    values_at = torch.stack(values)
    return step, (values_at.amin(0), values_at.amax(0))
