"""Networks of any layers: what they take and give, and back from disk bit for bit."""

from functools import partial
from unittest import mock

import pytest
import torch

from ibpcore import Interval, UserError, convert, load_model, nn, save_model
from ibpcore import nn as il
from ibpcore.bounds.operators import Monotone
from ibpcore.nn.layers import LAYERS, TWINS
from ibpcore.nn.networks import Network, built, described

KINDS = {name.removeprefix("Interval") for name in vars(il) if name.startswith("Interval")}
EXAMPLES = {
    "Conv2d": il.IntervalConv2d(2, 4, (3, 2), stride=(1, 2), padding=1, groups=2, bias=False),
    "Conv1d": il.IntervalConv1d(2, 4, 3, stride=2, padding=1, dilation=2, groups=2, bias=False),
    "ConvTranspose2d": il.IntervalConvTranspose2d(
        *(2, 4, (3, 2), (2, 3), 1, (1, 2)), groups=2, bias=False, dilation=(2, 1)
    ),
    "MatMul": il.IntervalMatMul(5, 3),
    "Linear": il.IntervalLinear(5, 3, bias=False),
    "BatchNorm": il.IntervalBatchNorm(4, eps=0.1, momentum=None, affine=False),
    "Normalize": il.IntervalNormalize((0.1, 1 / 3), (0.2, 0.7)),
    "ReLU": il.IntervalReLU(),
    "LeakyReLU": il.IntervalLeakyReLU(0.3),
    "Sigmoid": il.IntervalSigmoid(),
    "Tanh": il.IntervalTanh(),
    "Flatten": il.IntervalFlatten(2),
    "Scale": il.IntervalScale(3, [[0.5], [1 / 3], [2.0]], -1.0),
    "Subtract": il.IntervalSubtract(3, [0.5, 1 / 3, -2.0]),
    "Divide": il.IntervalDivide(2, torch.full((1, 2, 6, 6), 0.3)),
    "Reshape": il.IntervalReshape((2, 8)),
    "Permute": il.IntervalPermute((0, 2, 1)),
    "ZeroPad": il.IntervalZeroPad((1, 2)),
    "Slice": il.IntervalSlice([[0, 2, 1], [1, 4, 2]]),
    "IndexSelect": il.IntervalIndexSelect([3, 0, 0], 2),
    "Upsample": il.IntervalUpsample((2, 3)),
    "AvgPool2d": il.IntervalAvgPool2d(3, 2, 1, True, False, 7),
    "MaxPool2d": il.IntervalMaxPool2d((2, 3), (1, 2), 1, 1, ceil_mode=True),
    "PReLU": il.IntervalPReLU(3, 0.5),
    "Hardtanh": il.IntervalHardtanh(-0.5, 1 / 3),
    "Hardsigmoid": il.IntervalHardsigmoid(),
    "Abs": il.IntervalAbs(),
    "Maximum": il.IntervalMaximum(3, [[0.5], [1 / 3], [2.0]]),
    "Minimum": il.IntervalMinimum(2, -1.0),
    "Softsign": il.IntervalSoftsign(),
    "LogSigmoid": il.IntervalLogSigmoid(),
    "Softplus": il.IntervalSoftplus(2, 30),
    "ELU": il.IntervalELU(0.3),
    "CELU": il.IntervalCELU(2.0),
    "SELU": il.IntervalSELU(),
    "SiLU": il.IntervalSiLU(),
    "GELU": il.IntervalGELU("tanh"),
    "Mish": il.IntervalMish(),
    "Hardswish": il.IntervalHardswish(),
    "Dropout": il.IntervalDropout(0.25),
    "Dropout1d": il.IntervalDropout1d(0.25),
    "Dropout2d": il.IntervalDropout2d(0.25),
    "Dropout3d": il.IntervalDropout3d(0.25),
    "AlphaDropout": il.IntervalAlphaDropout(0.25),
    "FeatureAlphaDropout": il.IntervalFeatureAlphaDropout(0.25),
    "Sequential": il.IntervalSequential(il.IntervalReLU(), il.IntervalLeakyReLU(0.3)),
    "Residual": il.IntervalResidual(il.IntervalTanh(), il.IntervalLinear(2, 2)),
    "Product": il.IntervalProduct(il.IntervalTanh(), il.IntervalLinear(2, 2)),
    "Concat": il.IntervalConcat([il.IntervalSequential(), il.IntervalSigmoid()], 2),
}


def small() -> Network:
    """A network with every way to nest."""
    torch.manual_seed(0)
    branch = il.IntervalSequential(
        il.IntervalConv2d(3, 3, 3, padding=1, bias=False), il.IntervalBatchNorm(3)
    )
    parts = [
        il.IntervalNormalize((0.5, 0.4, 0.3), (0.2, 0.3, 1 / 3)),
        il.IntervalResidual(branch, il.IntervalConv2d(3, 3, 1)),
        il.IntervalSubtract(3, torch.rand(3, 4, 4)),
        il.IntervalDivide(3, torch.nn.Parameter(1 + torch.rand(3))),
        il.IntervalReLU(),
        il.IntervalConcat([il.IntervalSequential(), il.IntervalScale(3, [1.0, 2.0, 1 / 3])]),
        il.IntervalAvgPool2d(2),
        il.IntervalFlatten(),
        il.IntervalLinear(24, 4),
    ]
    network = Network(parts, (3, 4, 4)).train()
    network(torch.rand(16, 3, 4, 4))
    return network.eval()


def test_it_knows_what_it_takes_and_gives():
    network = small()
    assert network.in_shape == (3, 4, 4)
    assert network.classes == 4


def test_the_mode_stays_and_no_statistics_change():
    layer = il.IntervalBatchNorm(1).eval()
    parts = [layer, il.IntervalBatchNorm(1), il.IntervalFlatten(), il.IntervalLinear(4, 2)]
    network = Network(parts, (1, 2, 2))
    assert [part.training for part in network] == [False, True, True, True]
    assert all(int(part.num_batches_tracked) == 0 for part in network[:2])


def test_a_network_comes_back_bit_for_bit(tmp_path):
    network = small()
    save_model(network, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert isinstance(again, Network)
    assert again.description() == network.description()
    assert again.in_shape == network.in_shape
    images = torch.rand(5, 3, 4, 4)
    ball = Interval.ball(images, 0.1)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))
        assert torch.equal(again(ball).lower, network(ball).lower)


def test_every_layer_can_be_described():
    assert set(LAYERS) == set(EXAMPLES) == KINDS - {"", "Layer"}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_layer_is_built_as_it_was_described(kind):
    layer = EXAMPLES[kind]
    again = built(described(layer))
    assert type(again) is type(layer)
    assert repr(again) == repr(layer)
    assert {n: t.shape for n, t in again.state_dict().items()} == {
        n: t.shape for n, t in layer.state_dict().items()
    }


def test_a_layer_of_ones_own_registers_itself(tmp_path):
    """It is converted to, saved and loaded like any other."""
    twin = torch.nn.Softshrink
    with mock.patch.dict(LAYERS), mock.patch.dict(TWINS):

        class IntervalSoftshrink(il.IntervalLayer, twin):
            twins, arguments = (twin,), ("lambd",)

            def operators(self):
                return (Monotone(partial(twin.forward, self)),)

        module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2), twin(0.1))
        save_model(convert(module, (1, 2, 2)), tmp_path / "m")
        again = load_model(tmp_path / "m")
    assert type(again[2]) is IntervalSoftshrink
    images = torch.rand(3, 1, 2, 2)
    with torch.no_grad():
        assert torch.equal(again(images), module(images))


@pytest.mark.parametrize("name", ["IntervalReLU", "Other"])
def test_no_layer_replaces_that_of_another_module(name):
    """By its name in files, or by its twin; one that is defined again in its own module does."""
    stated = {"arguments": ()} if name == "IntervalReLU" else {"twins": (torch.nn.ReLU,)}
    with mock.patch.dict(LAYERS), mock.patch.dict(TWINS):
        before = dict(LAYERS), dict(TWINS)
        with pytest.raises(UserError, match=r"would replace .*activations\.IntervalReLU"):
            type(name, (il.IntervalLayer, torch.nn.ReLU), dict(stated, __module__=__name__))
        assert before == (LAYERS, TWINS)
        for _ in range(2):
            own = {"arguments": (), "__module__": __name__}
            again = type("IntervalMine", (il.IntervalLayer, torch.nn.ReLU), own)
        assert LAYERS["Mine"] is again


def test_other_layers_cannot_be_described():
    class Mine(il.IntervalReLU):
        pass

    with pytest.raises(UserError, match="Mine cannot be saved"):
        described(Mine())


@pytest.mark.parametrize(
    ("parts", "shape", "message"),
    [
        ([il.IntervalFlatten()], (), "in_shape must be"),
        ([il.IntervalFlatten()], (3, 0, 4), "in_shape must be"),
        ([il.IntervalFlatten(), il.IntervalLinear(5, 2)], (1, 2, 2), "do not take images"),
        ([il.IntervalFlatten(), il.IntervalLinear(4, 1)], (1, 2, 2), "not logits"),
        ([il.IntervalConv2d(1, 2, 1)], (1, 2, 2), "not logits"),
        ([torch.nn.Flatten()], (1, 2, 2), "unsupported layer"),
        (
            # Of a batch it would give each image the logits of the one before.
            [
                il.IntervalZeroPad((0,) * 6 + (1, 0)),
                il.IntervalZeroPad((0,) * 6 + (0, -1)),
                il.IntervalFlatten(),
                il.IntervalLinear(4, 2),
            ],
            (1, 2, 2),
            "would add images",
        ),
    ],
)
def test_what_makes_no_logits_is_refused(parts, shape, message):
    with pytest.raises(UserError, match=message):
        Network(parts, shape)


@pytest.mark.parametrize(
    "facts",
    [
        {"layer": "Softmax"},
        {"layer": "Layer"},
        {"layer": "ReLU", "inplace": True},
        {"layer": "LeakyReLU"},
        {"layer": ["ReLU"]},
        {"layer": "Residual", "branch": {"layer": "ReLU"}},
        {"layer": "Concat", "branches": [], "dim": 1},
        {"layer": "Concat", "branches": [{"layer": "ReLU"}], "dim": 0},
        {"layer": "Scale", "channels": 3, "scale": [1.0, 2.0], "shift": 0.0},
        {"layer": "IndexSelect", "indices": [], "dim": 1},
        {"layer": "IndexSelect", "indices": [-1], "dim": 1},
        {"layer": "IndexSelect", "indices": [0], "dim": 0},
        {"layer": "MatMul", "in_features": -1, "out_features": 2},
        {"layer": "Product", "first": {"layer": "ReLU"}},
        {"layer": "Permute", "dims": [1, 0]},
        {"layer": "Upsample", "factors": [0, 1]},
        {"layer": "Conv2d", **dict.fromkeys(il.IntervalConv2d.arguments, "x")},
        {},
    ],
)
def test_a_damaged_description_is_a_clear_error(tmp_path, facts, monkeypatch):
    network = small()
    whole = {**network.description(), "layers": [facts]}
    monkeypatch.setattr(Network, "description", lambda _: whole)
    save_model(network, tmp_path / "m")
    with pytest.raises(UserError, match="describes no network that can be built"):
        load_model(tmp_path / "m")


def test_the_package_offers_every_layer():
    assert {layer.__name__ for layer in LAYERS.values()} < set(nn.__all__)
    assert nn.IntervalConv2d is il.IntervalConv2d
