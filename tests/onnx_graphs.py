"""ONNX graphs made node by node, run by onnxruntime; and random ones."""

import math
import random
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

FLOAT = TensorProto.FLOAT


class Graph:
    """A graph under construction; `add` returns the name of the output of a node."""

    def __init__(self, shape: Sequence[object], opset: int = 17, type: int = FLOAT) -> None:
        self.shape, self.opset, self.type = shape, opset, type
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def add(self, kind: str, *inputs: object, outputs: int = 1, **attributes: object) -> str:
        """A node; arrays and lists among its inputs become initialisers."""
        names = [each if isinstance(each, str) else self.constant(each) for each in inputs]
        made = [f"{kind}_{len(self.nodes)}{'abcdef'[at] if at else ''}" for at in range(outputs)]
        node = helper.make_node(kind, names, made, f"{kind}_{len(self.nodes)}", **attributes)
        self.nodes.append(node)
        return made[0]

    def constant(self, value: object) -> str:
        array = np.asarray(value)
        if array.dtype == np.float64:
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.type))
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def model(self, output: str, shape: Sequence[object] | None = None) -> onnx.ModelProto:
        ports = [
            helper.make_tensor_value_info(name, self.type, sizes)
            for name, sizes in (("x", self.shape), (output, shape))
        ]
        graph = helper.make_graph(self.nodes, "g", ports[:1], ports[1:], self.constants)
        opsets = [helper.make_opsetid("", self.opset)]
        version = 8 if self.opset < 21 else 10
        return helper.make_model(graph, opset_imports=opsets, ir_version=version)

    def content(self, output: str, shape: Sequence[object] | None = None) -> bytes:
        return self.model(output, shape).SerializeToString()


def runtime_logits(content: bytes, inputs: torch.Tensor) -> torch.Tensor:
    """The numbers of the output of onnxruntime, one input at a time: (B, numbers)."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (port,) = session.get_inputs()
    shape = [size if isinstance(size, int) else 1 for size in port.shape]
    found = [session.run(None, {port.name: x.numpy().reshape(shape)})[0] for x in inputs]
    return torch.tensor(np.stack(found)).flatten(1)


class RandomGraph:
    """A random classifier of images with branches, in a random opset."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.numbers = np.random.default_rng(seed)
        self.opset = self.random.choice([7, 8, 9, 11, 12, 13, 15, 17, 18, 20, 22])
        shape = [1, self.random.choice([1, 2, 4]), *self.random.choices([4, 5, 6], k=2)]
        self.graph = Graph([self.random.choice(["batch", 1]), *shape[1:]], self.opset)
        self.x, self.shape = "x", shape

    def array(self, *shape: int) -> np.ndarray:
        return self.numbers.normal(0, 0.5, shape)

    def content(self) -> bytes:
        for _ in range(self.random.randint(3, 9)):
            self.random.choice(STEPS)(self)
            if math.prod(self.shape) > 2000:
                break
        self.x = self.graph.add("Flatten", self.x, axis=1)
        weight, bias = self.array(math.prod(self.shape), 3), self.array(3)
        if self.random.random() < 0.5:
            self.x = self.graph.add("Gemm", self.x, weight, bias)
        else:
            self.x = self.graph.add("Add", self.graph.add("MatMul", self.x, weight), bias)
        return self.graph.content(self.x)

    def apply(self, kind: str, *inputs: object, **attributes: object) -> None:
        """A node that keeps the shape."""
        self.x = self.graph.add(kind, self.x, *inputs, **attributes)

    def constant_shape(self) -> list[int]:
        """A shape that broadcasts to the present one."""
        sizes = [self.random.choice([1, size]) for size in self.shape[1:]]
        return [1, *sizes][self.random.randint(0, 3) :]

    def sized(self, name: str, values: list[int], since: int) -> tuple[list[object], dict]:
        """A setting as an attribute, or since an opset as an input."""
        if self.opset < since:
            return [], {name: values}
        return [np.array(values, dtype=np.int64)], {}


def _convolve(of: RandomGraph) -> None:
    channels, *sides = of.shape[1:]
    groups = of.random.choice([g for g in (1, 2) if channels % g == 0])
    out = groups * of.random.randint(1, 2)
    kernel = [of.random.randint(1, min(3, side)) for side in sides]
    how = {"strides": of.random.choices([1, 1, 2], k=2), "group": groups}
    if of.random.random() < 0.3:
        how["auto_pad"] = of.random.choice(["SAME_UPPER", "SAME_LOWER", "VALID"])
        pads = None
    else:
        pads = how["pads"] = of.random.choices([0, 1, 1, 2], k=4)
    bias = [of.array(out)] if of.random.random() < 0.5 else []
    of.x = of.graph.add("Conv", of.x, of.array(out, channels // groups, *kernel), *bias, **how)
    for at, (side, size, step) in enumerate(zip(sides, kernel, how["strides"], strict=True)):
        if pads is None:
            length = side if how["auto_pad"] != "VALID" else side - size + 1
            of.shape[2 + at] = -(-length // step)
        else:
            of.shape[2 + at] = (side + pads[at] + pads[2 + at] - size) // step + 1
    of.shape[1] = out


def _transpose_convolve(of: RandomGraph) -> None:
    channels, *sides = of.shape[1:]
    kernel, strides = of.random.choices([1, 2, 3], k=2), of.random.choices([1, 2], k=2)
    extra = [of.random.randint(0, step - 1) for step in strides]
    pads = [of.random.randint(0, min(1, size - 1)) for size in (*kernel, *kernel)]
    weight = of.array(channels, 2, *kernel)
    how = {"strides": strides, "pads": pads, "output_padding": extra}
    lengths = [
        (side - 1) * step + size + more - pads[at] - pads[2 + at]
        for at, (side, step, size, more) in enumerate(
            zip(sides, strides, kernel, extra, strict=True)
        )
    ]
    if min(lengths) > 0:
        of.x = of.graph.add("ConvTranspose", of.x, weight, of.array(2), **how)
        of.shape = [1, 2, *lengths]


def _activate(of: RandomGraph) -> None:
    plain = ["Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Abs", "Neg", "Selu", "Identity"]
    kind = of.random.choice([*plain, "LeakyRelu", "Elu", "PRelu", "Clip", "HardSigmoid", "gate"])
    if kind == "gate":
        of.x = of.graph.add("Mul", of.x, of.graph.add("Sigmoid", of.x))
    elif kind in ("LeakyRelu", "Elu"):
        of.apply(kind, alpha=0.3)
    elif kind == "PRelu":
        of.apply(kind, of.array(of.shape[1], 1, 1))
    elif kind == "Clip":
        limits = {"min": -0.3, "max": 0.7}
        of.apply(kind, **limits) if of.opset < 11 else of.apply(kind, *map(np.float32, (-0.3, 0.7)))
    else:
        of.apply(kind)


def _normalize(of: RandomGraph) -> None:
    channels = of.shape[1]
    numbers = [of.array(channels) for _ in range(3)]
    of.apply("BatchNormalization", *numbers, np.abs(of.array(channels)) + 0.1, epsilon=0.01)


def _combine(of: RandomGraph) -> None:
    extrema = ["Max", "Min"] if of.opset > 7 else []  # which did not broadcast before
    kind = of.random.choice(["Add", "Sub", "Mul", "Div", *extrema])
    constant = of.array(*of.constant_shape())
    if kind == "Div":
        of.apply(kind, np.sign(constant) * (np.abs(constant) + 0.5))
    elif of.random.random() < 0.5:
        of.apply(kind, constant)
    else:
        of.x = of.graph.add(kind, constant, of.x)


def _pool(of: RandomGraph) -> None:
    kernel = [of.random.randint(1, min(3, side)) for side in of.shape[2:]]
    strides = of.random.choices([1, 2], k=2)
    pads = [of.random.randint(0, size - 1) for size in (*kernel, *kernel)]
    how = {"kernel_shape": kernel, "strides": strides, "pads": pads}
    if of.random.random() < 0.5:
        of.apply("MaxPool", **how)
    else:
        of.apply("AveragePool", **how, count_include_pad=of.random.randint(0, 1))
    for at in range(2):
        whole = of.shape[2 + at] + pads[at] + pads[2 + at]
        of.shape[2 + at] = (whole - kernel[at]) // strides[at] + 1


def _reduce(of: RandomGraph) -> None:
    if of.random.random() < 0.5:
        of.apply(of.random.choice(["GlobalAveragePool", "GlobalMaxPool"]))
        of.shape[2:] = [1, 1]
        return
    axis = of.random.choice([1, 2, 3, -1])
    inputs, attributes = of.sized("axes", [axis], 18)
    of.apply("ReduceMean", *inputs, **attributes, keepdims=1)
    of.shape[axis] = 1


def _reorder(of: RandomGraph) -> None:
    order = [0, *of.random.sample([1, 2, 3], 3)]
    of.apply("Transpose", perm=order)
    of.shape = [of.shape[axis] for axis in order]


def _reshape(of: RandomGraph) -> None:
    channels, height, width = of.shape[1:]
    shape = of.random.choice([[0, -1, width, channels], [1, height, channels, width]])
    of.apply("Reshape", np.array(shape, dtype=np.int64))
    of.shape = [1, height if shape[1] == -1 else shape[1], *shape[2:]]


def _unpack(of: RandomGraph) -> None:
    """By axes that are added and removed again; the shape is computed in the graph."""
    inputs, attributes = of.sized("axes", [1], 13)
    wide = of.graph.add("Unsqueeze", of.x, *inputs, **attributes)
    of.x = of.graph.add("Squeeze", wide, *inputs, **attributes)
    sizes = of.graph.add("Shape", of.x)
    batch = of.graph.add("Gather", sizes, np.array([0]), axis=0)
    shape = of.graph.add("Concat", batch, np.array([-1, *of.shape[2:]]), axis=0)
    of.apply("Reshape", shape)


def _slice(of: RandomGraph) -> None:
    axis = of.random.choice([1, 2, 3])
    size = of.shape[axis]
    if of.random.random() < 0.5:
        places = of.random.choices(range(-size, size), k=of.random.randint(1, 4))
        of.apply("Gather", np.array(places), axis=axis)
        of.shape[axis] = len(places)
        return
    start = of.random.randint(0, size - 1)
    if of.opset < 10:
        of.apply("Slice", starts=[start], ends=[2**31], axes=[axis])
        of.shape[axis] = size - start
        return
    first, last, step = of.random.choice([(start, 2**31, 2), (-1, -(2**31), -1), (-size, size, 1)])
    of.apply("Slice", *map(np.array, ([first], [last], [axis], [step])))
    of.shape[axis] = len(range(size)[first:last:step])


def _pad(of: RandomGraph) -> None:
    pads = [0, 0, *of.random.choices([0, 1, 2], k=2), 0, 0, *of.random.choices([0, 1], k=2)]
    modes = ["constant", "constant", "edge", *["reflect"] * (min(of.shape[2:]) > 2)]
    mode = of.random.choice(modes)
    inputs, attributes = of.sized("pads", pads, 11)
    if mode == "constant" and of.random.random() < 0.5:
        if of.opset < 11:
            attributes["value"] = 0.7
        else:
            inputs.append(np.float32(0.7))
    of.apply("Pad", *inputs, **attributes, mode=mode)
    for axis in (2, 3):
        of.shape[axis] += pads[axis] + pads[4 + axis]


def _branch(of: RandomGraph) -> None:
    """Sums, products and concatenations of what two chains that keep the shape compute."""
    start, shape, ends = of.x, [*of.shape], []
    for _ in range(2):
        of.x = start
        for _ in range(of.random.randint(0, 2)):
            of.random.choice([_activate, _normalize, _combine])(of)
        ends.append(of.x)
    kind = of.random.choice(["Add", "Sub", "Mul", "Sum", "Concat"])
    axis = of.random.choice([1, 2, 3])
    of.x = of.graph.add(kind, *ends, **({"axis": axis} if kind == "Concat" else {}))
    of.shape = shape
    if kind == "Concat":
        of.shape[axis] *= 2


def _excite(of: RandomGraph) -> None:
    """A product with one number for each channel, computed from the same images."""
    means = of.graph.add("GlobalAveragePool", of.x)
    of.apply("Mul", of.graph.add("Sigmoid", means))


STEPS = [
    *(_convolve, _convolve, _transpose_convolve, _activate, _activate, _normalize, _combine),
    *(_pool, _reduce, _reorder, _reshape, _unpack, _slice, _pad, _branch, _excite),
]


class RandomTensors(RandomGraph):
    """A random network of tensors of any shape, with or without a batch."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        inner = self.random.choices([1, 2, 3, 4], k=self.random.randint(1, 3))
        self.shape = [*self.random.choice([[], [1], [1, 1]]), *inner]
        given = [None, *self.shape[1:]] if len(self.shape) > 1 and self.shape[0] == 1 else None
        self.graph = Graph(self.random.choice([given or self.shape, self.shape]), self.opset)
        self.made = [(self.x, self.shape)]

    def content(self) -> bytes:
        for _ in range(self.random.randint(3, 10)):
            self.random.choice(TENSOR_STEPS)(self)
            self.made.append((self.x, self.shape))
            if math.prod(self.shape) > 300:
                break
        self.x = self.graph.add("Reshape", self.x, np.array([math.prod(self.shape), 1]))
        weight, bias = self.array(3, math.prod(self.shape)), self.array(3, 1)
        self.x = self.graph.add("Add", self.graph.add("MatMul", weight, self.x), bias)
        return self.graph.content(self.x)

    def broadcasting(self) -> list[int]:
        """A shape that has a common one with the present one, which may be larger."""
        sizes = [
            self.random.choice([1, size, self.random.choice([2, 3]) if size == 1 else size])
            for size in self.shape
        ]
        more = [self.random.choice([1, 1, 2])] if self.random.random() < 0.1 else []
        return more or sizes[self.random.randint(0, len(sizes)) :]


def _combine_any(of: RandomTensors) -> None:
    constant = of.array(*of.broadcasting())
    kind = of.random.choice(["Add", "Sub", "Mul", *["Max"] * (of.opset > 7)])
    pair = [of.x, constant] if of.random.random() < 0.5 else [constant, of.x]
    try:
        shape = [*np.broadcast_shapes(of.shape, constant.shape)]
    except ValueError:
        return
    of.x, of.shape = of.graph.add(kind, *pair), shape


def _join_any(of: RandomTensors) -> None:
    """With a tensor of before, of which the shape need not be the same."""
    other, sizes = of.random.choice(of.made)
    try:
        shape = [*np.broadcast_shapes(of.shape, sizes)]
    except ValueError:
        return
    of.x, of.shape = of.graph.add(of.random.choice(["Add", "Sub", "Mul"]), other, of.x), shape


def _concatenate_any(of: RandomTensors) -> None:
    if not of.shape:
        return
    axis = of.random.randrange(len(of.shape))
    half = of.graph.add("Tanh", of.x)
    of.x = of.graph.add("Concat", of.x, half, axis=axis - of.random.choice([0, len(of.shape)]))
    of.shape = [size * (1 + (at == axis)) for at, size in enumerate(of.shape)]


def _reorder_any(of: RandomTensors) -> None:
    order = of.random.sample(range(len(of.shape)), len(of.shape))
    if order:
        of.apply("Transpose", perm=order)
        of.shape = [of.shape[axis] for axis in order]


def _reshape_any(of: RandomTensors) -> None:
    left, sizes = math.prod(of.shape), []
    while left > 1 and of.random.random() < 0.8:
        sizes.append(of.random.choice([n for n in range(1, left + 1) if left % n == 0]))
        left //= sizes[-1]
    sizes.insert(of.random.randint(0, len(sizes)), left)
    given = [*sizes]
    if of.random.random() < 0.5:
        given[of.random.randrange(len(given))] = -1
    of.apply("Reshape", np.array(given, dtype=np.int64))
    of.shape = sizes


def _reduce_any(of: RandomTensors) -> None:
    axes = of.random.sample(range(len(of.shape)), of.random.randint(0, len(of.shape)))
    if not axes:
        return
    keep = of.random.randint(0, 1)
    inputs, attributes = of.sized("axes", axes, 18)
    of.apply(of.random.choice(["ReduceMean", "ReduceMax"]), *inputs, **attributes, keepdims=keep)
    of.shape = [*np.zeros(of.shape).sum(tuple(axes), keepdims=bool(keep)).shape]


def _select_any(of: RandomTensors) -> None:
    if not of.shape:
        return
    axis = of.random.randrange(len(of.shape))
    sizes = of.random.choice([(), (1,), (3,), (2, 2)])
    size = of.shape[axis]
    places = of.numbers.integers(-size, size, sizes)
    of.apply("Gather", places, axis=axis)
    of.shape = [*of.shape[:axis], *sizes, *of.shape[axis + 1 :]]


def _wrap_any(of: RandomTensors) -> None:
    axis = of.random.randint(0, len(of.shape))
    inputs, attributes = of.sized("axes", [axis], 13)
    of.apply("Unsqueeze", *inputs, **attributes)
    of.shape = [*of.shape[:axis], 1, *of.shape[axis:]]
    if of.random.random() < 0.3:
        of.apply("Squeeze")
        of.shape = [size for size in of.shape if size != 1]


def _flatten_any(of: RandomTensors) -> None:
    axis = of.random.randint(0, len(of.shape))
    of.apply("Flatten", axis=axis)
    of.shape = [math.prod(of.shape[:axis]), math.prod(of.shape[axis:])]


def _multiply_any(of: RandomTensors) -> None:
    if len(of.shape) == 0:
        return
    if of.random.random() < 0.5:
        of.apply("MatMul", of.array(of.shape[-1], 2))
        of.shape = [*of.shape[:-1], 2]
    else:
        inner = of.shape[-2:][0]
        of.x = of.graph.add("MatMul", of.array(3, inner), of.x)
        of.shape = [*of.shape[:-2], 3, *of.shape[-2:][1:]]


def _pad_any(of: RandomTensors) -> None:
    pads = of.random.choices([0, 0, 1], k=2 * len(of.shape))
    inputs, attributes = of.sized("pads", pads, 11)
    if pads:
        of.apply("Pad", *inputs, **attributes)
    of.shape = [size + pads[at] + pads[len(of.shape) + at] for at, size in enumerate(of.shape)]


TENSOR_STEPS = [
    *(_combine_any, _combine_any, _join_any, _concatenate_any, _reorder_any, _reshape_any),
    *(_reduce_any, _select_any, _wrap_any, _flatten_any, _multiply_any, _pad_any),
]
