"""Checks of the layers of a network before it is trained; each message names one."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.soundness.network import sound_network
from ibpcore.errors import UserError
from ibpcore.nn import IntervalBatchNorm
from ibpcore.nn.layers import IntervalLayer, kind_of
from ibpcore.nn.networks import Classifier, modes_kept


def check_tensors(module: nn.Module) -> None:
    """Raises UserError unless conversion can read all parameters and buffers of `module`."""
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            continue  # conversion gives it its shape
        if tensor.is_meta:
            raise UserError(f"{name!r} is on the device meta, where it has no values")
        if tensor.is_inference():
            raise UserError(f"{name!r} was made in inference mode, and cannot be trained")
        if tensor.layout is not torch.strided:
            raise UserError(f"{name!r} is sparse: make it dense")


def check_layers(network: Classifier, module: nn.Module, claim: str) -> None:
    """Raises UserError unless every layer can be trained, and certified and saved afterwards.

    Args:
        network: converted from `module`, perhaps with more layers.
        module: gives the names of the layers in messages.
        claim: see `ibpcore.certification.certify.CertificationOptions`.
    """
    with modes_kept(network):
        network.eval()
        for layer in network.modules():
            if next(layer.children(), None) is not None:
                continue
            try:
                _check_layer(cast(IntervalLayer, layer), claim)
            except UserError as error:
                raise UserError(f"{_name(layer, module)}: {error}") from None
    if not any(weight.requires_grad for weight in network.parameters()):
        raise UserError("there is nothing to train: no parameter requires a gradient")


def _check_layer(layer: IntervalLayer, claim: str) -> None:
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if name != "num_batches_tracked":
            _check_tensor(name, tensor)
    for name, value in vars(layer).items():
        if isinstance(value, Tensor):
            raise UserError(f"its {name} is neither a parameter nor a buffer, and would be lost")
    if isinstance(layer, IntervalBatchNorm):
        if layer.running_mean is None:
            raise UserError("certificates need running statistics: let it track them")
        if not layer.eps >= torch.finfo(torch.float32).tiny:
            raise UserError(f"training needs an eps above 0 in float32, but it is {layer.eps:g}")
    layer.operators()
    # A single layer may have no float32 weights, which the claim float32 requires.
    if claim != UNCHECKED:
        sound_network(layer, "real")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if tensor.dtype != torch.float32:
        raise UserError(f"its {name} is {tensor.dtype}, but training computes in float32")
    if not tensor.is_leaf:
        raise UserError(
            f"its {name} is computed from other tensors, through which it has a gradient"
        )
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        raise UserError(f"its {name} is expanded, so that entries share memory: clone it")
    if not bool(tensor.isfinite().all()):
        raise UserError(f"its {name} holds values that are not finite")


def _name(layer: nn.Module, module: nn.Module) -> str:
    """A layer's place in `module`, to whose parts converted layers belong by their parameters."""
    for place, part in module.named_modules():
        if part._parameters is layer._parameters:
            return f"layer {place!r} ({type(part).__name__})"
    kind = kind_of(layer)
    own = {id(weight) for weight in layer.parameters()}
    used = [name for name, weight in module.named_parameters() if id(weight) in own]
    return f"a layer of type {kind}" + (f" with {used[0]!r}" if used else "")
