"""A model as an ONNX graph: a node or two for each layer, with the parameters that it has.

Nothing is folded, so that the file is of the very network that certificates speak of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibpcore import layers
from ibpcore.checkpoint import write_atomic
from ibpcore.errors import UserError, first_line
from ibpcore.layers import IntervalSequential, check_supported
from ibpcore.networks import Classifier
from ibpcore.precision import full_precision

OPSET, IR_VERSION = 14, 7
"""The oldest whose batch normalisation cannot be taken for one in training."""
INPUT, OUTPUT = "images", "logits"
TOLERANCE = 1e-4
"""Largest difference of a logit, as a share of the largest logit, or of 1 if that is below."""


class Value(NamedTuple):
    """What a node reads.

    Attributes:
        name: in the graph.
        example: such a tensor of a single image.
    """

    name: str
    example: Tensor


class Graph:
    """Nodes and constants, as they are added.

    Args:
        model: its modules give constants their names.

    Raises:
        UserError: the package onnx is missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.onnx = _imported("onnx")
        self.places = {module: place for place, module in model.named_modules()}
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def constant(self, layer: nn.Module, name: str, value: Tensor) -> str:
        """Enters `value` as that of a layer, once however often it is used; its name."""
        name = f"{self.places[layer]}.{name}"
        array = value.detach().cpu().contiguous().numpy()
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(self, kind: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Adds an operation on values of these names; the name of its result."""
        name = f"{kind}_{len(self.nodes)}"
        self.nodes.append(self.onnx.helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def add(self, layer: nn.Module, x: Value) -> Value:
        """Adds what a layer does to `x`.

        Raises:
            UserError: the layer, or a setting of it, has no ONNX form here.
        """
        if isinstance(layer, IntervalSequential) and _is_plain(layer):
            for part in layer:
                x = self.add(part, x)
            return x
        if type(layer) not in WRITERS:
            raise UserError(f"{type(layer).__name__} cannot be exported to ONNX")
        return Value(WRITERS[type(layer)](self, layer, x), layer(x.example))


def _is_plain(layer: IntervalSequential) -> bool:
    return type(layer).forward is IntervalSequential.forward


def _imported(name: str) -> Any:
    """A package of the extra `export`.

    Raises:
        UserError: it is missing.
    """
    try:
        return __import__(name)
    except ImportError:
        raise UserError(f"{name} is needed: pip install 'ibpcore[export]'") from None


@torch.no_grad()
def to_onnx(model: Classifier) -> bytes:
    """The content of an ONNX file: images (batch, C, H, W) in [0, 1] to logits (batch, classes).

    Args:
        model: float32, in evaluation mode.

    Raises:
        UserError: a layer has no ONNX form here, batch norm is in training mode, the weights
            are not float32, or the package onnx is missing.
    """
    check_supported(model)
    weight = next(model.parameters(), torch.empty(0))
    if weight.dtype != torch.float32:
        raise UserError(f"only float32 models are exported, but this one is {weight.dtype}")
    graph = Graph(model)
    graph.add(model, Value(INPUT, torch.zeros(1, *model.in_shape, device=weight.device)))
    graph.nodes[-1].output[0] = OUTPUT
    helper, kind = graph.onnx.helper, graph.onnx.TensorProto.FLOAT
    content = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "ibpcore",
            [helper.make_tensor_value_info(INPUT, kind, ["batch", *model.in_shape])],
            [helper.make_tensor_value_info(OUTPUT, kind, ["batch", model.classes])],
            list(graph.constants.values()),
        ),
        producer_name="ibpcore",
        producer_version=version("ibpcore"),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    graph.onnx.checker.check_model(content, full_check=True)
    return bytes(content.SerializeToString())


@torch.no_grad()
def check_onnx(content: bytes, model: Classifier, images: Tensor) -> float:
    """Compares what onnxruntime computes with what PyTorch does.

    Args:
        content: from `to_onnx`.
        model: what it was made of.
        images: (B, C, H, W) float32 in [0, 1].

    Returns:
        the largest difference of a logit.

    Raises:
        UserError: it is above `TOLERANCE`, or onnxruntime is missing or cannot run the network.
    """
    onnxruntime = _imported("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(None, {INPUT: images.cpu().numpy()})[0])
    except Exception as error:  # its exceptions have no base class of their own
        raise UserError(f"onnxruntime cannot run the network: {first_line(error)}") from None
    with full_precision():
        expected = model(images).cpu()
    if found.shape != expected.shape:
        raise UserError(f"ONNX gives {tuple(found.shape)}, not {tuple(expected.shape)}")
    difference = float((found - expected).abs().max())
    allowed = TOLERANCE * max(1.0, float(expected.abs().max()))
    if not difference <= allowed:
        raise UserError(
            f"onnxruntime and PyTorch differ by {difference:.2g} in a logit, by more than the"
            f" {allowed:.2g} that rounding explains: nothing was written"
        )
    return difference


def export_onnx(model: Classifier, path: str | Path, images: Tensor) -> float:
    """Writes an ONNX file, which is put in place once it agrees with `model` on `images`.

    Args, returns and raises: as `to_onnx` and `check_onnx`, and

    Raises:
        OSError: the file cannot be written.
    """
    content = to_onnx(model)
    difference = check_onnx(content, model, images)
    write_atomic(Path(path), content)
    return difference


Writer = Callable[[Graph, Any, Value], str]


def _convolution(graph: Graph, layer: nn.Conv2d, x: Value) -> str:
    if layer.padding_mode != "zeros":
        raise UserError(f"IntervalConv2d with {layer.padding_mode} padding cannot be exported")
    pads = layer._reversed_padding_repeated_twice
    return graph.node(
        "Conv",
        [x.name, *_weights(graph, layer)],
        kernel_shape=layer.kernel_size,
        strides=layer.stride,
        dilations=layer.dilation,
        group=layer.groups,
        pads=[*reversed(pads[0::2]), *reversed(pads[1::2])],
    )


def _weights(graph: Graph, layer: Any) -> list[str]:
    """The names of weight and, if there is one, bias."""
    given = {"weight": layer.weight, "bias": layer.bias}
    return [graph.constant(layer, name, t) for name, t in given.items() if t is not None]


def _linear(graph: Graph, layer: nn.Linear, x: Value) -> str:
    if x.example.dim() == 2:
        return graph.node("Gemm", [x.name, *_weights(graph, layer)], transB=1)
    product = graph.node("MatMul", [x.name, graph.constant(layer, "weight.T", layer.weight.T)])
    if layer.bias is None:
        return product
    return graph.node("Add", [product, graph.constant(layer, "bias", layer.bias)])


def _batch_norm(graph: Graph, layer: Any, x: Value) -> str:
    layer.steps()  # refuses training mode
    given = {
        "weight": torch.ones_like(layer.running_var) if layer.weight is None else layer.weight,
        "bias": torch.zeros_like(layer.running_mean) if layer.bias is None else layer.bias,
        "running_mean": layer.running_mean,
        "running_var": layer.running_var,
    }
    names = [graph.constant(layer, name, tensor) for name, tensor in given.items()]
    return graph.node("BatchNormalization", [x.name, *names], epsilon=layer.eps)


def _normalize(graph: Graph, layer: layers.IntervalNormalize, x: Value) -> str:
    along = (1, -1, *[1] * (x.example.dim() - 2))
    mean, std = (graph.constant(layer, n, getattr(layer, n).view(along)) for n in ("mean", "std"))
    return graph.node("Div", [graph.node("Sub", [x.name, mean]), std])


def _elementwise(kind: str) -> Writer:
    return lambda graph, layer, x: graph.node(kind, [x.name])


def _leaky_relu(graph: Graph, layer: nn.LeakyReLU, x: Value) -> str:
    return graph.node("LeakyRelu", [x.name], alpha=layer.negative_slope)


def _flatten(graph: Graph, layer: nn.Flatten, x: Value) -> str:
    shape = layer(x.example).shape
    if len(shape) == 2:  # what verifiers expect, rather than a shape
        return graph.node("Flatten", [x.name], axis=1)
    target = torch.tensor([-1, *shape[1:]])
    return graph.node("Reshape", [x.name, graph.constant(layer, "shape", target)])


def _pool(kind: str, graph: Graph, layer: Any, x: Value, **attributes: Any) -> str:
    if layer.ceil_mode:
        raise UserError(f"{type(layer).__name__} with ceil_mode cannot be exported")
    geometry = (layer.kernel_size, layer.stride, layer.padding)
    kernel, stride, pads = ([v, v] if isinstance(v, int) else list(v) for v in geometry)
    attributes |= {"kernel_shape": kernel, "strides": stride, "pads": pads * 2}
    return graph.node(kind, [x.name], **attributes)


def _average_pool(graph: Graph, layer: nn.AvgPool2d, x: Value) -> str:
    if layer.divisor_override is not None:
        raise UserError("IntervalAvgPool2d with divisor_override cannot be exported")
    return _pool("AveragePool", graph, layer, x, count_include_pad=int(layer.count_include_pad))


def _max_pool(graph: Graph, layer: nn.MaxPool2d, x: Value) -> str:
    dilation = layer.dilation
    dilations = [dilation] * 2 if isinstance(dilation, int) else list(dilation)
    return _pool("MaxPool", graph, layer, x, dilations=dilations)


def _residual(graph: Graph, layer: layers.IntervalResidual, x: Value) -> str:
    return graph.node("Add", [graph.add(part, x).name for part in (layer.branch, layer.shortcut)])


WRITERS: dict[type, Writer] = {
    layers.IntervalConv2d: _convolution,
    layers.IntervalLinear: _linear,
    layers.IntervalBatchNorm: _batch_norm,
    layers.IntervalNormalize: _normalize,
    layers.IntervalReLU: _elementwise("Relu"),
    layers.IntervalLeakyReLU: _leaky_relu,
    layers.IntervalSigmoid: _elementwise("Sigmoid"),
    layers.IntervalTanh: _elementwise("Tanh"),
    layers.IntervalFlatten: _flatten,
    layers.IntervalAvgPool2d: _average_pool,
    layers.IntervalMaxPool2d: _max_pool,
    layers.IntervalDropout: lambda graph, layer, x: x.name,
    layers.IntervalResidual: _residual,
}
"""By exact type: a subclass may do anything."""
