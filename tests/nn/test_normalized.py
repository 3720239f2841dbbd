"""A convolution with the batch norm after it against both layers one after the other."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ibpcore import cnn7
from ibpcore.bounds.ibp import robust_logits
from ibpcore.bounds.operators import Relu
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConv1d,
    IntervalConv2d,
    IntervalReLU,
    IntervalSequential,
)
from ibpcore.nn.folding import clean_pass
from ibpcore.nn.layers import Clean
from ibpcore.nn.normalized import NormalizedConvolution, paired

KINDS = {
    "plain": {"padding": 1},
    "strided": {"stride": 2, "padding": (1, 0)},
    "dilated": {"dilation": (1, 2)},
    "grouped": {"groups": 2},
    "without bias": {"bias": False},
    "channels last": {"padding": 1},
}


def pair(kind: str, affine: bool = True) -> NormalizedConvolution:
    torch.manual_seed(0)
    layers = IntervalConv2d(4, 6, 3, **KINDS[kind]), IntervalBatchNorm(6, affine=affine)
    if affine:
        nn.init.normal_(layers[1].weight)
        nn.init.normal_(layers[1].bias)
    for layer in layers:
        layer.double().train()
        if kind == "channels last":
            layer.to(memory_format=torch.channels_last)
    return NormalizedConvolution(*layers)


def separately(layers: NormalizedConvolution, x):
    """Output, merged weight, |weight| and bias by the textbook, for autograd to differentiate."""
    convolution, norm = layers
    z = convolution(x)
    mean = z.mean((0, 2, 3))
    variance = (z - mean[:, None, None]).square().mean((0, 2, 3))
    scale = (variance + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
    shift = (0 if norm.bias is None else norm.bias) - mean * scale
    weight = convolution.weight * scale[:, None, None, None]
    bias = shift if convolution.bias is None else convolution.bias * scale + shift
    return z * scale[:, None, None] + shift[:, None, None], weight, weight.abs(), bias


def together(layers: NormalizedConvolution, x):
    output, (operator,) = layers.clean(x, Clean(track=False))
    return output, operator.weight, operator.weight_abs, operator.bias


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_of_all_of_them(kind, affine):
    layers = pair(kind, affine)
    x = torch.randn(5, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (separately, together):
        outputs = function(layers, x)
        torch.manual_seed(1)
        loss = sum((torch.randn_like(part) * part.sin()).sum() for part in outputs)
        leaves = [x, *(p for layer in layers for p in layer.parameters())]
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append((outputs, gradients))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "used", [u for u in itertools.product([0, 1], repeat=4) if any(u)], ids=str
)
def test_gradients_where_only_some_outputs_are_used(used):
    layers = pair("plain")
    x = torch.randn(5, 4, 7, 8, dtype=torch.float64, requires_grad=True)
    results = []
    for function in (separately, together):
        outputs = function(layers, x)
        loss = sum(part.sin().sum() for part, on in zip(outputs, used, strict=True) if on)
        leaves = [x, *(p for layer in layers for p in layer.parameters())]
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


def test_the_bias_before_batch_norm_has_gradient_0():
    """The mean contains it, so no output depends on it. It is not rounded to nearly 0."""
    layers = pair("plain")
    x = torch.randn(5, 4, 7, 8, dtype=torch.float64)
    sum(part.sin().sum() for part in together(layers, x)).backward()
    assert layers.convolution.bias.grad.tolist() == [0] * 6
    assert layers.convolution.weight.grad.abs().min() > 0


@pytest.mark.parametrize("track", [True, False])
def test_running_statistics(track):
    """They contain the bias, as those of the layers one after the other."""
    joint, apart = pair("plain"), pair("plain")
    x = 3 + torch.randn(5, 4, 7, 8, dtype=torch.float64)
    joint.clean(x, Clean(track=track))
    z, _ = apart.convolution.clean(x, Clean(track=track))
    apart.norm.clean(z, Clean(track=track))
    for a, b in zip(joint.norm.buffers(), apart.norm.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    assert int(joint.norm.num_batches_tracked) == track


def test_layers_are_paired_in_order():
    first, second = IntervalConv2d(4, 6, 3), IntervalConv2d(6, 6, 1)
    norm, last, relu = IntervalBatchNorm(6), IntervalBatchNorm(6), IntervalReLU()
    found = [*paired([first, second, norm, last, relu, first])]
    assert found == [first, NormalizedConvolution(second, norm), last, relu, first]


@pytest.mark.parametrize(
    "convolution",
    [
        IntervalConv2d(4, 6, 3, padding="same"),
        IntervalConv2d(4, 6, 3, padding=1, padding_mode="circular"),
    ],
    ids=["same", "circular"],
)
def test_other_kinds_of_convolutions_are_not_merged_here(convolution):
    norm = IntervalBatchNorm(6).train()
    x = torch.randn(5, 4, 7, 8)
    output, operators = NormalizedConvolution(convolution, norm).clean(x, Clean())
    assert len(operators) == 2
    torch.testing.assert_close(output, F.batch_norm(convolution(x), None, None, training=True))


def test_convolutions_along_one_side():
    model = IntervalSequential(IntervalConv1d(2, 3, 3), IntervalBatchNorm(3)).train()
    x = torch.randn(4, 2, 9)
    output, operators = model.clean(x, Clean())
    assert len(operators) == 1
    torch.testing.assert_close(output, F.batch_norm(model[0](x), None, None, training=True))


def test_in_evaluation_both_keep_their_operators():
    layers = pair("plain")
    layers.norm.eval()
    x = torch.randn(5, 4, 7, 8, dtype=torch.float64)
    output, operators = layers.clean(x, Clean())
    assert len(operators) == 2
    torch.testing.assert_close(output, layers.norm(layers.convolution(x)))


@pytest.mark.parametrize("channels", [1, 3])
def test_all_of_a_step_has_one_memory_format(channels):
    """Midpoints, radii and their gradients: operators on two formats are many times slower."""
    model = cnn7((channels, 8, 8), 10, width=4, hidden=8).train()
    images, labels = torch.rand(6, channels, 8, 8), torch.arange(6)
    seen = []

    def observe(operator, x):
        if isinstance(operator, Relu) and x.mid.dim() == 4:
            for part in (x.mid, x.rad):
                seen.append(part.stride())
                part.register_hook(lambda grad: seen.append(grad.stride()))
            seen.append(x.mid.stride())

    _, network = clean_pass(model, images)
    bounds = robust_logits(network, images, labels, torch.full((6,), 0.1), BoundOptions(), observe)
    F.cross_entropy(bounds, labels).backward()
    assert len(seen) == 5 * 5
    assert all(stride[1] == 1 for stride in seen)
