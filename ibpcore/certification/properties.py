"""Properties of networks in exact numbers, and their boxes and constraints as rounded tensors.

A property describes what a network must not do, as VNN-LIB does: it is `sat` if some input of a
box has outputs that satisfy linear constraints, and `unsat` if none has.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import gcd, inf, isfinite, lcm, nextafter
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.errors import UserError


class Ends(NamedTuple):
    """Lower and upper ends of the inputs, (inputs,) each."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True, eq=False)
class Box:
    """All inputs between two ends; cases over the same box share one object.

    Attributes:
        lower, upper: exact ends of each input, lower <= upper.
    """

    lower: tuple[Fraction, ...]
    upper: tuple[Fraction, ...]

    @cached_property
    def outer(self) -> Ends:
        """The smallest box of float64 numbers that contains this one."""
        return Ends(_rounded(self.lower, -inf), _rounded(self.upper, inf))

    @cached_property
    def inner(self) -> Ends:
        """The largest box of float32 numbers in this one; lower > upper where there are none."""
        lower, upper = _rounded(self.lower, inf), _rounded(self.upper, -inf)
        return Ends(as_type(lower, torch.float32, inf), as_type(upper, torch.float32, -inf))

    def contains(self, inputs: Sequence[Fraction]) -> bool:
        """Whether these numbers lie in it, exactly."""
        ends = zip(self.lower, inputs, self.upper, strict=True)
        return all(low <= x <= high for low, x, high in ends)


class Constraint(NamedTuple):
    """The sum of coefficients times outputs is at most `bound`.

    Attributes:
        coefficients: pairs of the number of an output and its coefficient, which is not 0; at
            least one.
        bound: what the sum may be at most.
    """

    coefficients: tuple[tuple[int, Fraction], ...]
    bound: Fraction

    def holds(self, outputs: Sequence[Fraction]) -> bool:
        """Whether it is true of these outputs, exactly."""
        return sum(a * outputs[j] for j, a in self.coefficients) <= self.bound


class Case(NamedTuple):
    """All inputs of a box whose outputs satisfy all constraints.

    Without constraints these are all inputs of the box.
    """

    box: Box
    constraints: tuple[Constraint, ...]

    def holds(self, inputs: Sequence[float], outputs: Sequence[float]) -> bool:
        """Whether these numbers satisfy it exactly, without any tolerance."""
        if not all(map(isfinite, (*inputs, *outputs))):
            return False
        exact = [*map(Fraction, outputs)]
        return self.box.contains([*map(Fraction, inputs)]) and all(
            constraint.holds(exact) for constraint in self.constraints
        )


class Property(NamedTuple):
    """The property is `sat` if an input satisfies one of the cases.

    Attributes:
        inputs, outputs: numbers of inputs and outputs of the network.
        cases: none if no input satisfies the constraints on inputs.
    """

    inputs: int
    outputs: int
    cases: tuple[Case, ...]


class Rows(NamedTuple):
    """The constraints of some cases as functions of the outputs: bound - weight y.

    The function is negative where the constraint is violated.

    Attributes:
        weight: (R, outputs), float64.
        bound: (R,), float64, rounded up: what violates it violates the exact constraint too.
        member: (cases, R), whether the constraint belongs to the case.
        exact: whether no weight is rounded.
    """

    weight: Tensor
    bound: Tensor
    member: Tensor
    exact: bool


def rows_of(cases: Sequence[Case], outputs: int) -> Rows:
    """The constraints of `cases`, each multiplied by a positive number that makes it exact.

    Whole numbers of up to 53 bits are exact; the largest weight of a row is then scaled to [1, 2).

    Raises:
        UserError: a number is beyond the range of float64.
    """
    numbers: dict[Constraint, int] = {}
    for case in cases:
        for constraint in case.constraints:
            numbers.setdefault(constraint, len(numbers))
    weight, bound, exact = torch.zeros(len(numbers), outputs, dtype=torch.float64), [], True
    for row, (coefficients, most) in enumerate(numbers):
        factor = _scale([a for _, a in coefficients])
        for index, a in coefficients:
            weight[row, index] = float(a * factor)
            exact &= float(a * factor) == a * factor
        bound.append(most * factor)
    member = torch.zeros(len(cases), len(numbers), dtype=torch.bool)
    for place, case in enumerate(cases):
        member[place, [numbers[constraint] for constraint in case.constraints]] = True
    return Rows(weight, _rounded(bound, inf), member, exact)


def _scale(coefficients: Sequence[Fraction]) -> Fraction:
    """What makes them whole numbers without a common factor, divided by a power of 2."""
    whole = Fraction(
        lcm(*(a.denominator for a in coefficients)), gcd(*(a.numerator for a in coefficients))
    )
    largest = int(max(abs(a * whole) for a in coefficients))
    return whole / 2 ** (largest.bit_length() - 1)


def as_type(x: Tensor, dtype: torch.dtype, towards: float) -> Tensor:
    """The numbers `x`, (...), in another type, rounded up or down: `towards` inf or -inf."""
    rounded = x.to(dtype)
    wrong = rounded.double() < x if towards > 0 else rounded.double() > x
    return torch.where(wrong, torch.nextafter(rounded, rounded.new_full((), towards)), rounded)


def _rounded(values: Iterable[Fraction], towards: float) -> Tensor:
    """(N,) float64, rounded up or down: `towards` inf or -inf."""
    return torch.tensor([_float(value, towards) for value in values], dtype=torch.float64)


def _float(value: Fraction, towards: float) -> float:
    try:
        nearest = float(value)
    except OverflowError:
        raise UserError("the property has a number beyond the range of float64") from None
    wrong = nearest < value if towards > 0 else nearest > value
    return nextafter(nearest, towards) if wrong else nearest
