"""The order of layers: that of the file, or that of the numbers in their names."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

from ibpcore.interop.importing.state_dicts import FoundLayer

NUMBER = re.compile("[0-9]{1,9}")


def by_number(layers: list[FoundLayer]) -> list[FoundLayer]:
    """The layers with names that differ first in a number by that number.

    Where names differ first in something else, the order of the file stays, as that of `conv`
    and `fc`: what was there first comes first with all that begins like it.
    """
    first: dict[tuple[str, ...], int] = {}
    keys: dict[str, Any] = {}
    for layer in layers:
        parts = _parts(layer.name)
        key = []
        for end, part in enumerate(parts):
            number = int(part) if NUMBER.fullmatch(part) else None
            kind = part if number is None else "0"
            rank = first.setdefault((*parts[:end], kind), len(first))
            key.append((rank, number or 0))
        keys[layer.name] = key
    return sorted(layers, key=lambda layer: keys[layer.name])


def without_number(layers: list[FoundLayer]) -> tuple[str, str] | None:
    """Two neighbours whose order no number says; None if there are none."""
    for layer, following in pairwise(layers):
        both = zip(_parts(layer.name), _parts(following.name), strict=False)
        here, there = next(pair for pair in both if pair[0] != pair[1])
        if not (NUMBER.fullmatch(here) and NUMBER.fullmatch(there)):
            return layer.name, following.name
    return None


def _parts(name: str) -> tuple[str, ...]:
    """Numbers and what is between them; an empty part marks the end."""
    return (*re.findall(r"[0-9]{1,9}|[^0-9]+", name), "")
