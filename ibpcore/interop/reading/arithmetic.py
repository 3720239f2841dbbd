"""Rules of sums, differences, products and quotients."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, fx

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.reading.building import Signal, Value, core
from ibpcore.interop.reading.gates import gate
from ibpcore.interop.reading.operations import (
    Operation,
    Rule,
    aligned,
    broadcast_shape,
    expanded,
)
from ibpcore.nn.constants import Constants

Combine: TypeAlias = Callable[[Operation, Signal, Any], Signal]
"""Combines a signal with a constant."""
NO_BRANCHES = "only of a signal and a constant it has an interval rule"


def placed(of: Operation, x: Signal, constant: np.ndarray) -> tuple[Signal, Tensor]:
    """A signal and a constant that broadcast against each other, for a layer with constants.

    Returns:
        the signal in the shape of both, and the constant as one number, one for each channel, or
        (1, ...) in the dimensions of the signal's output.
    """
    numbers = of.tensor(constant)
    x = expanded(of, x, broadcast_shape(x.shape, constant.shape))
    if numbers.numel() == 1:
        return x, numbers.reshape(())
    if numbers.numel() == np.prod(x.shape):
        full = of.builder.shape(x.node)
        numbers = numbers.reshape(full)
    else:
        x = Signal(of.formed(x, core(x.shape)), x.shape)
        full = of.builder.shape(x.node)
        numbers = numbers.reshape((1,) * (len(x.shape) - numbers.dim()) + numbers.shape)
        numbers = numbers.reshape(numbers.shape[-len(full) :])
    if numbers.numel() == numbers.shape[0]:
        return x, numbers.flatten()
    if numbers.numel() == full[0]:  # which a layer would take as one for each channel
        numbers = numbers.expand(full).clone()
    return x, numbers[None]


def with_constant(
    of: Operation, x: Signal, kind: type[Constants], name: str, constant: Any
) -> Signal:
    """A layer of that kind for a signal, with the constant that it calls `name`."""
    x, numbers = placed(of, x, np.asarray(constant))
    others = {"scale": 1.0, "shift": 0.0} if kind is il.IntervalScale else {}
    given = {key: numbers.new_tensor(number) for key, number in others.items()}
    layer = kind(of.builder.shape(x.node)[0], **given | {name: numbers})
    return Signal(of.layer(layer, x.node), x.shape)


def scaled(of: Operation, x: Signal, factor: float) -> Signal:
    """A signal times a number."""
    return x if factor == 1 else times(of, x, factor)


def times(of: Operation, x: Signal, constant: Any) -> Signal:
    return with_constant(of, x, il.IntervalScale, "scale", constant)


def plus(of: Operation, x: Signal, constant: Any) -> Signal:
    return with_constant(of, x, il.IntervalScale, "shift", constant)


def minus(of: Operation, x: Signal, constant: Any) -> Signal:
    return with_constant(of, x, il.IntervalSubtract, "constant", constant)


def joined(of: Operation, function: Callable[..., Any], a: Signal, b: Signal) -> Signal:
    """The sum, difference or product of two signals."""
    shape = broadcast_shape(a.shape, b.shape)
    if a.shape == b.shape and of.builder.shape(a.node) == of.builder.shape(b.node):
        return Signal(of.call(function, a.node, b.node), shape)
    nodes: list[fx.Node] = [aligned(of, part, shape) for part in (a, b)]
    return Signal(of.call(function, *nodes), shape)


def _given(of: Operation, at: int) -> Value:
    value = of.input(at)
    if value is None:
        raise UserError(f"its input {at} is left out")
    return value


def _combined(
    join: Callable[..., Any], right: Combine, left: Combine
) -> Callable[[Operation], Signal]:
    """The rule of an operator with two inputs.

    Args:
        join: for two signals.
        right, left: for a signal and a constant on that side.
    """

    def read(of: Operation) -> Signal:
        a, b = _given(of, 0), _given(of, 1)
        if isinstance(a, Signal):
            return joined(of, join, a, b) if isinstance(b, Signal) else right(of, a, b)
        return left(of, of.signal(1), a)

    return read


def _subtracted_from(of: Operation, x: Signal, constant: Any) -> Signal:
    return plus(of, scaled(of, x, -1.0), constant)


def _read_product(of: Operation) -> Signal:
    found = _multiplied(of)
    known = gate(of.builder, found.node)
    return found if known is None else Signal(of.layer(*known), found.shape)


def _read_sum(of: Operation) -> Value:
    parts = [_given(of, at) for at in range(len(of.inputs))]
    total, *others = sorted(parts, key=lambda part: not isinstance(part, Signal))
    for part in others:
        total = _read_addition(replace(of, inputs=[total, part]))
    return total


def _read_quotient(of: Operation) -> Value:
    if not isinstance(of.input(0), Signal):
        raise UserError("only a division by a constant has an interval rule")
    divisor = of.constant(1, "divisor")
    if not divisor.all():
        raise UserError("it divides by 0")
    return with_constant(of, of.signal(), il.IntervalDivide, "divisor", divisor)


def _extremum(kind: type[Constants]) -> Rule:
    def read(of: Operation) -> Value:
        if len(of.inputs) != 2:
            raise UserError(NO_BRANCHES)
        at = 1 if isinstance(of.input(0), Signal) else 0
        if isinstance(of.input(at), Signal):
            raise UserError(NO_BRANCHES)
        return with_constant(of, of.signal(1 - at), kind, "constant", of.constant(at, "input"))

    return read


def _read_power(of: Operation) -> Value:
    x, exponent = of.signal(), of.constant(1, "exponent")
    if exponent.size != 1 or exponent.item() not in (1, 2):
        raise UserError("of all powers only the square has an interval rule")
    return x if exponent.item() == 1 else Signal(of.call(torch.square, x.node), x.shape)


_read_addition = _combined(operator.add, plus, plus)
_multiplied = _combined(operator.mul, times, times)
RULES: dict[str, Rule] = {
    "Add": _read_addition,
    "Sum": _read_sum,
    "Sub": _combined(operator.sub, minus, _subtracted_from),
    "Mul": _read_product,
    "Div": _read_quotient,
    "Neg": lambda of: scaled(of, of.signal(), -1.0),
    "Max": _extremum(il.IntervalMaximum),
    "Min": _extremum(il.IntervalMinimum),
    "Pow": _read_power,
}
