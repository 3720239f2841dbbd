"""ONNX files in interval layers: against onnxruntime, numbers by hand, and files that are wrong."""

import contextlib
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run_ibp, snapshot

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnx
import test_exporting
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import Graph, RandomGraph, RandomTensors, runtime_logits

from ibpcore import Interval, UserError, certified_margins, from_onnx, load_model, save_model
from ibpcore import nn as il
from ibpcore.interop.exporting.onnx import check_onnx, to_onnx
from ibpcore.interop.reading.folding import exact
from ibpcore.interop.reading.onnx import layers_of

RANDOM_GRAPHS = 25
IMAGE = ["batch", 2, 5, 6]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.onnx"


def weights(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def some_inputs(network, count=4):
    dtype = next((t.dtype for t in network.state_dict().values() if t.is_floating_point()), None)
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, *network.in_shape, generator=generator, dtype=dtype)


def kinds(network) -> list[str]:
    return [type(layer).__name__.removeprefix("Interval") for layer in network]


def read(content: bytes, path: Path, **how):
    path.write_bytes(content)
    return from_onnx(path, **how)


@torch.no_grad()
def agreeing(content: bytes, path: Path):
    """The network of a file, after a comparison of its logits with those of onnxruntime."""
    network = read(content, path)
    assert not network.training
    inputs = some_inputs(network)
    expected = runtime_logits(content, inputs)
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-5 * scale)
    return network


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", test_exporting.NETWORKS)
def test_what_is_exported_comes_back(name, path):
    """With the same logits, saved and loaded too, and again exported to an equal network."""
    model = test_exporting.NETWORKS[name]()
    images = test_exporting.images_for(model)
    found = agreeing(to_onnx(model), path)
    assert (found.in_shape, found.classes) == (model.in_shape, model.classes)
    with torch.no_grad():
        torch.testing.assert_close(found(images), model(images), rtol=1e-5, atol=1e-6)
        save_model(found, path.parent / "m.safetensors")
        again = load_model(path.parent / "m.safetensors")
        assert torch.equal(again(images), found(images))
        assert check_onnx(to_onnx(found), found, images) < 1e-5
        # A layer may come back as two, but never with bounds that miss its values.
        bounds = found(Interval.ball(images, 0.02))
        near = (images + 0.02 * torch.randn_like(images).clamp(-1, 1)).clamp(0, 1)
        assert bool(
            ((bounds.lower - 1e-5 <= found(near)) & (found(near) <= bounds.upper + 1e-5)).all()
        )


@pytest.mark.parametrize("name", ["silu", "mish", "hardswish", "gelu", "gelu by tanh"])
def test_gates_come_back_as_one_layer(name, path):
    """Their parts would have looser bounds, and Erf alone has no rule."""
    model = test_exporting.NETWORKS[name]()
    assert kinds(read(to_onnx(model), path)) == kinds(model)


@pytest.mark.parametrize("kind", [RandomGraph, RandomTensors])
@pytest.mark.parametrize("seed", range(RANDOM_GRAPHS))
def test_random_graphs(seed, kind, path):
    agreeing(kind(seed).content(), path)


def of_images(*steps, opset=17, shape=IMAGE):
    """The content of a file that applies steps, and then flattens."""

    def content():
        graph, x = Graph(shape, opset), "x"
        for kind, *rest in steps:
            attributes = rest.pop() if rest and isinstance(rest[-1], dict) else {}
            x = graph.add(kind, x, *rest, **attributes)
        return graph.content(graph.add("Flatten", x))

    return content


def ints(*values):
    return np.array(values, dtype=np.int64)


SINGLE = {
    "conv of rows": of_images(
        ("Conv", weights(4, 1, 3), weights(4), {"group": 2, "pads": [2, 1], "strides": [2]}),
        shape=[1, 2, 7],
    ),
    "conv, same": of_images(
        ("Conv", weights(3, 2, 2, 3), {"strides": [2, 1], "auto_pad": "SAME_LOWER"})
    ),
    "transposed conv of rows": of_images(
        ("ConvTranspose", weights(2, 3, 3), {"strides": [2], "pads": [1, 0]}), shape=[1, 2, 7]
    ),
    "transposed conv, same": of_images(
        ("ConvTranspose", weights(2, 1, 3, 4), {"strides": [2, 3], "auto_pad": "SAME_UPPER"})
    ),
    "transposed conv to a shape": of_images(
        ("ConvTranspose", weights(2, 1, 3, 3), {"strides": [2, 2], "output_shape": [10, 11]})
    ),
    "transposed conv, more added than cut off": of_images(
        (
            "ConvTranspose",
            weights(2, 1, 2, 2),
            {"strides": [3, 3], "pads": [1, 0, 0, 1], "output_padding": [2, 1]},
        )
    ),
    "clip below": of_images(("Clip", np.float32(0.3))),
    "clip above": of_images(("Clip", "", np.float32(0.3))),
    "no clip": of_images(("Clip", np.float32(-np.inf), np.float32(np.inf))),
    "clip to one number": of_images(("Clip", np.float32(0.7), np.float32(0.3)), opset=13),
    "clip, old": of_images(("Clip", {"max": 0.25}), opset=9),
    "slope for all": of_images(("PRelu", weights(1))),
    "squeeze, old": of_images(("Unsqueeze", {"axes": [0]}), ("Squeeze", {"axes": [0]}), opset=11),
    "unsqueeze at the end": of_images(("Unsqueeze", ints(-1)), ("Squeeze", ints(-1))),
    "slice, old": of_images(
        ("Slice", {"starts": [1, -3], "ends": [9, 6], "axes": [2, 3]}), opset=7
    ),
    "pad, old": of_images(("Pad", {"pads": [0, 0, 1, 0, 0, 0, 0, 2]}), opset=7),
    "pad some axes": of_images(("Pad", ints(1, 2), np.float32(0.5), ints(-1)), opset=18),
    "crop": of_images(("Pad", ints(0, 0, -1, 0, 0, 0, 1, -2))),
    "wrap": of_images(("Pad", ints(0, 0, 1, 2, 0, 0, 0, 1), {"mode": "wrap"}), opset=19),
    "mean, new": of_images(("ReduceMean", ints(2, 3)), opset=18),
    "mean over all but the batch": of_images(("ReduceMean", {"axes": [3, 1], "keepdims": 0})),
    "sum": of_images(("ReduceSum", ints(1))),
    "sum, old": of_images(("ReduceSum", {"axes": [-2]}), opset=11),
    "largest": of_images(("ReduceMax", {"axes": [2], "keepdims": 0})),
    "no reduction": of_images(("ReduceMean", {"noop_with_empty_axes": 1}), opset=18),
    "dropout": of_images(("Dropout", np.float32(0.5)), opset=13),
    "casts": of_images(("Cast", {"to": TensorProto.DOUBLE}), ("Cast", {"to": TensorProto.FLOAT})),
    "expand": of_images(("ReduceMean", {"axes": [1, 2]}), ("Expand", ints(1, 3, 4, 1))),
    "tile": of_images(("Tile", ints(1, 2, 1, 3))),
    "gather one": of_images(("Gather", np.array(-2), {"axis": 3})),
    "gather a matrix": of_images(("Gather", ints(0, 1, 1, 0, 4, -1).reshape(2, 3), {"axis": 2})),
    "flatten at the end": of_images(("Flatten", {"axis": -1})),
    "depth to space": of_images(("DepthToSpace", {"blocksize": 2}), shape=[1, 8, 2, 3]),
    "depth to space, columns first": of_images(
        ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}), shape=[1, 8, 2, 3]
    ),
    "space to depth": of_images(("SpaceToDepth", {"blocksize": 2}), shape=[1, 2, 4, 6]),
    "upsample, old": of_images(("Upsample", {"scales": [1.0, 1.0, 2.0, 3.0]}), opset=7),
    "upsample": of_images(("Upsample", np.float32([1, 1, 2, 1])), opset=9),
    "resize, opset 10": of_images(("Resize", np.float32([1, 1, 2, 2])), opset=10),
    "resize by halves": of_images(("Resize", "", np.float32([1, 1, 1, 2])), opset=13),
    "resize to a size": of_images(
        ("Resize", "", "", ints(1, 2, 10, 3), {"coordinate_transformation_mode": "asymmetric"}),
        opset=13,
    ),
    "resize some axes": of_images(
        ("Resize", "", np.float32([3]), {"axes": [2], "nearest_mode": "ceil"}), opset=18
    ),
    "max pool, ceil": of_images(
        ("MaxPool", {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1}), opset=12
    ),
    "max pool, dilated, more padding at the end": of_images(
        (
            "MaxPool",
            {"kernel_shape": [2, 3], "dilations": [2, 2], "pads": [0, 1, 1, 2]},
        ),
    ),
    "max pool of rows": of_images(
        ("MaxPool", {"kernel_shape": [3], "pads": [2, 1]}), shape=[1, 2, 7]
    ),
    "max pool, same": of_images(
        ("MaxPool", {"kernel_shape": [2, 2], "strides": [2, 2], "auto_pad": "SAME_UPPER"})
    ),
    "average pool, ceil": of_images(
        ("AveragePool", {"kernel_shape": [2, 3], "strides": [2, 2], "ceil_mode": 1})
    ),
    "average pool of rows": of_images(
        ("AveragePool", {"kernel_shape": [3], "pads": [2, 1], "count_include_pad": 1}),
        shape=[1, 2, 7],
    ),
    "square": of_images(("Pow", np.float32(2))),
    "celu": of_images(("Celu", {"alpha": 0.7})),
    "hard sigmoid": of_images(("HardSigmoid", {"alpha": 0.3, "beta": 0.4})),
    "selu with numbers": of_images(("Selu", {"alpha": 0.3, "gamma": 1.4})),
    "hard swish": of_images(("HardSwish",)),
    "mish": of_images(("Mish",), opset=18),
    "gelu": of_images(("Gelu", {"approximate": "tanh"}), opset=20),
    "constants of every shape": of_images(
        ("Add", weights(5, 6)),
        ("Mul", weights(2, 1, 6)),
        ("Sub", weights(1, 2, 5, 1)),
        ("Div", weights(6) + 3),
    ),
    "fewer channels than the constant": of_images(("Add", weights(1, 4, 1, 1)), shape=[1, 1, 2, 4]),
    "constants as many as channels, along the side": of_images(
        ("Add", weights(4)), shape=[1, 4, 3, 4]
    ),
    "features": of_images(
        ("BatchNormalization", *(weights(6, seed=i) ** 2 + 0.1 for i in range(4))),
        ("PRelu", weights(6)),
        ("Add", weights(6)),
        shape=["n", 6],
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_operators(name, path):
    agreeing(SINGLE[name](), path)


def matrices(*sides, alpha=1.0, beta=1.0, flip=(0, 0), bias=True):
    """Gemm of the input, on the left or on the right, and a constant."""

    def content():
        graph = Graph(sides[0])
        matrix = weights(*sides[1])
        terms = ("x", matrix) if sides[2] == "left" else (matrix, "x")
        more = [weights(*sides[3])] if bias else []
        how = {"alpha": alpha, "beta": beta, "transA": flip[0], "transB": flip[1]}
        return graph.content(graph.add("Gemm", *terms, *more, **how))

    return content


GEMMS = {
    "plain": matrices([1, 4], (4, 3), "left", (3,)),
    "turned": matrices([1, 4], (3, 4), "left", (1, 3), flip=(0, 1)),
    "no bias": matrices([1, 4], (4, 3), "left", (), bias=False),
    "one number": matrices([1, 4], (4, 3), "left", ()),
    "factors": matrices([1, 4], (4, 3), "left", (3,), alpha=0.3, beta=0.5),
    "no beta": matrices([1, 4], (4, 3), "left", (3,), beta=0.0),
    "column": matrices([4, 1], (3, 4), "right", (3, 1)),
    "column, turned": matrices([4, 1], (4, 3), "left", (3,), flip=(1, 0)),
    "matrix on the left": matrices([4, 2], (3, 4), "right", (3, 2)),
    "matrix on the right": matrices([2, 4], (4, 3), "left", (2, 1)),
    "row on the right": matrices([1, 4], (3, 4), "right", (3, 1), flip=(0, 1)),
}


@pytest.mark.parametrize("name", GEMMS)
def test_products_with_matrices(name, path):
    agreeing(GEMMS[name](), path)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [[4], [4, 1], [1, 4], [1, 4, 4], [3, 4, 4]])
@pytest.mark.parametrize("matrix", [(4,), (1, 4), (4, 4), (1, 1, 4, 4)])
def test_matrices_of_other_dimensions(side, given, matrix, path):
    """The output has as many dimensions as in NumPy; or they do not fit."""
    pair = [np.zeros(given), np.zeros(matrix)]
    pair, names = (pair, ("x", weights(*matrix)))
    if side == "left":
        pair, names = pair[::-1], names[::-1]
    graph = Graph(given)
    product = graph.add("MatMul", *names)
    try:
        rank = np.matmul(*pair).ndim
    except ValueError:
        with pytest.raises(UserError, match="do not fit each other"):
            read(graph.content(product), path)
        return
    means = graph.add("ReduceMean", product, axes=[rank - 1], keepdims=0) if rank else product
    spread = graph.add(
        "Mul", graph.add("Unsqueeze", means, ints(rank - 1 if rank else 0)), weights(2)
    )
    agreeing(graph.content(graph.add("Reshape", spread, ints(-1))), path)


def test_by_hand(path):
    """y = -2 * max(W x + b, 0) + [1, 2], with W = [[1, -1], [2, 0]], b = [0.5, -3], x = [3, 1]:
    W x + b = [2.5, 3]; y = [-4, -4]. Of the ball of radius 1: W x + b in [0.5, 4.5] x [1, 5]."""
    graph = Graph([1, 2])
    x = graph.add("MatMul", "x", np.float32([[1, 2], [-1, 0]]))
    x = graph.add("Relu", graph.add("Add", x, np.float32([0.5, -3])))
    x = graph.add("Add", graph.add("Mul", np.float32(-2), x), np.float32([1, 2]))
    network = read(graph.content(x), path)
    assert kinds(network) == ["Linear", "ReLU", "Scale", "Scale"]
    inputs = torch.tensor([[3.0, 1.0]])
    assert network(inputs).tolist() == [[-4.0, -4.0]]
    bounds = network(Interval.ball(inputs, 1.0, clip=None))
    assert (bounds.lower.tolist(), bounds.upper.tolist()) == ([[-8.0, -8.0]], [[0.0, 0.0]])


def test_a_bias_belongs_to_its_product(path):
    """So that the difference of logits is merged with one linear layer: elision."""
    graph = Graph([1, 4])
    hidden = graph.add(
        "Relu", graph.add("Add", graph.add("MatMul", "x", weights(4, 5)), weights(5))
    )
    logits = graph.add("Sub", graph.add("MatMul", hidden, weights(5, 3)), weights(3))
    network = agreeing(graph.content(logits), path)
    assert kinds(network) == ["Linear", "ReLU", "Linear"]
    assert torch.equal(network[2].bias, -torch.tensor(weights(3)))


def test_a_bias_that_is_not_added_everywhere_stays_apart(path):
    graph = Graph([1, 4])
    product = graph.add("MatMul", "x", weights(4, 3))
    network = agreeing(
        graph.content(graph.add("Mul", graph.add("Add", product, weights(3)), product)), path
    )
    assert network[0].bias is None


def test_branches(path):
    """Of different shapes, from one input, within one another."""
    graph = Graph(IMAGE)
    conv = graph.add("Conv", "x", weights(2, 2, 1, 1))
    inner = graph.add("Add", graph.add("Relu", conv), conv)
    means = graph.add("GlobalAveragePool", inner)
    whole = graph.add("Sub", graph.add("Mul", inner, means), graph.add("ReduceMean", "x", axes=[1]))
    parts = graph.add("Concat", whole, "x", whole, axis=1)
    agreeing(graph.content(graph.add("Flatten", parts)), path)


def test_splits(path):
    for opset, inputs, attributes in (
        (11, [], {"split": [1, 4]}),
        (13, [ints(1, 4)], {}),
        (17, [], {}),
        (18, [], {"num_outputs": 2}),
    ):
        graph = Graph([1, 2, 6 if opset >= 17 else 5], opset)
        first = graph.add("Split", "x", *inputs, outputs=2, axis=2, **attributes)
        pair = graph.add("Concat", first + "b", first, axis=2)
        agreeing(graph.content(graph.add("Flatten", pair)), path)


SHAPES = {
    "column": ([4, 1], [4, 1]),
    "vector": ([5], [5]),
    "batch of one in front of a column": ([1, 6, 1], [6, 1]),
    "rows without a batch": ([3, 4], [3, 4]),
    "colours last": ([1, 5, 6, 3], [5, 6, 3]),
    "unknown batch": ([None, 3], [3]),
    "a batch of none": ([0, 3], [3]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_shape_of_an_input(name, path):
    given, expected = SHAPES[name]
    graph = Graph(given)
    network = read(graph.content(graph.add("Relu", "x")), path)
    assert network.in_shape == tuple(expected)
    assert network.classes == math.prod(expected)


@pytest.mark.parametrize("shape", [[4, 1], [4], [1, 4, 1]])
def test_columns_become_linear_layers(shape, path):
    """As in networks of VNN-COMP without a batch: W x + b for a column x."""
    graph, x = Graph(shape), "x"
    tail = (1,) * (len(shape) > 1)
    for sizes in ((5, 4), (3, 5)):
        x = graph.add("Add", graph.add("MatMul", weights(*sizes), x), weights(sizes[0], *tail))
        x = graph.add("Relu", x)
    network = agreeing(graph.content(x), path)
    assert [kind for kind in kinds(network) if kind != "Flatten"] == ["Linear", "ReLU"] * 2


def test_a_fixed_batch_is_read_image_by_image(path):
    graph = Graph([10, 2, 3, 3])
    x = graph.add("Reshape", graph.add("Relu", "x"), ints(10, -1))
    x = graph.add("Gemm", x, weights(18, 4))
    content = graph.content(x, [10, 4])
    network = read(content, path)
    assert (network.in_shape, network.classes) == ((2, 3, 3), 4)
    images = torch.rand(10, 2, 3, 3)
    whole = runtime_logits(content, images[None]).view(10, 4)
    torch.testing.assert_close(network(images), whole, rtol=1e-5, atol=1e-6)


def test_a_fixed_batch_whose_images_differ_is_refused(path):
    graph = Graph([3, 4])
    with pytest.raises(UserError, match="it mixes the images of its batch of 3"):
        read(graph.content(graph.add("Add", "x", weights(3, 4)), [3, 4]), path)


def test_shapes_that_the_graph_computes(path):
    """As PyTorch writes x.view(x.size(0), -1), and expands a constant."""
    graph = Graph(IMAGE, 13)
    size = graph.add("Gather", graph.add("Shape", "x"), np.array(0), axis=0)
    rest = graph.add("Constant", value=numpy_helper.from_array(ints(-1)))
    shape = graph.add("Concat", graph.add("Unsqueeze", size, ints(0)), rest, axis=0)
    x = graph.add("Reshape", "x", shape)
    wide = graph.add("Mul", graph.add("Shape", x), ints(1, 1))
    ones = graph.add("ConstantOfShape", wide, value=numpy_helper.from_array(np.float32([0.5])))
    agreeing(graph.content(graph.add("Add", x, ones)), path)


def test_initialisers_may_be_inputs_too(path):
    """As in files of before IR version 4."""
    graph = Graph([1, 3])
    model = graph.model(graph.add("Mul", "x", weights(3)))
    port = helper.make_tensor_value_info("c0", TensorProto.FLOAT, [3])
    model.graph.input.insert(0, port)
    path.write_bytes(model.SerializeToString())
    assert from_onnx(path).in_shape == (3,)


def test_what_the_output_does_not_depend_on_is_ignored(path):
    graph = Graph([1, 3])
    graph.add("Softmax", "x")
    assert kinds(read(graph.content(graph.add("Relu", "x")), path)) == ["ReLU"]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.DOUBLE, torch.float64),
        (TensorProto.FLOAT16, torch.float32),
        (TensorProto.BFLOAT16, torch.float32),
    ],
)
def test_types(kind, dtype, path):
    """Of half precision the numbers are exactly those in the file."""
    graph = Graph([1, 3], type=kind)
    weight = weights(3, 4).astype(helper.tensor_dtype_to_np_dtype(kind))
    network = read(graph.content(graph.add("Relu", graph.add("MatMul", "x", weight))), path)
    assert network[0].weight.dtype == dtype
    assert network[0].weight.tolist() == weight.astype(np.float64).T.tolist()
    save_model(network, path.parent / "m.safetensors")
    margins = certified_margins(
        network, some_inputs(network), torch.zeros(4).long(), torch.zeros(1, 4)
    )
    assert margins.shape == (1, 4)


def test_a_double_constant_is_rounded_nowhere(path):
    for value, fits in ((0.5, True), (0.1, False)):
        graph = Graph([1, 3])
        wide = graph.add("Cast", "x", to=TensorProto.DOUBLE)
        graph.constants.append(numpy_helper.from_array(np.float64([value]), "d"))
        content = graph.content(
            graph.add("Cast", graph.add("Mul", wide, "d"), to=TensorProto.FLOAT)
        )
        if fits:
            agreeing(content, path)
        else:
            with pytest.raises(UserError, match=r"node 'Mul_1' \(Mul\): a constant is double"):
                read(content, path)


@pytest.mark.parametrize(
    ("kind", "a", "b", "is_exact"),
    [
        ("Mul", 3.0, 0.25, True),
        ("Mul", np.float32(0.1), np.float32(0.3), False),
        ("Mul", 2.0**-140, 2.0**-9, True),
        ("Mul", 2.0**-140, 2.0**-10, False),  # below the smallest float32
        ("Mul", 2.0**100, 2.0**100, False),  # above the largest
        ("Add", 1.0, 2.0**-23, True),
        ("Add", 1.0, 2.0**-24, False),
        ("Add", 2.0**100, 2.0**-100, False),  # even a float64 would be rounded
        ("Sub", 2.0**100, 2.0**-100, False),
        ("Sub", 5.0, 7.5, True),
        ("Div", 1.0, 4.0, True),
        ("Div", 1.0, 3.0, False),
        ("Div", 1.0, 0.0, False),
    ],
)
def test_constants_are_computed_where_nothing_is_rounded(kind, a, b, is_exact):
    pair = np.float32([a]), np.float32([b])
    if is_exact:
        operation = {"Mul": np.multiply, "Add": np.add, "Sub": np.subtract, "Div": np.divide}[kind]
        assert exact(kind, *pair) == operation(np.float64(a), np.float64(b))
    else:
        with pytest.raises(UserError, match="rounded"):
            exact(kind, *pair)


def test_weights_in_other_files(path):
    graph = Graph([1, 3])
    model = graph.model(graph.add("MatMul", "x", weights(3, 200)))
    onnx.save_model(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    assert torch.equal(from_onnx(path)[0].weight, torch.tensor(weights(3, 200).T))
    (path.parent / "w.data").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"the weights 'c0' are not in w\.data"):
        from_onnx(path)


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "", ".", "link", "none"])
def test_weights_are_read_from_the_folder_alone(location, path, tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 12)
    (inside / "link").symlink_to(tmp_path / "secret")
    graph = Graph([1, 3])
    model = graph.model(graph.add("Add", "x", weights(3)))
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    (inside / "net.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UserError, match="which is no file in its folder"):
        from_onnx(inside / "net.onnx")


def with_(change):
    """A small valid model after a change."""

    def content():
        graph = Graph([1, 3])
        model = graph.model(graph.add("Relu", graph.add("Add", "x", weights(3))))
        change(model)
        return model.SerializeToString()

    return content


def _cycle(model):
    model.graph.node[0].input[1] = model.graph.node[1].output[0]


def _second_input(model):
    model.graph.input.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3]))


def _second_output(model):
    model.graph.output.append(helper.make_tensor_value_info("Add_0", TensorProto.FLOAT, [1, 3]))


def _sizes(*sizes, kind=TensorProto.FLOAT):
    def change(model):
        model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", kind, sizes))

    return change


def _wrong_size(model):
    model.graph.initializer[0].dims[0] = 10**12


def _not_a_number(model):
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.float32([1, np.nan, 2]), "c0"))


def _opset(version):
    def change(model):
        model.opset_import[0].version = version

    return change


def _domain(model):
    model.graph.node[0].domain = "com.microsoft"


def steps(*given, shape=IMAGE, opset=17):
    return of_images(*given, shape=shape, opset=opset)


REFUSED = {
    "no file": (lambda: b"", "it is no ONNX file, or damaged"),
    "text": (lambda: b"a text" * 100, "it is no ONNX file, or damaged"),
    "cut off": (lambda: of_images(("Conv", weights(4, 2, 3, 3)))()[:-9], "or damaged"),
    "cycle": (with_(_cycle), "ONNX does not accept it"),
    "two inputs": (with_(_second_input), "it has 2 inputs ('x', 'y'), not one"),
    "two outputs": (with_(_second_output), "it has 2 outputs"),
    "sizes": (with_(_sizes("n", "m")), "its input 'x' has shape 1 x ?: all sizes but"),
    "no sizes": (with_(_sizes()), "its input 'x' has shape ?"),
    "one size": (with_(_sizes("n")), "its input 'x' has shape ?"),
    "endless": (with_(_sizes(1, 2**40)), "not between 1 and"),
    "whole numbers": (with_(_sizes(1, 3, kind=TensorProto.INT64)), "its input is int64, not float"),
    "huge tensor": (with_(_wrong_size), "the tensor 'c0' is damaged"),
    "not finite": (with_(_not_a_number), "node 'Add_0' (Add): a constant is not finite"),
    "old opset": (with_(_opset(6)), "its operators are of opset [6], not of one in 7-"),
    "future opset": (with_(_opset(9999)), "its operators are of opset [9999], not of one in 7-"),
    "domain": (with_(_domain), "node 'Add_0': no interval rule for Add"),
    "softmax": (steps(("Softmax", {"axis": 1})), "node 'Softmax_0': no interval rule for Softmax"),
    "group norm": (
        steps(("InstanceNormalization", weights(2), weights(2))),
        "node 'InstanceNormalization_0': no interval rule for InstanceNormalization",
    ),
    "truth values": (
        lambda: _with_where(),
        "node 'Greater_0' (Greater): it has an interval rule only for constants",
    ),
    "erf": (steps(("Erf",)), "node 'Erf_0' (Erf): no interval rule is known for it"),
    "batch norm in training": (
        steps(("BatchNormalization", *[weights(2) ** 2] * 4, {"training_mode": 1})),
        "only batch norm in inference mode",
    ),
    "dropout in training": (
        steps(("Dropout", np.float32(0.5), np.array(True))),
        "it is in training mode",
    ),
    "variance": (
        steps(("BatchNormalization", *[weights(2)] * 3, np.float32([1, -1]))),
        "a variance is not above 0",
    ),
    "division by zero": (steps(("Div", np.float32([1, 0] * 3))), "it divides by 0"),
    "division by a signal": (lambda: _swapped("Div"), "only a division by a constant"),
    "power": (steps(("Pow", np.float32(3))), "of all powers only the square"),
    "product of signals": (lambda: _doubled("MatMul"), "only products with a constant matrix"),
    "maximum of signals": (lambda: _doubled("Max"), "only of a signal and a constant"),
    "negative slope": (steps(("LeakyRelu", {"alpha": -0.1})), "needs negative_slope >= 0"),
    "slopes": (steps(("PRelu", weights(2, 5, 6))), "only one slope for each channel"),
    "cast": (steps(("Cast", {"to": TensorProto.INT64}), ("Cast", {"to": 1})), "a cast to whole"),
    "rounded": (
        matrices([1, 4], (4, 3), "left", (3,), beta=0.3),
        "node 'Gemm_0' (Gemm): it computes constants, which would be rounded",
    ),
    "resize": (
        steps(("Resize", "", np.float32([1, 1, 1.5, 1]))),
        "only mode nearest, by whole factors",
    ),
    "linear": (
        steps(("Resize", "", np.float32([1, 1, 2, 2]), {"mode": "linear"})),
        "only mode nearest, by whole factors",
    ),
    "window in the padding": (
        steps(("MaxPool", {"kernel_shape": [1, 1], "pads": [0, 0, 1, 1]})),
        "one of its windows lies in the padding",
    ),
    "clip to infinity": (
        steps(("Clip", np.float32(np.inf), np.float32(0.5))),
        "node 'Clip_0' (Clip): a constant is not finite",
    ),
    "no weights": (
        steps(("Conv", np.zeros((0, 2, 1, 1)))),
        "node 'Conv_0' (Conv): a tensor has 0 numbers, not between 1 and",
    ),
    "an axis twice": (
        lambda: of_images(("Unsqueeze", ints(0, 0)), shape=[1, 3])(),
        "it adds an axis twice",
    ),
    "endless input": (with_(_sizes(2**62, 2)), "numbers, not between 1 and"),
    "padding by -infinity": (
        steps(("Pad", ints(0, 0, 1, 1, 0, 0, 1, 1), np.float32(-np.inf))),
        "node 'Pad_0' (Pad): no interval rule is known for it",
    ),
    "volumes": (
        steps(("Conv", weights(2, 2, 1, 1, 1)), shape=[1, 2, 3, 3, 3]),
        "convolutions in 3 dimensions",
    ),
    "concatenation with a constant": (
        steps(("Concat", weights(1, 2, 5, 6), {"axis": 1})),
        "its input 1 does not depend on the images",
    ),
    "shape": (steps(("Reshape", ints(7, -1))), "shape (1, 2, 5, 6) cannot become (7, 8)"),
    "shapes": (steps(("Add", weights(5))), "do not fit each other"),
    "too much": (steps(("Tile", ints(1, 1, 2**20, 2**20))), "not between 1 and"),
    "padded too much": (
        steps(("Pad", ints(0, 0, 2**40, 0, 0, 0, 0, 0), {"mode": "edge"}), opset=13),
        "not between 1 and",
    ),
    "constant too large": (
        lambda: _huge_constant(),
        "node 'ConstantOfShape_0' (ConstantOfShape): it would have more than",
    ),
    "no input used": (lambda: _constant_output(), "its output does not depend on its input"),
    "one number": (of_images(("ReduceMean", {"axes": [1, 2, 3]})), "not logits (2, classes)"),
}


def _with_where():
    graph = Graph([1, 3])
    above = graph.add("Greater", "x", np.float32(0))
    return graph.content(graph.add("Where", above, "x", np.float32(0)))


def _swapped(kind):
    graph = Graph([1, 3])
    return graph.content(graph.add(kind, weights(3), "x"))


def _doubled(kind):
    graph = Graph([3, 3])
    return graph.content(graph.add(kind, "x", "x"))


def _huge_constant():
    graph = Graph([1, 3])
    return graph.content(graph.add("Add", "x", graph.add("ConstantOfShape", ints(2**30, 3))))


def _constant_output():
    graph = Graph([1, 3])
    return graph.content(graph.add("Identity", weights(3)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(name, path):
    make, message = REFUSED[name]
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(make(), path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_bytes_that_are_changed_are_never_a_crash(path):
    """Files with some bytes overwritten or cut out are read, or refused in one line."""
    content = bytearray(RandomGraph(3).content())
    numbers = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for place in numbers.integers(0, len(damaged), 4):
            damaged[place] = numbers.integers(0, 256)
        path.write_bytes(bytes(damaged[: numbers.integers(1, len(damaged) + 1)]))
        with contextlib.suppress(UserError):  # which has one line by itself
            from_onnx(path)


def test_deep_nesting_is_read_or_refused(path):
    graph, x = Graph([1, 3]), "x"
    for _ in range(1000):
        x = graph.add("Add", graph.add("Relu", x), "x")
    path.write_bytes(graph.content(x))
    with pytest.raises(UserError):
        from_onnx(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.onnx: it is missing, or not a file"):
        from_onnx(tmp_path / "none.onnx")


def test_the_extra_is_named(monkeypatch, path):
    path.write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnx is needed: pip install 'ibpcore\[export\]'"):
        from_onnx(path)


def test_one_number_is_read_as_layers(path):
    path.write_bytes(of_images(("ReduceMean", {"axes": [1, 2, 3]}))())
    layers, shape = layers_of(path)
    assert shape == (2, 5, 6)
    images = torch.rand(3, *shape)
    expected = images.flatten(1).mean(1, keepdim=True)
    torch.testing.assert_close(il.IntervalSequential(*layers)(images), expected)


# Images for networks that take other shapes


@pytest.mark.parametrize("given", [[1, 12, 1], [12], [12, 1], [1, 12], [1, 1, 12]])
def test_images_for_flat_inputs(given, path):
    graph = Graph(given)
    content = graph.content(graph.add("Relu", graph.add("Mul", "x", np.float32(2))))
    network = read(content, path, in_shape=(1, 3, 4))
    images = torch.rand(2, 1, 3, 4)
    assert network.in_shape == (1, 3, 4)
    assert torch.equal(network(images), 2 * images.flatten(1))


def test_images_for_inputs_with_colours_last(path):
    graph = Graph([1, 3, 4, 2])
    content = graph.content(graph.add("Flatten", graph.add("Relu", "x")))
    images = torch.rand(2, 2, 3, 4)
    assert torch.equal(
        read(content, path, in_shape=(2, 3, 4))(images), images.permute(0, 2, 3, 1).flatten(1)
    )
    for wrong in ((2, 4, 3), (24,), (1, 4, 6)):
        with pytest.raises(UserError, match=re.escape(f"cannot be {wrong}")):
            read(content, path, in_shape=wrong)


# The command


def imported(tmp_path, content, *arguments, name="net.onnx"):
    (tmp_path / name).write_bytes(content)
    return run_ibp("import", tmp_path / name, *arguments, "-o", tmp_path / "m.safetensors")


@pytest.mark.parametrize("name", ["net.onnx", "net"])
def test_the_command_writes_a_model(tmp_path, name):
    """It is recognised by its ending or its content."""
    model = test_exporting.NETWORKS["residual"]()
    outcome = imported(tmp_path, to_onnx(model), name=name)
    assert (outcome.code, outcome.err) == (0, "")
    assert "2 x 4 x 6, 3 classes" in outcome.out
    images = test_exporting.images_for(model)
    found = load_model(tmp_path / "m.safetensors")
    torch.testing.assert_close(found(images), model(images), rtol=1e-5, atol=1e-6)


def flat_digits():
    graph = Graph([1, 64, 1])
    return graph.content(graph.add("Gemm", graph.add("Flatten", "x"), weights(64, 10)))


def test_the_command_puts_images_and_normalisation_in_front(tmp_path):
    how = "--in-shape", "1,8,8", "--mean", "0.5", "--std", "0.25"
    outcome = imported(tmp_path, flat_digits(), *how)
    assert (outcome.code, outcome.err) == (0, "")
    images = torch.rand(3, 1, 8, 8)
    expected = ((images - 0.5) / 0.25).flatten(1) @ torch.tensor(weights(64, 10))
    found = load_model(tmp_path / "m.safetensors")(images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    certify = "certify", tmp_path / "m.safetensors", "--limit-test", "8", "--out", tmp_path / "c"
    outcome = run_ibp(*certify, "--dataset", "digits", "--epsilon-max", "0.1")
    assert (outcome.code, outcome.err) == (0, "")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (flat_digits, ("--dataset", "mnist"), "it takes inputs of shape (64, 1), which cannot be"),
        (flat_digits, ("--crop", "4"), "leave out --architecture, --crop and --order"),
        (flat_digits, ("--architecture", "cnn4"), "leave out --architecture, --crop and --order"),
        (flat_digits, ("--mean", "0.5"), "--mean and --std must be given together"),
        (flat_digits, ("--in-shape", "1,8,8", "--mean", "0", "--std", "0"), "must be above 0"),
        (flat_digits, ("--mean", "0,0", "--std", "1,1"), "its normalisation has 2 channels"),
        (
            of_images(("Sub", np.float32(0.5))),
            ("--mean", "0.5", "--std", "1"),
            "it holds its own normalisation: leave out --mean and --std",
        ),
        (of_images(("Softmax",)), (), "node 'Softmax_0': no interval rule for Softmax"),
        (lambda: b"\x08", (), "it is no ONNX file, or damaged"),
    ],
)
def test_a_wrong_import_is_one_line_and_leaves_nothing(tmp_path, content, arguments, message):
    outcome = imported(tmp_path, content(), *arguments)
    assert outcome.code != 0
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert [*snapshot(tmp_path)] == ["net.onnx"]
