"""Extraction of layers from foreign checkpoints: the tensors of each layer, in order."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn.modules import activation, padding, pooling

from ibpcore.errors import UserError
from ibpcore.interop.importing.files import Checkpoint
from ibpcore.io.pickles import Unknown
from ibpcore.wording import counted

WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "network")
"""Keys under which checkpoints store the weights."""
DEEPEST = 10
"""Largest depth of nested wrappers and modules."""
WITHOUT_EFFECT = {"num_batches_tracked", "deepz_lambda"}
"""Last names of tensors without effect on a network in evaluation mode."""
EPS = 1e-5
"""Of batch norm in all these repositories; it is not part of a state dict."""
WEIGHTLESS = {*activation.__all__, *pooling.__all__, *padding.__all__}
"""Layers of `torch.nn` that change what a network computes, and not its state dict."""
GEOMETRY = {"stride": None, "padding": None, "dilation": None, "padding_mode": "zeros"}
"""Attributes of convolutions that a pickled module has, with the values of older versions."""
NUMBERED = re.compile(r"(?:.*\.)?/(\d+)\.(param|buffer)")
"""Names of parameters and buffers in auto_LiRPA's `BoundedModule`."""


class FoundLayer(NamedTuple):
    """A layer in the file.

    Attributes:
        name: as in the file.
        tensors: by their last names, such as `weight`.
    """

    name: str
    tensors: dict[str, Tensor]

    @property
    def position(self) -> tuple[str, int] | None:
        """The list of layers that holds it, and its number there; None if it is in no list."""
        place, _, number = self.name.rpartition(".")
        return (place, int(number)) if re.fullmatch("[0-9]{1,9}", number) else None


class Found(NamedTuple):
    """The layers of a file that have weights.

    Attributes:
        layers: in the order of the file.
        by_name: whether that is the order of their names, which says nothing about the network.
    """

    layers: list[FoundLayer]
    by_name: bool


def found_layers(checkpoint: Checkpoint, size: int) -> Found:
    """The layers of a checkpoint that have weights.

    Args:
        size: of the file, in bytes.

    Raises:
        UserError: there is no state dict, or its tensors are larger than the file.
    """
    state = _state_dict(checkpoint.objects)
    _check_size(state, size)
    if any(NUMBERED.fullmatch(name) for name in state):
        return Found(_of_numbers(state), by_name=False)
    places: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        place, _, last = name.rpartition(".")
        places.setdefault(place, {})[last] = tensor
    layers = [FoundLayer(name, tensors) for name, tensors in places.items()]
    # PyTorch puts a weight before its bias.
    told_apart = any({"weight", "bias"} <= tensors.keys() for tensors in places.values())
    by_name = checkpoint.by_name or (told_apart and [*state] == sorted(state))
    return Found(layers, by_name)


class Stated(NamedTuple):
    """What a pickled module says about itself, and a state dict does not.

    Attributes:
        geometry: stride, padding, dilation and padding mode of each convolution, in order.
        kinds: names of the classes of its layers without weights, of those in `torch.nn`.
    """

    geometry: list[tuple[Any, ...]]
    kinds: set[str]


def stated(content: Any) -> Stated | None:
    """What the module in a file says; None if it holds none.

    Args:
        content: accepted by `found_layers`.
    """
    content = _unwrapped(content)
    if not isinstance(content, Unknown):
        return None
    left, seen, found = [content], set(), Stated([], set())
    while left:
        module = left.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        weight = module.state["_parameters"].get("weight")
        if isinstance(weight, Tensor) and weight.dim() == 4:
            found.geometry.append(tuple(module.state.get(k, v) for k, v in GEOMETRY.items()))
        if module.kind in WEIGHTLESS:
            # Adaptive pooling to one pixel is pooling of the whole image.
            found.kinds.add(module.kind.removeprefix("Adaptive"))
        left += reversed([m for m in module.state["_modules"].values() if m is not None])
    return found


def _unwrapped(content: Any) -> Any:
    for _ in range(DEEPEST):
        inner = [name for name in WRAPPERS if isinstance(content, dict) and name in content]
        if not inner:
            break
        content = content[inner[0]]
        if isinstance(content, list):  # of models, of which later ones take what others leave
            if len(content) != 1:
                raise UserError(f"it holds {len(content)} networks, not a single one")
            content = content[0]
    return content


def _state_dict(content: Any) -> dict[str, Tensor]:
    """The state dict in a checkpoint, or that of the module in it."""
    content = _unwrapped(content)
    if isinstance(content, Unknown):
        content = _module_state(content, "", set())
    if not isinstance(content, dict) or not content:
        raise UserError("it holds no state dict")
    state = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"its entry {name!s} is not a tensor of a state dict")
        if name.rpartition(".")[2] not in WITHOUT_EFFECT:
            state[name] = value
    return state


def _module_state(module: Unknown, prefix: str, seen: set[int]) -> dict[str, Any]:
    """`module.state_dict()` of a pickled module, in which shared modules occur only once."""
    if id(module) in seen:
        return {}
    seen.add(id(module))
    held = module.state if isinstance(module.state, dict) else {}
    if held.get("eps", EPS) != EPS:
        raise UserError(f"{prefix}eps is {held['eps']}, but batch norm must have {EPS}")
    parts = []
    for kind in ("_parameters", "_buffers", "_modules"):
        part = held.get(kind)
        if not isinstance(part, dict) or prefix.count(".") > DEEPEST:
            raise UserError("it holds neither a state dict nor a module that can be read")
        parts.append({f"{prefix}{name}": v for name, v in part.items() if v is not None})
    state, modules = parts[0] | parts[1], parts[2]
    for name, inner in modules.items():
        if not isinstance(inner, Unknown):
            raise UserError(f"its entry {name} is not a module")
        state |= _module_state(inner, f"{name}.", seen)
    return state


def _check_size(state: dict[str, Tensor], size: int) -> None:
    """Raises UserError for huge tensors, which a small file may hold as expanded views."""
    if sum(tensor.numel() * tensor.element_size() for tensor in state.values()) > size:
        raise UserError("its tensors are larger than the file itself")


def _of_numbers(state: dict[str, Tensor]) -> list[FoundLayer]:
    """The layers from auto_LiRPA's numbers, each with a weight, a bias and batch norm."""
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
                f"layer /{number} has {counted(len(vectors), 'more parameter')} and"
                f" {counted(len(buffers), 'buffer')}, where a bias and batch norm have 3 and 2"
            )
        bias = {"bias": vectors.pop(0)} if len(vectors) % 2 else {}
        layers.append(FoundLayer(f"/{number}", {"weight": weight, **bias}))
        if buffers:
            names = ("weight", "bias", "running_mean", "running_var")
            norm = dict(zip(names, [*vectors, *buffers], strict=True))
            layers.append(FoundLayer(f"the batch norm of /{number}", norm))
    return layers
