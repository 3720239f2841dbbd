"""Traces of PyTorch modules: their operations in order, with the shape or value of each."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ibpcore.errors import UserError, first_line
from ibpcore.interop.wrappers import is_compiled, unwrapped
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Tie, weight_like

TRACED_SAMPLES = 3
"""Size of the batch that is sent through the module."""
IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul")
"""Assignments such as `+=`, which `torch.fx` would record as operations that are not in place."""
QUERIES = ("size", "dim", "numel", "shape", "ndim", "device", "dtype")
"""Properties of a tensor that do not depend on its values."""
CREATIONS = (
    "zeros_like",
    "ones_like",
    "full_like",
    "new_tensor",
    "new_zeros",
    "new_ones",
    "new_full",
)
"""Operations that read only such properties of their first argument."""
FITTINGS = ("expand_as", "view_as", "reshape_as", "type_as", "to")
"""Operations that read only such properties of their other arguments."""
PLACE = "place"
"""Entry of the facts about a node: its place, for messages, where it is of no module."""
TRANSFORMS = "torchvision.transforms"
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
        names: the names of each tensor that the graph reads.
        ties: the tensors of the module that layers follow, collected by their translation.
        fixed: the values of nodes that layers do not follow: numbers that Python has read from
            tensors, and what the translation adds.
    """

    root: nn.Module
    values: dict[fx.Node, Any]
    output: fx.Node
    like: Tensor
    names: tuple[tuple[str, ...], ...]
    ties: list[Tie] = field(default_factory=list)
    fixed: dict[fx.Node, Any] = field(default_factory=dict)

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

    def attributes(self) -> set[Tensor]:
        """The tensors of the module that the graph reads."""
        return {self.values[node] for node in self.values if node.op == "get_attr"}

    def shares(self) -> bool:
        """Whether names of one tensor, of which the graph has only one, are still of one tensor."""
        groups = [{id(_named(self.root, name)) for name in group} for group in self.names]
        return all(len(tensors) == 1 for tensors in groups)

    def has_unknown_constants(self) -> bool:
        """Whether a tensor was used that is neither an attribute of a module nor computed in the
        graph: one made during the trace, perhaps from tensors that no module registers."""
        return any(str(node.target).startswith("_tensor_constant") for node in self.values)

    def owner(self, node: fx.Node, value: Tensor) -> fx.Node | None:
        """The node of the module's tensor of which `value`, computed by `node`, is only a view.

        Such a view holds the same numbers in the same order; None if there is no such tensor.
        """
        while node.op != "get_attr":
            inputs = [n for n in node.all_input_nodes if isinstance(self.values[n], Tensor)]
            if len(inputs) != 1:
                return None
            node = inputs[0]
        tensor = cast(Tensor, self.values[node])
        same = tensor.data_ptr() == value.data_ptr() and tensor.numel() == value.numel()
        ordered = tensor.is_contiguous() and value.is_contiguous()
        return node if same and ordered and tensor.dtype == value.dtype else None

    def is_trained(self, node: fx.Node) -> bool:
        """Whether a constant is computed from a parameter that is trained."""
        parameters: list[Any] = []
        for source in self._sources(node):
            if source.op == "call_module":
                parameters += self.module(source).parameters()
            else:
                parameters.append(self.values[source])
        return any(isinstance(p, nn.Parameter) and p.requires_grad for p in parameters)

    def is_registered(self, node: fx.Node) -> bool:
        """Whether a constant is computed from parameters and buffers, which move with a module."""
        registered = {id(tensor) for tensor in (*self.root.parameters(), *self.root.buffers())}
        sources = [source for source in self._sources(node) if source.op == "get_attr"]
        return all(id(self.values[source]) in registered for source in sources)

    def numbers(self) -> dict[fx.Node, Any]:
        """The numbers that Python reads from tensors of the module and uses with the images."""
        return {
            node: value
            for node, value in self.values.items()
            if _is_python(value)
            and self._sources(node)
            and any(isinstance(self.values[user], TracedSignal) for user in node.users)
        }

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        """The nodes under a constant that read tensors of the module."""
        found = [node] if node.op in ("get_attr", "call_module") else []
        for other in node.all_input_nodes:
            if not isinstance(self.values[other], TracedSignal):
                found += self._sources(other)
        return found

    @torch.no_grad()
    def now(self, node: fx.Node) -> Any:
        """The value of a node that is independent of the images, from what the module holds now."""
        if node.op == "get_attr":
            return _named(self.root, cast(str, node.target))
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._argument)
        if node.op == "call_function":
            return cast(Any, node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], cast(str, node.target))(*args[1:], **kwargs)
        return self.module(node)(*args, **kwargs)

    def _argument(self, node: fx.Node) -> Any:
        value = self.values[node]
        if isinstance(value, TracedSignal):
            # Only its shape, type and device are read.
            return weight_like(self.root).new_zeros(value.shape)
        return self.now(node)


def _named(root: nn.Module, name: str) -> Any:
    return reduce(getattr, name.split("."), root)


def _names(root: nn.Module, nodes: Iterable[fx.Node]) -> Iterator[tuple[str, ...]]:
    """All names of each tensor that nodes read from a module."""
    tensors = [
        *root.named_parameters(remove_duplicate=False),
        *root.named_buffers(remove_duplicate=False),
    ]
    for node in nodes:
        if node.op == "get_attr":
            read = _named(root, cast(str, node.target))
            yield cast(str, node.target), *(name for name, tensor in tensors if tensor is read)


def traced(module: nn.Module, in_shape: Sequence[int]) -> Trace:
    """Traces `module` in evaluation mode with `torch.fx`, and runs a batch of images through it.

    Operations in place are resolved: later readers of an overwritten tensor read the node that
    overwrote it. The module is left in evaluation mode.

    Raises:
        UserError: it cannot be traced, does not take images (B, *in_shape), returns no tensor, or
            keeps constants that it computes.
    """
    root = _TracedRoot(module).eval()
    with _RandomOperations() as random:
        graph, kept = _graph(root, random)
        runner = _Runner(root, graph, random)
        try:
            # Inference mode has no version counters, which show what an operation overwrites.
            with torch.inference_mode(False), torch.no_grad():
                logits = runner.run(some_images(module, TRACED_SAMPLES, in_shape))
        except UserError:
            raise
        except Exception as error:
            at = "" if runner.at is None else f" at {where(runner.at)}"
            raise UserError(
                f"images of shape {tuple(in_shape)} do not fit the module{at}: {first_line(error)}"
            ) from None
    if not isinstance(logits, Tensor):
        raise UserError(f"the module must return a tensor of logits, not {type(logits).__name__}")
    _read_what_was_overwritten(runner)
    for node in kept:
        if not isinstance(runner.values[node], TracedSignal):
            raise UserError(
                f"the module keeps what {where(node)} computes from its tensors, so that later"
                " changes of these would not matter: make it a buffer"
            )
    output, names = next(reversed(graph.nodes)), tuple(_names(root, graph.nodes))
    trace = Trace(root, runner.values, output, logits.new_empty(0), names)
    trace.fixed.update(trace.numbers())
    return trace


def _graph(root: _TracedRoot, random: _RandomOperations) -> tuple[fx.Graph, list[fx.Node]]:
    """The operations of a module, and those whose values it assigns to its attributes."""
    tracer = _Tracer(root)
    before = {part: dict(vars(part)) for part in root.modules()}
    try:
        graph = tracer.trace(root)
    except Exception as error:
        raise UserError(
            f"the forward of {place(tracer.failed)!r} cannot be traced, which must not depend on"
            f" values or sizes of its input: {first_line(error)}"
        ) from None
    finally:
        kept = _taken_back(before)
    if random.found:
        raise UserError(f"unsupported operation {random.found[0]!r}: it is random")
    return graph, kept


def _taken_back(before: dict[nn.Module, dict[str, Any]]) -> list[fx.Node]:
    """The nodes that modules hold as attributes, which get back their values of `before`."""
    kept: list[fx.Node] = []
    for part, attributes in before.items():
        held = {name: v.node for name, v in vars(part).items() if isinstance(v, fx.Proxy)}
        kept += held.values()
        for name in held:
            del vars(part)[name]
        vars(part).update({name: attributes[name] for name in held.keys() & attributes.keys()})
    return kept


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
    if PLACE in node.meta:
        return str(node.meta[PLACE])
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


class _RandomOperations(TorchDispatchMode):
    """Collects the names of the random operations that are run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class _Tracer(fx.Tracer):
    """A tracer that does not trace into interval layers, and records the use of every tensor.

    Attributes:
        known: the modules that exist before tracing.
        failed: path of the module whose forward failed.
    """

    proxy_buffer_attributes = True

    def __init__(self, root: nn.Module) -> None:
        super().__init__()
        self.known, self.failed = set(root.modules()), ""

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        named = isinstance(m, IntervalLayer) or type(m).__module__.startswith(TRANSFORMS)
        return named or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if type(m).__name__ == "Normalize" and type(m).__module__.startswith(TRANSFORMS):
            return _normalized(m, *args)
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


def _normalized(transform: Any, images: Any) -> Any:
    """What `torchvision.transforms.Normalize` computes, which rejects what is not a tensor."""
    mean, std = (
        torch.as_tensor(values, dtype=torch.get_default_dtype()).view(-1, 1, 1)
        for values in (transform.mean, transform.std)
    )
    return (images - mean) / std


class _Runner(fx.Interpreter):
    """Runs the graph and keeps the values of its nodes.

    Attributes:
        values: see `Trace`.
        tensors: the tensors of all nodes, kept so that no memory is reused.
        overwritten: pairs of a node and another one whose tensor it changed.
        at: the node that is being run.
        random: what collects the random operations of the run.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph, random: _RandomOperations) -> None:
        super().__init__(root, graph=graph)
        self.random = random
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
        signal = n.op in ("placeholder", "output") or self._reads_images(n)
        if self.random.found and not signal:  # others have no interval rule
            raise UserError(f"unsupported operation {where(n)}: it is random")
        self.random.found.clear()
        if signal and isinstance(value, Tensor):
            self.values[n] = TracedSignal(tuple(value.shape), value.dtype, value.device)
        else:
            self.values[n] = TracedSignal(()) if signal else value
        return value

    def _reads_images(self, n: fx.Node) -> bool:
        """Whether the value of a node depends on the numbers of the images."""
        return any(isinstance(self.values[other], TracedSignal) for other in _read_by(n))


def _is_python(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_python, value))
    return isinstance(value, int | float)


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The inputs of a node whose numbers it reads, and not only their shape, type or device."""
    inputs, name = node.all_input_nodes, operation(node)
    if name in QUERIES:
        return []
    if name in CREATIONS:
        return inputs[1:]
    return inputs[:1] if name in FITTINGS else inputs


def _read_what_was_overwritten(runner: _Runner) -> None:
    """Lets later readers of an overwritten tensor read the node that overwrote it.

    Raises:
        UserError: they read the same memory as another view, or it is a tensor of the module.
    """
    order = {node: number for number, node in enumerate(runner.values)}
    owned = [runner.tensors[node] for node in order if node.op == "get_attr"]
    for node, before in runner.overwritten:
        if any(_share_memory(runner.tensors[before], tensor) for tensor in owned):
            raise UserError(
                f"unsupported operation {where(node)}: it changes a tensor of the module in place"
            )
        for other, tensor in runner.tensors.items():
            later = order[other] >= order[node]
            if later or not _share_memory(tensor, runner.tensors[before]):
                continue
            for user in [user for user in other.users if order[user] > order[node]]:
                if node in runner.tensors and _are_same(tensor, runner.tensors[node]):
                    user.replace_input_with(other, node)
                elif other in _read_by(user):
                    raise UserError(
                        f"unsupported operation {where(node)}: it changes in place what"
                        f" {where(user)} reads as another view"
                    )


def _share_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _are_same(a: Tensor, b: Tensor) -> bool:
    return (a.data_ptr(), a.shape, a.stride()) == (b.data_ptr(), b.shape, b.stride())
