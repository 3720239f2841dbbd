"""Translation of layers, functions and methods of PyTorch to interval layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.tracing import TRACED_SAMPLES, Trace, TracedSignal, operation, where
from ibpcore.nn.layers import TWINS, IntervalLayer

Layers: TypeAlias = list[IntervalLayer]
Sizes: TypeAlias = tuple[int, ...]

DATA_DEPENDENT = "its statistics depend on the perturbed input, so it is not a fixed affine map"
LOGITS = "a classifier must return logits: leave it out"
REASONS = {
    **dict.fromkeys(("GroupNorm", "group_norm", "LayerNorm", "layer_norm"), DATA_DEPENDENT),
    **dict.fromkeys(("InstanceNorm1d", "InstanceNorm2d", "instance_norm"), DATA_DEPENDENT),
    **dict.fromkeys(("Softmax", "softmax", "LogSoftmax", "log_softmax"), LOGITS),
    "batch_norm": "use nn.BatchNorm1d or nn.BatchNorm2d",
}
UNKNOWN = "no interval rule is known for it"


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the images.

    Attributes:
        shape: its shape where it is used, e.g. after a `view`.
        tensor: the same numbers in any shape; an attribute of the module is kept, not copied.
    """

    shape: Sizes
    tensor: Tensor


@dataclass(frozen=True)
class Site:
    """A node of a trace that is to be translated, and the shapes at it."""

    trace: Trace
    node: fx.Node

    @property
    def shape(self) -> Sizes:
        """Shape of its output, batch included."""
        return cast(TracedSignal, self.trace.values[self.node]).shape

    @property
    def given(self) -> Sizes:
        """Shape of its first input that depends on the images, batch included."""
        return cast(TracedSignal, self.trace.values[self.trace.signals(self.node)[0]]).shape

    def unsupported(self, reason: str | None = None) -> UserError:
        """An error that names the node, its place in the module and the reason."""
        module = self.node.op == "call_module"
        name = type(self.trace.module(self.node)).__name__ if module else operation(self.node)
        kind = "layer" if module else "operation"
        return UserError(
            f"unsupported {kind} {where(self.node)}: {reason or REASONS.get(name, UNKNOWN)}"
        )

    def layers(self) -> Layers:
        """The equivalent interval layers, in order.

        Raises:
            UserError: there are none.
        """
        if self.node.op == "call_module":
            found = self._of_module(self.trace.module(self.node))
        else:
            found = self._of_operation()
        if self.shape[:1] != (TRACED_SAMPLES,):
            raise self.unsupported("it mixes the images of a batch")
        return found

    def scale(self, given: Sizes, scale: Any = 1.0, shift: Any = 0.0) -> IntervalLayer:
        """The layer scale * x + shift for x of shape `given`; both are numbers or tensors."""
        like = self.trace.like
        how: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        numbers = (
            n if isinstance(n, nn.Parameter) else torch.as_tensor(n, **how) for n in (scale, shift)
        )
        return il.IntervalScale(given[1], *numbers)

    def concatenated(self, parts: list[fx.Node]) -> int:
        """The dimension, at least 1, along which `parts` are concatenated.

        Raises:
            UserError: one part is constant, or it is the dimension of the batch.
        """
        given: dict[str, Any] = dict(zip(("tensors", "dim"), self.node.args, strict=False))
        given |= self.node.kwargs
        if list(given["tensors"]) != parts:
            raise self.unsupported("a part of it does not depend on the images")
        dim = int(given.get("dim", given.get("axis", 0)))
        dim += len(self.shape) * (dim < 0)
        if dim == 0:
            raise self.unsupported("it mixes the images of a batch")
        return dim

    def _of_module(self, module: nn.Module) -> Layers:
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            raise self.unsupported("its bounds would ignore its hooks, or its own forward")
        if isinstance(module, il.IntervalSequential):
            return module.layers
        if isinstance(module, IntervalLayer):
            return [module]
        if type(module) in MODULES:
            return MODULES[type(module)](self, module)
        if type(module) in TWINS:
            return [twin(TWINS[type(module)], module)]
        raise self.unsupported()

    def _of_operation(self) -> Layers:
        name = operation(self.node)
        known = OPERATIONS.get(ALIASES.get(name, name.removesuffix("_")))
        if known is None:
            raise self.unsupported()
        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), self._resolved)
        try:
            return known(self, *args, **kwargs)
        except (TypeError, ZeroDivisionError):
            raise self.unsupported("it is called in an unusual way") from None

    def _resolved(self, node: fx.Node) -> Any:
        value = self.trace.values[node]
        if not isinstance(value, Tensor):
            return value
        source = node
        while source.op == "call_method" and source.target in ("view", "reshape", "unsqueeze"):
            source = cast(fx.Node, source.args[0])
        if source.op == "get_attr":
            return Constant(tuple(value.shape), cast(Tensor, self.trace.values[source]))
        if any(isinstance(self.trace.values[other], nn.Parameter) for other in _ancestors(node)):
            raise self.unsupported("one of its constants is computed from parameters")
        return Constant(tuple(value.shape), value)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found = {node}
    return found.union(*(_ancestors(other) for other in node.all_input_nodes))


def twin(kind: type[IntervalLayer], module: nn.Module) -> IntervalLayer:
    """A layer of that kind that shares all attributes with `module`, its `torch.nn` twin."""
    layer = kind.__new__(kind)
    # They share the dictionary of parameters: to replace a parameter replaces it in both.
    vars(layer).update(vars(module))
    return layer


# Operations: `input` and then the arguments of PyTorch's function, under the same names.


def _translate_leaky_relu(
    site: Site, input: TracedSignal, negative_slope: float = 0.01, inplace: bool = False
) -> Layers:
    return [il.IntervalLeakyReLU(negative_slope)]


def _translate_dropout(
    site: Site, input: TracedSignal, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Layers:
    if training:
        raise site.unsupported("it is active in evaluation too: pass training=self.training")
    return [il.IntervalDropout(p)]


def _translate_reshape(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """Any operation that keeps the numbers and their order, so that the new shape defines it."""
    if site.shape == site.given:
        return []
    if site.shape[:1] != (TRACED_SAMPLES,):
        raise site.unsupported("it mixes the images of a batch")
    if len(site.shape) == 2:
        return [il.IntervalFlatten()]
    return [il.IntervalReshape(site.shape[1:])]


def _translate_permute(site: Site, input: TracedSignal, *dims: Any) -> Layers:
    given = dims[0] if isinstance(dims[0], tuple | list) else dims
    order = [dim % len(site.given) for dim in given]
    if order[0] != 0:
        raise site.unsupported("it mixes the images of a batch")
    return [il.IntervalPermute(order)]


def _translate_transpose(site: Site, input: TracedSignal, dim0: int, dim1: int) -> Layers:
    order = list(range(len(site.given)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _translate_permute(site, input, order)


def _translate_getitem(site: Site, input: TracedSignal, index: Any) -> Layers:
    index = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
        raise site.unsupported("only slices and whole numbers may select parts of a tensor")
    if ... in index:
        at, used = index.index(...), sum(i is not None and i is not ... for i in index)
        index[at : at + 1] = [slice(None)] * (len(site.given) - used)
    chosen = [i for i in index if i is not None]
    chosen += [slice(None)] * (len(site.given) - len(chosen))
    if chosen[0] != slice(None):
        raise site.unsupported("it mixes the images of a batch")
    ranges = []
    for i, size in zip(chosen[1:], site.given[1:], strict=True):
        whole = i if isinstance(i, slice) else slice(i % size, i % size + 1)
        ranges.append(whole.indices(size))
    left = (TRACED_SAMPLES, *(len(range(*numbers)) for numbers in ranges))
    layers: Layers = [] if left == site.given else [il.IntervalSlice(ranges)]
    # A whole number removes a dimension, and None adds one.
    return layers if left == site.shape else [*layers, il.IntervalReshape(site.shape[1:])]


def _translate_pad(
    site: Site, input: TracedSignal, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Layers:
    if mode != "constant" or value:
        raise site.unsupported("only padding by zeros has an interval rule")
    if len(pad) > 2 * (len(site.given) - 1):
        raise site.unsupported("it would add images to the batch")
    return [il.IntervalZeroPad(pad)]


def _translate_max_pool(
    site: Site,
    input: TracedSignal,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Layers:
    if return_indices:
        raise site.unsupported("it returns indices")
    return [il.IntervalMaxPool2d(kernel_size, stride, padding, dilation, False, ceil_mode)]


def _translate_resize(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """To a divisor of the size by averaging, or to a multiple of it by repetition."""
    if len(site.given) != 4:
        raise site.unsupported("it has an interval rule only for batches of images")
    (height, width), (rows, columns) = site.given[2:], site.shape[2:]
    if (rows, columns) == (height, width):
        return []
    if height % rows == 0 and width % columns == 0:
        return [il.IntervalAvgPool2d((height // rows, width // columns))]
    if rows % height == 0 and columns % width == 0:
        return [il.IntervalUpsample((rows // height, columns // width))]
    raise site.unsupported(f"{rows}x{columns} does not divide its input, {height}x{width}")


def _translate_interpolate(
    site: Site,
    input: TracedSignal,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    *others: Any,
    **options: Any,
) -> Layers:
    """The remaining arguments do not matter for mode nearest and a multiple of the size."""
    grown = all(new >= old for new, old in zip(site.shape[2:], site.given[2:], strict=True))
    if mode != "nearest" or not grown:
        raise site.unsupported("only mode nearest, to a multiple of the size, has an interval rule")
    return _translate_resize(site)


def _translate_mean(
    site: Site, input: TracedSignal, dim: Any = (), keepdim: bool = False, dtype: Any = None
) -> Layers:
    dims = [dim] if isinstance(dim, int) else [*(dim or ())]
    over = {d % len(site.given) for d in dims}
    if dtype not in (None, site.trace.like.dtype):
        raise site.unsupported("it changes the type of the numbers")
    if len(site.given) != 4 or not over or not over <= {2, 3}:
        raise site.unsupported("only means over height and width have an interval rule")
    rows, columns = (size if d in over else 1 for d, size in enumerate(site.given) if d > 1)
    pooled: Layers = [il.IntervalAvgPool2d((rows, columns))]
    if keepdim:
        return pooled
    flat = il.IntervalFlatten() if len(over) == 2 else il.IntervalReshape(site.shape[1:])
    return [*pooled, flat]


def _translate_linear(site: Site, input: TracedSignal, weight: Any, bias: Any = None) -> Layers:
    with torch.device("meta"):
        layer = il.IntervalLinear(weight.shape[1], weight.shape[0], bias is not None)
    return [_with_weights(site, layer, weight, bias)]


def _translate_conv2d(
    site: Site,
    input: TracedSignal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layers:
    out, inner, *kernel = weight.shape
    with torch.device("meta"):
        geometry: Any = tuple(kernel), stride, padding, dilation, groups, bias is not None
        layer = il.IntervalConv2d(inner * groups, out, *geometry)
    return [_with_weights(site, layer, weight, bias)]


def _with_weights(site: Site, layer: Any, weight: Any, bias: Any) -> IntervalLayer:
    for name, constant in (("weight", weight), ("bias", bias)):
        if constant is None:
            continue
        own = isinstance(constant, Constant) and isinstance(constant.tensor, nn.Parameter)
        if not own or constant.shape != tuple(constant.tensor.shape):
            raise site.unsupported(f"its {name} must be a parameter of the module")
        setattr(layer, name, constant.tensor)
    return cast(IntervalLayer, layer)


def _translate_scale(site: Site, scale: Any = 1.0, shift: Any = 0.0) -> Layers:
    """scale * x + shift, where at most one of the two is a tensor."""
    given = site.given
    if len(given) < 2:
        raise site.unsupported("its input has no channels")
    for constant in (scale, shift):
        if isinstance(constant, Constant):
            shape = (1,) * (len(given) - len(constant.shape)) + constant.shape
            others = [size for dim, size in enumerate(shape) if dim != 1]
            if site.shape != given or math.prod(others) != 1 or shape[1] not in (1, given[1]):
                raise site.unsupported(
                    f"a constant must be one number or one per channel, but an input {given}"
                    f" meets one of shape {constant.shape}"
                )
        elif not isinstance(constant, int | float):
            raise site.unsupported("it has no interval rule with such a constant")
    if scale == 1 and shift == 0:
        return []
    tensors = (c.tensor if isinstance(c, Constant) else float(c) for c in (scale, shift))
    return [site.scale(given, *tensors)]


def _translate_add(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    return _translate_scale(site, shift=other if isinstance(input, TracedSignal) else input)


def _translate_sub(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    if not isinstance(input, TracedSignal):
        return [*_translate_scale(site, -1.0), *_translate_scale(site, shift=input)]
    return _translate_scale(site, shift=_fixed(site, other, operator.neg))


def _translate_mul(site: Site, input: Any, other: Any) -> Layers:
    return _translate_scale(site, other if isinstance(input, TracedSignal) else input)


def _translate_div(site: Site, input: Any, other: Any, rounding_mode: str | None = None) -> Layers:
    if rounding_mode is not None or not isinstance(input, TracedSignal):
        raise site.unsupported("only a division by a constant has an interval rule")
    return _translate_scale(site, _fixed(site, other, lambda value: 1 / value))


def _fixed(site: Site, constant: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a constant; not of a parameter, which training would no longer reach."""
    if not isinstance(constant, Constant):
        return function(constant)
    if isinstance(constant.tensor, nn.Parameter):
        raise site.unsupported(
            "it divides by a parameter or subtracts one: multiply by it or add it instead"
        )
    return Constant(constant.shape, function(constant.tensor.detach()))


def _translate_padding_layer(site: Site, module: Any) -> Layers:
    return _translate_pad(site, TracedSignal(site.given), module.padding, value=module.value)


def _translate_upsample_layer(site: Site, module: nn.Upsample) -> Layers:
    return _translate_interpolate(site, TracedSignal(site.given), mode=module.mode)


MODULES: dict[type[nn.Module], Callable[[Site, Any], Layers]] = {
    nn.Identity: lambda site, module: [],
    nn.Flatten: _translate_reshape,
    nn.Unflatten: _translate_reshape,
    nn.ZeroPad2d: _translate_padding_layer,
    nn.ConstantPad2d: _translate_padding_layer,
    nn.AdaptiveAvgPool2d: _translate_resize,
    nn.Upsample: _translate_upsample_layer,
}
"""Modules that are not translated by `ibpcore.nn.layers.TWINS`. By exact type, as there: a subclass
may compute anything, and is traced into."""

OPERATIONS: dict[str, Callable[..., Layers]] = {
    "relu": lambda site, input, inplace=False: [il.IntervalReLU()],
    "leaky_relu": _translate_leaky_relu,
    "sigmoid": lambda site, input: [il.IntervalSigmoid()],
    "tanh": lambda site, input: [il.IntervalTanh()],
    "dropout": _translate_dropout,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze"), _translate_reshape),
    **dict.fromkeys(("unsqueeze", "contiguous", "clone"), _translate_reshape),
    "permute": _translate_permute,
    "transpose": _translate_transpose,
    "getitem": _translate_getitem,
    "pad": _translate_pad,
    "avg_pool2d": lambda site, input, *args, **how: [il.IntervalAvgPool2d(*args, **how)],
    "max_pool2d": _translate_max_pool,
    "adaptive_avg_pool2d": _translate_resize,
    "interpolate": _translate_interpolate,
    "mean": _translate_mean,
    "linear": _translate_linear,
    "conv2d": _translate_conv2d,
    "add": _translate_add,
    "sub": _translate_sub,
    "mul": _translate_mul,
    "div": _translate_div,
    "neg": lambda site, input: _translate_scale(site, -1.0),
}
"""Functions of torch, torch.nn.functional and operator, and methods of tensors, by name."""

ALIASES = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "negative": "neg"},
}
