"""Traces of PyTorch modules: their operations in order, with the shape or value of each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ibpcore.errors import UserError, first_line
from ibpcore.interop.wrappers import is_compiled, unwrapped
from ibpcore.nn.layers import IntervalLayer

TRACED_SAMPLES = 3
"""Size of the batch that is sent through the module."""
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
"""Assignments such as `+=`, which `torch.fx` would record as operations that are not in place."""
QUERIES = ("size", "dim", "numel", "shape", "ndim", "device", "dtype")
"""Properties of a tensor that do not depend on its values."""
OWNERS = (torch, torch.nn.functional, operator)
"""Modules whose functions are known by name; others with the same name may compute anything."""


@dataclass(frozen=True)
class TracedSignal:
    """A value that depends on the images.

    Attributes:
        shape: batch included; () if it is not a tensor.
        dtype, device: those of the tensor; None if it is none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    device: torch.device | None = None


@dataclass(frozen=True)
class Trace:
    """The nodes of a module with their values for a batch of images.

    Attributes:
        root: a module whose attribute `model` is the traced module.
        values: for each node in order a `TracedSignal`, or a value that is independent of the
            images.
        output: the node that returns the logits.
        like: an empty tensor with the type and device of the logits.
    """

    root: nn.Module
    values: dict[fx.Node, Any]
    output: fx.Node
    like: Tensor

    @property
    def graph(self) -> fx.Graph:
        """The graph of the nodes."""
        return self.output.graph

    def signals(self, node: fx.Node) -> list[fx.Node]:
        """The inputs of a node that depend on the images, with repetitions."""
        found: list[fx.Node] = []
        fx.map_arg((node.args, node.kwargs), found.append)
        return [other for other in found if isinstance(self.values[other], TracedSignal)]

    def module(self, node: fx.Node) -> nn.Module:
        """The module that a node calls."""
        return self.root.get_submodule(cast(str, node.target))


def traced(module: nn.Module, in_shape: Sequence[int]) -> Trace:
    """Traces `module` in evaluation mode with `torch.fx`, and runs a batch of images through it.

    Operations in place are resolved: later readers of an overwritten tensor read the node that
    overwrote it. The module is left in evaluation mode.

    Raises:
        UserError: it cannot be traced, does not take images (B, *in_shape), or returns no tensor.
    """
    root = _TracedRoot(module).eval()
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
        # Inference mode has no version counters, which show what an operation overwrites.
        with torch.inference_mode(False), torch.no_grad():
            logits = runner.run(some_images(module, TRACED_SAMPLES, in_shape))
    except Exception as error:
        raise UserError(
            f"images of shape {tuple(in_shape)} do not fit the module at"
            f" {where(cast(fx.Node, runner.at))}: {first_line(error)}"
        ) from None
    if not isinstance(logits, Tensor):
        raise UserError(f"the module must return a tensor of logits, not {type(logits).__name__}")
    _read_what_was_overwritten(runner)
    return Trace(root, runner.values, next(reversed(graph.nodes)), logits.new_empty(0))


def some_images(module: nn.Module, samples: int, in_shape: Sequence[int]) -> Tensor:
    """Different images (samples, *in_shape) in [0, 1) for `module`, without random numbers."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    like = tensors[0] if tensors else torch.zeros(())
    shape = torch.Size((samples, *in_shape))
    # Fractional parts of multiples of an irrational number.
    return (torch.arange(shape.numel()).double() * 2**0.5 % 1).view(shape).to(like)


def place(path: str) -> str:
    """A path from the root as a path from the module."""
    return path.removeprefix("model.") or "model"


def where(node: fx.Node) -> str:
    """The place of a node for messages: 'layer1.0.norm' (GroupNorm), 'softmax' in 'layer1.0'."""
    stack = [*node.meta.get("nn_module_stack", {}).values()]
    path, kind = stack[-1] if stack else ("", nn.Module)
    if node.op == "call_module":
        return f"{place(path)!r} ({kind.__name__})"
    return f"{operation(node)!r} in {place(path)!r}"


def operation(node: fx.Node) -> str:
    """The name of a torch function, method or attribute; of other functions with the module."""
    target = node.target
    if target is getattr:
        return str(node.args[1])
    name = getattr(target, "__name__", str(target))
    if node.op == "call_function" and not any(getattr(o, name, None) is target for o in OWNERS):
        return f"{getattr(target, '__module__', None)}.{name}"
    return name


class _TracedRoot(nn.Module):
    """Calls the module with images only, so that further arguments keep their defaults."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Any) -> Any:
        return self.model(images)


class _Proxy(fx.Proxy):
    """A proxy that records assignments such as `+=` as operations in place."""


def _assigned(function: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], Any]:
    return lambda proxy, other: proxy.tracer.create_proxy(
        "call_function", function, (proxy, other), {}
    )


for _name in IN_PLACE:
    setattr(_Proxy, f"__{_name}__", _assigned(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """A tracer that does not trace into interval layers.

    Attributes:
        known: the modules that exist before tracing.
        failed: path of the module whose forward failed.
    """

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
        inner = unwrapped(m)
        if inner is not m:
            return inner(*args, **kwargs)
        if is_compiled(m):
            if m._forward_hooks or m._forward_pre_hooks:
                raise UserError("it is compiled and has forward hooks")
            forward = m.forward
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


class _Runner(fx.Interpreter):
    """Runs the graph and keeps the values of its nodes.

    Attributes:
        values: see `Trace`.
        tensors: the tensors of all nodes, kept so that no memory is reused.
        overwritten: pairs of a node and another one whose tensor it changed.
        at: the node that is being run.
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
        elif isinstance(value, tuple | list) and value and isinstance(value[0], Tensor):
            self.tensors[n] = value[0]  # parts of one tensor share its memory
        for other, version in zip(read, versions, strict=True):
            if self.tensors[other]._version != version:
                self.overwritten.append((n, other))
        reads = any(isinstance(self.values[other], TracedSignal) for other in n.all_input_nodes)
        signal = n.op in ("placeholder", "output") or (reads and operation(n) not in QUERIES)
        if signal and isinstance(value, Tensor):
            self.values[n] = TracedSignal(tuple(value.shape), value.dtype, value.device)
        else:
            self.values[n] = TracedSignal(()) if signal else value
        return value


def _read_what_was_overwritten(runner: _Runner) -> None:
    """Lets later readers of an overwritten tensor read the node that overwrote it.

    Raises:
        UserError: they read the same memory as another view.
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
                elif isinstance(runner.values[user], TracedSignal):
                    raise UserError(
                        f"unsupported operation {where(node)}: it changes in place what"
                        f" {where(user)} reads as another view"
                    )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _are_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
