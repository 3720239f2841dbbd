"""All parameters of a model in one tensor: an optimiser step is then a few operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ALIGNMENT = 16
"""Each parameter starts at a multiple of so many numbers: at one of the widest vector loads."""


def flattened(model: nn.Module) -> list[nn.Parameter]:
    """Moves the trained parameters and their gradients into one tensor for each type and device.

    The model's parameters remain, as views with their former values and strides. Backward passes
    add to the gradients of the tensors returned, which an optimiser updates in their place.

    Returns:
        1-d parameters, with gradient 0.
    """
    return [_joined(group) for group in _groups(model)]


def separate(model: nn.Module) -> None:
    """Gives each trained parameter a tensor of its own again, without gradient.

    A part of the model, or a pickle of it, would otherwise hold all parameters, once for each.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data, parameter.grad = parameter.detach().clone(), None


def _groups(model: nn.Module) -> list[list[nn.Parameter]]:
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault((parameter.dtype, parameter.device), []).append(parameter)
    return [*groups.values()]


def _joined(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    whole = nn.Parameter(_zeros(parameters))
    whole.grad = torch.zeros_like(whole)
    views, grads = (_parts(x, parameters) for x in (whole.detach(), whole.grad))
    for parameter, view, grad in zip(parameters, views, grads, strict=True):
        view.copy_(parameter.detach())
        parameter.data, parameter.grad = view, grad
    return whole


def _zeros(parameters: Sequence[Tensor]) -> Tensor:
    """(n,) with places for all numbers of `parameters`."""
    return parameters[0].detach().new_zeros(sum(map(_places, parameters)))


def _places(parameter: Tensor) -> int:
    return -(-parameter.numel() // ALIGNMENT) * ALIGNMENT


def _parts(whole: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Views of `whole`, (n,), with the shapes and strides of `parameters`."""
    strides = [torch.empty_like(parameter, device="meta").stride() for parameter in parameters]
    return [
        part.as_strided(parameter.shape, stride, part.storage_offset())
        for part, parameter, stride in zip(
            whole.split([*map(_places, parameters)]), parameters, strides, strict=True
        )
    ]


def joined_state(saved: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The state of an optimiser of `flattened(model)`, from that of one of `model.parameters()`.

    States of runs that older versions began have one entry a parameter. Malformed ones raise an
    error of any type.
    """
    (group,) = saved["param_groups"]
    index = {id(parameter): i for i, parameter in enumerate(model.parameters())}
    groups = _groups(model)
    states = {}
    for number, parameters in enumerate(groups):
        each = [saved["state"][index[id(parameter)]] for parameter in parameters]
        states[number] = {"step": each[0]["step"]}
        for name in each[0].keys() - {"step"}:
            whole = _zeros(parameters)
            for part, state in zip(_parts(whole, parameters), each, strict=True):
                part.copy_(state[name])
            states[number][name] = whole
    return {"state": states, "param_groups": [{**group, "params": [*range(len(groups))]}]}


def clip_gradients(parameters: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales the gradients so that the norm of all together is at most `limit`; returns the norm.

    `torch.nn.utils.clip_grad_norm_` does the same with three times as many operators.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = [torch.linalg.vector_norm(grad) for grad in grads]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    excess = (norm / limit).clamp_min_(1)
    for grad in grads:
        grad.div_(excess)
    return norm


def check_joined(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raises RuntimeError unless `optimizer` updates the trained parameters of `model`.

    A copy of a model, or one moved to another device, has parameters of its own.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    updated = {p.untyped_storage().data_ptr() for p in parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.untyped_storage().data_ptr() not in updated:
            raise RuntimeError(f"the optimiser does not update {name}: the model was copied")
