"""Conversion of PyTorch classifiers to networks of interval layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import fx, nn

from ibpcore.errors import UserError
from ibpcore.interop import tracing
from ibpcore.interop.rewriting import CONCATENATIONS, rewritten
from ibpcore.interop.tracing import Trace, TracedSignal, operation
from ibpcore.interop.translating.rearrangements import broadcast
from ibpcore.interop.translating.site import Layers, Site, Sizes
from ibpcore.interop.translating.table import translated
from ibpcore.interop.wrappers import eagerly, unwrapped
from ibpcore.nn import (
    IntervalConcat,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalSequential,
)
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Classifier, Network, input_shape, modes_kept

LOGIT_TOLERANCE = 1e-3
"""Largest difference between module and network, relative to the largest logit."""
REPEATED = 64
"""The largest number of operations that are computed again, once for each branch they feed."""
SUMS = ("add", "iadd", "add_", "sub", "isub", "sub_")
PRODUCTS = ("mul", "imul", "mul_", "multiply")


def convert(module: nn.Module, in_shape: Sequence[int]) -> Classifier:
    """Converts any supported classifier to a network that can be bounded, trained and saved.

    The network shares its parameters and buffers with `module`: training one trains the other,
    and moving the network to a device moves the module. The module is traced by `torch.fx` in
    evaluation mode. It may contain layers with an interval rule, as modules or functions, and
    sums, products and concatenations of branches.

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
    shape, module = input_shape(in_shape), unwrapped(module)
    if isinstance(module, Classifier):
        if module.in_shape != shape:
            raise UserError(f"the classifier takes images {module.in_shape}, not {shape}")
        return module
    training = module.training
    with modes_kept(module), eagerly(module):
        assembly = _Assembly(rewritten(tracing.traced(module, shape)))
        layouts = {weight: weight.stride() for weight in module.parameters()}
        network = Network(assembly.whole(), shape)
        _lay_out(layouts)  # views in the module may rely on it
        _check_same(network.eval(), module, shape)
        network.train(training)
    for (original, _), layers in assembly.twins.items():
        for layer in layers if not isinstance(original, IntervalLayer) else []:
            layer.training = original.training
    return network


def _lay_out(layouts: dict[nn.Parameter, tuple[int, ...]]) -> None:
    """Restores the strides of tensors."""
    for weight, stride in layouts.items():
        if weight.stride() != stride:
            weight.data = torch.empty_strided(
                weight.shape, stride, dtype=weight.dtype, device=weight.device
            ).copy_(weight.data)


def _check_same(network: Network, module: nn.Module, in_shape: Sequence[int]) -> None:
    """Raises UserError unless the network computes what the module computes.

    It uses another number of images than the trace, in case the module depends on that.
    """
    images = tracing.some_images(module, tracing.TRACED_SAMPLES + 2, in_shape)
    try:
        with torch.no_grad():
            found, logits = network(images), module(images.clone())
        near = LOGIT_TOLERANCE * float(logits.abs().nan_to_num().max())
        same = torch.allclose(found, logits, rtol=0, atol=near, equal_nan=True)
    except Exception:  # of the module, since the network accepts any batch
        same = False
    if not same:
        raise UserError(
            "the module computes something that its trace does not show: it overwrites a tensor"
            " that is used again, depends on the size of the batch, or is not deterministic"
        )


class _Assembly:
    """Splits a trace into chains and branches, and translates them to layers.

    Attributes:
        twins: the layers for each module and shape of its input, so that a module that is called
            twice shares them.
        used: nodes that have been translated.
        repeated: how often one was translated again, for another branch that it feeds.
        before: for each node its immediate dominator, see `_dominators`.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.twins: dict[tuple[nn.Module, Sizes], Layers] = {}
        self.used: set[fx.Node] = set()
        self.repeated = 0
        self.before = _dominators(trace)

    def whole(self) -> Layers:
        """All layers from images to logits."""
        if not self.trace.signals(self.trace.output):
            raise UserError("the logits do not depend on the images")
        (logits,) = self.trace.signals(self.trace.output)
        return self.between(logits, next(iter(self.trace.values)))

    def between(self, node: fx.Node, start: fx.Node) -> Layers:
        """The layers that map the output of `start` to the output of `node`."""
        chain: list[fx.Node] = []
        while node is not start:
            chain.append(node)
            node = cast(fx.Node, self.before[node])
        return [layer for node in reversed(chain) for layer in self.layers(node)]

    def layers(self, node: fx.Node) -> Layers:
        """The layers that map the output of the dominator of `node` to the output of `node`."""
        site = Site(self.trace, node)
        again = node in self.used
        self.used.add(node)
        self.repeated += again
        parts = self.trace.signals(node)
        if len(parts) > 1 or operation(node) in (*CONCATENATIONS, "stack"):
            layers = self.joined(site, parts, cast(fx.Node, self.before[node]))
        elif node.op == "call_module":
            layers = self.of_module(site)
        else:
            layers = translated(site)
        if again and not (self.repeated <= REPEATED and all(map(_is_repeatable, layers))):
            raise site.unsupported("it feeds branches that are not nested within each other")
        return layers

    def of_module(self, site: Site) -> Layers:
        """The layers for a module, each time the same ones."""
        key = self.trace.module(site.node), site.given
        if key not in self.twins:
            self.twins[key] = translated(site)
        return self.twins[key]

    def joined(self, site: Site, parts: list[fx.Node], start: fx.Node) -> Layers:
        """A sum, a product or a concatenation of the branches from `start` to each of `parts`."""
        name = operation(site.node)
        shapes = [self.trace.values[part].shape for part in parts]
        branches = [IntervalSequential(*self.between(part, start)) for part in parts]
        if name in (*CONCATENATIONS, "stack"):
            dim = site.concatenated(parts)
            if name == "stack":
                for branch in branches:
                    branch.append(IntervalReshape((*shapes[0][1:dim], 1, *shapes[0][dim:])))
            return [IntervalConcat(branches, dim)] if len(branches) > 1 else [*branches[0]]
        if name not in (*SUMS, *PRODUCTS) or len(parts) != 2 or site.node.kwargs:
            raise site.unsupported(
                "only sums and products may be of two parts that depend on the images"
            )
        if name in PRODUCTS and parts[0] is parts[1]:
            # A square is not negative, which the product of two branches does not show.
            return [IntervalProduct(*branches), IntervalReLU()]
        for branch, shape in zip(branches, shapes, strict=True):
            branch.extend(broadcast(site, shape))
        if "sub" in name:
            branches[1].append(site.scale(site.shape, -1.0))
        return [IntervalProduct(*branches) if name in PRODUCTS else IntervalResidual(*branches)]


def _is_repeatable(layer: nn.Module) -> bool:
    """Whether it computes the same each time, and tracks no statistics."""
    kinds = nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd
    return not any(isinstance(part, kinds) for part in layer.modules())


def _dominators(trace: Trace) -> dict[fx.Node, fx.Node | None]:
    """The immediate dominator of each node: the last node that all paths to it pass.

    The algorithm of Cooper et al. (2001).
    """
    order = {node: number for number, node in enumerate(trace.values)}
    before: dict[fx.Node, fx.Node | None] = {}
    for node, value in trace.values.items():
        if isinstance(value, TracedSignal):
            ends = trace.signals(node)
            while len(set(ends)) > 1:
                latest = max(ends, key=order.__getitem__)
                ends = [cast(fx.Node, before[end]) if end is latest else end for end in ends]
            before[node] = ends[0] if ends else None
    return before
