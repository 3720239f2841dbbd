"""What is translated how: modules by type, operations by name."""

from __future__ import annotations

from torch import nn

from ibpcore import nn as il
from ibpcore.interop.tracing import TRACED_SAMPLES, operation
from ibpcore.interop.translating import activations, affine, constants, pooling, rearrangements
from ibpcore.interop.translating.site import Layers, Site, twin
from ibpcore.nn.layers import TWINS, IntervalLayer

KINDS = (activations, affine, constants, pooling, rearrangements)
MODULES = {kind: function for part in KINDS for kind, function in part.MODULES.items()}
"""Modules that are not translated by `ibpcore.nn.layers.TWINS`. By exact type, as there: a subclass
may compute anything, and is traced into."""
OPERATIONS = {name: function for part in KINDS for name, function in part.OPERATIONS.items()}
"""Functions of torch, torch.nn.functional and operator, and methods of tensors, by name."""
ALIASES = {
    **{"iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "truediv": "div"},
    **{"subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div"},
    **{"negative": "neg", "clip": "clamp", "absolute": "abs"},
}


def translated(site: Site) -> Layers:
    """The interval layers that are equivalent to a node, in order.

    Raises:
        UserError: there are none.
    """
    module = site.node.op == "call_module"
    found = _of_module(site, site.trace.module(site.node)) if module else _of_operation(site)
    if site.shape[:1] != (TRACED_SAMPLES,):
        raise site.unsupported("it mixes the images of a batch")
    if site.moves:
        raise site.unsupported("it changes the type or the device of the numbers")
    return found


def _of_module(site: Site, module: nn.Module) -> Layers:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise site.unsupported("its bounds would ignore its hooks, or its own forward")
    if isinstance(module, il.IntervalSequential):
        return module.layers
    if isinstance(module, IntervalLayer):
        return [module]
    if type(module) in MODULES:
        return MODULES[type(module)](site, module)
    if type(module) in TWINS:
        return [twin(TWINS[type(module)], module)]
    raise site.unsupported()


def _of_operation(site: Site) -> Layers:
    name = operation(site.node)
    known = OPERATIONS.get(ALIASES.get(name, name.removesuffix("_")))
    if known is None:
        raise site.unsupported()
    args, kwargs = site.arguments()
    try:
        return known(site, *args, **kwargs)
    except (TypeError, ZeroDivisionError):
        raise site.unsupported("it is called in an unusual way") from None
