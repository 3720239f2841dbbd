"""ONNX files that compute what the model does, and VNN-LIB properties that hold the whole ball."""

import csv
import re
import sys
from fractions import Fraction
from functools import partial
from pathlib import Path
from unittest import mock

import helpers
import numpy as np
import oracle
import pytest
import torch
from activations import ACTIVATIONS, DROPOUTS
from torch import nn

import ibpcore
from ibpcore import UserError, certified_margins, cnn7, save_model
from ibpcore.bounds.epsilons import as_number
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.interop.exporting import onnx as files
from ibpcore.interop.exporting.onnx import IR_VERSION, OPSET, check_onnx, export_onnx, to_onnx
from ibpcore.interop.exporting.onnx_nodes import WRITERS
from ibpcore.interop.exporting.vnnlib import (
    correct_images,
    outer_box,
    properties,
    property_text,
    write_benchmark,
)
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalConvTranspose2d,
    IntervalDivide,
    IntervalDropout,
    IntervalFlatten,
    IntervalIndexSelect,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalMatMul,
    IntervalMaxPool2d,
    IntervalNormalize,
    IntervalPermute,
    IntervalProduct,
    IntervalReLU,
    IntervalReshape,
    IntervalResidual,
    IntervalScale,
    IntervalSequential,
    IntervalSigmoid,
    IntervalSlice,
    IntervalSubtract,
    IntervalTanh,
    IntervalUpsample,
    IntervalZeroPad,
)
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Network

onnx = pytest.importorskip("onnx")
ReferenceEvaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator
pytest.importorskip("onnxruntime")

RELU = IntervalReLU()
SHAPE = (2, 4, 6)
"""Of images."""


def head(numbers=24):
    """What makes three logits of so many numbers."""
    return IntervalFlatten(), IntervalLinear(numbers, 3)


def filled(layer):
    """With weights, which the layer itself starts at 0."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(0))
    return layer


def network(*parts, shape=SHAPE):
    """`parts` with weights and statistics that no initialisation would give."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Network(parts, shape)
    return oracle.randomize_batch_norm(model, torch.rand(8, *shape, generator=generator), generator)


def conv(channels=1, **options):
    return IntervalConv2d(2, channels, **{"kernel_size": 3, "padding": 1, **options})


NETWORKS = {
    "convolution": lambda: network(conv(), *head()),
    "strides": lambda: network(
        IntervalConv2d(2, 4, (2, 3), stride=(1, 2), padding=(1, 2), groups=2, bias=False),
        IntervalFlatten(),
        IntervalLinear(4 * 5 * 4, 3),
    ),
    "dilation": lambda: network(conv(padding=(2, 2), dilation=2), *head()),
    "same": lambda: network(conv(kernel_size=(2, 3), dilation=(2, 1), padding="same"), *head()),
    "same, even kernel": lambda: network(conv(kernel_size=(2, 4), padding="same"), *head()),
    "valid": lambda: network(
        conv(padding="valid"), IntervalFlatten(), IntervalLinear(8, 3, bias=False)
    ),
    "transposed convolution": lambda: network(
        IntervalConvTranspose2d(2, 4, (3, 2), (2, 1), (1, 1), (1, 0), dilation=(1, 2)),
        *(IntervalReLU(), IntervalFlatten(), IntervalLinear(4 * 8 * 6, 3)),
    ),
    "rows": lambda: network(
        IntervalConv1d(2, 4, 3, 2, 1, dilation=2, groups=2, bias=False),
        *(IntervalBatchNorm(4), IntervalFlatten(), IntervalLinear(16, 3)),
        shape=(2, 10),
    ),
    "features": lambda: network(IntervalLinear(6, 4), RELU, IntervalLinear(4, 3), shape=(6,)),
    "matrix": lambda: network(
        *(filled(IntervalMatMul(6, 5)), IntervalFlatten(), filled(IntervalMatMul(40, 3)))
    ),
    "chosen": lambda: network(IntervalIndexSelect([5, 0, 0, 3], 3), conv(), *head(16)),
    "product": lambda: network(
        IntervalProduct(
            IntervalSequential(
                IntervalAvgPool2d((4, 6)), IntervalConv2d(2, 2, 1), IntervalUpsample((4, 6))
            ),
            IntervalProduct(conv(2)),
        ),
        *(conv(), *head()),
    ),
    "sums": lambda: network(
        IntervalAvgPool2d((2, 3), 1, (1, 0), divisor_override=1),
        IntervalAvgPool2d((2, 3), 1, (0, 1), divisor_override=7),
        *(conv(), *head(16)),
    ),
    "batch norm": lambda: network(
        conv(),
        IntervalBatchNorm(1, eps=0.1),
        IntervalFlatten(),
        IntervalBatchNorm(24),
        IntervalLinear(24, 3),
    ),
    "bare batch norm": lambda: network(conv(), IntervalBatchNorm(1, affine=False), *head()),
    "normalisation": lambda: network(IntervalNormalize((0.1, 1 / 3), (0.2, 0.7)), conv(), *head()),
    "activations": lambda: network(
        *(conv(2), IntervalSigmoid(), conv(2), IntervalTanh(), conv(2), IntervalLeakyReLU(0.3)),
        *(conv(), IntervalReLU()),
        *head(),
    ),
    **{
        name: partial(lambda make: network(conv(2), make(2), conv(), *head()), make)
        for name, make in ACTIVATIONS.items()
    },
    "flat activations": lambda: network(
        IntervalFlatten(),
        *(ACTIVATIONS[name](48) for name in ("prelu", "maximum", "minimum")),
        IntervalLinear(48, 3),
    ),
    **{
        name: partial(lambda make: network(make(2), IntervalFlatten(), IntervalLinear(48, 3)), make)
        for name, make in DROPOUTS.items()
    },
    "average pool": lambda: network(
        IntervalAvgPool2d((3, 2), (1, 2), (1, 0), count_include_pad=False), *head()
    ),
    "average pool over padding": lambda: network(
        IntervalAvgPool2d(2, 2, 1), IntervalFlatten(), IntervalLinear(2 * 3 * 4, 3)
    ),
    "max pool": lambda: network(
        IntervalMaxPool2d((2, 3), (1, 2), (1, 1), dilation=(2, 1)), *head()
    ),
    "max pool over the edge": lambda: network(
        IntervalMaxPool2d(3, 2, ceil_mode=True), IntervalFlatten(), IntervalLinear(12, 3)
    ),
    "linear of rows": lambda: network(
        IntervalLinear(6, 6),
        IntervalFlatten(2),
        IntervalLinear(24, 6, bias=False),
        IntervalFlatten(),
        IntervalLinear(12, 3),
    ),
    "part of the shape": lambda: network(
        IntervalFlatten(1, 2), IntervalLinear(6, 3), IntervalFlatten(), IntervalLinear(24, 3)
    ),
    "residual": lambda: network(
        IntervalResidual(conv(2), IntervalConv2d(2, 2, 1)),
        IntervalResidual(IntervalSequential(conv(2), IntervalResidual(IntervalReLU()))),
        conv(),
        *head(),
    ),
    "constants": lambda: network(
        IntervalScale(2, torch.tensor([0.5, -2.0]), 0.3),
        IntervalSubtract(2, torch.rand(2, 4, 6)),
        IntervalDivide(2, torch.tensor([0.3, -0.7])),
        *(conv(), IntervalScale(1, 3.0, torch.tensor([[[0.1]]]))),
        *(IntervalFlatten(), IntervalScale(24, torch.arange(24.0), -1.0)),
        IntervalLinear(24, 3),
    ),
    "shapes": lambda: network(
        IntervalReshape((3, 4, 4)),
        *(IntervalPermute((0, 2, 3, 1)), IntervalSlice([[1, 4, 2], [0, 3, 1], [0, 3, 1]])),
        *(IntervalZeroPad((1, 0, 0, 1)), IntervalUpsample((1, 3))),
        *(IntervalFlatten(), IntervalLinear(2 * 4 * 12, 3)),
    ),
    "concatenation": lambda: network(
        IntervalConcat([conv(2), IntervalSequential(), IntervalAvgPool2d(3, 1, 1)]),
        *(IntervalFlatten(), IntervalLinear(6 * 24, 3)),
    ),
    "dropout twice": lambda: network(IntervalDropout(0.5), conv(), *head(), IntervalDropout(0.5)),
    "one layer twice": lambda: network(
        *(twice := (conv(2), RELU)), *twice, IntervalSequential(twice[0]), conv(), *head()
    ),
    "cnn7": lambda: oracle.randomize_batch_norm(
        cnn7((1, 8, 8), 3, width=2, hidden=5, mean=(0.4,), std=(0.3,)),
        torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
        torch.Generator().manual_seed(0),
    ),
}


def images_for(model, count=5):
    return torch.rand(count, *model.in_shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_file_computes_what_the_model_does(name):
    """By the ONNX project's own reference, in NumPy, and by onnxruntime; batches of any size."""
    model = NETWORKS[name]()
    content = to_onnx(model)
    images = images_for(model)
    reference = ReferenceEvaluator(onnx.load_model_from_string(content))
    for batch in (images, images[:1]):
        (found,) = reference.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.tensor(found), model(batch), rtol=1e-5, atol=1e-6)
        assert check_onnx(content, model, batch) < 1e-5


POOLS = {
    "max": (IntervalMaxPool2d, [{}, {"dilation": 2}, {"dilation": (1, 3)}]),
    "average": (IntervalAvgPool2d, [{}, {"count_include_pad": False}]),
}
# Kernel, stride and padding, as torch accepts them: the last window may start beyond the image.
WINDOWS = [
    *((1, 2, 0), (2, 3, 0), (3, 5, 0), (2, 1, 1), (3, 2, 1), (4, 3, 2), (2, 5, 1)),
    *(((2, 3), (3, 1), (0, 1)), ((2,), (3,), (1,)), (3, [], 1), (2, None, 0)),
]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("kind", POOLS)
def test_a_pool_has_the_windows_that_torch_uses(kind, windows, ceil_mode):
    """ONNX's own `ceil_mode` keeps a last window that torch drops, and divides by other counts."""
    make, settings = POOLS[kind]
    for options in settings:
        for size in ((7, 8), (8, 9)):
            pool = make(*windows, ceil_mode=ceil_mode, **options)
            numbers = pool(torch.zeros(1, 2, *size)).numel()
            head = IntervalFlatten(), IntervalLinear(numbers, 3)
            model = network(pool, *head, shape=(2, *size))
            assert check_onnx(to_onnx(model), model, images_for(model)) < 1e-5


def test_a_stride_of_one_number_is_exported():
    model = network(IntervalConv2d(2, 2, 3, stride=(2,)), IntervalFlatten(), IntervalLinear(4, 3))
    assert check_onnx(to_onnx(model), model, images_for(model)) < 1e-5


def test_what_onnx_does_not_accept_is_one_line():
    def wrong(graph, layer, x):
        return graph.node("Relu", [x.name], unknown=1)

    with (
        mock.patch.dict(WRITERS, {IntervalReLU: wrong}),
        pytest.raises(UserError, match=r"^ONNX does not accept the network: .*unknown.*$"),
    ):
        to_onnx(network(IntervalReLU(), IntervalFlatten(), IntervalLinear(48, 3)))


def test_groups_of_a_transposed_convolution():
    """By onnxruntime alone: the reference knows one group only."""
    layer = IntervalConvTranspose2d(2, 4, (3, 2), (2, 3), (1, 0), (1, 2), groups=2)
    model = network(layer, IntervalFlatten(), IntervalLinear(4 * 8 * 19, 3))
    assert check_onnx(to_onnx(model), model, images_for(model)) < 1e-5


def test_every_layer_is_exported():
    kinds = {
        kind
        for name, kind in vars(ibpcore.nn).items()
        if name.startswith("Interval") and isinstance(kind, type) and issubclass(kind, nn.Module)
    }
    assert set(WRITERS) == kinds - {IntervalLayer, IntervalSequential}


def test_the_file_holds_the_parameters_as_they_are():
    """Nothing is folded, so certificates and file are of one network; old readers can read it."""
    model = NETWORKS["cnn7"]()
    file = onnx.load_model_from_string(to_onnx(model))
    found = {t.name: torch.tensor(onnx.numpy_helper.to_array(t)) for t in file.graph.initializer}
    stored = {n: t for n, t in model.state_dict().items() if not n.endswith("num_batches_tracked")}
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name
    kinds = [node.op_type for node in file.graph.node]
    assert kinds[:5] == ["Sub", "Div", "Conv", "BatchNormalization", "Relu"]
    assert (file.opset_import[0].version, file.ir_version) == (OPSET, IR_VERSION) == (14, 7)
    assert not any(a.name == "training_mode" for node in file.graph.node for a in node.attribute)


class Own(IntervalReLU):
    """A layer that may do anything."""


def in_training(model):
    model[1].train()
    return model


REFUSED = [
    (lambda: network(conv(), Own(), *head()), "Own cannot be exported"),
    (lambda: network(conv(padding_mode="circular"), *head()), "Conv2d with circular"),
    (
        lambda: network(IntervalZeroPad((-1, 0)), IntervalFlatten(), IntervalLinear(40, 2)),
        "IntervalZeroPad that crops",
    ),
    (lambda: network(conv(), *head()).double(), "float64"),
    (lambda: in_training(network(conv(), IntervalBatchNorm(1), *head())), "batch norm"),
    (lambda: nn.Sequential(nn.Linear(2, 2)), "plain Sequential"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED)
def test_what_has_no_form_is_refused_by_name(make, reason):
    with pytest.raises(UserError, match=reason):
        to_onnx(make())


def test_disagreement_leaves_nothing(tmp_path, monkeypatch):
    model = NETWORKS["convolution"]()
    images = images_for(model)
    path = tmp_path / "m.onnx"
    assert export_onnx(model, path, images) < 1e-5
    before = path.read_bytes()
    assert before == to_onnx(model)
    for value in (0.01, torch.nan):
        changed = NETWORKS["convolution"]()
        changed[2].bias.data[0] += value
        with pytest.raises(UserError, match="differ by"):
            check_onnx(to_onnx(model), changed, images)
    monkeypatch.setattr(files, "to_onnx", lambda model: to_onnx(changed))
    with pytest.raises(UserError, match="differ by nan in a logit"):
        export_onnx(model, path, images)
    assert helpers.snapshot(tmp_path) == {"m.onnx": before}


def test_logits_of_another_shape_disagree():
    three = to_onnx(NETWORKS["convolution"]())
    two = network(conv(), IntervalFlatten(), IntervalLinear(24, 2))
    with pytest.raises(UserError, match=r"ONNX gives \(5, 3\), not \(5, 2\)"):
        check_onnx(three, two, images_for(two))


def test_what_onnxruntime_cannot_run_is_one_line():
    model = NETWORKS["convolution"]()
    with pytest.raises(UserError, match="onnxruntime cannot run the network"):
        check_onnx(b"no file", model, images_for(model))


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package):
    model = NETWORKS["convolution"]()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package} is needed: pip install 'ibpcore\[export\]'"):
        check_onnx(to_onnx(model), model, images_for(model))


# Properties

PROPERTY = """; A remark

(declare-const X_0 Real)
(declare-const X_1 Real)
(declare-const Y_0 Real)
(declare-const Y_1 Real)
(declare-const Y_2 Real)

(assert (<= X_0 0.500000000000))
(assert (>= X_0 -0.250000000000))
(assert (<= X_1 1.000000000000))
(assert (>= X_1 0.100000001490))

(assert (or
    (and (>= Y_0 Y_1))
    (and (>= Y_2 Y_1))
))
"""


def test_a_property_in_full():
    """The form of VNN-COMP's benchmarks; float32's 0.1 is 0.100000001490116..."""
    lower, upper = torch.tensor([[[-0.25, 0.1]]]), torch.tensor([[[0.5, 1.0]]])
    assert property_text(lower, upper, 1, 3, "A remark") == PROPERTY


def read_property(text):
    """Ends of the box as fractions, [(low, high), ...], and the pairs (i, j) of Y_i >= Y_j."""
    inputs = len(re.findall(r"^\(declare-const X_\d+ Real\)$", text, re.M))
    bounds = {
        (int(i), sign): Fraction(number)
        for sign, i, number in re.findall(
            r"^\(assert \((<=|>=) X_(\d+) (-?[\d.]+)\)\)$", text, re.M
        )
    }
    assert len(bounds) == 2 * inputs
    (cases,) = re.findall(r"^\(assert \(or\n(.*?)^\)\)$", text, re.M | re.S)
    wins = [(int(i), int(j)) for i, j in re.findall(r"\(and \(>= Y_(\d+) Y_(\d+)\)\)", cases)]
    assert len(wins) == cases.count("\n") == text.count("declare-const Y") - 1
    return [(bounds[i, ">="], bounds[i, "<="]) for i in range(inputs)], wins


PIXELS = torch.cat([as_pixels(torch.arange(256)), torch.tensor([1e-7, 1e-5, 0.5, 1 - 2.0**-24])])


@pytest.mark.parametrize("epsilon", [1 / 255, 2 / 255, 8.8 / 255, 0.1, 0.3, 2.0**-30, 1e-9, 1.0])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None])
def test_the_box_holds_the_exact_ball(epsilon, clip):
    """As real numbers, and as whoever rounds them to float64 or float32 reads them."""
    text = property_text(*outer_box(PIXELS, epsilon, clip), 0, 2, "")
    for pixel, (low, high) in zip(PIXELS.tolist(), read_property(text)[0], strict=True):
        exact = [Fraction(pixel) - Fraction(epsilon), Fraction(pixel) + Fraction(epsilon)]
        if clip is not None:
            exact = [max(exact[0], Fraction(0)), min(exact[1], Fraction(1))]
            assert 0 <= low <= high <= 1
        single = torch.tensor([float(low), float(high)], dtype=torch.float32).tolist()
        for ends in ((low, high), (float(low), float(high)), single):
            assert ends[0] <= exact[0]
            assert exact[1] <= ends[1]
        # And no more than two float32 and the last decimal wider.
        slack = [Fraction(2.0**-22) * max(1, abs(end)) + Fraction(1, 10**12) for end in exact]
        assert exact[0] - low <= slack[0]
        assert high - exact[1] <= slack[1]


@pytest.mark.parametrize("text", ["8/255", "8.8/255", "0.3", "1/3"])
def test_the_box_holds_the_ball_of_an_epsilon_as_it_was_typed(text):
    """As a float it may be smaller."""
    exact = Fraction(text.partition("/")[0]) / Fraction(text.partition("/")[2] or 1)
    text = property_text(*outer_box(PIXELS, as_number(text), None), 0, 2, "")
    for pixel, (low, high) in zip(PIXELS.tolist(), read_property(text)[0], strict=True):
        assert low <= Fraction(pixel) - exact
        assert Fraction(pixel) + exact <= high


@pytest.mark.parametrize("clip", [(0.1, 0.9), (-0.3, 1.7), (1 / 3, 2 / 3), (-2.1179039, 2.64)])
def test_ends_of_another_pixel_range_are_rounded_outwards(clip):
    lower, upper = outer_box(torch.tensor(clip), 0.05, clip)
    ((low, _), (_, high)), _ = read_property(property_text(lower, upper, 0, 2, ""))
    for kind in (Fraction, float, np.float32):
        assert float(kind(low)) <= clip[0]
        assert clip[1] <= float(kind(high))
    assert Fraction(clip[0]) - low <= Fraction(2.0**-21)
    assert high - Fraction(clip[1]) <= Fraction(2.0**-21)


def labelled(model, count=40):
    """Random images of 8 bits: two of three with the label that the model gives them."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, *model.in_shape), generator=generator).byte()
    labels = model(as_pixels(images)).argmax(1)
    labels[::3] = (labels[::3] + 1) % model.classes
    return ImageSet(images, labels)


EPSILON = 1 / 255


def benchmark_in(folder, model, data, epsilon, clip=(0.0, 1.0), limit=None, timeout=100):
    """Writes a benchmark, and returns its number of properties."""
    indices = correct_images(model, data, limit)
    texts = properties(data, indices, model.classes, epsilon, clip)
    write_benchmark(folder, to_onnx(model), texts, timeout)
    return len(indices)


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory):
    """A folder, its model and its images."""
    folder = tmp_path_factory.mktemp("benchmark")
    model = NETWORKS["residual"]()
    data = labelled(model)
    assert benchmark_in(folder, model, data, EPSILON, timeout=7) == 26
    return folder, model, data


def instances(folder):
    return list(csv.reader((folder / "instances.csv").read_text().splitlines()))


def test_each_correct_image_has_a_property(benchmark):
    folder, model, data = benchmark
    rows = instances(folder)
    correct = [i for i in range(len(data)) if i % 3]
    names = [f"vnnlib/image_{i}_eps_0.00392157.vnnlib" for i in correct]
    assert rows == [["onnx/model.onnx", name, "7"] for name in names]
    assert (folder / "onnx/model.onnx").read_bytes() == to_onnx(model)
    for index, row in zip(correct, rows, strict=True):
        box, wins = read_property((folder / row[1]).read_text())
        label = int(data.labels[index])
        assert wins == [(i, label) for i in range(3) if i != label]
        pixels = as_pixels(data.images[index]).flatten().tolist()  # in the order of the input
        for pixel, (low, high) in zip(pixels, box, strict=True):
            assert abs(float(low) - max(pixel - EPSILON, 0)) < 1e-6
            assert abs(float(high) - min(pixel + EPSILON, 1)) < 1e-6


def test_bounds_exclude_the_violation_for_certified_images(benchmark):
    """The other way round, points of the box at which another class wins refute a certificate."""
    folder, _, data = benchmark
    reference = ReferenceEvaluator(str(folder / "onnx/model.onnx"))
    generator = torch.Generator().manual_seed(4)
    certified = 0
    for _, name, _ in instances(folder):
        index = int(name.split("_")[1])
        box, wins = read_property((folder / name).read_text())
        low, high = (torch.tensor([[float(e) for e in ends]]) for ends in zip(*box, strict=True))
        image, label = as_pixels(data.images[[index]]), data.labels[[index]]
        # In float64, for a ball that holds the box.
        (margin,) = certified_margins(
            NETWORKS["residual"]().double(), image.double(), label, torch.tensor([EPSILON + 1e-6])
        ).detach()
        points = low + (high - low) * torch.rand(200, low.numel(), generator=generator)
        (logits,) = reference.run(None, {"images": points.view(-1, *SHAPE).numpy()})
        violated = max(float((logits[:, i] - logits[:, j]).max()) for i, j in wins)
        assert violated <= float(margin) + 1e-5
        certified += float(margin) < 0
    assert 5 < certified <= 26


def test_a_limit_spreads_over_all_and_repeats(tmp_path):
    model = NETWORKS["convolution"]()
    data = labelled(model, 300)
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        assert benchmark_in(tmp_path / name, model, data, 0.1, clip=None, limit=9) == 9
        found.append([int(row[1].split("_")[1]) for row in instances(tmp_path / name)])
    assert found[0] == found[1] == sorted(found[0])
    assert found[0][-1] > 150
    assert all(index % 3 for index in found[0])
    box, _ = read_property((tmp_path / "a" / instances(tmp_path / "a")[0][1]).read_text())
    assert min(low for low, _ in box) < 0


def test_without_a_correct_image_there_is_nothing_to_verify(tmp_path):
    model = NETWORKS["convolution"]()
    data = labelled(model, 3)[torch.tensor([0])]
    with pytest.raises(UserError, match="no image is classified correctly"):
        benchmark_in(tmp_path, model, data, 0.1)
    assert helpers.snapshot(tmp_path) == {}


# The command


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    save_model(cnn7((1, 8, 8), 10, width=2, hidden=4).eval(), tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


DIGITS = ("--dataset", "digits", "--data-dir", "nowhere")


def test_the_command_writes_both(saved, tmp_path):
    options = ("--onnx", tmp_path / "m.onnx", "--vnnlib", tmp_path / "v", "--epsilon", "2/255")
    result = helpers.run_ibp("export", saved, *DIGITS, *options, "--limit", 3, "--timeout", 9)
    assert (result.code, result.err) == (0, "")
    assert f"3 properties for epsilon 2/255 (0.007843) in {tmp_path / 'v'}" in result.out
    assert "test images" in result.out
    rows = instances(tmp_path / "v")
    assert [row[::2] for row in rows] == [["onnx/model.onnx", "9"]] * 3
    assert (tmp_path / "v" / rows[0][0]).read_bytes() == (tmp_path / "m.onnx").read_bytes()
    text = (tmp_path / "v" / rows[0][1]).read_text()
    assert text.startswith("; Test image ")
    assert "epsilon 0.00784313725490196, pixels in [0, 1]." in text.splitlines()[0]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"m.safetensors", "m.onnx", "v"}


def test_a_lone_onnx_file_needs_no_epsilon(saved, tmp_path):
    result = helpers.run_ibp("export", saved, *DIGITS, "--onnx", tmp_path / "m.onnx")
    assert (result.code, result.err) == (0, "")
    assert onnx.load(tmp_path / "m.onnx").graph.input[0].name == "images"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "say what to write"),
        (("--onnx", "m.safetensors"), "ends in .onnx"),
        (("--vnnlib", "v"), "give --dataset and --epsilon-max"),
        ((*DIGITS, "--vnnlib", ".", "--epsilon", "0.1"), "already exists and is not empty"),
        ((*DIGITS, "--vnnlib", "v", "--epsilon", "2"), "at most 1"),
        ((*DIGITS, "--onnx", "none/m.onnx"), "there is no folder none"),
        ((*DIGITS, "--onnx", "old.onnx"), "the output file old.onnx already exists"),
        (("--hub", "h"), "--hub takes a run folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(saved, tmp_path, monkeypatch, options, reason):
    monkeypatch.chdir(tmp_path)
    Path("old.onnx").write_text("mine")
    before = helpers.snapshot(tmp_path)
    result = helpers.run_ibp("export", saved, *options)
    assert result.code != 0
    assert reason in result.err
    assert result.err.count("\n") == 1
    assert helpers.snapshot(tmp_path) == before


def test_the_radius_of_properties_may_be_the_preset(saved, tmp_path):
    """Of a model that does not say how it was trained."""
    result = helpers.run_ibp("export", saved, *DIGITS, "--vnnlib", tmp_path / "v", "--limit", 1)
    assert result.code == 0
    assert "epsilon_max 0.1 is the preset of digits" in result.out
    assert "1 property for epsilon 0.1 in" in result.out


def test_the_command_names_the_extra(saved, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = helpers.run_ibp("export", saved, *DIGITS, "--onnx", tmp_path / "m.onnx")
    assert result.err == "Error: onnxruntime is needed: pip install 'ibpcore[export]'\n"
    assert not (tmp_path / "m.onnx").exists()
