"""Any PyTorch classifier becomes a network that computes, trains and bounds the same."""

import copy
from functools import partial
from importlib import import_module

import oracle
import pytest
import torch
import torch.nn.functional as F
from activations import ACTIVATIONS, DROPOUTS
from balls import points, worst_corners
from torch import nn
from torchvision import models
from torchvision.models import densenet, efficientnet, mobilenet_v2, resnet, shufflenetv2, vgg
from torchvision.ops import StochasticDepth

import ibpcore
from ibpcore import Interval, UserError, certified_margins, convert, load_model, save_model
from ibpcore import nn as il
from ibpcore.certification.radii import certified_radii
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.nn.folding import clean_pass

SLACK = 1e-9
depth = import_module("torchvision.ops.stochastic_depth")


def conv3(i, o, stride=1, groups=1, bias=True) -> nn.Conv2d:
    return nn.Conv2d(i, o, 3, stride, 1, groups=groups, bias=bias)


class PreActivated(nn.Module):
    """Shortcut of the activated input where the size changes, and of the input elsewhere."""

    def __init__(self, i, o, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(i), conv3(i, o, stride, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(o), conv3(o, o, bias=False)
        if stride != 1:
            self.shortcut = nn.Conv2d(i, o, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if hasattr(self, "shortcut") else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        out += shortcut
        return out


class Wide(nn.Module):
    """One ReLU in place for everything, as in wide residual networks."""

    def __init__(self, i, o, stride, groups=1):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(i, 2 * o, 1), nn.BatchNorm2d(2 * o)
        self.conv2, self.bn2 = conv3(2 * o, o, stride, groups), nn.BatchNorm2d(o)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(i, o, 1, stride), nn.BatchNorm2d(o))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Flat(nn.Module):
    def forward(self, x):
        return x.view(x.size(0), -1)


class Functional(nn.Module):
    """A head in functional form behind any blocks."""

    def __init__(self, blocks, width):
        super().__init__()
        self.stem, self.bn = conv3(2, 4), nn.BatchNorm2d(4)
        self.blocks = nn.Sequential(*blocks)
        self.dense, self.bn_dense = nn.Linear(width, 6), nn.BatchNorm1d(6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        x = self.blocks(F.relu(self.bn(self.stem(x)), inplace=True))
        x = Flat()(F.avg_pool2d(x, 2))
        return self.last(F.dropout(F.relu(self.bn_dense(self.dense(x))), 0.0, self.training))


class Padded(nn.Module):
    """A shortcut without weights: every second pixel, and zeros for the new channels."""

    def __init__(self, i, o):
        super().__init__()
        self.conv, self.more = conv3(i, o, 2), o - i

    def forward(self, x):
        return torch.relu(self.conv(x)) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.more))


def small_vgg() -> nn.Module:
    features = vgg.make_layers([4, "M", 4, "M", 4, "M"], batch_norm=True)
    features[0] = conv3(2, 4)
    with torch.device("meta"):  # no memory for the classifier of ImageNet
        model = vgg.VGG(features, init_weights=False)
    model.classifier = nn.Sequential(
        nn.Linear(196, 6), nn.ReLU(True), nn.Dropout(0), nn.Linear(6, 3)
    )
    return model


def small_resnet() -> nn.Module:
    model = resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=3)
    model.conv1 = nn.Conv2d(2, 64, 3, bias=False)
    return model


def small_densenet() -> nn.Module:
    model = densenet.DenseNet(3, (3, 2), 4, bn_size=2, num_classes=3)
    model.features.conv0 = conv3(2, 4, bias=False)
    return model


def small_shufflenet() -> nn.Module:
    model = shufflenetv2.ShuffleNetV2([1, 2, 1], [4, 8, 8, 8, 12], num_classes=3)
    model.conv1[0] = conv3(2, 4, bias=False)
    return model


def small_efficientnet() -> nn.Module:
    config = partial(efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    blocks = [config(1, 3, 1, 8, 8, 1), config(2, 5, 2, 8, 8, 2)]
    model = efficientnet.EfficientNet(blocks, 0.0, stochastic_depth_prob=0.0, num_classes=3)
    model.features[0][0] = conv3(2, 8, bias=False)
    return model


MODULES = {
    "sequential": lambda: nn.Sequential(
        conv3(2, 4), nn.BatchNorm2d(4), nn.ReLU(True), nn.Flatten(), nn.Linear(256, 3)
    ),
    "preactivated": lambda: Functional([PreActivated(4, 4, 1), PreActivated(4, 8, 2)], 32),
    "wide": lambda: Functional([Wide(4, 4, 1), Wide(4, 8, 2)], 32),
    "grouped": lambda: Functional([Wide(4, 4, 1, 4), Wide(4, 8, 2, 4)], 32),
    "padded": lambda: Functional([Padded(4, 6)], 24),
    "torchvision resnet": small_resnet,
    "torchvision vgg": small_vgg,
    "torchvision densenet": small_densenet,
    "torchvision shufflenet": small_shufflenet,
    "torchvision efficientnet": small_efficientnet,
}


def prepared(name: str):
    """A module in float64 and evaluation, with statistics of its own, and images."""
    torch.manual_seed(0)
    module, rng = MODULES[name]().double(), torch.Generator().manual_seed(0)
    images = torch.rand(6, 2, 8, 8, generator=rng, dtype=torch.float64)
    return oracle.randomize_batch_norm(module, images, rng), images


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODULES)
def test_it_computes_what_the_module_computes(name, training):
    """Logits, gradients and running statistics, in the mode that the module was in."""
    module, images = prepared(name)
    other = copy.deepcopy(module.train(training))
    network = convert(module, (2, 8, 8))
    assert all(part.training == training for part in network.modules())
    logits, expected = clean_pass(network, images)[0], other(images)
    torch.testing.assert_close(logits, expected, rtol=1e-8, atol=1e-8)
    for result in (logits, expected):
        result.square().sum().backward()
    for place, parameter in module.named_parameters():
        gradient = other.get_parameter(place).grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=1e-6)
    for place, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(place))


@pytest.mark.parametrize("name", MODULES)
def test_its_bounds_are_those_of_the_oracle_and_hold_the_module(name):
    module, images = prepared(name)
    network = convert(module, (2, 8, 8))
    labels, clip = module(images).argmax(1), (0.0, 1.0)
    radii = torch.tensor([0, 1e-9, 1e-6, 1e-4, 1e-3, 1e-2], dtype=torch.float64)
    with torch.no_grad():
        margins = certified_margins(network, images, labels, radii)
    expected = oracle.margins(network, images, labels, radii, True, clip)
    # The ends of a ball are rounded to 2**-53, of which a small radius has a large share.
    rounding = expected.abs() * 2**-52 / radii.clamp(min=1e-9)
    assert ((margins - expected).abs() <= 1e-9 + 1e-9 * expected.abs() + rounding).all()
    corners = worst_corners(module, images, labels, radii, clip)
    x = torch.cat([points(images, radii, clip, torch.Generator().manual_seed(0)), corners])
    with torch.no_grad():
        logits = module(x.flatten(0, 1)).view(*x.shape[:2], -1)
        bounds = network(Interval.ball(images, radii, clip))
        crown = certified_margins(network, images, labels, radii, bound="crown-ibp")
    assert (logits >= bounds.lower - SLACK).all()
    assert (logits <= bounds.upper + SLACK).all()
    index = labels.expand(len(x), -1)[..., None]
    reached = (logits - logits.gather(2, index)).scatter(2, index, -torch.inf).amax((0, 2))
    assert (reached <= margins + SLACK).all()
    assert (reached <= crown + SLACK).all()
    assert (crown <= margins + SLACK).all()


@pytest.mark.parametrize("bound", ["ibp", "crown-ibp"])
@pytest.mark.parametrize("name", ["padded", "torchvision shufflenet", "torchvision densenet"])
def test_its_radii_are_proved(name, bound):
    module, images = prepared(name)
    network = convert(module.float(), (2, 8, 8))
    images = images[:3].float()
    labels = network(images).argmax(1)
    found = certified_radii(network, images, labels, 0.1, bound=bound)
    assert (found.radius > 0).all()
    for claim in ("real", "float32"):
        proved = verified_radii(network, images, labels, found, bound=bound, claim=claim)
        assert (proved.radius > 0.5 * found.radius).all()


@pytest.mark.parametrize("name", ["wide", "torchvision densenet", "torchvision efficientnet"])
def test_it_comes_back_from_disk(name, tmp_path):
    module, images = prepared(name)
    network = convert(module, (2, 8, 8))
    save_model(network, tmp_path / "m.safetensors")
    again = load_model(tmp_path / "m.safetensors")
    assert again.description() == network.description()
    with torch.no_grad():
        ours, theirs = (m(Interval.ball(images, 0.01)) for m in (network, again))
    torch.testing.assert_close(ours.mid, theirs.mid, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.rad, theirs.rad, rtol=1e-12, atol=1e-12)


def test_both_are_one_in_training_and_on_the_move():
    module, images = prepared("wide")
    network = convert(module, (2, 8, 8))
    assert {id(p) for p in network.parameters()} == {id(p) for p in module.parameters()}
    assert {id(b) for b in network.buffers()} == {id(b) for b in module.buffers()}
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    before = module(images)
    clean_pass(network.train(), images)[0].square().sum().backward()
    optimizer.step()
    network.eval()
    assert not torch.allclose(module(images), before)
    torch.testing.assert_close(module(images), network(images))
    network.float()  # which puts new buffers in the place of the old ones
    torch.testing.assert_close(module(images.float()), network(images.float()))


def test_the_module_stays_as_it_was():
    """Modes, statistics, the layout that its views need, and random numbers."""
    module, _ = prepared("wide")
    module.blocks[0].train()
    state = copy.deepcopy(module.state_dict())
    modes = [part.training for part in module.modules()]
    strides = [weight.stride() for weight in module.parameters()]
    torch.manual_seed(3)
    network = convert(module, (2, 8, 8))
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(3)))
    assert [part.training for part in module.modules()] == modes
    assert [weight.stride() for weight in module.parameters()] == strides
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    norms = [part.training for part in network.modules() if isinstance(part, il.IntervalBatchNorm)]
    assert sorted(norms) == [False] * 5 + [True] * 2


class Body(nn.Module):
    """A convolution, any function of it, and a linear layer."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        self.conv, self.other = conv3(2, 4), conv3(4, 4)
        self.gain = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.1]))
        self.register_buffer("shift", torch.linspace(-1, 1, 4).view(4, 1, 1))
        self.relu, self.norm = nn.ReLU(inplace=True), nn.BatchNorm2d(4)
        for name, part in parts.items():
            setattr(self, name, part)
        self.last = nn.LazyLinear(3)

    def forward(self, x):
        return self.last(torch.flatten(self.function(self, self.conv(x)), 1))


def body(function, **parts) -> Body:
    torch.manual_seed(0)
    module = Body(function, **parts)
    module(torch.rand(4, 2, 6, 6))
    return module.eval()


def resized(module, x):
    return F.interpolate(F.adaptive_avg_pool2d(x, (2, 3)), scale_factor=2)


def overwritten(module, x):
    y = x.add_(1)
    return y * 2 + x


def overwritten_by_python(module, x):
    y = x
    y += 1
    y *= module.shift
    y /= 3
    y -= 0.5
    return y + x


def blocks_of(module, x):
    a = torch.cat([x, module.other(x)], 1)
    return torch.cat([x, module.other(x), a], dim=-3)


def casts_and_moves(module, x):
    x = x.to(x.dtype).to("cpu", x.dtype).to(module.shift).type_as(module.gain).to(x)
    return x.contiguous().detach().clone().cpu().to(module.gain.device).type(x.dtype)


def unpacked(module, x):
    first, second, third, fourth = torch.split(x, 1, dim=1)
    left, right = torch.tensor_split(second, 2, -1)
    return torch.cat([first * third, torch.relu(fourth) - second, torch.cat([right, left], 3)], 1)


def part_that_feeds_two(module, x):
    first, second = x.chunk(2, dim=1)
    y = torch.tanh(second)
    z = torch.relu(y - first)
    return torch.cat([first, second, y, z, second * y], 1)


def gate_that_feeds_two(module, x):
    gate = torch.sigmoid(module.other(x))
    return gate * torch.relu(x) + (1 - gate) * x


def gated_in_place(module, x):
    y = module.other(x)
    y *= torch.sigmoid(x)
    return y


def matrix_in_place(module, x):
    y = module.other(x) @ module.rows
    y += module.bias
    return y


FUNCTIONS = {
    "activations": lambda m, x: F.leaky_relu(torch.tanh(x), 0.2) + torch.sigmoid(x).relu(),
    "clamps": lambda m, x: (
        x.clamp(-0.5, 0.4) + torch.clip(x, max=0.1) + x.clamp_min(0.2) + torch.clamp(x, 0.3, -0.3)
    ),
    "clamps in place": lambda m, x: torch.clamp_max_(m.other(x.add_(0.1).clamp_(min=-0.2)), 0.7),
    "clamps a channel": lambda m, x: x.clamp(m.shift - 1, m.shift) + torch.maximum(m.shift, x),
    "minima a channel": lambda m, x: x.minimum(m.gain.view(4, 1, 1)) + torch.min(x, m.shift),
    "maxima": lambda m, x: torch.max(torch.tensor([0.1]), x),
    "piecewise linear": lambda m, x: (
        F.relu6(x) + F.hardtanh(x, -0.1, 0.3, False) + F.hardsigmoid(x) + x.abs() + abs(x)
    ),
    "slopes": lambda m, x: F.prelu(m.prelu(x), m.slopes) + x.prelu(m.slopes),
    "exponentials": lambda m, x: (
        F.elu(x, 0.5) + F.celu(x, alpha=0.5) + torch.selu(x) + F.softplus(x, 2) + F.logsigmoid(x)
    ),
    "exponentials in place": lambda m, x: torch.selu_(
        torch.celu_(m.other(F.elu_(x, 0.5)), 0.3).add(1)
    ),
    "gates": lambda m, x: (
        F.silu(x) + F.gelu(x) + F.gelu(x, approximate="tanh") + F.mish(x) + F.hardswish(x)
    ),
    "gates in place": lambda m, x: F.silu(m.other(F.mish(x, inplace=True)), inplace=True),
    "a quotient": lambda m, x: F.softsign(x),
    "activations in place": lambda m, x: torch.relu_(m.other(x).add_(0.1)),
    "constants": lambda m, x: 1 - (2 * x - 0.5) / 3 + -x * 0.1,
    "a parameter for each channel": lambda m, x: (x - m.gain.view(4, 1, 1)) / m.gain[:, None, None],
    "constants for each row": lambda m, x: (x * m.rows + m.rows.sqrt()) / (m.rows + 1) - m.rows,
    "as many columns as channels": lambda m, x: x[..., :4] * m.rows[:4] - m.rows[2:],
    "constants a channel": lambda m, x: m.gain.view(1, -1, 1, 1) * x + m.shift,
    "computed constants": lambda m, x: (x + m.shift[1].exp().view(1, 1, 1, 1)).mul(2),
    "differences": lambda m, x: x - m.other(x),
    "a sum by Python": lambda m, x: sum([x, m.other(x)]),
    "a sum of three": lambda m, x: x + m.other(x) + torch.tanh(x),
    "twice the same": lambda m, x: x + x,
    "means": lambda m, x: x.mean((2, 3)),
    "means that keep their dimensions": lambda m, x: torch.mean(x, dim=[-1], keepdim=True),
    "means of rows": lambda m, x: x.mean(3),
    "pools": lambda m, x: F.max_pool2d(F.avg_pool2d(x, 3, stride=1, padding=1), 2, ceil_mode=True),
    "other sizes": resized,
    "to one pixel": lambda m, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "one pool at two sizes": lambda m, x: torch.cat([m.pool(x), m.pool(F.max_pool2d(x, 2))], 1),
    "padding": lambda m, x: m.pad(F.pad(x, [1, 0, 0, 2])),
    "parts": lambda m, x: x[:, 1:, ..., ::2][:, :, 0],
    "parts with new dimensions": lambda m, x: x[:, None, 1:3, -1].squeeze(1),
    "order": lambda m, x: x.permute(0, 2, 3, 1).transpose(1, -1).contiguous(),
    "order as a tuple": lambda m, x: torch.permute(x, (0, 3, 1, 2)),
    "shapes": lambda m, x: x.view(x.shape[0], 2, -1).unsqueeze(1).reshape(-1, 12, x.size(2) * 2),
    "shapes by a layer": lambda m, x: m.unflatten(x.flatten(1)),
    "concatenations": lambda m, x: torch.cat([x, m.other(x), x], 1),
    "rows side by side": lambda m, x: torch.cat((x, m.other(x)), dim=-1),
    "a concatenation that goes on": blocks_of,
    "a concatenation of one": lambda m, x: torch.cat([x], 1),
    "casts and moves": casts_and_moves,
    "sums": lambda m, x: x.sum((2, 3)) + x.sum(-1).sum(dim=2) + x.sum(1).flatten(1)[:, :4],
    "means of channels": lambda m, x: (
        torch.mean(x, 1, keepdim=True) + x.mean((-1, 1), keepdim=True)
    ),
    "means of channels and rows": lambda m, x: x.flatten(2).mean(1),
    "maxima of places": lambda m, x: x.amax((2, 3)) + x.amax(1)[:, 0, :4],
    "chunks": lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1),
    "unpacked": unpacked,
    "splits": lambda m, x: torch.cat(
        [p.relu() for p in (x.split([1, 3], 1)[1], x.split(2, -3)[0])], 1
    ),
    "unbound": lambda m, x: x.unbind(1)[2] * x.unbind(-1)[0].mean(1)[:, None],
    "a part that feeds two": part_that_feeds_two,
    "stacks": lambda m, x: torch.stack([x, m.other(x), torch.tanh(x)], -2).sum(-2),
    "one stacked": lambda m, x: torch.stack((x,), dim=1),
    "narrowed": lambda m, x: x.narrow(2, -4, 3).select(1, -1),
    "selected": lambda m, x: x[:, [2, 0, 0]].index_select(3, torch.tensor([5, 1])),
    "turned": lambda m, x: x.flip(-1, 2).flip([1]) + x.roll((1, -2), dims=(1, 3)).roll(2, 2),
    "repeated": lambda m, x: x.repeat(1, 2, 1, 1).repeat_interleave(2, dim=2),
    "expanded": lambda m, x: x.mean((1, 2), keepdim=True).expand(-1, 3, -1, 6).expand_as(x[:, 1:]),
    "orders by other names": lambda m, x: x.movedim(1, -1).swapaxes(1, 2).swapdims(-2, 3),
    "shapes of others": lambda m, x: m.other(x).flatten(2).view_as(x).type_as(m.other(x)),
    "shuffles": lambda m, x: m.down(m.up(m.mixed(x))),
    "shuffles by functions": lambda m, x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3),
    "a gate": lambda m, x: x * torch.sigmoid(m.other(F.adaptive_avg_pool2d(x, 1))),
    "a gate of places": lambda m, x: x.mul(torch.sigmoid(x.mean(1, keepdim=True))),
    "a gate in place": gated_in_place,
    "products": lambda m, x: x * m.other(x) * torch.tanh(x),
    "squares": lambda m, x: x * x + x.square() + x**2 + x.pow(2),
    "a gate that feeds two": gate_that_feeds_two,
    "a part by name": lambda m, x: torch.chunk(input=x, chunks=2, dim=1)[1],
    "turned by name": lambda m, x: torch.flip(x, dims=(2,)).tile(2, 1, 1),
    "products with buffers": lambda m, x: F.linear(x, m.table.t()) @ m.table.T,
    "a linear map turned": lambda m, x: F.linear(x, m.rows.t(), m.bias),
    "a difference from fewer channels": lambda m, x: x.mean(1, keepdim=True) - x,
    "sums of other sizes": lambda m, x: x + x[:, :1] - x.mean((2, 3), keepdim=True),
    "matrices": lambda m, x: torch.matmul(x, m.rows) @ m.rows.t() @ m.rows,
    "matrices from the left": lambda m, x: m.rows.T @ (m.rows @ x),
    "a matrix and a bias": lambda m, x: F.relu(x.flatten(1) @ m.rows + m.bias),
    "a matrix and a bias, in place": matrix_in_place,
    "a matrix by name": lambda m, x: torch.addmm(m.bias, torch.mm(x.flatten(1), m.first), m.rows),
    "transposed convolutions": lambda m, x: m.larger(m.other(x)),
    "transposed convolutions by name": lambda m, x: F.conv_transpose2d(
        x, m.weight, m.bias, 2, (1, 0), (0, 1), groups=2, dilation=2
    ),
    "transposed to a size": lambda m, x: m.larger(x, output_size=(12, 12)),
    "convolutions of rows": lambda m, x: F.conv1d(m.along(x.flatten(2)), m.weight, stride=2),
    "adaptive maxima": lambda m, x: m.pool(x) + F.adaptive_max_pool2d(x, (4, 1))[..., :3],
    "adaptive means": lambda m, x: F.adaptive_avg_pool2d(x, (4, 5)),
    "adaptive pools that grow": lambda m, x: torch.cat([m.pool(x), m.other_pool(x)], 1),
    "pools that repeat": lambda m, x: F.adaptive_max_pool2d(x, 12),
    "pools of rows": lambda m, x: m.last_pool(m.pool(m.other_pool(m.first_pool(x.flatten(2))))),
    "pools of rows by functions": lambda m, x: F.adaptive_avg_pool1d(
        F.max_pool1d(F.avg_pool1d(x.flatten(2), 3, 2, 1, True), (2,), 1, 0, 2), 5
    ),
    "padding of everything": lambda m, x: F.pad(x, (1, 0, 0, 2, 1, 0, 0, 0)),
    "padding of no images": lambda m, x: F.pad(x, [0] * 8),
    "stochastic depth": lambda m, x: x + m.drop(m.other(x)),
    "nothing": lambda m, x: F.dropout(m.identity(x), 0.5, m.training),
    "a weight of its own": lambda m, x: F.conv2d(x, m.weight, padding=1, groups=2),
    "rows through a weight": lambda m, x: F.linear(x, m.rows, m.bias),
    "one layer twice": lambda m, x: m.other(torch.relu(m.other(x))),
    "one norm twice": lambda m, x: m.norm(m.other(m.norm(x))),
    "one relu for all, in place": lambda m, x: m.relu(m.other(m.relu(x))),
    "read after a detached part was overwritten": lambda m, x: (x.detach().relu_(), x)[1],
    "read after it was overwritten": lambda m, x: m.other(m.relu(x)) + x,
    "overwritten by a method": overwritten,
    "overwritten by Python": overwritten_by_python,
    "overwritten under another name": lambda m, x: m.identity(x).relu_() + x,
    "overwritten, with names": lambda m, x: F.relu(input=x, inplace=True) + x,
    "interval layers": lambda m, x: m.interval(x),
    "interval layers never overwrite": lambda m, x: m.interval(x) + x,
}


def in_place(part):
    part.compile()
    return part


PARTS = {
    "shuffles": {
        "mixed": nn.ChannelShuffle(2),
        "up": nn.PixelShuffle(2),
        "down": nn.PixelUnshuffle(3),
    },
    "products with buffers": {"table": nn.Buffer(torch.randn(6, 2) / 2)},
    "a linear map turned": {
        "rows": nn.Parameter(torch.randn(6, 5) / 2),
        "bias": nn.Parameter(torch.randn(5)),
    },
    "matrices": {"rows": nn.Parameter(torch.randn(6, 2) / 2)},
    "matrices from the left": {"rows": nn.Parameter(torch.randn(3, 6) / 2)},
    "a matrix and a bias": {
        "rows": nn.Parameter(torch.randn(144, 5) / 9),
        "bias": nn.Parameter(torch.randn(5)),
    },
    "a matrix and a bias, in place": {
        "rows": nn.Parameter(torch.randn(6, 5) / 2),
        "bias": nn.Parameter(torch.randn(5)),
    },
    "a matrix by name": {
        "first": nn.Parameter(torch.randn(144, 5) / 9),
        "rows": nn.Parameter(torch.randn(5, 4)),
        "bias": nn.Parameter(torch.randn(4)),
    },
    "transposed convolutions": {"larger": nn.ConvTranspose2d(4, 2, 3, 2, 1, 1, 2)},
    "transposed convolutions by name": {
        "weight": nn.Parameter(torch.randn(4, 3, 2, 3) / 3),
        "bias": nn.Parameter(torch.randn(6)),
    },
    "transposed to a size": {"larger": nn.ConvTranspose2d(4, 2, 3, 2, 1)},
    "convolutions of rows": {
        "along": nn.Conv1d(4, 6, 3, padding="same", padding_mode="circular"),
        "weight": nn.Parameter(torch.randn(2, 6, 5) / 5),
    },
    "adaptive maxima": {"pool": nn.AdaptiveMaxPool2d((4, 3))},
    "adaptive pools that grow": {
        "pool": nn.AdaptiveMaxPool2d((9, 4)),
        "other_pool": nn.AdaptiveAvgPool2d((9, 4)),
    },
    "pools of rows": {
        "first_pool": nn.AvgPool1d(3, 2, 1, count_include_pad=False),
        "other_pool": nn.MaxPool1d(3, 1, 1, 1, ceil_mode=True),
        "pool": nn.AdaptiveAvgPool1d(7),
        "last_pool": nn.AdaptiveMaxPool1d(4),
    },
    "stochastic depth": {"drop": StochasticDepth(0.0, "row")},
    "slopes": {"prelu": nn.PReLU(4, 1.5), "slopes": nn.Parameter(torch.tensor([-0.3]))},
    "one pool at two sizes": {"pool": nn.AdaptiveAvgPool2d(1)},
    "padding": {"pad": nn.ZeroPad2d((0, 1, 1, 0))},
    "shapes by a layer": {"unflatten": nn.Unflatten(1, (9, 16))},
    "constants for each row": {"rows": nn.Buffer(torch.rand(6))},
    "as many columns as channels": {"rows": nn.Buffer(torch.rand(6))},
    "nothing": {"identity": nn.Identity()},
    "overwritten under another name": {"identity": nn.Dropout(0.0)},
    "interval layers never overwrite": {"interval": il.IntervalReLU(inplace=True)},
    "a weight of its own": {"weight": nn.Parameter(torch.rand(4, 2, 3, 3))},
    "rows through a weight": {"rows": nn.Parameter(torch.rand(3, 6)), "bias": None},
    "interval layers": {
        "interval": il.IntervalSequential(il.IntervalConv2d(4, 2, 1), il.IntervalReLU())
    },
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_and_methods(name):
    """As the module in evaluation and in training; each point of a ball is in the bounds."""
    module = body(FUNCTIONS[name], **PARTS.get(name, {})).double()
    images = torch.rand(5, 2, 6, 6, dtype=torch.float64)
    network = convert(module, (2, 6, 6))
    x = images + 0.02 * (2 * torch.rand(20, *images.shape) - 1).sign()
    bounds = network(Interval.ball(images, 0.02, None))
    logits = module(x.flatten(0, 1)).view(20, 5, -1)
    torch.testing.assert_close(network(images), module(images), rtol=1e-9, atol=1e-9)
    assert (logits >= bounds.lower - SLACK).all()
    assert (logits <= bounds.upper + SLACK).all()
    trained = {id(p) for p in network.parameters()}
    used = module(images).sum()
    grads = torch.autograd.grad(used, [*module.parameters()], allow_unused=True)
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        assert (id(parameter) in trained) or grad is None
    if "nothing" not in name:  # which drops at random
        other = copy.deepcopy(module).train()
        logits = clean_pass(network.train(), images)[0]
        torch.testing.assert_close(logits, other(images), rtol=1e-8, atol=1e-8)
        for ours, theirs in zip(module.buffers(), other.buffers(), strict=True):
            torch.testing.assert_close(ours, theirs)


TWINS = {
    "relu6": nn.ReLU6(),
    **{
        name: type(layer).twins[0](**{name: getattr(layer, name) for name in layer.arguments})
        for name, make in (ACTIVATIONS | DROPOUTS).items()
        if getattr(layer := make(4), "twins", ()) and name not in ("relu6", "dropout of rows")
    },
    "dropout of rows": nn.Dropout1d(0.5),
}


@pytest.mark.parametrize("name", TWINS)
def test_modules_become_the_layers_that_they_are_twins_of(name, tmp_path):
    """They compute the same in both modes, share what they hold, and come back from disk."""
    torch.manual_seed(0)
    shape = [nn.Flatten(2)] if name == "dropout of rows" else []
    module = nn.Sequential(conv3(2, 4), *shape, TWINS[name], nn.Flatten(), nn.Linear(144, 3)).eval()
    network = convert(module, (2, 6, 6))
    assert type(module[-3]) in type(network[-3]).twins
    assert {id(p) for p in network.parameters()} == {id(p) for p in module.parameters()}
    images = torch.rand(4, 2, 6, 6)
    for training in (False, True):
        logits = []
        for model in (network.train(training), module.train(training)):
            torch.manual_seed(1)
            logits.append(model(images))
        torch.testing.assert_close(*logits)
    save_model(network.eval(), tmp_path / "m")
    again = load_model(tmp_path / "m")
    assert repr(again) == repr(network)
    ours, theirs = (m(Interval.ball(images, 0.01)) for m in (network, again))
    torch.testing.assert_close(ours.lower, theirs.lower)
    torch.testing.assert_close(ours.upper, theirs.upper)


def test_softplus_is_continuous_where_the_module_is_not():
    """At 20 `nn.Softplus` steps down by 2e-9, out of the bounds of smaller numbers."""
    layer = il.IntervalSoftplus().double()
    x = torch.tensor([[19.9999999999, 20.0000000001]], dtype=torch.float64)
    assert nn.Softplus()(x).diff() < 0
    assert layer(x).diff() > 0
    torch.testing.assert_close(layer(x), nn.Softplus()(x), rtol=0, atol=2.1e-9)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (1, 1, 1, 1), ()], ids=str)
def test_clamps_follow_what_the_module_loads(shape):
    def clamped(m, x):
        return torch.maximum(x, m.low) + x.clamp(max=m.high)

    trained, loaded = Body(clamped).eval(), Body(clamped).eval()
    for module, low, high in ((trained, 0.3, -0.2), (loaded, 0.0, 1.0)):
        module.register_buffer("low", torch.full(shape, low))
        module.register_buffer("high", torch.full(shape, high))
        module(torch.rand(4, 2, 6, 6))
    network = convert(loaded, (2, 6, 6))
    images = torch.rand(4, 2, 6, 6)
    assert not torch.allclose(network(images), trained(images))
    loaded.load_state_dict(trained.state_dict())
    torch.testing.assert_close(network(images), trained(images))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (nn.ELU(-0.5), "^IntervalELU needs alpha >= 0$"),
        (nn.CELU(-0.5), "^IntervalCELU needs alpha > 0$"),
        (nn.Softplus(1.0, 2.0), "^IntervalSoftplus needs threshold >= 20$"),
        (nn.LeakyReLU(-0.1), "^IntervalLeakyReLU needs negative_slope >= 0$"),
    ],
    ids=str,
)
def test_settings_without_a_sound_rule_are_refused_by_name(part, message):
    with pytest.raises(UserError, match=message):
        convert(body(lambda m, x: m.part(x), part=part), (2, 6, 6))


def test_limits_that_are_parameters_are_trained():
    module = body(lambda m, x: torch.clamp(x, max=m.gain.view(4, 1, 1)))
    network = convert(module, (2, 6, 6))
    ball = Interval.ball(torch.rand(4, 2, 6, 6), 0.1)
    (gradient,) = torch.autograd.grad(network(ball).upper.sum(), module.gain)
    assert (gradient != 0).any()


@pytest.mark.parametrize(
    "function",
    [F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout],
    ids=lambda function: function.__name__,
)
def test_functions_that_drop_become_their_layers(function):
    def dropped(m, x, training):
        rows = x.flatten(2) if function is F.dropout1d else x
        return function(rows, 0.5, training).view(x.shape)

    network = convert(body(lambda m, x: dropped(m, x, m.training)), (2, 6, 6))
    kinds = [type(layer).__name__.lower() for layer in network]
    assert "interval" + function.__name__.replace("_", "") in kinds
    with pytest.raises(UserError, match="pass training="):
        convert(body(lambda m, x: dropped(m, x, True)), (2, 6, 6))


def test_mobilenet_v2_of_torchvision():
    """Its logits, and the bounds of the oracle, which hold points of the ball."""
    torch.manual_seed(0)
    module = mobilenet_v2(weights=None, num_classes=10)
    images = torch.rand(3, 3, 64, 64)
    oracle.randomize_batch_norm(module, torch.rand(8, 3, 64, 64), torch.Generator().manual_seed(0))
    network = convert(module, (3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(network(images), module(images), rtol=1e-4, atol=1e-4)
        radius = 1e-6
        bounds = network.double()(Interval.ball(images.double(), radius))
        moved = images + radius * (2 * torch.rand(4, *images.shape).double() - 1)
        logits = module.double()(moved.clamp(0, 1).flatten(0, 1)).view(4, 3, 10)
        expected = oracle.propagate(network, oracle.ball(images, radius))
    assert (logits >= bounds.lower - SLACK).all()
    assert (logits <= bounds.upper + SLACK).all()
    torch.testing.assert_close(bounds.upper, expected.upper, rtol=1e-6, atol=1e-6)
    assert sum(isinstance(layer, il.IntervalHardtanh) for layer in network.modules()) == 35


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "efficientnet_b0"])
def test_networks_of_torchvision(name):
    """Their logits, and bounds that hold those of points of the ball."""
    torch.manual_seed(0)
    module = getattr(models, name)(weights=None, num_classes=10)
    oracle.randomize_batch_norm(module, torch.rand(8, 3, 64, 64), torch.Generator().manual_seed(0))
    images, radius = torch.rand(2, 3, 64, 64).double(), 1e-9
    network = convert(module.double(), (3, 64, 64))
    with torch.no_grad():
        torch.testing.assert_close(network(images), module(images), rtol=1e-9, atol=1e-9)
        bounds = network(Interval.ball(images, radius))
        moved = images + radius * (2 * torch.rand(4, *images.shape).double() - 1)
        logits = module(moved.clamp(0, 1).flatten(0, 1)).view(4, 2, 10)
    assert (logits >= bounds.lower - SLACK).all()
    assert (logits <= bounds.upper + SLACK).all()
    assert bounds.rad.isfinite().all()


class Scaled(nn.Module):
    """With a parameter of five dimensions."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1, 2).view(1, 2, 1, 1, 1))
        self.last = nn.Linear(16, 3)

    def forward(self, x):
        return self.last((x * self.gain).flatten(1))


INPUTS = {
    (1,): lambda: nn.Sequential(nn.Linear(1, 6), nn.ReLU(), nn.Linear(6, 3)),
    (6,): lambda: nn.Sequential(
        nn.BatchNorm1d(6), nn.Linear(6, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)
    ),
    (3, 12): lambda: nn.Sequential(
        nn.Conv1d(3, 4, 3, padding=1),
        *(nn.BatchNorm1d(4), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(24, 3)),
    ),
    (5, 7): lambda: nn.Sequential(nn.Linear(7, 4), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)),
    (2, 3, 4, 5): lambda: nn.Sequential(
        nn.BatchNorm3d(2), nn.Linear(5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ),
    (2, 2, 2, 2): Scaled,
}


@pytest.mark.parametrize("shape", INPUTS, ids=str)
def test_inputs_of_any_shape(shape, tmp_path):
    """Converted, certified, proved, trained and back from disk."""
    torch.manual_seed(0)
    module = INPUTS[shape]().eval()
    network = convert(module, shape)
    assert network.in_shape == shape
    inputs = torch.rand(6, *shape)
    with torch.no_grad():
        torch.testing.assert_close(network(inputs), module(inputs))
    labels = network(inputs).argmax(1)
    for bound in ("ibp", "crown-ibp"):
        found = certified_radii(network, inputs, labels, 0.1, bound=bound)
        proved = verified_radii(network, inputs, labels, found, bound=bound, claim="float32")
        assert (proved.radius > 0.5 * found.radius).all()
        assert (found.radius > 0).any()
        with torch.no_grad():
            margins = certified_margins(network, inputs, labels, found.radius, bound=bound)
            expected = oracle.margins(network, inputs, labels, found.radius, True, (0.0, 1.0))
        assert (margins <= expected + 1e-5).all()
    save_model(network, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(inputs), network(inputs))
    certified_margins(network.train(), inputs, labels, 0.01).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_batch_norm_of_several_processes_is_batch_norm(tmp_path):
    torch.manual_seed(0)
    plain = nn.Sequential(conv3(2, 4), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    oracle.randomize_batch_norm(plain, torch.rand(4, 2, 6, 6), torch.Generator().manual_seed(0))
    module = nn.SyncBatchNorm.convert_sync_batchnorm(plain).eval()
    network = convert(module, (2, 6, 6))
    assert type(network[1]) is il.IntervalBatchNorm
    assert network[1].running_mean is module[1].running_mean
    images = torch.rand(3, 2, 6, 6)
    torch.testing.assert_close(network(images), module(images))
    save_model(network, tmp_path / "m")
    assert torch.equal(load_model(tmp_path / "m")(images), network(images))


def test_a_matrix_is_shared_and_its_bias_merged():
    """So that elision and proofs see one last layer."""

    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(4, 8))
            self.bias = nn.Parameter(torch.randn(4))
            self.rows = nn.Parameter(torch.randn(4, 3))
            self.shift = nn.Parameter(torch.randn(3))

        def forward(self, x):
            hidden = torch.relu(x.flatten(1) @ self.first.t() + self.bias)
            return self.shift + torch.matmul(hidden, self.rows)

    torch.manual_seed(0)
    module = Last()
    network = convert(module, (2, 2, 2))
    kinds = [type(layer) for layer in network]
    assert kinds == [il.IntervalFlatten, il.IntervalLinear, il.IntervalReLU, il.IntervalMatMul]
    assert network[1].weight is module.first
    assert (network[1].bias, network[3].bias) == (module.bias, module.shift)
    assert network[3].weight is module.rows
    images, labels = torch.rand(5, 2, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    with torch.no_grad():
        margins = certified_margins(network, images, labels, 0.01)
        expected = oracle.margins(network, images, labels, 0.01, False, (0.0, 1.0))
    assert (margins < expected - 1e-3).any()
    certified_margins(network, images, labels, 0.01).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_layers_that_share_weights_can_be_saved(tmp_path):
    network = convert(body(FUNCTIONS["one norm twice"]), (2, 6, 6))
    save_model(network, tmp_path / "m")
    images = torch.rand(2, 2, 6, 6)
    assert torch.equal(load_model(tmp_path / "m")(images), network(images))


def test_a_chain_stays_a_chain_and_branches_are_residuals_and_concatenations():
    def kinds(function):
        return [type(layer).__name__[8:] for layer in convert(body(function), (2, 6, 6))][1:-2]

    assert kinds(lambda m, x: m.norm(torch.relu(m.other(x)))) == ["Conv2d", "ReLU", "BatchNorm"]
    assert kinds(lambda m, x: torch.relu(m.other(x) + x)) == ["Residual", "ReLU"]
    assert kinds(blocks_of) == ["Concat"]
    assert kinds(lambda m, x: torch.cat([torch.tanh(x), x], 1)) == ["Concat"]


def test_a_classifier_is_itself():
    model = ibpcore.cnn7((1, 8, 8), 3, width=2, hidden=4)
    assert convert(model, (1, 8, 8)) is model
    with pytest.raises(UserError, match=r"takes images \(1, 8, 8\)"):
        convert(model, (1, 9, 9))


def hooked(m) -> Body:
    m.conv.register_forward_hook(lambda module, args, output: output + 1)
    return m


@torch.fx.wrap
def relu(x):
    """Named like a function of torch, and another."""
    return -x


def of_batch(m, x):
    return x / x.size(0)


class First(nn.Module):
    """The first result of a part."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return self.part(x)[0]


def hooked_part(part):
    part.register_forward_hook(lambda module, args, output: output + 1)
    return part


REFUSED = {
    "group norm": (nn.GroupNorm(2, 4), r"layer 'part' \(GroupNorm\): its statistics depend on"),
    "layer norm": (nn.LayerNorm(6), r"layer 'part' \(LayerNorm\): its statistics depend on"),
    "glu": (nn.GLU(1), r"layer 'part' \(GLU\): no interval rule"),
    "no channels to clamp": (
        lambda m, x: x[:, 0, 0, 0].clamp(min=0)[:, None],
        "'clamp' in 'model': its input has no channels",
    ),
    "a clamp by another part": (
        lambda m, x: torch.maximum(x, m.other(x)),
        "only sums and products",
    ),
    "a computed slope": (lambda m, x: F.prelu(x, m.gain.exp()), "computed from parameters"),
    "a smallest number": (lambda m, x: x - x.min(), "operation 'min' in 'model'"),
    "largest numbers": (lambda m, x: x.max(1).values[:, None], "operation 'max' in 'model'"),
    "softmax": (lambda m, x: x.softmax(1), "'softmax' in 'model': a classifier must return logits"),
    "function": (lambda m, x: torch.sin(x), "operation 'sin' in 'model': no interval rule"),
    "norm as function": (lambda m, x: F.layer_norm(x, [6]), "'layer_norm' in 'model': its stat"),
    "weight norm": (
        nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1)),
        "ParametrizedConv2d",
    ),
    "quotient of parts": (lambda m, x: x / m.other(x), "'truediv' in 'model': only sums and prod"),
    "product of matrices": (lambda m, x: x @ m.other(x), "'matmul' in 'model': only sums and prod"),
    "product with a vector": (lambda m, x: x[..., :4] @ m.gain, "constant matrix"),
    "computed matrix": (lambda m, x: x[..., :4] @ m.gain.exp()[:, None], "computed from param"),
    "cube": (lambda m, x: x**3, "'pow' in 'model': of all powers only the square"),
    "batch of matrices": (lambda m, x: x @ torch.ones(4, 6, 2), "constant matrix"),
    "sum over images": (lambda m, x: x + x.sum(0, keepdim=True), "'sum' .* mixes the images"),
    "sum of all": (lambda m, x: x + x.mean(), "'mean' .* mixes the images"),
    "images chosen": (lambda m, x: x.narrow(0, 0, 1), "'narrow' .* mixes the images"),
    "images split": (lambda m, x: x.chunk(3)[0], "mixes the images"),
    "images padded": (lambda m, x: F.pad(x, [0] * 7 + [1])[:-1], "would add images"),
    "images repeated": (lambda m, x: x.repeat(2, 1, 1, 1)[::2], "mixes the images"),
    "images rolled": (lambda m, x: x.roll(1, 0), "'roll' .* mixes the images"),
    "all rolled": (lambda m, x: x.roll(1), "'roll' .* mixes the images"),
    "another type": (lambda m, x: x.double().float(), "'double' in 'model': it changes the type"),
    "another type by name": (lambda m, x: x.to(torch.float16).float(), "it changes the type"),
    "indices of adaptive maxima": (First(nn.AdaptiveMaxPool2d(4, return_indices=True)), "indices"),
    "indices of a row": (
        First(nn.Sequential(nn.Flatten(2), nn.MaxPool1d(4, return_indices=True))),
        "indices",
    ),
    "indices of rows": (
        lambda m, x: F.max_pool1d(x.flatten(2), 2, return_indices=True)[0],
        "indices",
    ),
    "active stochastic depth": (
        lambda m, x: depth.stochastic_depth(x, 0.5, "row"),
        "'torchvision.ops.stochastic_depth.stochastic_depth' .* active in evaluation",
    ),
    "hooks of a wrapper": (
        hooked_part(nn.DataParallel(nn.Conv2d(4, 4, 1))),
        "the wrapper DataParallel has forward hooks",
    ),
    "division of a number": (lambda m, x: 1 / x, "only a division by a constant"),
    "division by 0": (lambda m, x: x / 0, "it divides by 0"),
    "a number of the image": (lambda m, x: x * x.max().item(), "operation 'max' in 'model'"),
    "a constant filled with a number of the image": (
        lambda m, x: x * x.new_full((1,), x.sum().item()),
        "operation 'sum' in 'model'|operation 'new_full' in 'model'",
    ),
    "values": (lambda m, x: x if x.sum() > 0 else -x, "'model' cannot be traced, .*control flow"),
    "sizes": (lambda m, x: x if x.shape[1] > 3 else -x, "cannot be traced"),
    "constants": (
        lambda m, x: x[:, :1] * torch.ones(4, 1, 1),
        r"constant of shape \(4, 1, 1\) changes the shape \(3, 1, 6, 6\)",
    ),
    "computed constants": (lambda m, x: x * m.gain.exp().view(4, 1, 1), "computed from parameters"),
    "sizes of a sum": (lambda m, x: (x[:, :1, None] + x).mean(1), "different shapes"),
    "scaled sum": (lambda m, x: torch.add(x, m.other(x), alpha=2), "only sums and products"),
    "images mixed": (lambda m, x: x.flip(0), "operation 'flip' .* mixes the images"),
    "images side by side": (lambda m, x: torch.cat([x, x], 0)[::2], "mixes the images"),
    "images turned": (lambda m, x: x.transpose(0, 1).transpose(0, 1), "mixes the images"),
    "images flattened": (lambda m, x: x.flatten(0, 1).view(-1, 4, 6, 6), "mixes the images"),
    "a function of the same name": (lambda m, x: relu(x), "operation 'test_convert.relu' in"),
    "an attribute": (lambda m, x: x.mT, "operation 'mT' in 'model'"),
    "no channels": (lambda m, x: (x[:, 0, 0, 0] * 2)[:, None], "its input has no channels"),
    "a size of the batch": (lambda m, x: x.reshape(3, 4, 6, 6), "depends on the size of the batch"),
    "size of the batch": (of_batch, "depends on the size of the batch"),
    "an alias": (lambda m, x: (x.view(-1).relu_(), x)[1], "changes in place"),
    "padding by others": (lambda m, x: F.pad(x, (1, 1), value=2.0), "only padding by zeros"),
    "padding by copies": (lambda m, x: F.pad(x, [1] * 4, mode="replicate"), "padding by zeros"),
    "bilinear": (lambda m, x: F.interpolate(x, scale_factor=2, mode="bilinear"), "mode nearest"),
    "dropout": (lambda m, x: F.dropout(x), "training=self.training"),
    "indices": (lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], "indices"),
    "a choice by truth": (lambda m, x: x[:, [True, False, True, True]], "list of whole numbers"),
    "two choices": (lambda m, x: x[:, [0, 1], [0, 1]], "one list of them may select"),
    "images by a list": (lambda m, x: x[[2, 1, 0]], "one dimension only"),
    "types": (
        lambda m, x: x.mean((2, 3), dtype=torch.bfloat16) * m.shift.view(4),
        "'mean' in 'model': it changes the type or the device of the numbers",
    ),
    "a constant part": (
        lambda m, x: torch.cat([x, m.shift.expand(3, 4, 6, 6)], 1),
        "does not depend on",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")  # of lazy layers
def test_what_has_no_rule_is_named_with_its_place(name):
    part, message = REFUSED[name]
    if isinstance(part, nn.Module):
        module = body(lambda m, x: m.part(x), part=part)
    elif name == "a constant part":  # which fits one size of a batch only, as the next
        module = Body(part)
        module.last = nn.Linear(288, 3)
    elif name == "a size of the batch":
        module = Body(part)
        module.last = nn.Linear(144, 3)
    else:
        module = body(part)
    modes = [part.training for part in module.modules()]
    with pytest.raises(UserError, match=message) as caught:
        convert(module, (2, 6, 6))
    assert "\n" not in str(caught.value)
    assert [part.training for part in module.modules()] == modes


def relu_of_half(x):
    half = x[:, :2]
    half += 0
    half.relu_()
    return x


@pytest.mark.parametrize(
    "change",
    [
        lambda x: (x.view(-1).relu_(), x)[1],
        lambda x: (x[:, :1].clamp_(0), x)[1],
        lambda x: (x.data.clamp_(0), x)[1],
        lambda x: (x.view(-1), x.relu_())[0].view(-1, 4, 6, 6),
        relu_of_half,
        lambda x: (x.chunk(2, 1)[0].relu_(), x)[1],
        lambda x: (x.chunk(2, 1), x.relu_())[0][0],
    ],
    ids=["view", "part", "data", "made before", "by Python", "chunk", "chunks made before"],
)
def test_what_changes_in_place_is_noticed_where_no_image_shows_it(change):
    """All that is overwritten is above 0 for images, so that nothing changes in the trial."""
    with torch.no_grad():
        module = body(lambda m, x: change(x))
        module.conv.weight.abs_()
        module.conv.bias.abs_()
    with pytest.raises(UserError, match="unsupported operation"):
        convert(module, (2, 6, 6))


def test_a_square_is_bounded_by_0():
    network = convert(body(lambda m, x: x * x).double(), (2, 6, 6))
    x = Interval(mid=torch.zeros(1, 2, 6, 6).double(), rad=torch.ones(1, 2, 6, 6).double())
    assert (network[:-2](x).lower >= 0).all()


def test_many_branches_that_are_not_nested_are_refused():
    """At once, not after trillions of copies."""

    def ladder(m, x):
        a, b = torch.relu(x), torch.tanh(x)
        for _ in range(40):
            a, b = torch.relu(a + b), torch.tanh(a - b)
        return a + b

    with pytest.raises(UserError, match="feeds branches that are not nested"):
        convert(body(ladder), (2, 6, 6))


def test_branches_that_are_not_nested_are_refused():
    def crossed(m, x):
        a, b = torch.tanh(x), m.norm(x)
        return (a + b) + m.other(torch.relu(a) + torch.sigmoid(b))

    with pytest.raises(UserError, match="feeds branches that are not nested"):
        convert(body(crossed), (2, 6, 6))


def test_hooks_are_refused():
    with pytest.raises(UserError, match=r"layer 'conv' \(Conv2d\): its bounds would ignore"):
        convert(hooked(body(lambda m, x: x)), (2, 6, 6))


class Many(nn.Module):
    def forward(self, x, both=False):
        return (x, x) if both is None else x.flatten(1)


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Flatten(), (), "in_shape must be"),
        (nn.Flatten(), (2, 0), "in_shape must be"),
        (nn.Sequential(nn.Flatten(), nn.Linear(7, 2)), (1, 2, 4), r"do not fit .*'1' \(Linear\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(8, 1)), (1, 2, 4), "not logits"),
        (nn.Conv2d(1, 2, 1), (1, 2, 4), "not logits"),
        (resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1]), (1, 8, 8), r"'conv1' \(Conv2d\): Given"),
    ],
    ids=["no shape", "shape", "sizes", "one logit", "images", "channels"],
)
def test_what_makes_no_logits_is_refused(module, shape, message):
    with pytest.raises(UserError, match=message):
        convert(module, shape)


class Turned(nn.Module):
    def forward(self, x):
        return torch.ones(3, 3) @ x


def test_a_matrix_over_images_is_refused():
    with pytest.raises(UserError, match="'matmul' in 'model': it mixes the images"):
        convert(Turned(), (2,))


def compiled_parts() -> nn.Sequential:
    """Every wrapper, whole and in parts."""
    torch.manual_seed(0)
    parts = (nn.Sequential(conv3(2, 4), nn.Tanh()), nn.Sequential(conv3(4, 4), nn.ReLU()))
    return nn.Sequential(*parts, in_place(nn.Sequential(nn.Flatten(), nn.Linear(144, 3)))).eval()


@pytest.mark.parametrize("kind", ["data parallel", "compiled", "compiled in place", "parts"])
def test_wrappers_are_taken_off(kind):
    module = compiled_parts()
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        images = torch.rand(3, 2, 6, 6)
        expected = module(images)
    if kind == "data parallel":
        wrapped = nn.DataParallel(torch.compile(module))
    elif kind == "compiled":
        wrapped = torch.compile(nn.DataParallel(module))
    elif kind == "compiled in place":
        wrapped = in_place(module)
    else:
        wrapped = nn.Sequential(nn.DataParallel(module[0]), torch.compile(module[1]), module[2])
    before = {id(p) for p in module.parameters()}
    network = convert(wrapped, (2, 6, 6)).eval()
    assert {id(p) for p in network.parameters()} == before
    with torch.no_grad():
        torch.testing.assert_close(network(images), expected)


def test_hooks_of_a_compiled_part_are_refused():
    module = compiled_parts()
    hooked_part(module[2])
    with pytest.raises(UserError, match="it is compiled and has forward hooks"):
        convert(module, (2, 6, 6))


def test_a_wrapped_classifier_is_itself():
    model = ibpcore.cnn7((1, 8, 8), 3, width=2, hidden=4)
    assert convert(nn.DataParallel(torch.compile(model)), (1, 8, 8)) is model


def test_arguments_with_defaults_are_left_at_these():
    assert convert(Many(), (1, 1, 2)).classes == 2


def test_settings_of_one_number_count_for_both_sides(tmp_path):
    """PyTorch accepts them; bounds, proofs and model files too."""
    how = {"stride": (2,), "padding": (1,), "dilation": (1,)}
    module = nn.Sequential(nn.Conv2d(2, 2, 3, **how), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    network = convert(module, (2, 4, 4)).eval()
    save_model(network, tmp_path / "m")
    images = torch.rand(4, 2, 4, 4)
    labels = module(images).argmax(1)
    for model in (network, load_model(tmp_path / "m")):
        for bound in ("ibp", "crown-ibp"):
            found = certified_radii(model, images, labels, 0.1, bound=bound)
            proved = verified_radii(model, images, labels, found, bound=bound)
            assert (proved.radius > 0.5 * found.radius).all()
            assert (found.radius > 0).all()
    own = il.IntervalConv2d(2, 2, 3, **how)
    assert (own.stride, own.padding, own.dilation) == ((2, 2), (1, 1), (1, 1))
