"""Reads VNN-LIB properties in the dialect of VNN-COMP 2021 to 2023, with exact numbers.

The reader is our own. The package `vnnlib` reads version 2 of the language only, of another syntax;
its release for version 1 is no longer kept, and turns decimals into the nearest float64, which
may make a box smaller than it is written.

What is not understood is refused: a property that is misread would be verified wrongly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from ibpcore.certification.properties import Box, Case, Constraint, Property
from ibpcore.errors import UserError
from ibpcore.io.compressed import unpacked

MOST_CASES = 100_000
DEEPEST = 32
"""Parentheses around each other: real files have at most six."""
LONGEST_NUMBER = 800
"""Characters; the exact decimals of the smallest float64 have 767 digits."""
LARGEST_EXPONENT = 400

LINE_END = re.compile(r"\r\n|\r|\n")
"""No other character ends a comment."""
TOKEN = re.compile(r"[()]|[^ \t()]+")
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE]([+-]?\d+))?", re.ASCII)
VARIABLE = re.compile(r"([XY])_(0|[1-9]\d{0,8})", re.ASCII)


def read_property(path: Path) -> Property:
    """Reads a file, which may be compressed by gzip.

    Raises:
        UserError: it is missing or damaged, or holds anything that is not in the dialect.
        OSError: it exists but cannot be read.
    """
    try:
        return property_of(unpacked(path).decode())
    except UnicodeDecodeError:
        raise UserError(f"{path}: it is not a text file") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def property_of(text: str) -> Property:
    """The property in the content of a file.

    Raises:
        UserError: it holds anything that is not in the dialect; the line is named.
    """
    declared: dict[str, set[int]] = {"X": set(), "Y": set()}
    asserted: list[Formula] = []
    for command in _expressions(text):
        match command.parts:
            case ("declare-const", str(name), "Real"):
                _declare(name, declared, command.line)
            case ("assert", formula):
                asserted.append(_formula(formula, command.line, declared))
            case ("vnnlib-version" | "declare-network", *_):
                raise UserError(f"{command.where}VNN-LIB 2 is not read, only version 1")
            case _:
                raise UserError(f"{command.where}neither (declare-const NAME Real) nor (assert ..)")
    inputs, outputs = (_count(letter, declared[letter]) for letter in "XY")
    return Property(inputs, outputs, _cases(asserted, inputs))


# S-expressions


class Expression(NamedTuple):
    """The parts between two parentheses, and the line of the first of these."""

    line: int
    parts: tuple[Any, ...]

    @property
    def where(self) -> str:
        return f"line {self.line}: "


def _expressions(text: str) -> list[Expression]:
    """All expressions of the outermost level."""
    lines: list[int] = [0]
    parts: list[list[Any]] = [[]]
    for number, line in enumerate(LINE_END.split(text), 1):
        for token in TOKEN.findall(line.partition(";")[0]):
            if token == "(":
                if len(lines) > DEEPEST:
                    raise UserError(f"line {number}: more than {DEEPEST} open parentheses")
                lines.append(number)
                parts.append([])
            elif token == ")":
                if len(lines) == 1:
                    raise UserError(f"line {number}: a parenthesis is closed that was not opened")
                closed = Expression(lines.pop(), tuple(parts.pop()))
                parts[-1].append(closed)
            elif len(lines) == 1:
                raise UserError(f"line {number}: {token!r} stands outside of parentheses")
            else:
                parts[-1].append(token)
    if len(lines) > 1:
        raise UserError(f"line {lines[-1]}: a parenthesis is opened that is not closed")
    return parts[0]


# Variables


def _declare(name: str, declared: dict[str, set[int]], line: int) -> None:
    variable = VARIABLE.fullmatch(name)
    if variable is None:
        raise UserError(f"line {line}: variables are X_0, X_1, .. and Y_0, Y_1, .., not {name!r}")
    letter, index = variable[1], int(variable[2])
    if index in declared[letter]:
        raise UserError(f"line {line}: {name} is declared twice")
    declared[letter].add(index)


def _count(letter: str, indices: set[int]) -> int:
    if not indices:
        raise UserError(f"no variable {letter}_0 is declared")
    for index in range(len(indices)):
        if index not in indices:
            raise UserError(f"{letter}_{index} is not declared, but {letter}_{max(indices)} is")
    return len(indices)


# Formulas


class Inequality(NamedTuple):
    """The sum of coefficients times variables, such as ("X", 3), is at most `bound`."""

    line: int
    coefficients: tuple[tuple[tuple[str, int], Fraction], ...]
    bound: Fraction

    @property
    def letters(self) -> set[str]:
        return {letter for (letter, _), _ in self.coefficients}


Formula: TypeAlias = list[tuple[Inequality, ...]]
"""Alternatives, of which each is a conjunction."""


def _formula(part: Any, line: int, declared: dict[str, set[int]]) -> Formula:
    match part:
        case Expression(line, ("and", *parts)) if parts:
            return _conjunction([_formula(inner, line, declared) for inner in parts], line)
        case Expression(line, ("or", *parts)) if parts:
            found = [one for inner in parts for one in _formula(inner, line, declared)]
            return _counted(found, len(found), line)
        case Expression(line, ("<=" | ">=" as relation, first, second)):
            low, high = (first, second) if relation == "<=" else (second, first)
            left, right = (_linear(side, line, declared) for side in (low, high))
            difference = _sum([left, _times(right, Fraction(-1))])
            bound = -difference.pop(None, Fraction(0))
            coefficients = tuple(sorted((k, a) for k, a in difference.items() if a))
            return [(Inequality(line, coefficients, bound),)]
        case Expression(line, ("<=" | ">=", *_)):
            raise UserError(f"line {line}: <= and >= compare two terms")
        case Expression(line, (str(name), *_)):
            raise UserError(f"line {line}: {name!r} is not <=, >=, (and ..) or (or ..) of these")
    raise UserError(f"line {line}: a constraint such as (<= Y_0 Y_1) is missing")


def _conjunction(formulas: Iterable[Formula], line: int) -> Formula:
    formulas = [*formulas]
    # What has no alternatives is collected only once.
    common = tuple(one for formula in formulas if len(formula) == 1 for one in formula[0])
    several = [formula for formula in formulas if len(formula) > 1]
    _counted(several, prod(map(len, several)), line)
    return [sum(choice, common) for choice in product(*several)]


def _counted(found: Any, count: int, line: int) -> Any:
    if count > MOST_CASES:
        raise UserError(f"line {line}: more than {MOST_CASES} alternatives")
    return found


Linear: TypeAlias = dict[Any, Fraction]
"""Coefficients by variable, such as ("X", 3); by None the constant."""


def _linear(term: Any, line: int, declared: dict[str, set[int]]) -> Linear:
    """A term as a linear function of the variables."""
    if isinstance(term, str):
        return _atom(term, line, declared)
    match term.parts:
        case ("+", _, *_):
            return _sum([_linear(part, term.line, declared) for part in term.parts[1:]])
        case ("-", first):
            return _times(_linear(first, term.line, declared), Fraction(-1))
        case ("-", first, *others):
            rest = _sum([_linear(part, term.line, declared) for part in others])
            first = _linear(first, term.line, declared)
            return _sum([first, _times(rest, Fraction(-1))])
        case ("*", _, *_):
            factors = [_linear(part, term.line, declared) for part in term.parts[1:]]
            return _product(factors, term.line)
    raise UserError(f"{term.where}not a number, a variable, or (+ ..), (- ..), (* ..) of these")


def _atom(token: str, line: int, declared: dict[str, set[int]]) -> Linear:
    variable = VARIABLE.fullmatch(token)
    if variable is not None:
        letter, index = variable[1], int(variable[2])
        if index not in declared[letter]:
            raise UserError(f"line {line}: {token} is not declared before")
        return {(letter, index): Fraction(1)}
    number = NUMBER.fullmatch(token)
    if number is None:
        raise UserError(f"line {line}: {token[:40]!r} is neither a number nor a variable")
    exponent = number[3] or "0"
    if len(token) > LONGEST_NUMBER or len(exponent) > 9 or abs(int(exponent)) > LARGEST_EXPONENT:
        raise UserError(f"line {line}: the number {token[:40]} is too long")
    return {None: Fraction(token)}


def _sum(terms: Sequence[Linear]) -> Linear:
    total: Linear = {}
    for term in terms:
        for key, value in term.items():
            total[key] = total.get(key, Fraction(0)) + value
    return total


def _times(term: Linear, factor: Fraction) -> Linear:
    return {key: factor * value for key, value in term.items()}


def _product(factors: Sequence[Linear], line: int) -> Linear:
    total: Linear = {None: Fraction(1)}
    for factor in factors:
        if factor.keys() > {None} or None not in factor:
            total, factor = factor, total
        if factor.keys() != {None}:
            raise UserError(f"line {line}: a product of variables is not linear")
        total = _times(total, factor[None])
    return total


# Boxes and constraints on outputs


def _cases(asserted: Sequence[Formula], inputs: int) -> tuple[Case, ...]:
    """The cases of a conjunction of formulas, without those that no input satisfies."""
    common = [one for formula in asserted if len(formula) == 1 for one in formula[0]]
    choices = _conjunction([formula for formula in asserted if len(formula) > 1], 0)
    shared = [one for one in common if one.letters <= {"X"}]
    boxes: dict[tuple[Inequality, ...], Box | None] = {}
    cases = []
    for choice in choices:
        own = tuple(one for one in choice if one.letters <= {"X"})
        if own not in boxes:
            boxes[own] = _box([*shared, *own], inputs)
        constraints = tuple(_constraint(one) for one in (*common, *choice) if "Y" in one.letters)
        box = boxes[own]
        if box is not None:
            cases.append(Case(box, constraints))
    return tuple(cases)


def _constraint(one: Inequality) -> Constraint:
    if one.letters != {"Y"}:
        raise UserError(f"line {one.line}: a constraint on inputs and outputs is not supported")
    return Constraint(tuple((index, a) for (_, index), a in one.coefficients), one.bound)


def _box(inequalities: Iterable[Inequality], inputs: int) -> Box | None:
    """The box in which all hold; None if none does."""
    lower: dict[int, Fraction] = {}
    upper: dict[int, Fraction] = {}
    possible = True
    for line, coefficients, bound in inequalities:
        if not coefficients:
            possible &= bound >= 0
            continue
        if len(coefficients) > 1:
            raise UserError(f"line {line}: a constraint on several inputs is not supported")
        (((_, index), factor),) = coefficients
        end = bound / factor
        if factor > 0:
            upper[index] = min(upper.get(index, end), end)
        else:
            lower[index] = max(lower.get(index, end), end)
    for name, ends in (("lower", lower), ("upper", upper)):
        missing = next((index for index in range(inputs) if index not in ends), None)
        if missing is not None:
            raise UserError(f"X_{missing} has no {name} bound")
    box = Box(*(tuple(ends[index] for index in range(inputs)) for ends in (lower, upper)))
    possible &= all(low <= high for low, high in zip(box.lower, box.upper, strict=True))
    return box if possible else None
