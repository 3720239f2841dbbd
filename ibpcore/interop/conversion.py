"""Conversion of PyTorch classifiers to networks of interval layers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from ibpcore.errors import UserError
from ibpcore.interop import tracing
from ibpcore.interop.assembly import Assembly
from ibpcore.interop.rewriting import rewritten
from ibpcore.interop.tracing import Trace
from ibpcore.interop.wrappers import eagerly, unwrapped
from ibpcore.nn.layers import IntervalLayer, check_global_hooks
from ibpcore.nn.networks import Classifier, Network, Source, check_in_shape, modes_kept

LOGIT_TOLERANCE = 1e-4
"""Largest difference between module and network, relative to the largest logit."""
REPETITIONS = 5
"""Runs of the module that are compared: random numbers of Python may be close to each other."""
REPETITION_TOLERANCE = 1e-6
"""Largest difference between these runs: a GPU may sum in another order."""
HIDDEN = (
    "the module computes something that its trace does not show: it overwrites a tensor that is"
    " used again, depends on the size of the batch, or is not deterministic"
)
Plain: TypeAlias = dict[tuple[str, ...], Tensor]
"""Tensors by the path of their module, the name of the attribute, and the place within it."""
NESTED = 5
"""The depth to which objects within attributes of a module are searched for tensors."""


def convert(module: nn.Module, in_shape: Sequence[int]) -> Classifier:
    """Converts any supported classifier to a network that can be bounded, trained and saved.

    The network follows `module`: it uses the parameters and buffers that the module has at any
    time, so that training or loading one trains or loads the other, and moving the network to a
    device moves the module. Tensors that are no buffers are followed too, or a change of them is
    an error in the next pass, as is a layer or setting that is replaced, or a hook that is added.
    The module is traced by `torch.fx` in evaluation mode. It may contain layers with an interval
    rule, as modules or functions, and sums, products and concatenations of branches.

    Args:
        module: maps images (B, *in_shape) in pixel units to logits (B, classes). Wrappers such as
            `nn.DataParallel` and that of `torch.compile` are taken off.
        in_shape: shape of an input without the batch, such as (channels, height, width) of an
            image, or (features,).

    Returns:
        the network; `module` itself if it is a `Classifier` already.

    Raises:
        UserError: a part has no interval rule (the message gives its place and the reason), or
            the module cannot be traced, or does not map such images to logits.
    """
    shape = check_in_shape(in_shape)
    if not isinstance(module, nn.Module):
        raise UserError(f"convert takes an nn.Module, not {type(module).__name__}")
    if isinstance(module, torch.jit.ScriptModule):
        raise UserError("TorchScript cannot be traced: convert the module that it was made from")
    module = unwrapped(module)
    if isinstance(module, Classifier):
        if module.in_shape != shape:
            raise UserError(f"the classifier takes images {module.in_shape}, not {shape}")
        return module
    check_global_hooks()
    training = module.training
    plain = {name: tensor.clone() for name, tensor in _unregistered(module).items()}
    with modes_kept(module), eagerly(module):
        assembly = Assembly(rewritten(tracing.traced(module, shape)))
        trace, layers = assembly.trace, assembly.whole()
        images = tracing.some_images(module, tracing.TRACED_SAMPLES + 2, shape)
        logits = _logits(module, images)
        # A tensor that the forward itself assigns, such as its last features, is no constant.
        frozen = _unchanged(module, plain)
        if not trace.has_unknown_constants():
            followed, now = trace.attributes(), _unregistered(module)
            frozen = {key: value for key, value in frozen.items() if now[key] not in followed}
        holds = partial(_holds, module, frozen, trace, _structure(module))
        source = Source(module, tuple(trace.ties), holds)
        network = Network(layers, shape, source).eval()
        with torch.no_grad():
            if not _near(network(images), logits, LOGIT_TOLERANCE):
                raise UserError(HIDDEN)
        network.train(training)
    for (original, _), layers in assembly.twins.items():
        for layer in layers if not isinstance(original, IntervalLayer) else []:
            layer.training = original.training
    return network


def _unregistered(module: nn.Module) -> Plain:
    """The tensors and arrays that modules do not register: of attributes, objects and classes."""
    registered = {*module.parameters(), *module.buffers()}
    found: Plain = {}
    for path, part in module.named_modules():
        kinds = [vars(kind).items() for kind in type(part).__mro__]
        names = {name for items in kinds for name, v in items if isinstance(v, Tensor)}
        of_class = {name: getattr(part, name) for name in names}
        _collect(of_class | _attributes(part), (path,), found)
    return {place: tensor for place, tensor in found.items() if tensor not in registered}


def _attributes(part: nn.Module) -> dict[str, Any]:
    # Names with an underscore: tables of nn.Module, with parameters and buffers.
    return {name: value for name, value in vars(part).items() if not name.startswith("_")}


def _collect(value: Any, place: tuple[str, ...], found: Plain) -> None:
    """Enters the tensors and arrays within `value`, which is at `place`, to `found`."""
    inner: Any = {}
    if isinstance(value, Tensor):
        found[place] = value
    elif isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            found[place] = torch.as_tensor(np.ascontiguousarray(value))
    elif isinstance(value, nn.Module):  # one that is not registered
        inner = {**_attributes(value), **value._parameters, **value._buffers, **value._modules}
    elif isinstance(value, list | tuple):
        inner = dict(enumerate(value))
    elif isinstance(value, dict):
        inner = value
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        inner = vars(value)
    for key in inner if len(place) <= NESTED else ():
        _collect(inner[key], (*place, str(key)), found)


def _unchanged(module: nn.Module, before: Plain) -> Plain:
    """Those of the copies `before` whose tensors the module still holds with equal numbers."""
    now = _unregistered(module)
    return {
        name: tensor
        for name, tensor in before.items()
        if name in now and torch.equal(now[name].to(tensor), tensor)
    }


def _structure(module: nn.Module) -> dict[str, Any]:
    """What the parts of a module compute with their tensors: types, hooks and settings."""
    return {
        path: (
            part,
            type(part),
            [*part._forward_pre_hooks.values(), *part._forward_hooks.values()],
            vars(part).get("forward"),
            _settings(part),
        )
        for path, part in module.named_modules()
    }


def _settings(part: nn.Module) -> dict[str, Any]:
    """The settings of a layer of PyTorch, such as a slope; other modules may count their calls."""
    if not type(part).__module__.startswith(nn.modules.__name__):
        return {}
    return {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, int | float | str | tuple) and name != "training"
    }


def _holds(module: nn.Module, before: Plain, trace: Trace, structure: dict[str, Any]) -> bool:
    """Whether the module has its parts, and what layers do not follow still has equal numbers."""
    if _structure(module) != structure or not trace.shares():
        return False
    same = all(_equal(trace.now(node), value) for node, value in trace.fixed.items())
    return same and (not before or len(_unchanged(module, before)) == len(before))


def _equal(now: Any, before: Any) -> bool:
    if isinstance(before, Tensor):
        return torch.equal(now.to(before), before)
    return bool(now == before)


@torch.no_grad()
def _logits(module: nn.Module, images: Tensor) -> Tensor:
    """The logits of the module for `images`, of another number than those of the trace.

    Raises:
        UserError: it does not take that number of images, or is not deterministic.
    """
    try:
        logits, *others = [module(images.clone()) for _ in range(REPETITIONS)]
    except Exception:
        raise UserError(HIDDEN) from None
    # Noise may be smaller than rounding errors.
    if not all(_near(again, logits, REPETITION_TOLERANCE) for again in others):
        raise UserError(HIDDEN)
    return cast(Tensor, logits)


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether logits differ at most by `tolerance`, relative to the largest one."""
    distance = tolerance * float(b.abs().nan_to_num().max())
    same = a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=distance, equal_nan=True)
    return bool(same)
