"""`RootOptions`: a solver's name and its options, as stored in configurations and records."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real

from ibpcore.errors import UserError
from ibpcore.roots.base import Solver
from ibpcore.roots.bisection import Bisection
from ibpcore.roots.brent import Brent
from ibpcore.roots.multipoint import Multipoint
from ibpcore.roots.warm_start import WarmStart

SOLVERS: dict[str, type[Solver]] = {
    "brentq": Brent,
    "bisect": Bisection,
    "fused": Multipoint,
    "tracked": WarmStart,
}


@dataclass(frozen=True)
class RootOptions:
    """How roots are found; the paper uses these tolerances and 100 or 2 iterations.

    Attributes:
        solver: a name in `SOLVERS`.
        xtol, rtol: absolute (pixel units) and relative width of the final bracket.
        max_iterations: passes over the open samples after R(epsilon_max).
        candidates: radii per sample and pass of `fused`; other solvers use one.
    """

    solver: str = "brentq"
    xtol: float = 1e-6
    rtol: float = 1e-4
    max_iterations: int = 100
    candidates: int = 8

    def __post_init__(self) -> None:
        if self.solver not in [*SOLVERS]:  # a list, since a name may be unhashable
            raise UserError(f"solver {self.solver!r} is not one of {', '.join(SOLVERS)}")
        for tolerance in (self.xtol, self.rtol):
            if not isinstance(tolerance, Real) or not tolerance > 0:
                raise UserError("xtol and rtol must be above 0")
        for name in ("max_iterations", "candidates"):
            if not isinstance(getattr(self, name), Integral):
                raise UserError(f"{name} must be a whole number, but is {getattr(self, name)!r}")
        if self.max_iterations < 0:
            raise UserError(f"max_iterations must not be negative, but is {self.max_iterations}")
        if self.candidates < 1:
            raise UserError(f"candidates must be at least 1, but is {self.candidates}")

    def make(self) -> Solver:
        """The solver, with the options that it supports."""
        kind = SOLVERS[self.solver]
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})
