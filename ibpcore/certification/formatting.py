"""Radii and shares as text; certified radii are rounded down: what is printed is certified too."""

from __future__ import annotations

import math
from fractions import Fraction


def as_number(text: str) -> float:
    """The radius in a text such as "0.1" or "8/255", in pixel units.

    Raises:
        ValueError: the text is neither a number nor a fraction of two.
        ZeroDivisionError: the denominator is 0.
    """
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator if slash else 1)


def rounded_up(text: str) -> float:
    """The smallest float that is not below the radius in a text, such as "0.1" or "8/255".

    Images with at least this radius are certified at the radius in the text; at `as_number` of
    it they need not be.

    Raises: see `as_number`.
    """
    number = as_number(text)
    if number > 0 and math.isfinite(number):
        numerator, _, denominator = text.partition("/")
        exact = Fraction(numerator) / Fraction(denominator or 1)
        while number < exact:
            number = math.nextafter(number, math.inf)
    return number


def as_text(radius: float) -> str:
    """A given limit, not a certified radius, to four digits: "0.03137 (8/255)"."""
    return f"{radius:.4g} ({255 * radius:.4g}/255)"


def rounded_down(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` as a decimal that does not exceed it.

    Args:
        radius: in pixel units, not negative.
        unit: 1, or 255 for 255ths.
        digits: number of decimals.
    """
    whole, rest = divmod(int(Fraction(radius) * unit * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}"


def in_digits(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` in `digits` digits; rounded down to 9 decimals if those exceed it."""
    text = f"{radius * unit:.{digits}g}"
    return text if float(text) / unit <= radius else rounded_down(radius, unit, 9)


def radius_text(radius: float) -> str:
    """A limit as a person would type it: "0.1" or "8.8/255"."""
    return f"{radius:g}" if round(radius, 4) == radius else f"{255 * radius:.4g}/255"


def percent(share: float) -> str:
    """A fraction in percent with two decimals: "62.21 %"."""
    return f"{100 * share:.2f} %"
