"""What a layer, function or method of PyTorch is in interval layers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, fx, nn

from ibpcore.errors import UserError
from ibpcore.interop.tracing import SAMPLES, Signal, Trace, operation, where
from ibpcore.nn import layers as il
from ibpcore.nn.layers import IntervalLayer

Layers: TypeAlias = list[IntervalLayer]
Sizes: TypeAlias = tuple[int, ...]

STATISTICS = "its statistics depend on the perturbed input, so that it is no fixed affine map"
LOGITS = "a classifier shall give logits, without it"
REASONS = {
    **dict.fromkeys(("GroupNorm", "group_norm", "LayerNorm", "layer_norm"), STATISTICS),
    **dict.fromkeys(("InstanceNorm1d", "InstanceNorm2d", "instance_norm"), STATISTICS),
    **dict.fromkeys(("Softmax", "softmax", "LogSoftmax", "log_softmax"), LOGITS),
    "batch_norm": "use nn.BatchNorm1d or nn.BatchNorm2d",
}
UNKNOWN = "no interval rule is known for it"


@dataclass(frozen=True)
class Constant:
    """A tensor that does not depend on the images.

    Attributes:
        shape: with which it is used.
        tensor: the attribute of the module itself where it is one, in any shape.
    """

    shape: Sizes
    tensor: Tensor


@dataclass(frozen=True)
class Site:
    """A node of a trace, to be translated."""

    trace: Trace
    node: fx.Node

    @property
    def shape(self) -> Sizes:
        """Of what it gives, the batch first."""
        return cast(Signal, self.trace.values[self.node]).shape

    @property
    def given(self) -> Sizes:
        """Shape of what it reads."""
        return cast(Signal, self.trace.values[self.trace.signals(self.node)[0]]).shape

    def unsupported(self, reason: str | None = None) -> UserError:
        """The error that names the place, the kind and the reason."""
        module = self.node.op == "call_module"
        name = type(self.trace.module(self.node)).__name__ if module else operation(self.node)
        kind = "layer" if module else "operation"
        return UserError(
            f"unsupported {kind} {where(self.node)}: {reason or REASONS.get(name, UNKNOWN)}"
        )

    def layers(self) -> Layers:
        """The interval layers that do the same.

        Raises:
            UserError: there are none.
        """
        if self.node.op == "call_module":
            found = self._of_module(self.trace.module(self.node))
        else:
            found = self._of_operation()
        if self.shape[:1] != (SAMPLES,):
            raise self.unsupported("it mixes the images of a batch")
        return found

    def scale(self, given: Sizes, scale: Any = 1.0, shift: Any = 0.0) -> IntervalLayer:
        """scale * x + shift for an x of shape `given`, by numbers or tensors."""
        like = self.trace.like
        numbers = (
            n
            if isinstance(n, nn.Parameter)
            else torch.as_tensor(n, dtype=like.dtype, device=like.device)
            for n in (scale, shift)
        )
        return il.IntervalScale(given[1], *numbers)

    def concatenated(self, parts: list[fx.Node]) -> int:
        """Along which dimension, from 1; raises UserError where that cannot be."""
        names = ("tensors", "dim", "axis")
        given: dict[str, Any] = dict(zip(names, self.node.args, strict=False))
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
            raise self.unsupported("its bounds would not see its hooks, or its own forward")
        if isinstance(module, IntervalLayer):
            if isinstance(module, il.IntervalSequential):
                return [cast(IntervalLayer, part) for part in module]
            return [module]
        if type(module) not in MODULES:
            raise self.unsupported()
        return MODULES[type(module)](self, module)

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
    """The layer of that kind with all that `module` has, and not a copy of it."""
    layer = kind.__new__(kind)
    # Even the dictionaries of parameters are the same: what replaces one replaces both.
    vars(layer).update(vars(module))
    return layer


# Operations: what they read comes first, then their arguments as PyTorch has them.


def _relu(site: Site, input: Signal, inplace: bool = False) -> Layers:
    return [il.IntervalReLU()]


def _leaky_relu(
    site: Site, input: Signal, negative_slope: float = 0.01, inplace: bool = False
) -> Layers:
    return [il.IntervalLeakyReLU(negative_slope)]


def _sigmoid(site: Site, input: Signal) -> Layers:
    return [il.IntervalSigmoid()]


def _tanh(site: Site, input: Signal) -> Layers:
    return [il.IntervalTanh()]


def _dropout(
    site: Site, input: Signal, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Layers:
    if training:
        raise site.unsupported("it drops in evaluation too: give it training=self.training")
    return [il.IntervalDropout(p)]


def _reshaped(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """Whatever keeps the numbers and their order: the shapes say it all."""
    if site.shape == site.given:
        return []
    if site.shape[:1] != (SAMPLES,):
        raise site.unsupported("it mixes the images of a batch")
    if len(site.shape) == 2:
        return [il.IntervalFlatten()]
    return [il.IntervalReshape(site.shape[1:])]


def _permute(site: Site, input: Signal, *dims: Any) -> Layers:
    order = dims[0] if isinstance(dims[0], tuple | list) else dims
    order = [dim % len(site.given) for dim in order]
    if order[0] != 0:
        raise site.unsupported("it mixes the images of a batch")
    return [il.IntervalPermute(order)]


def _transpose(site: Site, input: Signal, dim0: int, dim1: int) -> Layers:
    order = list(range(len(site.given)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(site, input, order)


def _getitem(site: Site, input: Signal, index: Any) -> Layers:
    index = list(index) if isinstance(index, tuple) else [index]
    if not all(i is None or i is ... or isinstance(i, int | slice) for i in index):
        raise site.unsupported("only slices and whole numbers may choose parts of a tensor")
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
    left = (SAMPLES, *(len(range(*numbers)) for numbers in ranges))
    layers: Layers = [] if left == site.given else [il.IntervalSlice(ranges)]
    # What a whole number chose, or None added, is a dimension less or more.
    return layers if left == site.shape else [*layers, il.IntervalReshape(site.shape[1:])]


def _pad(
    site: Site, input: Signal, pad: Sequence[int], mode: str = "constant", value: Any = None
) -> Layers:
    if mode != "constant" or value:
        raise site.unsupported("only padding by zeros has an interval rule here")
    if len(pad) > 2 * (len(site.given) - 1):
        raise site.unsupported("it adds images to the batch")
    return [il.IntervalZeroPad(pad)]


def _avg_pool(site: Site, input: Signal, *args: Any, **kwargs: Any) -> Layers:
    return [il.IntervalAvgPool2d(*args, **kwargs)]


def _max_pool(
    site: Site,
    input: Signal,
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


def _resized(site: Site, *args: Any, **kwargs: Any) -> Layers:
    """To a size that divides the one before, by averages, or is a multiple of it, by copies."""
    if len(site.given) != 4:
        raise site.unsupported("it has an interval rule for batches of images only")
    (height, width), (rows, columns) = site.given[2:], site.shape[2:]
    if (rows, columns) == (height, width):
        return []
    if height % rows == 0 and width % columns == 0:
        return [il.IntervalAvgPool2d((height // rows, width // columns))]
    if rows % height == 0 and columns % width == 0:
        return [il.IntervalUpsample((rows // height, columns // width))]
    raise site.unsupported(f"{rows}x{columns} does not divide its input, {height}x{width}")


def _interpolate(
    site: Site,
    input: Signal,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Layers:
    grown = all(new >= old for new, old in zip(site.shape[2:], site.given[2:], strict=True))
    if mode != "nearest" or not grown:
        raise site.unsupported("only mode nearest has an interval rule, to a multiple of the size")
    return _resized(site)


def _mean(
    site: Site, input: Signal, dim: Any = (), keepdim: bool = False, dtype: Any = None
) -> Layers:
    dims = [dim] if isinstance(dim, int) else [*(dim or ())]
    over = {d % len(site.given) for d in dims}
    if dtype not in (None, site.trace.like.dtype):
        raise site.unsupported("it changes the type of numbers")
    if len(site.given) != 4 or not over or not over <= {2, 3}:
        raise site.unsupported("only means over height and width have an interval rule")
    rows, columns = (size if d in over else 1 for d, size in enumerate(site.given) if d > 1)
    pooled: Layers = [il.IntervalAvgPool2d((rows, columns))]
    if keepdim:
        return pooled
    flat = il.IntervalFlatten() if len(over) == 2 else il.IntervalReshape(site.shape[1:])
    return [*pooled, flat]


def _linear(site: Site, input: Signal, weight: Any, bias: Any = None) -> Layers:
    with torch.device("meta"):
        layer = il.IntervalLinear(weight.shape[1], weight.shape[0], bias is not None)
    return [_with_weights(site, layer, weight, bias)]


def _conv2d(
    site: Site,
    input: Signal,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Layers:
    out, inner, *kernel = weight.shape
    with torch.device("meta"):
        layer = il.IntervalConv2d(
            inner * groups,
            out,
            cast(tuple[int, int], tuple(kernel)),
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=bias is not None,
        )
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


def _scaled(site: Site, scale: Any = 1.0, shift: Any = 0.0) -> Layers:
    """scale * x + shift, where at most one of both is a tensor."""
    given = site.given
    if len(given) < 2:
        raise site.unsupported("what it reads has no channels")
    for constant in (scale, shift):
        if isinstance(constant, Constant):
            shape = (1,) * (len(given) - len(constant.shape)) + constant.shape
            others = [size for dim, size in enumerate(shape) if dim != 1]
            if site.shape != given or math.prod(others) != 1 or shape[1] not in (1, given[1]):
                raise site.unsupported(
                    f"a constant must be one number, or one a channel: {constant.shape} is"
                    f" neither for {given}"
                )
        elif not isinstance(constant, int | float):
            raise site.unsupported("it has no interval rule with such a constant")
    if scale == 1 and shift == 0:
        return []
    tensors = (c.tensor if isinstance(c, Constant) else float(c) for c in (scale, shift))
    return [site.scale(given, *tensors)]


def _add(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    return _scaled(site, shift=other if isinstance(input, Signal) else input)


def _sub(site: Site, input: Any, other: Any, *, alpha: float = 1) -> Layers:
    if alpha != 1:
        raise site.unsupported("alpha must be 1")
    if not isinstance(input, Signal):
        return [*_scaled(site, -1.0), *_scaled(site, shift=input)]
    return _scaled(site, shift=_fixed(site, other, operator.neg))


def _mul(site: Site, input: Any, other: Any) -> Layers:
    return _scaled(site, other if isinstance(input, Signal) else input)


def _div(site: Site, input: Any, other: Any, rounding_mode: str | None = None) -> Layers:
    if rounding_mode is not None or not isinstance(input, Signal):
        raise site.unsupported("only a division by a constant has an interval rule")
    return _scaled(site, _fixed(site, other, lambda value: 1 / value))


def _neg(site: Site, input: Signal) -> Layers:
    return _scaled(site, -1.0)


def _fixed(site: Site, constant: Any, function: Callable[[Any], Any]) -> Any:
    """`function` of a constant, which can then no longer be trained."""
    if not isinstance(constant, Constant):
        return function(constant)
    if isinstance(constant.tensor, nn.Parameter):
        raise site.unsupported("it divides by a parameter, or takes one away: multiply or add it")
    return Constant(constant.shape, function(constant.tensor.detach()))


def _of_twin(kind: type[IntervalLayer]) -> Callable[[Site, Any], Layers]:
    return lambda site, module: [twin(kind, module)]


def _padded(site: Site, module: Any) -> Layers:
    return _pad(site, Signal(site.given), module.padding, value=getattr(module, "value", 0))


MODULES: dict[type[nn.Module], Callable[[Site, Any], Layers]] = {
    nn.Conv2d: _of_twin(il.IntervalConv2d),
    nn.Linear: _of_twin(il.IntervalLinear),
    nn.BatchNorm1d: _of_twin(il.IntervalBatchNorm),
    nn.BatchNorm2d: _of_twin(il.IntervalBatchNorm),
    nn.ReLU: _of_twin(il.IntervalReLU),
    nn.LeakyReLU: _of_twin(il.IntervalLeakyReLU),
    nn.Sigmoid: _of_twin(il.IntervalSigmoid),
    nn.Tanh: _of_twin(il.IntervalTanh),
    nn.AvgPool2d: _of_twin(il.IntervalAvgPool2d),
    nn.MaxPool2d: _of_twin(il.IntervalMaxPool2d),
    nn.Dropout: _of_twin(il.IntervalDropout),
    nn.Identity: lambda site, module: [],
    nn.Flatten: _reshaped,
    nn.Unflatten: _reshaped,
    nn.ZeroPad2d: _padded,
    nn.ConstantPad2d: _padded,
    nn.AdaptiveAvgPool2d: _resized,
    nn.Upsample: lambda site, module: _interpolate(site, Signal(site.given), mode=module.mode),
}
"""By exact type: what derives from one may do anything, and is followed as it is executed."""

OPERATIONS: dict[str, Callable[..., Layers]] = {
    "relu": _relu,
    "leaky_relu": _leaky_relu,
    "sigmoid": _sigmoid,
    "tanh": _tanh,
    "dropout": _dropout,
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze"), _reshaped),
    **dict.fromkeys(("unsqueeze", "contiguous", "clone"), _reshaped),
    "permute": _permute,
    "transpose": _transpose,
    "getitem": _getitem,
    "pad": _pad,
    "avg_pool2d": _avg_pool,
    "max_pool2d": _max_pool,
    "adaptive_avg_pool2d": _resized,
    "interpolate": _interpolate,
    "mean": _mean,
    "linear": _linear,
    "conv2d": _conv2d,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "neg": _neg,
}
"""Functions of torch, torch.nn.functional and operator, and methods of tensors, by their name."""

ALIASES = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "negative": "neg"},
}
