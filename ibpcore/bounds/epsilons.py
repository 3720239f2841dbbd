"""Radii as a user gives them: numbers, or texts such as "0.1" and "8/255"."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

from ibpcore.errors import UserError


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


def without_text(epsilon: Any, name: str) -> Any:
    """`epsilon` with a text as the number that it stands for; anything else as it is.

    Raises:
        UserError: the text is no number; the message calls it `name`.
    """
    if not isinstance(epsilon, str):
        return epsilon
    try:
        return as_number(epsilon)
    except (ValueError, ZeroDivisionError):
        rule = "must be a number such as 0.1 or 8/255"
        raise UserError(f"{name} {rule}, but is {epsilon!r}") from None
