"""Architectures as text: the layers they name, and one clear line for what is none."""

import pytest
import torch
from torch import nn

from ibpcore import Interval, UserError
from ibpcore.nn.architectures import ARCHITECTURES, is_name, new_network, variants
from ibpcore.nn.grammar import LARGEST, LONGEST, parse

SHAPE = (3, 12, 10)


class Sum(nn.Module):
    def __init__(self, left: nn.Module, right: nn.Module) -> None:
        super().__init__()
        self.left, self.right = left, right

    def forward(self, x):
        return self.left(x) + self.right(x)


def conv(*arguments, **options):
    return nn.Conv2d(*arguments, **options)


NETWORKS = {
    "linear": [nn.Flatten(), nn.Linear(360, 4)],
    "linear 7 nobias, relu, linear 4": [
        nn.Flatten(),
        nn.Linear(360, 7, bias=False),
        nn.ReLU(),
        nn.Linear(7, 4),
    ],
    "conv 5 3x3, sigmoid, flatten, linear": [conv(3, 5, 3), nn.Sigmoid(), nn.Flatten()],
    "conv 5 3x2 s2x1 p1x0 d1x2 nobias, tanh, linear": [
        conv(3, 5, (3, 2), (2, 1), (1, 0), (1, 2), bias=False),
        nn.Tanh(),
    ],
    "CONV 6 4x4 S2 P1 G3,bn,LeakyReLU .2,linear": [
        conv(3, 6, 4, 2, 1, groups=3),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.2),
    ],
    "pad 1 2 0 3, conv 2 3x3, relu, maxpool 2x2, linear": [
        nn.ZeroPad2d((1, 2, 0, 3)),
        conv(3, 2, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
    ],
    "pad 1, maxpool 3x2 s1x2 p1, avgpool 2x2 s3, linear": [
        nn.ZeroPad2d(1),
        nn.MaxPool2d((3, 2), (1, 2), 1),
        nn.AvgPool2d(2, 3),
    ],
    "conv 4 1x1, avgpool, flatten": [conv(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "conv 4 1x1, maxpool, dropout 0.3, flatten, bn": [
        conv(3, 4, 1),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(4),
    ],
    "residual(conv 3 3x3 p1, bn, relu, conv 3 1x1), relu, linear": [
        Sum(
            nn.Sequential(conv(3, 3, 3, 1, 1), nn.BatchNorm2d(3), nn.ReLU(), conv(3, 3, 1)),
            nn.Identity(),
        ),
        nn.ReLU(),
    ],
    "residual(conv 5 3x3 s2 p1 | conv 5 1x1 s2, bn), residual( | relu), linear 4": [
        Sum(conv(3, 5, 3, 2, 1), nn.Sequential(conv(3, 5, 1, 2), nn.BatchNorm2d(5))),
        Sum(nn.Identity(), nn.ReLU()),
    ],
    "residual(residual(relu | conv 3 1x1) | conv 3 5x5 p2), linear": [
        Sum(Sum(nn.ReLU(), conv(3, 3, 1)), conv(3, 3, 5, 1, 2)),
    ],
}


def reference(text: str) -> nn.Sequential:
    """The twin of torch.nn, with a linear layer to 4 classes at the end."""
    model = nn.Sequential(*NETWORKS[text]).eval()
    output = model(torch.zeros(1, *SHAPE)).flatten(1)
    ends = output.shape[1] == 4 and not isinstance(model[-1], nn.ReLU)
    return model if ends else nn.Sequential(*model, nn.Flatten(), nn.Linear(output.shape[1], 4))


@pytest.mark.parametrize("text", NETWORKS)
def test_the_layers_of_a_text(text):
    torch.manual_seed(0)
    network, twin = new_network(text, SHAPE, 4).eval(), reference(text).eval()
    ours, theirs = network.state_dict(), twin.state_dict()
    assert [tensor.shape for tensor in ours.values()] == [t.shape for t in theirs.values()]
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    images = torch.rand(3, *SHAPE)
    with torch.no_grad():
        torch.testing.assert_close(network(images), twin(images))
        bounds = network(Interval.ball(images, 0.01))
        assert bool((bounds.lower <= network(images)).all())


def test_normalisation_comes_first():
    network = new_network("linear", (1, 2, 2), 2, (0.5,), (0.25,))
    assert type(network[0]).__name__ == "IntervalNormalize"
    assert network.training


ERRORS = {
    "": "the architecture is empty",
    " , relu": "'' is not a layer",
    "relu,": "a comma and a layer must follow 'relu'",
    "relu,, relu": "a comma and a layer must follow 'relu'",
    "relu relu": "'relu' is no argument of a layer",
    "relu)": r"unexpected '\)'",
    "relu | relu": r"unexpected '\|'",
    "(relu)": "'' is not a layer",
    "softmax": "'softmax' is not a layer: the layers are conv, linear, bn",
    "conv 3": "'conv 3': a convolution needs the size of its kernel",
    "conv 3 3x3x3": "'3x3x3' is no argument",
    "conv 3 4 3x3": "'conv 3 4 3x3': there must be one number",
    "conv 3 3x3 2x2": "'conv 3 3x3 2x2' has two arguments",
    "conv 3 3x3 s0": "s must be at least 1",
    "conv 0 3x3": "there must be one number, at least 1",
    "conv 3 0x3": "kernel must be at least 1",
    "conv 1.5 3x3": "'1.5' is no argument",
    "conv .5 3x3": "there must be one number",
    "conv -3 3x3": "'-3' is no argument",
    "conv ³ 3x3": "'³' is no argument",
    "conv 3 3x3 q1": "'q1' is no argument",
    "conv 9999999 3x3": "'9999999' is above 4194304",
    "conv 99999999 3x3": "'99999999' is no argument",
    "conv 4 3x3 g2 g?": "its groups are given and left open",
    "linear 3x3": "'linear 3x3': linear takes no kernel",
    "relu 3": "'relu 3': relu takes no numbers",
    "bn nobias": "'bn nobias': bn takes no nobias",
    "dropout .1 .2": "there must be 1 number",
    "leakyrelu 3x3": "leakyrelu takes no kernel",
    "maxpool 2x2 s1 p1 d2": "maxpool takes no d",
    "maxpool s2": "maxpool takes no s",
    "pad": "pad needs one number, or those for left",
    "pad 1 2 3": "pad needs one number",
    "residual": "'residual' is not a layer",
    "residual(relu": "a closing",
    "residual(relu | relu | relu)": "two branches at most",
    "residual(relu) relu": r"a comma and a layer must follow 'residual'",
    "residual(" * 9 + "relu" + ")" * 9: "more than 8 residuals within each other",
    "relu, " * 4000: f"at most {LONGEST} characters",
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_is_no_architecture(text):
    with pytest.raises(UserError, match=ERRORS[text]):
        parse(text)


MISFITS = {
    "conv 3 3x3, flatten, conv 3 3x3": "'conv 3 3x3': it takes images, but its input is 240",
    "linear 5, maxpool": "'maxpool': it takes images, but its input is 5",
    "conv 3 13x13": "its kernel is larger than its input of 12 x 10",
    "conv 4 3x3 g2": "in_channels must be divisible by groups",
    "conv 3x3": "'conv 3x3': in a new network it needs its width",
    "conv 3 3x3 g?": "'conv 3 3x3 g.': in a new network it needs its width and groups",
    "linear, relu, linear": "'linear': in a new network it needs its width",
    "conv 3 3x3, bn?, linear": "'bn.': a new network has bn, or nothing",
    "linear 5": "the architecture gives 5 values for 4 classes",
    "conv 4 3x3": "the architecture gives 4 x 10 x 8 values for 4 classes",
    "maxpool 3x3 p2": "pad should be at most half",
    "residual(conv 3 3x3), linear": r"'residual': its branches give \(3, 10, 8\) and \(3, 12, 10\)",
    "residual(conv 3 3x3 p1, bn?), linear": "'residual': 'bn.': a new network has bn",
    "flatten, pad 1": "'pad 1': padding .* would add images",
    f"linear {LARGEST}, linear": "the architecture has more than 1073741824 parameters",
    f"linear {LARGEST}, linear {LARGEST}, linear": "more than 1073741824 parameters",
    "pad 9999, linear": "'pad 9999' computes more than 268435456 values for an image",
    f"conv 1 {LARGEST}x{LARGEST} p{LARGEST}, linear": "computes more than 268435456 values",
    "cnn7": "in a new network it needs its width",
    "mlp2": "in a new network it needs its width",
    "cnn99": "'cnn99' is not a layer: .*; the named architectures are cnn3, .* mlpN",
    "mlp0": "'mlp0' is not a layer",
    "": "^the architecture is empty$",
}


@pytest.mark.parametrize("text", MISFITS)
def test_networks_that_cannot_be_built(text):
    with pytest.raises(UserError, match=MISFITS[text]):
        new_network(text, SHAPE, 4)


def test_names_are_abbreviations():
    for name in (*ARCHITECTURES, "mlp1", "mlp99"):
        assert is_name(name)
        assert len(set(variants(name))) == len(variants(name))
    assert not is_name("mlp100")
    assert not is_name("linear")
    assert variants("mlp2") == (parse("linear, bn?, relu, linear"),)
    (small,) = variants("eran-small")
    assert small == parse(
        "conv 4x4 s2, bn?, relu, conv 4x4 s2, bn?, relu, linear, bn?, relu, linear"
    )
