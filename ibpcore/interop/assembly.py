"""From a trace to nested layers: chains of them, and sums, products and concatenations."""

from __future__ import annotations

from typing import cast

from torch import fx, nn

from ibpcore.errors import UserError
from ibpcore.interop.rewriting import CONCATENATIONS
from ibpcore.interop.tracing import Trace, TracedSignal, operation
from ibpcore.interop.translating.constants import scaled
from ibpcore.interop.translating.rearrangements import broadcast
from ibpcore.interop.translating.site import Layers, Site, Sizes
from ibpcore.interop.translating.table import translated
from ibpcore.nn import (
    IntervalConcat,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalSequential,
)

REPEATED = 64
"""The largest number of operations that are computed again, once for each branch they feed."""
SUMS = ("add", "iadd", "add_", "sub", "isub", "sub_")
PRODUCTS = ("mul", "imul", "mul_", "multiply")


class Assembly:
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
            branches[1].extend(scaled(site, -1.0))
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
