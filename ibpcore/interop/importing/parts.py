"""Interval layers with the tensors of a file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any, cast

import torch

from ibpcore import nn as il
from ibpcore.errors import UserError
from ibpcore.interop.importing.state_dicts import Found, FoundLayer
from ibpcore.nn.grammar import BatchNorm, Convolution, LayerSequence, Linear
from ibpcore.nn.layers import IntervalLayer

AFFINE, RUNNING_STATISTICS = {"weight", "bias"}, {"running_mean", "running_var"}
KINDS = {Convolution: "convolutions", Linear: "linear layers", BatchNorm: "batch norms"}


def kind_of(layer: FoundLayer) -> type[Convolution | Linear | BatchNorm]:
    """What the layer is.

    Raises:
        UserError: it is nothing of these, or a tensor is missing.
    """
    names, weight = set(layer.tensors), layer.tensors.get("weight")
    if names & RUNNING_STATISTICS or (weight is not None and weight.dim() == 1):
        whole = RUNNING_STATISTICS if names <= RUNNING_STATISTICS else AFFINE | RUNNING_STATISTICS
        if missing := whole - names:
            raise UserError(f"{layer.name} lacks {' and '.join(sorted(missing))}")
        if names <= AFFINE | RUNNING_STATISTICS:
            return BatchNorm
    elif weight is not None and weight.dim() in (2, 4) and names <= AFFINE:
        return Linear if weight.dim() == 2 else Convolution
    raise UserError(f"{layer.name}, with {', '.join(sorted(names))}, is not a known layer")


def fitting(
    found: list[FoundLayer], name: str, variants: Iterable[LayerSequence]
) -> list[LayerSequence]:
    """The variants with as many layers of each kind as the file.

    Args:
        name: of the architecture, for messages.

    Raises:
        UserError: there are none.
    """
    kinds = [kind_of(layer) for layer in found]
    given = [kinds.count(kind) for kind in KINDS]
    counts = {variant: _counts(variant) for variant in variants}
    same = [variant for variant, wanted in counts.items() if wanted[:2] == given[:2]]
    if not same:
        wanted = {_listed(wanted[:2]) for wanted in counts.values()}
        has = f"has {wanted.pop()}" if len(wanted) == 1 else "has other numbers of layers"
        raise UserError(f"{name} {has}, the file has {_listed(given[:2])}")
    exact = [variant for variant in same if counts[variant][3] <= given[2] <= counts[variant][2]]
    if not exact:
        most, least = counts[same[0]][2:]
        limit = most if given[2] > most else least
        raise UserError(f"{name} has {limit} batch norms, the file has {given[2]}")
    return exact


def _counts(architecture: LayerSequence) -> list[int]:
    """Numbers of the convolutions, linear layers, batch norms, and of those not optional."""
    parts = [*architecture.all_parts()]
    norms = [part.optional for part in parts if isinstance(part, BatchNorm)]
    counts = [sum(isinstance(part, kind) for part in parts) for kind in (Convolution, Linear)]
    return [*counts, len(norms), norms.count(False)]


def _listed(counts: list[int]) -> str:
    return " and ".join(f"{n} {kind}" for n, kind in zip(counts, KINDS.values(), strict=False))


def owners(found: Found) -> dict[str, str | None]:
    """For batch norms, by name, the layer directly before them; None in front of all others.

    That is the one before it in its list, or in the file. Batch norms are left out where neither
    says it: where entries are sorted, or batch norms are stored behind each other.
    """
    before: dict[str, str | None] = {}
    lists: dict[str, dict[int, FoundLayer]] = {}
    last: FoundLayer | None = None
    known = not found.by_name
    for layer in found.layers:
        if layer.position:
            name, number = layer.position
            lists.setdefault(name, {})[number] = layer
        elif kind_of(layer) is BatchNorm:
            before[layer.name] = last.name if last else None
            known = known and (last is None or kind_of(last) is not BatchNorm)
        last = layer
    before = before if known else {}
    for layer in found.layers:
        if layer.position and kind_of(layer) is BatchNorm:
            name, number = layer.position
            earlier = [other for other in lists[name] if other < number]
            if earlier and kind_of(owner := lists[name][max(earlier)]) is not BatchNorm:
                before[layer.name] = owner.name
    return before


class FileWeights:
    """Layers with the weights of a file, those of each kind in the order of the file.

    Of optional batch norms the file has all, none, or those directly behind convolutions.

    Args:
        found: the layers of the file in order, without normalisation.
        architecture: one of those that `fitting` gives.
        owners: see there.

    Attributes:
        taken: each layer that was made, with its layer of the file.

    Raises:
        UserError: the file has others.
    """

    def __init__(
        self,
        found: list[FoundLayer],
        architecture: LayerSequence,
        owners: dict[str, str | None],
    ) -> None:
        self.taken: list[tuple[IntervalLayer, FoundLayer]] = []
        self._owners = owners
        self._left = {
            kind: deque(layer for layer in found if kind_of(layer) is kind) for kind in KINDS
        }
        norms = len(self._left[BatchNorm])
        convolutions = {layer.name for layer in self._left[Convolution]}
        *_, most, least = _counts(architecture)
        if norms == most:
            self._normed = {layer.name for layer in found}
        elif norms == least:
            self._normed = set()
        elif set(owners.values()) == convolutions:
            self._normed = convolutions
        else:
            raise UserError(
                "its batch norms follow neither all layers but the last, nor all convolutions:"
                " spell the architecture out"
            )

    def convolution(self, part: Convolution, channels: int) -> IntervalLayer:
        found = self._left[Convolution].popleft()
        width, share, *_ = found.tensors["weight"].shape
        groups = part.groups
        if groups is None:
            groups = channels // share if share > 0 and channels % share == 0 else 1
        with torch.device("meta"):
            layer = il.IntervalConv2d(
                *(channels, part.width or width, part.kernel, part.stride, part.padding),
                *(part.dilation, groups, self._bias(found, part.bias)),
            )
        return self._filled(layer, found)

    def linear(self, part: Linear, features: int) -> IntervalLayer:
        found = self._left[Linear].popleft()
        width, taken = found.tensors["weight"].shape
        if taken != features:
            raise UserError(
                f"{found.name}.weight takes {taken} features, but the layers before it compute"
                f" {features}: have the images another size, or are they cropped?"
            )
        with torch.device("meta"):
            bias = self._bias(found, part.bias)
            layer = il.IntervalLinear(features, part.width or width, bias)
        return self._filled(layer, found)

    def batch_norm(self, part: BatchNorm, channels: int) -> list[IntervalLayer]:
        last = self.taken[-1][1] if self.taken else None
        if part.optional and (last is None or last.name not in self._normed):
            return []
        if not self._left[BatchNorm]:
            raise UserError("the file has no batch norm left for it")
        found = self._left[BatchNorm].popleft()
        here = last.name if last else None
        if (owner := self._owners.get(found.name, here)) != here:
            raise UserError(f"{found.name} belongs behind {owner or 'nothing'} in the file")
        if bool((found.tensors["running_var"] < 0).any()):
            raise UserError(f"{found.name}.running_var holds variances below 0")
        with torch.device("meta"):
            layer = il.IntervalBatchNorm(channels, affine="weight" in found.tensors)
        return [self._filled(layer, found)]

    def _bias(self, found: FoundLayer, allowed: bool) -> bool:
        if "bias" in found.tensors and not allowed:
            raise UserError(f"{found.name} has a bias")
        return "bias" in found.tensors

    def _filled(self, layer: IntervalLayer, found: FoundLayer) -> IntervalLayer:
        state: dict[str, Any] = {"num_batches_tracked": torch.tensor(0)}
        for name, tensor in layer.state_dict().items():
            if name in found.tensors:
                state[name] = found.tensors[name].detach().clone()
                shape, expected = tuple(state[name].shape), tuple(tensor.shape)
                if shape != expected:
                    raise UserError(f"{found.name}.{name} is {shape}, but should be {expected}")
        layer.load_state_dict({name: state[name] for name in layer.state_dict()}, assign=True)
        self.taken.append((layer, found))
        return layer


def check_positions(
    layers: list[IntervalLayer], taken: list[tuple[IntervalLayer, FoundLayer]], apart: bool
) -> None:
    """Raises UserError unless the numbers of the layers in a list allow for those without weights.

    This detects a missing batch norm, or a network without ReLUs.

    Args:
        layers: of a network, or of a branch in it.
        taken: see `FileWeights`.
        apart: whether the layers of a list may be consecutive, because others are applied
            between them, as with `nn.ModuleList`.
    """
    found = {id(layer): found for layer, found in taken}
    lists: dict[str, list[tuple[int, int, str]]] = {}
    for place, layer in enumerate(layers):
        if isinstance(layer, il.IntervalResidual):
            for branch in (layer.branch, layer.shortcut):
                check_positions(cast(il.IntervalSequential, branch).layers, taken, apart)
            # A block may apply the ReLU behind it itself: numbers before and after do not compare.
            _check_lists(lists, apart)
            lists = {}
        elif id(layer) in found and (position := found[id(layer)].position):
            name, number = position
            lists.setdefault(name, []).append((place, number, found[id(layer)].name))
    _check_lists(lists, apart)


def _check_lists(lists: dict[str, list[tuple[int, int, str]]], apart: bool) -> None:
    """Checks the layers of each list, by (place in the network, number in the list, name)."""
    for (start, first, _), *others in lists.values():
        numbers = [number for _, number, _ in others]
        consecutive = numbers == [first + count for count in range(1, len(others) + 1)]
        reason = "there is another layer before it, or one is missing"
        if consecutive:
            reason = "if ReLUs are applied between its layers, spell the architecture out"
        for place, number, name in others:
            expected = first + place - start
            if number != expected and not (apart and consecutive):
                raise UserError(
                    f"{name} would be number {expected} if the architecture had the layers of the"
                    f" file: {reason}"
                )
