"""Radii and shares as text; certified radii are rounded down: what is printed is certified too."""

from __future__ import annotations

from fractions import Fraction


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
