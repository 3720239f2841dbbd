"""Radii and shares as text: all radii below one limit in the unit in which the limit was typed.

Certified radii are rounded down: what is printed is certified too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_FLOOR, Context, Decimal
from fractions import Fraction
from typing import NamedTuple

from ibpcore.bounds.epsilons import as_number

DIGITS = 6
"""A number of at most as many significant digits was probably typed by a person."""
CERTIFIED_DIGITS = 5
"""Significant digits of a certified radius as large as its limit."""


class Unit(NamedTuple):
    """A unit of radii.

    Attributes:
        scale: a radius in pixel units times this is the radius in this unit.
        suffix: follows the number.
        name: for the axis of a figure.
    """

    scale: int
    suffix: str
    name: str


PIXEL_UNITS = Unit(1, "", "pixels in [0, 1]")
LEVELS = Unit(255, "/255", "255ths")


def unit_of(limit: float) -> Unit:
    """255ths if `limit`, in pixel units, has few digits in 255ths, and many as a decimal."""

    def few_digits(scale: int) -> bool:
        typed = float(f"{limit * scale:.{DIGITS}g}") / scale
        return math.isclose(typed, limit, rel_tol=1e-12, abs_tol=0)

    return LEVELS if few_digits(LEVELS.scale) and not few_digits(1) else PIXEL_UNITS


def radius_text(limit: float) -> str:
    """A limit as a person would type it, such as "0.1" or "8.8/255"; never above it."""
    unit = unit_of(limit)
    return in_digits(limit, unit.scale) + unit.suffix


def as_text(limit: float) -> str:
    """A limit as it was typed, 255ths with the decimal beside: "0.1" or "8/255 (0.03137)".

    Neither number exceeds it.
    """
    beside = f" ({in_digits(limit, digits=4)})" if unit_of(limit) is LEVELS else ""
    return radius_text(limit) + beside


def exact_text(limit: float) -> str:
    """A text that `as_number` turns into `limit` itself: as it was typed, or with all digits."""
    typed = radius_text(limit)
    return typed if as_number(typed) == limit else repr(limit)


def in_unit_of(limit: float, radius: float) -> str:
    """A radius that nothing is certified for, to four digits in the unit of its limit."""
    unit = unit_of(limit)
    return f"{radius * unit.scale:.4g}{unit.suffix}"


def certified_text(limit: float, radius: float) -> str:
    """A certified radius, rounded down, in the unit of its limit."""
    unit = unit_of(limit)
    decimals = max(0, CERTIFIED_DIGITS - 1 - math.floor(math.log10(limit * unit.scale)))
    return rounded_down(radius, unit.scale, decimals) + unit.suffix


def certified_texts(limit: float, radius: float) -> list[str]:
    """`certified_text`, and for 255ths the decimal beside it."""
    decimal = [rounded_down(radius)] if unit_of(limit) is LEVELS else []
    return [certified_text(limit, radius), *decimal]


def quarters(limit: float) -> list[str]:
    """The first three quarters of a limit, and the limit, in its unit."""
    unit = unit_of(limit)
    parts = [limit * unit.scale * part for part in (0.25, 0.5, 0.75)]
    return [*(f"{part:.{DIGITS}g}{unit.suffix}" for part in parts), radius_text(limit)]


def reported_radii(limit: float, standard: Sequence[str]) -> list[str]:
    """Radii up to a limit at which certified accuracies are reported, in its unit.

    They are the `standard` ones, or the quarters of the limit where none has its unit.
    """
    numbers = {text: as_number(text) for text in standard}
    unit = unit_of(limit)
    same = [text for text, n in numbers.items() if n <= limit and unit_of(n) is unit]
    return same or quarters(limit)


def rounded_down(radius: float, scale: int = 1, decimals: int = 6) -> str:
    """`radius` times `scale` as a decimal that does not exceed it.

    Args:
        radius: in pixel units, not negative.
        scale: of a unit.
        decimals: their number.
    """
    whole, rest = divmod(int(Fraction(radius) * scale * 10**decimals), 10**decimals)
    return f"{whole}.{rest:0{decimals}d}" if decimals else str(whole)


def in_digits(radius: float, scale: int = 1, digits: int = DIGITS) -> str:
    """`radius` times `scale` in `digits` significant digits; rounded down if those exceed it."""
    text = f"{radius * scale:.{digits}g}"
    if float(text) / scale <= radius:
        return text
    below = Context(prec=digits, rounding=ROUND_FLOOR).multiply(Decimal(radius), scale)
    return f"{below:g}"


def percent(share: float) -> str:
    """A fraction in percent with two decimals: "62.21 %"."""
    return f"{100 * share:.2f} %"
