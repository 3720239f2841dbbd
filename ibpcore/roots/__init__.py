"""Batched bracketing root finders for scalar equations, independent of networks.

Start with `base`, which defines lanes and the interface of all solvers.
"""

from ibpcore.roots.base import Ends, Estimate, LaneFunction, Roots, RootStatus, Solver
from ibpcore.roots.bisection import Bisection
from ibpcore.roots.brent import Brent
from ibpcore.roots.multipoint import Multipoint
from ibpcore.roots.options import SOLVERS, RootOptions
from ibpcore.roots.warm_start import WarmStart

__all__ = [
    "SOLVERS",
    "Bisection",
    "Brent",
    "Ends",
    "Estimate",
    "LaneFunction",
    "Multipoint",
    "RootOptions",
    "RootStatus",
    "Roots",
    "Solver",
    "WarmStart",
]
