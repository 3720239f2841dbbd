"""Batched bracketing root finders. They know no network: only a function of lanes."""

from collections.abc import Callable

from ibpcore.roots.base import Ends, LaneFunction, Roots, RootStatus
from ibpcore.roots.bisection import bisect
from ibpcore.roots.brent import brentq
from ibpcore.roots.multipoint import fused
from ibpcore.roots.warm_start import tracked

SOLVERS: dict[str, Callable[..., Roots]] = {
    "brentq": brentq,
    "bisect": bisect,
    "fused": fused,
    "tracked": tracked,
}

__all__ = [
    "SOLVERS",
    "Ends",
    "LaneFunction",
    "RootStatus",
    "Roots",
    "bisect",
    "brentq",
    "fused",
    "tracked",
]
