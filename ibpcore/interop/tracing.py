"""The operations of a PyTorch module in their order, and what each of them gives."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ibpcore.errors import UserError, first_line
from ibpcore.nn.layers import IntervalLayer

SAMPLES = 3
"""Of the batch that is sent through the module."""
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
"""Assignments such as `+=`, of which `torch.fx` by itself makes operations that change nothing."""
QUERIES = ("size", "dim", "numel", "shape", "ndim", "device", "dtype")
"""What may be asked of a tensor without a look at its values."""
OWNERS = (torch, torch.nn.functional, operator)
"""Of the functions that are known by their names; somebody else's may do anything."""


@dataclass(frozen=True)
class Signal:
    """A tensor, or anything else, that depends on the images.

    Attributes:
        shape: with the batch first; () for what is no tensor.
    """

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """A module taken apart.

    Attributes:
        root: whose attribute `model` is the module.
        values: of each node in order, a `Signal` or what does not depend on the images.
        output: the node that returns the logits.
        like: a tensor of the type and on the device of the module's.
    """

    root: nn.Module
    values: dict[fx.Node, Any]
    output: fx.Node
    like: Tensor

    def signals(self, node: fx.Node) -> list[fx.Node]:
        """The signals that a node reads, each as often as it is read."""
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), found.append)
        return [other for other in found if isinstance(self.values[other], Signal)]

    def module(self, node: fx.Node) -> nn.Module:
        """What a node calls, or holds the attribute that it gets."""
        return self.root.get_submodule(cast(str, node.target))


def traced(module: nn.Module, in_shape: Sequence[int]) -> Trace:
    """Follows a batch of images through `module`, as it is in evaluation, by `torch.fx`.

    What an operation overwrites, later ones read as it was left. The module is in evaluation
    mode when this returns.

    Raises:
        UserError: it cannot be followed, does not take such images, or gives no tensor.
    """
    root = _Called(module).eval()
    tracer = _Tracer(set(root.modules()))
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise UserError(
            f"the forward of {place(tracer.failed)!r} cannot be traced, which must not depend on"
            f" values or sizes of its input: {first_line(error)}"
        ) from None
    runner = _Runner(root, graph)
    try:
        # In inference mode nothing tells what an operation overwrites.
        with torch.inference_mode(False), torch.no_grad():
            logits = runner.run(some_images(module, SAMPLES, in_shape))
    except Exception as error:
        raise UserError(
            f"images of shape {tuple(in_shape)} do not fit the module at"
            f" {where(cast(fx.Node, runner.at))}: {first_line(error)}"
        ) from None
    if not isinstance(logits, Tensor):
        raise UserError(f"the module must give a tensor of logits, not a {type(logits).__name__}")
    _read_what_was_overwritten(runner)
    return Trace(root, runner.values, next(reversed(graph.nodes)), logits.new_empty(0))


def some_images(module: nn.Module, samples: int, in_shape: Sequence[int]) -> Tensor:
    """Images in [0, 1) for `module`, all different; no random number is drawn."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.zeros(())
    shape = torch.Size((samples, *in_shape))
    # Multiples of an irrational number, without what is before the point.
    return (torch.arange(shape.numel()).double() * 2**0.5 % 1).view(shape).to(like)


def place(path: str) -> str:
    """A path from the root as the user of the module knows it."""
    return path.removeprefix("model.") or "model"


def where(node: fx.Node) -> str:
    """'layer1.0.norm' (GroupNorm); of a function 'softmax' in 'layer1.0'."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    path, kind = stack[-1] if stack else ("", nn.Module)
    if node.op == "call_module":
        return f"{place(path)!r} ({kind.__name__})"
    return f"{operation(node)!r} in {place(path)!r}"


def operation(node: fx.Node) -> str:
    """The name of a function of torch, a method, or an attribute; others with their module."""
    target = node.target
    if target is getattr:
        return str(node.args[1])
    name = getattr(target, "__name__", str(target))
    if node.op == "call_function" and not any(getattr(o, name, None) is target for o in OWNERS):
        return f"{getattr(target, '__module__', None)}.{name}"
    return name


class _Called(nn.Module):
    """Calls the module as its user does: with images and nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """Records what it is assigned in place as such."""


def _assigned(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda proxy, other: proxy.tracer.create_proxy(
        "call_function", function, (proxy, other), {}
    )


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _assigned(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Takes interval layers as a whole, and remembers whose forward failed."""

    def __init__(self, known: set[nn.Module]) -> None:
        super().__init__()
        self.known, self.failed = known, ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, IntervalLayer) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if m not in self.known:
            return forward(*args, **kwargs)  # it was made on the way, and has no place
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


class _Runner(fx.Interpreter):
    """Runs the graph, and keeps what each node gave; of a signal the shape.

    Attributes:
        tensors: what nodes gave, all of them alive, so that none has the memory of another.
        overwritten: each node that changed what another one gave, and that one.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self.tensors: dict[fx.Node, Tensor] = {}
        self.overwritten: list[tuple[fx.Node, fx.Node]] = []
        self.at: fx.Node | None = None

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        read = [other for other in n.all_input_nodes if other in self.tensors]
        versions = [self.tensors[other]._version for other in read]
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.tensors[n] = value
        self.overwritten += [
            (n, other)
            for other, version in zip(read, versions, strict=True)
            if self.tensors[other]._version != version
        ]
        reads = any(isinstance(self.values[other], Signal) for other in n.all_input_nodes)
        signal = n.op in ("placeholder", "output") or (reads and operation(n) not in QUERIES)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        self.values[n] = Signal(shape) if signal else value
        return value


def _read_what_was_overwritten(runner: _Runner) -> None:
    """Later readers of what a node overwrote read that node.

    Raises:
        UserError: they read the same memory in another form, as a view.
    """
    order = {node: number for number, node in enumerate(runner.values)}
    for node, before in runner.overwritten:
        for other, tensor in runner.tensors.items():
            later = order[other] >= order[node]
            if later or not _share_memory(tensor, runner.tensors[before]):
                continue
            for user in [user for user in other.users if order[user] > order[node]]:
                if node in runner.tensors and _are_same(tensor, runner.tensors[node]):
                    user.replace_input_with(other, node)
                elif isinstance(runner.values[user], Signal):
                    raise UserError(
                        f"unsupported operation {where(node)}: it changes in place what"
                        f" {where(user)} reads in another form"
                    )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _are_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
