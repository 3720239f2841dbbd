"""Rows in windows: the same bounds as rows of whole feature maps, and the same gradients."""

import itertools

import pytest
import test_chunking as chunked
import torch
import torch.nn.functional as F
from torch import nn

from ibpcore import Interval
from ibpcore.bounds.chunking import crown_chunk_size
from ibpcore.bounds.convolutions import TransposedConvolution
from ibpcore.bounds.crown import _ends, _width
from ibpcore.bounds.linear import LinearBounds, maximum
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.bounds.visits import flattened, trace
from ibpcore.bounds.windows import Windows
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConcat,
    IntervalConv1d,
    IntervalConv2d,
    IntervalLeakyReLU,
    IntervalMaxPool2d,
    IntervalProduct,
    IntervalReLU,
    IntervalResidual,
    IntervalSequential,
    IntervalSigmoid,
)
from ibpcore.nn.folding import fold

KERNELS = [(1, 1), (3, 3), (4, 2), (2, 5)]
STRIDES = [(1, 1), (2, 2), (3, 2), (1, 3)]
PADDINGS = [(0, 0), (1, 1), (2, 3), (5, 4)]
DILATIONS = [(1, 1), (2, 1)]


def exact(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


# --- transposed convolutions ----------------------------------------------------------------


@pytest.mark.parametrize("channels", [4, 12], ids=["few channels", "many"])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_the_transpose_is_the_gradient(kernel, groups, channels):
    torch.manual_seed(0)
    tried = 0
    for stride, padding, dilation in itertools.product(STRIDES, PADDINGS, DILATIONS):
        x = torch.randn(2, channels, 8, 9, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(6, channels // groups, *kernel, dtype=torch.float64)
        y = F.conv2d(x, weight, None, stride, padding, dilation, groups)
        rows = torch.randn_like(y)
        transpose = TransposedConvolution(stride, padding, dilation, groups)
        exact(transpose(rows, weight, x.shape), torch.autograd.grad(y, x, rows)[0])
        tried += 1
    assert tried == 32


@pytest.mark.parametrize("channels", [2, 12], ids=["few channels", "many"])
def test_the_transpose_has_the_gradients_of_autograd(channels):
    torch.manual_seed(0)
    transpose = TransposedConvolution((2, 1), (1, 2), (1, 1), 1)
    rows = torch.randn(2, 3, 3, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, channels, 3, 2, dtype=torch.float64, requires_grad=True)
    shape = torch.Size((2, channels, 6, 3))
    assert torch.autograd.gradcheck(lambda r, w: transpose(r, w, shape), (rows, weight))
    assert torch.autograd.gradcheck(transpose.with_padding, (rows, weight))


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_are_what_a_single_number_reads(groups):
    torch.manual_seed(0)
    weight = torch.randn(4, 6 // groups, 2, 3, dtype=torch.float64)
    transpose = TransposedConvolution((2, 3), (1, 0), (3, 2), groups)
    identity = torch.eye(4, dtype=torch.float64)[..., None, None]
    exact(transpose.kernels(weight), transpose.with_padding(identity, weight))


# --- windows --------------------------------------------------------------------------------


def test_windows_by_hand():
    """Two windows of 2 numbers, 2 apart, the first of which starts before the end."""
    windows = Windows(torch.tensor([[0, 2]]), (3,), (2,), (2,), (-1,), clean=False)
    x = torch.tensor([[[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]]])
    assert windows.cut(x)[0].tolist() == [[[0, 1], [0, 6]], [[4, 5], [9, 10]]]
    rows = torch.tensor([[[[1.0, 2]], [[3, 4]], [[5, 6]], [[7, 8]]]])
    whole = [[2, 0, 0, 0, 0], [4, 0, 0, 0, 0], [0, 0, 0, 5, 6], [0, 0, 0, 7, 8]]
    assert windows.whole(rows, (5,))[0, :, 0].tolist() == whole
    assert windows.cleaned(rows, (4,))[0, :, 0].tolist() == [[0, 2], [0, 4], [5, 0], [7, 0]]
    wider = windows._replace(size=(1,), start=(1,))
    assert windows.joined(wider) == windows._replace(size=(3,))
    widened = wider.widened(rows[..., :1], windows._replace(size=(3,)))
    assert widened[0, :, 0].tolist() == [[0, 0, 1], [0, 0, 3], [0, 0, 5], [0, 0, 7]]
    assert windows.joined(wider._replace(stride=(1,))) is None


# --- networks -------------------------------------------------------------------------------


def conv(*sizes, **settings) -> IntervalConv2d:
    return IntervalConv2d(*sizes, **settings)


def geometry(kernel, stride=1, padding=0, dilation=1, groups=1) -> IntervalSequential:
    return IntervalSequential(
        conv(2, 4, (2, 3), stride=(1, 2), padding=(2, 1)),
        IntervalReLU(),
        conv(4, 6, kernel, stride, padding, dilation, groups),
        IntervalReLU(),
        conv(6, 3, 2, padding=1),
        IntervalReLU(),
    )


def residual() -> IntervalSequential:
    block = IntervalSequential(
        conv(4, 4, 3, stride=2, padding=1),
        IntervalBatchNorm(4),
        IntervalReLU(),
        conv(4, 4, 3, padding=1),
    )
    return IntervalSequential(
        conv(2, 4, 3, padding=1),
        IntervalResidual(block, conv(4, 4, 1, stride=2)),
        IntervalReLU(),
        IntervalResidual(IntervalSequential(conv(4, 4, 3, padding=1), IntervalReLU())),
        conv(4, 4, 2, padding=1),
        IntervalReLU(),
    )


def uneven() -> IntervalSequential:
    """Branches whose windows have different strides."""
    wide = IntervalSequential(conv(4, 4, (8, 11), padding=(0, 0)))
    return IntervalSequential(
        conv(2, 4, 3, padding=1),
        IntervalReLU(),
        IntervalResidual(wide, conv(4, 4, 1, stride=(20, 20))),
        IntervalReLU(),
    )


def forks() -> IntervalSequential:
    gate = IntervalSequential(conv(4, 4, 3, padding=1), IntervalSigmoid())
    return IntervalSequential(
        conv(2, 4, 3, padding=1),
        IntervalProduct(conv(4, 4, 1), gate),
        conv(4, 2, 3),
        IntervalConcat(
            [conv(2, 2, 1), IntervalSequential(conv(2, 2, 3, padding=1), IntervalReLU())]
        ),
        conv(4, 4, 2),
        IntervalMaxPool2d(2),
        conv(4, 4, 2, padding=1),
        IntervalReLU(),
    )


NETWORKS = {
    "strides": lambda: geometry((3, 2), stride=(2, 3), padding=(1, 2)),
    "overhanging": lambda: geometry(3, padding=(5, 4)),
    "dilated": lambda: geometry((2, 3), stride=(3, 1), padding=(3, 4), dilation=(3, 2)),
    "groups": lambda: geometry(3, padding=1, groups=2),
    "beyond the image": lambda: geometry((9, 8), padding=(4, 4)),
    "residual": residual,
    "uneven": uneven,
    "forks": forks,
    "leaky": lambda: IntervalSequential(
        conv(2, 4, 3, padding=2),
        IntervalLeakyReLU(0.1),
        conv(4, 4, 3, padding=2, bias=False),
        IntervalBatchNorm(4),
        IntervalLeakyReLU(1.5),
    ),
    "no activation between": lambda: IntervalSequential(
        conv(2, 3, 3, padding=2), conv(3, 4, 3, padding=2), conv(4, 3, 2, padding=1), IntervalReLU()
    ),
    "sigmoids": lambda: IntervalSequential(
        conv(2, 4, 3), IntervalSigmoid(), conv(4, 4, 3, padding=1), IntervalSigmoid()
    ),
}


def problem(name: str, scale: float = 0.3):
    """A network with random batch norms, and a box of two samples of different widths."""
    torch.manual_seed(0)
    model = NETWORKS[name]().double().eval()
    for layer in model.modules():
        if isinstance(layer, IntervalBatchNorm):
            for tensor in (layer.weight, layer.bias, layer.running_mean):
                nn.init.normal_(tensor)
    mid = torch.randn(2, 2, 8, 11, dtype=torch.float64)
    rad = torch.rand_like(mid) * torch.tensor([scale, scale / 10]).double().view(-1, 1, 1, 1)
    return model, Interval(mid=mid, rad=rad)


def places(operators, box):
    """The paths to the inputs of all nonlinear operators, and these inputs."""
    found = []

    def refine(operator, number, x, path):
        found.append((path, x))
        return x, x

    trace(operators, box, refine)
    return found


def whole_rows(path, x, box, shares=None):
    """Lower and upper bounds, (B, R), on all components of x by rows of whole feature maps."""
    count = x.mid[0].numel()
    rows = torch.eye(count, dtype=torch.float64).expand(len(x.mid), -1, -1)
    rows, value = rows.unflatten(2, x.shape[1:]), x.mid.flatten(1)
    upper = maximum(path, LinearBounds(rows, value), box, shares)
    return -maximum(path, LinearBounds(-rows, -value), box, shares), upper


@pytest.mark.parametrize("name", NETWORKS)
def test_windows_bound_as_whole_rows_do(name):
    model, box = problem(name)
    with torch.no_grad():
        for path, x in places(fold(model).operators, box):
            index = torch.stack([torch.randperm(x.mid[0].numel())[:50] for _ in range(2)])
            expected = [end.gather(1, index) for end in whole_rows(path, x, box)]
            exact([*_ends(path, x, index, box, {})], expected)


@pytest.mark.parametrize("name", ["residual", "leaky", "strides", "sigmoids", "groups"])
def test_windows_have_the_gradients_of_whole_rows(name):
    """Of the weights, and of the box, through the lines of the activations."""
    model, box = problem(name)
    leaves = [*model.parameters(), box.mid.requires_grad_(), box.rad.requires_grad_()]
    path, x = places(fold(model).operators, box)[-1]
    index = torch.stack([torch.randperm(x.mid[0].numel())[:20] for _ in range(2)])
    gradients = []
    for lower, upper in (_ends(path, x, index, box, {}), whole_rows(path, x, box)):
        if lower.shape != index.shape:
            lower, upper = lower.gather(1, index), upper.gather(1, index)
        loss = (lower * torch.arange(1.0, 21)).sin().sum() + upper.cos().sum()
        gradients.append(torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True))
    some = [i for i, gradient in enumerate(gradients[1]) if gradient is not None]
    assert len(some) >= 5
    for i in some:
        assert gradients[1][i].abs().max() > 0
        torch.testing.assert_close(gradients[0][i], gradients[1][i], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["residual", "leaky", "strides"])
def test_rows_in_windows_may_share_mixed_lines(name):
    model, box = problem(name)
    path, x = places(fold(model).operators, box)[-1]
    shares = {
        visit.number: torch.rand_like(visit.x.mid)[:, None].requires_grad_()
        for part in path
        for visit in flattened(part)
        if visit.number >= 0
    }
    assert shares
    index = torch.arange(30).expand(2, -1)
    found = _ends(path, x, index, box, shares)
    expected = [end[:, :30] for end in whole_rows(path, x, box, shares)]
    exact([*found], expected)
    assert (found[1] - _ends(path, x, index, box, {})[1]).abs().max() > 1e-3
    gradients = [
        torch.autograd.grad(sum(end.sin().sum() for end in ends), [*shares.values()])
        for ends in (found, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_one_dimension():
    torch.manual_seed(0)
    model = IntervalSequential(
        IntervalConv1d(2, 4, 3, padding=2, stride=2),
        IntervalReLU(),
        IntervalConv1d(4, 4, 2, dilation=2),
        IntervalReLU(),
    ).double()
    box = Interval(mid=torch.randn(2, 2, 30).double(), rad=torch.rand(2, 2, 30).double())
    with torch.no_grad():
        path, x = places(fold(model).operators, box)[-1]
        index = torch.arange(x.mid[0].numel()).expand(2, -1)
        exact([*_ends(path, x, index, box, {})], [*whole_rows(path, x, box)])


# --- memory ---------------------------------------------------------------------------------


def test_the_widest_row_by_hand():
    """3x3 of 4 channels are 36 numbers, 5x5 of 2 are 50; whole maps take over after 7x7 of 88."""
    model = IntervalSequential(
        conv(2, 4, 3, padding=1),
        IntervalReLU(),
        conv(4, 4, 3, padding=1),
        IntervalReLU(),
        conv(4, 4, 5, padding=2),
        IntervalReLU(),
    )
    operators = fold(model).operators
    box = Interval(mid=torch.zeros(2, 2, 8, 11), rad=torch.ones(2, 2, 8, 11))
    widths = [_width(path, x, torch.zeros(2, 1).long()) for path, x in places(operators, box)]
    assert widths == [18, 50, 4 * 49]
    small = Interval(mid=box.mid[..., :7], rad=box.rad[..., :7])
    widths = [_width(path, x, torch.zeros(2, 1).long()) for path, x in places(operators, small)]
    assert widths == [18, 50, 4 * 56]


@pytest.mark.parametrize("name", chunked.NETWORKS)
def test_a_pass_of_crown_keeps_to_its_budget(name):
    """8 samples, 4 at a time, give the numbers of one pass."""
    torch.manual_seed(0)
    network = fold(chunked.NETWORKS[name]().eval())
    images = torch.rand(8, 3 if name == "CNN7, colours" else 1, 8, 8)
    labels, radii = torch.arange(8) % 5, torch.full((8,), 0.1)
    margins = BOUNDS["crown"].margins
    with torch.no_grad():
        # |W| is kept for all passes, so it is no part of one.
        whole = margins(network, images, labels, radii, BoundOptions(budget=2**40))
        budget = 4 * 2**40 // crown_chunk_size(network, images, 2**40)
        with chunked.LiveBytes() as memory:
            cut = margins(network, images, labels, radii, BoundOptions(budget=budget))
    assert (0.15 if name == "linear" else 0.4) <= memory.peak / budget <= 1.1
    torch.testing.assert_close(cut, whole, rtol=1e-4, atol=1e-5)
