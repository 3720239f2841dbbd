"""`FoldedNetwork`: a list of operators at fixed parameters, and its variants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ibpcore.bounds.operators import (
    Affine,
    ChannelAffine,
    NonnegativeLinear,
    Observer,
    Relu,
    Signal,
    Step,
    mapped,
    run,
)
from ibpcore.errors import UserError


@dataclass(frozen=True, eq=False)
class FoldedNetwork:
    """A network at fixed parameters and batch statistics, ready for many passes.

    Attributes:
        steps: affine, channel-wise, monotone, ... in order of execution.
        footprints: sizes of intermediate results, by image shape, see `ibpcore.bounds.chunking`.
        compiled: passes are compiled, see `ibpcore.bounds.kernels`. `fold` makes none that are.
    """

    steps: tuple[Step, ...]
    footprints: dict[Any, tuple[int, int]] = field(default_factory=dict)
    compiled: bool = False

    def __call__(self, x: Signal, observe: Observer | None = None) -> Signal:
        """Logits for a tensor (B, ...), an `Interval` of logits for an `Interval`."""
        return run(self.steps, x, observe)


def final_linear(network: FoldedNetwork) -> tuple[tuple[Step, ...], Affine]:
    """The steps before the last linear layer, and that layer, for elision.

    Raises:
        UserError: the network does not end in a linear layer.
    """
    steps = network.steps
    if steps and isinstance(steps[-1], ChannelAffine) and _is_linear(steps[-2:-1]):
        steps = (*steps[:-2], cast(Affine, steps[-2]).then(steps[-1]))
    if not _is_linear(steps[-1:]):
        raise UserError(
            "elision merges the last linear layer, but the model does not end in an"
            " IntervalLinear: pass elide=False"
        )
    return steps[:-1], cast(Affine, steps[-1])


def _is_linear(steps: Sequence[Step]) -> bool:
    return any(isinstance(step, Affine) and step.operation is F.linear for step in steps)


def detached(network: FoldedNetwork) -> FoldedNetwork:
    """The network with constant parameters, for gradients with respect to images alone."""
    return replace(network, steps=mapped(network.steps, _detached))


def _detached(step: Step) -> Step:
    if isinstance(step, Affine):
        bias = None if step.bias is None else step.bias.detach()
        return replace(step, weight=step.weight.detach(), bias=bias)
    if isinstance(step, ChannelAffine):
        return ChannelAffine(step.scale.detach(), step.shift.detach())
    return step


def tensors_of(network: FoldedNetwork) -> list[Tensor]:
    """Its parameters, in order: what `with_tensors` takes."""
    found: list[Tensor] = []

    def seen(step: Step) -> Step:
        found.extend(getattr(step, name) for name in _tensors_in(step))
        return step

    mapped(network.steps, seen)
    return found


def with_tensors(network: FoldedNetwork, tensors: Sequence[Tensor]) -> FoldedNetwork:
    """The network with other parameters, in the order of `tensors_of`."""
    others = iter(tensors)

    def replaced(step: Step) -> Step:
        names = _tensors_in(step)
        values: dict[str, Any] = {name: next(others) for name in names}
        return replace(step, **values) if names else step

    return replace(network, steps=mapped(network.steps, replaced))


def _tensors_in(step: Step) -> list[str]:
    return [x.name for x in fields(step) if isinstance(getattr(step, x.name), Tensor)]


def compiled(network: FoldedNetwork) -> FoldedNetwork:
    """The network with its passes compiled or, where somebody observes them, their kernels."""
    return replace(network, steps=mapped(network.steps, _for_compiler), compiled=True)


def _for_compiler(step: Step) -> Step:
    if isinstance(step, Affine):
        _ = step.weight_abs  # computed once here, not in each of the compiled passes
    return Relu(True) if isinstance(step, Relu) else step


def in_bfloat16(network: FoldedNetwork) -> FoldedNetwork:
    """The network with all but its first and last affine step computed in bfloat16.

    Not sound, and never used for certificates: it says quickly where to look.
    """
    places = [i for i, step in enumerate(network.steps) if isinstance(step, Affine)]
    if len(places) < 3:
        return network
    first, last = places[0] + 1, places[-1]
    usual = cast(Affine, network.steps[last]).weight.dtype
    down = NonnegativeLinear(partial(torch.Tensor.to, dtype=torch.bfloat16))
    up = NonnegativeLinear(partial(torch.Tensor.to, dtype=usual))
    inner = mapped(network.steps[first:last], _in_bfloat16)
    steps = (*network.steps[:first], down, *inner, up, *network.steps[last:])
    return replace(network, steps=steps)


def _in_bfloat16(step: Step) -> Step:
    if isinstance(step, Affine):
        bias = None if step.bias is None else step.bias.bfloat16()
        return replace(step, weight=step.weight.bfloat16(), bias=bias)
    if isinstance(step, ChannelAffine):
        return ChannelAffine(step.scale.bfloat16(), step.shift.bfloat16())
    return step
