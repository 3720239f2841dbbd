"""Radii as text, never rounded up."""

from __future__ import annotations

from fractions import Fraction


def as_number(text: str) -> float:
    """A radius as it is typed: "0.1" or "8/255".

    Raises:
        ValueError: it is neither.
    """
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator if slash else 1)


def as_text(radius: float) -> str:
    """A radius as it is read: "0.03137 (8/255)", to four digits."""
    return f"{radius:.4g} ({255 * radius:.4g}/255)"


def rounded_down(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` as a decimal that is not above it: certified at that too.

    Args:
        radius: in pixel units, not negative.
        unit: 1, or 255 for 255ths.
        digits: behind the point.
    """
    whole, rest = divmod(int(Fraction(radius) * unit * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}"


def in_digits(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` in so many digits, in nine behind the point if that is above it."""
    text = f"{radius * unit:.{digits}g}"
    return text if float(text) / unit <= radius else rounded_down(radius, unit, 9)


def radius_text(radius: float) -> str:
    """0.1 or 8.8/255, as a person would type it."""
    return f"{radius:g}" if round(radius, 4) == radius else f"{255 * radius:.4g}/255"
