"""Interval layers: `torch.nn` layers that also accept an `Interval`.

An interval layer has the parameter names of its `torch.nn` twin, so state dicts can be
exchanged unchanged. It defines its bounds by a tuple of *operators*
(`ibpcore.bounds.operators`) and stores no bounds itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.modules import module as module_hooks

from ibpcore.bounds import operators as ops
from ibpcore.bounds.interval import Interval
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.errors import UserError, first_line, is_out_of_memory
from ibpcore.precision import full_precision

Operators = tuple[ops.Operator, ...]
CleanObserver = Callable[[ops.Operator, Tensor], None]

LAYERS: dict[str, type[IntervalLayer]] = {}
"""Layers that can be saved, by class name without `Interval`."""
TWINS: dict[type[nn.Module], type[IntervalLayer]] = {}
"""The interval layer for each supported type of `torch.nn`."""


class Clean(NamedTuple):
    """Settings of a forward pass with a clean batch.

    Attributes:
        track: whether batch norm updates its running statistics.
        observe: called with the operator and the input (B, ...) of each layer that has exactly
            one operator.
        ranks: the processes whose batches together define the batch statistics.
        bounds: whether interval passes follow; if not, operators may be missing.
    """

    track: bool = True
    observe: CleanObserver | None = None
    ranks: Ranks = SINGLE_PROCESS
    bounds: bool = True


def _register(table: dict[Any, type[IntervalLayer]], key: Any, layer: type[IntervalLayer]) -> None:
    """Enters a layer; only its own module may replace it, or files would load as other layers."""
    known = table.get(key, layer)
    if known.__module__ != layer.__module__:
        raise UserError(f"{layer.__name__} would replace {known.__module__}.{known.__name__}")
    table[key] = layer


class IntervalLayer(nn.Module):
    """Base class of all interval layers; a subclass implements `operators`.

    `operators` and `clean` assume that the whole model has passed `check_supported`, which
    interval calls and `ibpcore.nn.folding` ensure. A subclass that defines `arguments` is
    registered, so that networks of it can be saved.

    Attributes:
        arguments: names of the constructor arguments, each also an attribute of the layer.
            Tensors are saved as numbers, and `bias` as whether there is one.
        twins: the `torch.nn` types that the layer can replace.
    """

    arguments: ClassVar[tuple[str, ...]]
    twins: ClassVar[tuple[type[nn.Module], ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # Only what the class itself states: subclasses may compute something else.
        for twin in vars(cls).get("twins", ()):
            _register(TWINS, twin, cls)
        if "arguments" in vars(cls):
            _register(LAYERS, cls.__name__.removeprefix("Interval"), cls)

    @classmethod
    def of(cls, **arguments: Any) -> IntervalLayer:
        """A newly initialised layer, from a value for each name in `arguments`."""
        return cls(**arguments)

    def operators(self) -> Operators:
        """The layer as pure operators with its current parameters.

        Raises:
            UserError: the layer needs a clean batch first (batch norm in training mode), or one
                of its settings has no sound interval rule.
        """
        raise NotImplementedError

    def clean(self, x: Tensor, how: Clean) -> tuple[Tensor, Operators]:
        """The output for a clean batch `x` (B, ...), and the operators that bound this batch."""
        operators = self.operators()
        if how.observe is not None and len(operators) == 1:
            how.observe(operators[0], x)
        return self.applied(x), operators

    def applied(self, x: Tensor) -> Tensor:
        """The output for a clean batch `x` (B, ...), by what is fastest in a training step."""
        return cast(Tensor, self(x))

    def forward(self, x: Any) -> Any:
        """The output of the twin for a tensor, sound bounds on it for an `Interval`.

        Bounds have full precision: neither autocast nor TF32 affects them.
        """
        if isinstance(x, Interval):
            check_supported(self)
            with full_precision():
                return bounded(self.operators(), x)
        return super().forward(x)


def bounded(operators: Operators, x: Interval) -> Interval:
    """Bounds on the outputs of `operators` for inputs in `x`, (B, ...).

    Raises:
        UserError: their shape or type does not fit.
    """
    try:
        return ops.run(operators, x)
    except (RuntimeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"an interval of shape {tuple(x.shape)}, {x.mid.dtype}, does not fit the model:"
            f" {first_line(error)}"
        ) from None


class ByOperators(IntervalLayer):
    """Base class of layers that apply their operators to tensors as well.

    `inplace` therefore has no effect; it would overwrite the input of a residual's shortcut.
    """

    def forward(self, x: Any) -> Any:
        return ops.run(self.operators(), x)


def kind_of(layer: nn.Module) -> str:
    """What PyTorch calls the layer, such as Conv2d, in model files and messages."""
    return type(layer).__name__.removeprefix("Interval")


def check_supported(model: nn.Module) -> None:
    """Raises a UserError that names the first module of `model` without an interval rule.

    Modules with forward hooks, or with a `forward` set on the object, are refused too, since
    bounds would ignore them; and so is everything while there are forward hooks of all modules.
    """
    check_converted(model)
    check_global_hooks()
    for place, module in model.named_modules():
        if not isinstance(module, IntervalLayer):
            kind, twin = type(module), TWINS.get(type(module))
            advice = f"use {twin.__name__}" if twin else "no interval rule is known for it"
            raise UserError(f"unsupported layer {place or 'model'!r} ({kind.__name__}): {advice}")
        # A `forward` of the object hides that of its class.
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise UserError(
                f"layer {place or 'model'!r} has forward hooks or a forward of its own, which"
                " bounds would ignore: remove them first"
            )


def check_converted(model: Any) -> None:
    """Raises a UserError that says how to make interval layers of `model`, unless it is some."""
    if not isinstance(model, nn.Module):
        raise UserError(f"the model must be an nn.Module, not {type(model).__name__}")
    if not isinstance(model, IntervalLayer):
        raise UserError(
            f"the model is a plain {type(model).__name__} without interval layers: call"
            " ibpcore.convert(model, in_shape) first"
        )


def check_global_hooks() -> None:
    """Raises a UserError while there are forward hooks of all modules."""
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        raise UserError(
            "there are forward hooks of all modules, which bounds would ignore: remove them first"
        )
