"""The rule of resizing by whole factors, which repeats or drops numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.building import Signal, Value
from ibpcore.interop.reading.operations import Operation, Rule
from ibpcore.interop.reading.rearrangements import selected

HALF = Fraction(1, 2)
ORIGINS: dict[str, Callable[[int, Fraction], Fraction]] = {
    "asymmetric": lambda place, scale: place / scale,
    "half_pixel": lambda place, scale: (place + HALF) / scale - HALF,
    "pytorch_half_pixel": lambda place, scale: (place + HALF) / scale - HALF,
}
"""Where a place of the output is in the input, for each transformation of coordinates."""
NEAREST: dict[str, Callable[[Fraction], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round_prefer_floor": lambda place: math.ceil(place - HALF),
    "round_prefer_ceil": lambda place: math.floor(place + HALF),
}
"""The nearest whole place, for each mode."""


def _read_resize(of: Operation) -> Value:
    x = of.signal()
    modern = len(of.inputs) > 2 or "coordinate_transformation_mode" in of.attributes
    how = of.attributes.get("coordinate_transformation_mode", "half_pixel" if modern else "")
    nearest = of.attributes.get("nearest_mode", "round_prefer_floor" if modern else "")
    origin, whole = ORIGINS.get(how or "asymmetric"), NEAREST.get(nearest or "floor")
    if of.attributes.get("mode", "nearest") != "nearest" or origin is None or whole is None:
        raise UserError("only mode nearest, by whole factors, has an interval rule")
    axes = of.attributes.get("axes", [*range(len(x.shape))])
    scales = _scales(of, [x.shape[axis] for axis in axes], modern)
    factors = dict(zip(axes, scales, strict=True))
    places = {
        axis: [
            min(max(whole(origin(place, scale)), 0), x.shape[axis] - 1)
            for place in range(math.floor(x.shape[axis] * scale))
        ]
        for axis, scale in factors.items()
    }
    if set(factors) == set(range(4)) and _repeats(x.shape, places):
        node = of.image(x, [4])
        sides = [len(places[axis]) // x.shape[axis] for axis in (2, 3)]
        shape = *x.shape[:2], *(len(places[axis]) for axis in (2, 3))
        return Signal(of.layer(il.IntervalUpsample(sides), node), shape)
    for axis, chosen in places.items():
        x = selected(of, x, chosen, axis)
    return x


def _scales(of: Operation, sizes: Sequence[int], modern: bool) -> list[Fraction]:
    """The factor of each axis.

    Raises:
        UserError: neither it nor its inverse is a whole number, so that it may be rounded.
    """
    given = of.option("scales", 2 if modern else 1, [])
    if given:
        found = [Fraction(scale) for scale in given]
    else:
        wanted: Any = of.option("sizes", 3)
        found = [Fraction(new, old) for new, old in zip(wanted, sizes, strict=True)]
    if any(scale <= 0 or 1 not in (scale.numerator, scale.denominator) for scale in found):
        raise UserError("only mode nearest, by whole factors, has an interval rule")
    return found


def _repeats(shape: Sequence[int], places: dict[int, list[int]]) -> bool:
    """Whether all numbers of an image are repeated equally often, along its sides."""
    return all(
        chosen == [place for place in range(shape[axis]) for _ in range(len(chosen) // shape[axis])]
        and (axis > 1 or len(chosen) == shape[axis])
        for axis, chosen in places.items()
    )


RULES: dict[str, Rule] = {"Resize": _read_resize, "Upsample": _read_resize}
