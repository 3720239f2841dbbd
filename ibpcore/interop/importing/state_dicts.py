"""Foreign checkpoints as layers: the tensors of each, in order, whatever wraps and names them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.modules import activation

from ibpcore.errors import UserError
from ibpcore.io.pickles import Unknown

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
"""What holds the weights, beside the optimiser and other things."""
DEEPEST = 10
"""Of wrappers and modules within each other."""
WITHOUT_EFFECT = {"num_batches_tracked", "deepz_lambda"}
"""Last names of what does not change what a network in evaluation computes."""
EPS = 1e-5
"""Of batch norm in all these repositories; state dicts do not tell it."""
OTHER_ACTIVATIONS = {*activation.__all__} - {"ReLU"}
GEOMETRY = ("stride", "padding", "dilation")
"""What the convolutions of a whole module tell, and those of a state dict do not."""
NUMBERED = re.compile(r"(?:.*\.)?/(\d+)\.(param|buffer)")
"""How auto_LiRPA's `BoundedModule` names parameters and buffers."""


class FoundLayer(NamedTuple):
    """A layer of the file.

    Attributes:
        name: its own, as in the file.
        number: its place among the layers of an `nn.Sequential`, those without weights
            counted; None where the file does not tell.
        tensors: by their last names, such as `weight`.
    """

    name: str
    number: int | None
    tensors: dict[str, Tensor]


def found_layers(content: Any, size: int) -> list[FoundLayer]:
    """The layers that have weights, in order.

    Args:
        content: what `read_foreign` gave.
        size: bytes of the file.

    Raises:
        UserError: there is no state dict, or it holds more than the file can.
    """
    state = _state_dict(content)
    _check_size(state, size)
    if any(NUMBERED.fullmatch(name) for name in state):
        return _of_numbers(state)
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        place, _, last = name.rpartition(".")
        places.setdefault(place, {})[last] = tensor
    layers = [FoundLayer(name, _trailing_number(name), tensors) for name, tensors in places.items()]
    if len({re.sub(r"\d+$", "", name) for name in places}) > 1:
        # Names of several kinds, or several sequences: only the file knows their order.
        return [layer._replace(number=None) for layer in layers]
    return sorted(layers, key=lambda layer: -1 if layer.number is None else layer.number)


def _trailing_number(name: str) -> int | None:
    match = re.search(r"\d{1,9}$", name)
    return int(match.group()) if match else None


def stated_geometry(content: Any) -> list[Any]:
    """Stride, padding and dilation of each convolution in order; none but of a whole module.

    Args:
        content: what `read_foreign` gave, in which `found_layers` has found layers.
    """
    left, found, seen = [_unwrapped(content)], [], set()
    while left:
        module = left.pop()
        if isinstance(module, Unknown) and id(module) not in seen:
            seen.add(id(module))  # and there are dictionaries in it, as found_layers saw
            weight = module.state["_parameters"].get("weight")
            if isinstance(weight, Tensor) and weight.dim() == 4:
                found.append(tuple(module.state.get(name) for name in GEOMETRY))
            left += reversed(module.state["_modules"].values())
    return found


def _unwrapped(content: Any) -> Any:
    for _ in range(DEEPEST):
        inner = [name for name in WRAPPERS if isinstance(content, dict) and name in content]
        if not inner:
            break
        content = content[inner[0]]
        if isinstance(content, list) and len(content) == 1:  # of one model
            content = content[0]
    return content


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict within, or that of the module within."""
    content = _unwrapped(content)
    if isinstance(content, Unknown):
        content = _module_state(content, "", set())
    if not isinstance(content, dict) or not content:
        raise UserError("it holds no state dict")
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"its entry {name!s} is no tensor of a state dict")
        if name.rpartition(".")[2] not in WITHOUT_EFFECT:
            state[name] = value
    return state


def _module_state(module: Unknown, prefix: str, seen: set[int]) -> dict[str, Any]:
    """`module.state_dict()` of a whole module that was pickled, with what is shared only once."""
    if id(module) in seen:
        return {}
    seen.add(id(module))
    if type(module).__name__ in OTHER_ACTIVATIONS:
        raise UserError(f"it has a {type(module).__name__}, where networks here have ReLUs")
    held = module.state if isinstance(module.state, dict) else {}
    if held.get("eps", EPS) != EPS:
        raise UserError(f"{prefix}eps is {held['eps']}, where batch norm here has {EPS}")
    parts = []
    for kind in ("_parameters", "_buffers", "_modules"):
        part = held.get(kind)
        if not isinstance(part, dict) or prefix.count(".") > DEEPEST:
            raise UserError("it holds no state dict, and no module that is known here")
        parts.append(
            {f"{prefix}{name}": value for name, value in part.items() if value is not None}
        )
    parameters, buffers, modules = parts
    state = parameters | buffers
    for name, inner in modules.items():
        if not isinstance(inner, Unknown):
            raise UserError(f"its module {name} is no module")
        state |= _module_state(inner, f"{name}.", seen)
    return state


def _check_size(state: dict[str, Tensor], size: int) -> None:
    """A view may have any shape, with few numbers behind it."""
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > size:
        raise UserError("its tensors are larger than the file itself")


def _of_numbers(state: dict[str, Tensor]) -> list[FoundLayer]:
    """The layers of auto_LiRPA's numbers: of each the weight, the bias, and batch norm."""
    tensors: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state.items():
        match = NUMBERED.fullmatch(name)
        if match is None:
            raise UserError(f"its entry {name} is superfluous among numbered ones")
        tensors[int(match.group(1))] = (match.group(2), tensor)
    layers: list[FoundLayer] = []
    rows = [(number, *tensors[number]) for number in sorted(tensors)]
    starts = [i for i, (_, _, tensor) in enumerate(rows) if tensor.dim() > 1]
    for start, stop in zip(starts, [*starts[1:], len(rows)], strict=True):
        number, _, weight = rows[start]
        vectors = [tensor for _, kind, tensor in rows[start + 1 : stop] if kind == "param"]
        buffers = [tensor for _, kind, tensor in rows[start + 1 : stop] if kind == "buffer"]
        if (len(vectors), len(buffers)) not in ((0, 0), (1, 0), (2, 2), (3, 2)):
            raise UserError(
                f"layer /{number} has {len(vectors)} more parameters and {len(buffers)} buffers,"
                " where a bias and batch norm have 3 and 2"
            )
        bias = {"bias": vectors.pop(0)} if len(vectors) % 2 else {}
        layers.append(FoundLayer(f"/{number}", None, {"weight": weight, **bias}))
        if buffers:
            names = ("weight", "bias", "running_mean", "running_var")
            norm = dict(zip(names, [*vectors, *buffers], strict=True))
            layers.append(FoundLayer(f"the batch norm of /{number}", None, norm))
    return layers
