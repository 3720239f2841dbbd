"""Proofs are of the network that is stored and exported: float32 constants, real divisions."""

from fractions import Fraction

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from ibpcore import convert
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import sound_network
from ibpcore.interop.exporting.onnx import to_onnx
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalFlatten,
    IntervalLeakyReLU,
    IntervalLinear,
    IntervalReshape,
    Network,
)


def linear(weight, bias) -> IntervalLinear:
    layer = IntervalLinear(len(weight[0]), len(weight))
    layer.weight.data, layer.bias.data = torch.tensor(weight), torch.tensor(bias)
    return layer


def margin(model, claim: str = "real", bound: str = "ibp") -> float:
    """The proved margin of images of ones and label 0 at radius 0."""
    network = sound_network(model.eval(), claim)
    options = BoundOptions(bound=bound)
    images, labels = torch.ones(1, *model.in_shape), torch.zeros(1, dtype=torch.long)
    return float(sound_margins(network, images, labels, torch.zeros(1), options))


def with_slope(slope: float) -> Network:
    """Logit 1 minus logit 0 is float32(0.03) - 3 slope: negative for 0.01, 0 for float32(0.01)."""
    return Network(
        [
            IntervalFlatten(),
            linear([[0.0]], [-3.0]),
            IntervalLeakyReLU(slope),
            linear([[0.0], [1.0]], [0.0, 0.03]),
        ],
        (1, 1, 1),
    )


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("claim", ["real", "float32"])
def test_a_slope_is_a_float32_number(claim, bound):
    slope = Fraction(float(np.float32(0.01)))
    assert Fraction(float(np.float32(0.03))) - 3 * slope == 0
    assert Fraction(float(np.float32(0.03))) - 3 * Fraction(0.01) < 0
    assert margin(with_slope(0.01), claim, bound) >= 0


def test_the_slope_of_a_float64_network_is_a_float64_number():
    model = with_slope(0.01).double()
    model[3].bias.data = torch.tensor([0.0, float(np.float32(0.03))]).double()
    assert margin(model) < 0


def test_the_eps_of_batch_norm_is_a_float32_number():
    """With variance 0, 1 / sqrt(eps) is larger for float32(0.01) than for 0.01 in float64."""
    norm = IntervalBatchNorm(1, eps=0.01)
    norm.running_var.zero_()
    reach = 1 / float(np.float32(0.01)) ** 0.5
    for bias, sign in ((reach * (1 + 5e-9) - 10, -1), (reach * (1 - 5e-9) - 10, 1)):
        steps = [float(np.float32(bias)), 0.0]
        steps[1] = bias - steps[0]
        model = Network(
            [
                *(IntervalFlatten(), linear([[1.0], [1.0]], [0.0, 0.0]), IntervalReshape((2, 1))),
                *(IntervalFlatten(1), linear([[1.0, 0.0]], [0.0]), norm),
                linear([[0.0], [1.0]], [steps[0], -10.0]),
            ],
            (1, 1, 1),
        )
        model[6].weight.data[0, 0] = steps[1] / reach
        assert np.sign(margin(model)) == sign


class Divided(nn.Module):
    """Logit 1 minus logit 0 is b + w / 3 - 1 / 3, above 0; it is below with a rounded 1 / 3."""

    def __init__(self, divide):
        super().__init__()
        self.divide, self.last = divide, nn.Linear(2, 2)
        self.register_buffer("three", torch.tensor(3.0))
        self.last.weight.data = torch.tensor([[1.0, 0.0], [0.0, 7e-8]])
        self.last.bias.data = torch.tensor([0.0, np.nextafter(np.float32(1 / 3), np.float32(0))])

    def forward(self, x):
        return self.last(self.divide(self, x).flatten(1))


DIVISIONS = {
    "number": lambda m, x: x / 3.0,
    "in place": lambda m, x: x.clone().div_(3),
    "torch": lambda m, x: torch.true_divide(x, 3),
    "buffer": lambda m, x: x / m.three,
    "image": lambda m, x: x / m.three.expand(1, 1, 2),
    "negative": lambda m, x: -(x / -m.three),
}


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("name", DIVISIONS)
def test_a_division_is_no_product_with_a_rounded_reciprocal(name, bound):
    module = Divided(DIVISIONS[name])
    weight, bias = (Fraction(float(p.detach().flatten()[-1])) for p in module.last.parameters())
    assert bias + weight / 3 - Fraction(1, 3) > 0
    assert bias + weight / 3 - Fraction(float(np.float32(1 / 3))) < 0
    network = convert(module.eval(), (1, 1, 2))
    assert margin(network, bound=bound) > 0
    nodes = [node.op_type for node in onnx.load_model_from_string(to_onnx(network)).graph.node]
    assert "Div" in nodes


def test_the_file_holds_the_constants_of_the_proof():
    """As float32 numbers, which are the attributes of ONNX."""
    graph = onnx.load_model_from_string(to_onnx(with_slope(0.01))).graph
    (node,) = [node for node in graph.node if node.op_type == "LeakyRelu"]
    assert node.attribute[0].f == float(np.float32(0.01))
