"""The order of the bounds: which of them are tried, one after the other."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from ibpcore.choices import BOUNDS
from ibpcore.errors import UserError


def next_tighter(name: str) -> str | None:
    """The name of the bound that comes after this one; None if it is the tightest."""
    return dict(pairwise(BOUNDS)).get(name)


def rungs(bound: Any) -> tuple[str, ...]:
    """The bounds that are tried one after the other, each where those before left radii open.

    Args:
        bound: a name, for all bounds up to that one; or several names separated by commas, from
            the loosest to the tightest, for these alone.

    Raises:
        UserError: a name is not known, or the names are not in that order.
    """
    names = [part.strip() for part in bound.split(",")] if isinstance(bound, str) else [bound]
    places = [place(name) for name in names]
    if len(names) == 1:
        return BOUNDS[: places[0] + 1]
    if any(b <= a for a, b in pairwise(places)):
        raise UserError(
            f"bounds must be listed from the loosest to the tightest: {', '.join(BOUNDS)}"
        )
    return tuple(names)


def place(name: Any) -> int:
    """The place of the bound called `name`, from 0 for the loosest.

    Raises:
        UserError: there is no such bound.
    """
    if name not in BOUNDS:
        raise UserError(f"bound {name!r} is not one of {', '.join(BOUNDS)}")
    return BOUNDS.index(name)
