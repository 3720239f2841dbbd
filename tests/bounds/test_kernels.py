"""The elementwise kernels against the textbook formulas, and their gradients against autograd."""

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from ibpcore import certified_margins
from ibpcore.bounds.ibp import margins, robust_logits
from ibpcore.bounds.kernels import above, interval_relu
from ibpcore.bounds.network import compiled
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalReLU,
    IntervalSequential,
)
from ibpcore.nn.batch_norm import batch_normalized
from ibpcore.nn.folding import clean_pass, fold
from ibpcore.nn.layers import Clean


def plain_relu(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    """relu of both ends (eq. 18-19)."""
    lower, upper = (mid - rad).clamp(min=0), (mid + rad).clamp(min=0)
    return (upper + lower) / 2, (upper - lower) / 2


def ends(mid: Tensor, rad: Tensor) -> tuple[Tensor, Tensor]:
    return mid - rad, mid + rad


def random_intervals(shape=(2, 3, 4, 5), dtype=torch.float64, seed=0) -> tuple[Tensor, Tensor]:
    """Active, inactive and crossing ones, some of them points."""
    rng = torch.Generator().manual_seed(seed)
    mid = torch.randn(shape, generator=rng, dtype=torch.float64)
    rad = torch.randn(shape, generator=rng, dtype=torch.float64).clamp(min=0)
    return mid.to(dtype), rad.to(dtype)


def grid() -> tuple[Tensor, Tensor]:
    """Quarters, on which float64 is exact: every tie mid = +-rad, mid = 0 and rad = 0."""
    mid = torch.arange(-8, 9, dtype=torch.float64) / 4
    rad = torch.arange(0, 9, dtype=torch.float64) / 4
    mid, rad = torch.cartesian_prod(mid, rad).unbind(1)
    return mid, rad


# --- interval relu ------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 40])
def test_above_keeps_what_is_above_zero_or_not_a_number(count):
    """With one element, and with enough for vector instructions."""
    x = torch.tensor([5.0, 6.0, 7.0, -8.0]).repeat(count)
    where = torch.tensor([0.0, -1.0, math.nan, 1e-30]).repeat(count)
    assert above(x, where).tolist() == [0.0, 0.0, 7.0, -8.0] * count


def test_relu_by_hand():
    """[1, 3] stays, [-1, 3] is cut to [0, 3], [-3, -1] vanishes, [0, 2] and [-2, 0] touch 0."""
    mid = torch.tensor([2.0, 1.0, -2.0, 1.0, -1.0])
    rad = torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])
    relu_mid, relu_rad = interval_relu(mid, rad)
    assert relu_mid.tolist() == [2, 1.5, 0, 1, 0]
    assert relu_rad.tolist() == [1, 1.5, 0, 1, 0]


def test_relu_is_relu_of_both_ends():
    mid, rad = grid()
    for result, expected in zip(interval_relu(mid, rad), plain_relu(mid, rad), strict=True):
        assert torch.equal(result, expected)


def test_relu_of_random_intervals():
    mid, rad = random_intervals((1000,))
    torch.testing.assert_close(
        interval_relu(mid, rad), plain_relu(mid, rad), rtol=1e-14, atol=1e-15
    )


def test_relu_with_and_without_gradient_are_the_same():
    mid, rad = random_intervals()
    bare = interval_relu(mid, rad)
    mid.requires_grad_()
    for result, expected in zip(interval_relu(mid, rad), bare, strict=True):
        assert result.requires_grad
        assert torch.equal(result, expected)
    with torch.no_grad():
        assert not any(part.requires_grad for part in interval_relu(mid, rad))


def test_relu_leaves_its_arguments_alone():
    mid, rad = random_intervals()
    copies = mid.clone(), rad.clone()
    interval_relu(mid, rad)
    assert torch.equal(mid, copies[0])
    assert torch.equal(rad, copies[1])


def test_relu_takes_a_radius_that_is_expanded():
    """As the bare ball has it: one number, strides of 0."""
    mid, _ = random_intervals((3, 4))
    rad = torch.tensor([[0.5], [0.0], [2.0]], dtype=torch.float64).expand(3, 4)
    torch.testing.assert_close(interval_relu(mid, rad), plain_relu(mid, rad))
    assert rad[:, 0].tolist() == [0.5, 0, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_is_always_active_passes_bit_by_bit(dtype):
    """Also where rad is far below mid, a subnormal, or next to mid."""
    rng = torch.Generator().manual_seed(1)
    mid = torch.rand(2000, generator=rng, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (2000,))
    mid = mid.to(dtype) + torch.finfo(dtype).tiny
    share = torch.rand(2000, generator=rng, dtype=dtype) ** torch.randint(1, 20, (2000,))
    below = torch.nextafter(mid, torch.zeros((), dtype=dtype))
    for rad in (mid * share, below, torch.zeros_like(mid), torch.full_like(mid, 1e-45)):
        assert bool((rad <= mid).all())
        relu_mid, relu_rad = interval_relu(mid, rad)
        assert torch.equal(relu_mid, mid)
        assert torch.equal(relu_rad, rad)


def float32_intervals() -> tuple[Tensor, Tensor]:
    """Many magnitudes, half of them with |mid| within a few ulp of rad."""
    rng = torch.Generator().manual_seed(2)
    size = 20_000
    scale = 10.0 ** torch.randint(-20, 20, (2, size), generator=rng)
    mid = torch.randn(size, generator=rng) * scale[0]
    rad = torch.rand(size, generator=rng) * scale[1]
    near = torch.arange(size) % 2 == 0
    steps = torch.randint(-4, 5, (size,), generator=rng)
    close = mid.abs() * (1 + steps * torch.finfo(torch.float32).eps)
    return mid, torch.where(near, close, rad)


def test_relu_in_float32_contains_the_exact_image():
    """Up to 2 ulp of the larger of |mid| and rad; the radius is never negative."""
    mid, rad = float32_intervals()
    relu_mid, relu_rad = interval_relu(mid, rad)
    assert bool((relu_rad >= 0).all())
    assert bool((relu_mid >= relu_rad).all())
    lower, upper = ends(relu_mid.double(), relu_rad.double())
    exact_lower, exact_upper = (end.clamp(min=0) for end in ends(mid.double(), rad.double()))
    ulp = torch.maximum(mid.abs(), rad).double() * torch.finfo(torch.float32).eps
    assert bool((lower <= exact_lower + 2 * ulp).all())
    assert bool((upper >= exact_upper - 2 * ulp).all())
    # And not by being wide.
    assert bool((lower >= exact_lower - 2 * ulp).all())
    assert bool((upper <= exact_upper + 2 * ulp).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("mid", [-0.3, -0.1, 0.01, -0.9])
def test_relu_where_the_lower_end_overflows(dtype, mid):
    """Both numbers are finite and so is the upper end, which must not be lost."""
    largest = torch.finfo(dtype).max
    mid = torch.full((37,), mid * largest, dtype=dtype)
    rad = torch.full((37,), 0.95 * largest, dtype=dtype)
    relu_mid, relu_rad = interval_relu(mid, rad)
    exact = mid / largest + rad / largest
    reached = relu_mid / largest + relu_rad / largest
    assert bool((reached >= 0.999 * exact).all())


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_an_overflow_at_the_lower_end_is_no_certificate(elide):
    """h = 0.95 M (x_0 - x_1) - 0.3 M is 0.65 M at the corner (1, 0), M the largest float32."""
    largest = torch.finfo(torch.float32).max
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(2, 1), IntervalReLU(), IntervalLinear(1, 2)
    ).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.95, -0.95]]) * largest)
        model[1].bias.fill_(-0.3 * largest)
        model[3].weight.copy_(torch.tensor([[0.0], [1e-37]]))
        model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    images, corner = torch.tensor([[[[0.5, 0.5]]], [[[1.0, 0.0]]]]).split(1)
    assert model(images).argmax(1).item() == 0
    assert model(corner).argmax(1).item() == 1
    label = torch.zeros(1, dtype=torch.int64)
    assert certified_margins(model, images, label, 0.5, elide=elide).item() >= 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("count", [1, 37], ids=["one", "a vector"])
def test_what_is_not_finite_stays_so(dtype, count):
    """Even mid = -inf with a finite radius, which is inactive."""
    for mid, rad in itertools.product([math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0], repeat=2):
        if rad in (-math.inf, -1.0) or (math.isfinite(mid) and math.isfinite(rad)):
            continue
        relu_mid, relu_rad = interval_relu(
            torch.full((count,), mid, dtype=dtype), torch.full((count,), rad, dtype=dtype)
        )
        finite = relu_mid.isfinite() & relu_rad.isfinite()
        assert not bool(finite.any()), (mid, rad)
        if math.isnan(mid) or math.isnan(rad):
            assert bool((relu_mid.isnan() | relu_rad.isnan()).all()), (mid, rad)
        if rad == math.inf:
            # What the next layer reads: an infinite radius alone says that nothing is known.
            assert not bool(relu_rad.isfinite().any()), (mid, rad)


def gradients(function, mid: Tensor, rad: Tensor, weights: tuple[Tensor, Tensor]):
    mid, rad = mid.detach().requires_grad_(), rad.detach().requires_grad_()
    outputs = function(mid, rad)
    return torch.autograd.grad(outputs, (mid, rad), weights)


@pytest.mark.parametrize("intervals", [random_intervals(), grid()], ids=["random", "ties"])
def test_gradient_of_relu_is_that_of_both_ends(intervals):
    """relu has slope 0 at 0, for either end."""
    mid, rad = intervals
    weights = random_intervals(mid.shape, seed=3)[0], random_intervals(mid.shape, seed=4)[0]
    ours = gradients(interval_relu, mid, rad, weights)
    torch.testing.assert_close(
        ours, gradients(plain_relu, mid, rad, weights), rtol=1e-14, atol=1e-15
    )


def test_gradcheck_of_relu():
    mid, rad = random_intervals()
    rad = rad + 0.01  # central differences reach below it
    assert torch.minimum((mid - rad).abs(), (mid + rad).abs()).min() > 1e-5
    assert torch.autograd.gradcheck(interval_relu, (mid.requires_grad_(), rad.requires_grad_()))


@pytest.mark.parametrize("part", [0, 1], ids=["mid", "rad"])
def test_gradient_of_relu_from_one_output_alone(part):
    """The other's is then left out by autograd; a sum's is an expanded number."""
    mid, rad = (x.requires_grad_() for x in random_intervals())
    ours = torch.autograd.grad(interval_relu(mid, rad)[part].sum(), (mid, rad))
    plain = torch.autograd.grad(plain_relu(mid, rad)[part].sum(), (mid, rad))
    torch.testing.assert_close(ours, plain)


def test_gradient_of_relu_to_one_argument_alone():
    mid, rad = random_intervals()
    for k in (0, 1):
        args = [mid.detach().clone(), rad.detach().clone()]
        args[k].requires_grad_()
        ours, plain = (
            torch.autograd.grad(sum((x * x).sum() for x in f(*args)), args[k])[0]
            for f in (interval_relu, plain_relu)
        )
        torch.testing.assert_close(ours, plain)
        assert ours.abs().sum() > 0


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_in_any_layout(layout, grad_layout):
    mid, rad = map(LAYOUTS[layout], random_intervals())
    weights = tuple(LAYOUTS[grad_layout](random_intervals(seed=s)[0]) for s in (3, 4))
    outputs = interval_relu(mid, rad)
    torch.testing.assert_close(outputs, plain_relu(mid, rad))
    assert [x.stride() for x in outputs] == [mid.stride()] * 2
    torch.testing.assert_close(
        gradients(interval_relu, mid, rad, weights), gradients(plain_relu, mid, rad, weights)
    )


def test_relu_of_two_layouts():
    """After a residual sum the midpoint may lie otherwise than the radius."""
    mid, rad = random_intervals()
    rad = LAYOUTS["channels last"](rad)
    torch.testing.assert_close(interval_relu(mid, rad), plain_relu(mid, rad))
    weights = mid.cos(), mid.sin()
    torch.testing.assert_close(
        gradients(interval_relu, mid, rad, weights), gradients(plain_relu, mid, rad, weights)
    )


# --- batch norm ---------------------------------------------------------------------------

SHAPES = {"2-d": (7, 3), "3-d": (4, 3, 5), "4-d": (4, 3, 2, 5), "two samples": (2, 3)}


def plain_batch_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float):
    others = [d for d in range(x.dim()) if d != 1]
    along = (1, -1, *[1] * (x.dim() - 2))
    mean = x.mean(others)
    deviation = x - mean.view(along)
    variance = (deviation**2).mean(others)
    scale = (1 if weight is None else weight) / torch.sqrt(variance + eps)
    shift = (0 if bias is None else bias) - mean * scale
    return scale.view(along) * x + shift.view(along), scale, shift


def batch_norm_arguments(shape, affine: bool):
    rng = torch.Generator().manual_seed(5)
    x = 3 + 2 * torch.randn(shape, generator=rng, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=rng, dtype=torch.float64)
    return (x, weight, bias) if affine else (x, None, None)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_and_its_affine_map(shape, affine):
    arguments = batch_norm_arguments(SHAPES[shape], affine)
    torch.testing.assert_close(
        batch_normalized(*arguments, 1e-5),
        plain_batch_norm(*arguments, 1e-5),
        rtol=1e-12,
        atol=1e-12,
    )


def test_the_variance_is_the_biased_one():
    """(1, 3): mean 2, variance 1 and not 2; with eps 3 the scale is 1/2 and the shift -1."""
    _, scale, shift = batch_normalized(torch.tensor([[1.0], [3.0]]), None, None, 3.0)
    assert (scale.item(), shift.item()) == (0.5, -1)


@pytest.mark.parametrize("used", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_through_output_scale_and_shift(shape, affine, used):
    arguments = batch_norm_arguments(SHAPES[shape], affine)
    rng = torch.Generator().manual_seed(6)
    results = []
    for function in (batch_normalized, plain_batch_norm):
        rng.manual_seed(6)
        leaves = [None if a is None else a.clone().requires_grad_() for a in arguments]
        outputs = function(*leaves, 1e-2)
        loss = sum(
            share * (torch.randn(part.shape, generator=rng, dtype=part.dtype) * part.sin()).sum()
            for share, part in zip(used, outputs, strict=True)
        )
        wanted = [leaf for leaf in leaves if leaf is not None]
        gradient = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        assert gradient[0].abs().max() > 1e-3
        results.append(gradient)
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck_of_batch_norm(shape, affine):
    x, weight, bias = batch_norm_arguments(SHAPES[shape], affine)
    leaves = [a.requires_grad_() for a in (x, weight, bias) if a is not None]

    def function(x, weight=None, bias=None):
        return batch_normalized(x, weight, bias, 1e-2)

    assert torch.autograd.gradcheck(function, leaves)


def test_batch_norm_channels_last():
    x, weight, bias = batch_norm_arguments(SHAPES["4-d"], True)
    other = x.contiguous(memory_format=torch.channels_last)
    results = []
    for images in (x, other):
        leaf = images.detach().requires_grad_()
        output, scale, shift = batch_normalized(leaf, weight, bias, 1e-5)
        loss = output.sin().sum() + scale.sin().sum() + shift.sin().sum()
        results.append([output, scale, shift, *torch.autograd.grad(loss, leaf)])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_scale_and_shift_are_not_those_of_a_later_batch():
    """Each call has tensors of its own."""
    first = batch_normalized(torch.tensor([[1.0], [3.0]]), None, None, 3.0)
    batch_normalized(torch.tensor([[10.0], [30.0]]), None, None, 3.0)
    assert (first[1].item(), first[2].item()) == (0.5, -1)


TWINS = {"1d": (nn.BatchNorm1d, (6, 3)), "1d long": (nn.BatchNorm1d, (3, 3, 4))}
TWINS["2d"] = (nn.BatchNorm2d, (4, 3, 2, 5))


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("momentum", [0.1, 0.7, 1.0, 0.0, None])
@pytest.mark.parametrize("twin", TWINS)
def test_running_statistics_are_those_of_the_twin(twin, momentum, affine):
    """After each of five batches of three sizes, whose means differ."""
    kind, shape = TWINS[twin]
    ours = IntervalBatchNorm(3, momentum=momentum, affine=affine).double().train()
    theirs = kind(3, momentum=momentum, affine=affine).double().train()
    rng = torch.Generator().manual_seed(7)
    for count in range(5):
        size = (shape[0] + count % 3, *shape[1:])
        x = count + (1 + count) * torch.randn(size, generator=rng, dtype=torch.float64)
        output, _ = ours.clean(x, Clean())
        torch.testing.assert_close(output, theirs(x), rtol=1e-12, atol=1e-12)
        for name, buffer in theirs.named_buffers():
            torch.testing.assert_close(
                ours.get_buffer(name), buffer, rtol=1e-12, atol=1e-12, msg=name
            )
    assert int(ours.num_batches_tracked) == 5
    moved = not torch.equal(ours.running_mean, torch.zeros(3).double())
    assert moved == (momentum != 0.0)


def test_an_untracked_batch_leaves_the_statistics_alone():
    layer = IntervalBatchNorm(3).train()
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    layer.clean(5 + torch.randn(8, 3), Clean(track=False))
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_running_statistics_carry_no_gradient():
    layer = IntervalBatchNorm(3).train()
    layer.clean(torch.randn(8, 3, requires_grad=True), Clean())
    assert not layer.running_mean.requires_grad
    assert not layer.running_var.requires_grad


def test_without_running_statistics_the_batch_serves_in_evaluation_too():
    layer = IntervalBatchNorm(3, track_running_stats=False).double().eval()
    x = torch.randn(8, 3, dtype=torch.float64)
    output, _ = layer.clean(x, Clean())
    torch.testing.assert_close(output, nn.BatchNorm1d(3).double().train()(x))


def small_network() -> IntervalSequential:
    torch.manual_seed(0)
    return IntervalSequential(
        IntervalConv2d(1, 2, 3, 2),
        IntervalBatchNorm(2),
        IntervalReLU(),
        IntervalFlatten(),
        IntervalLinear(18, 8),
        IntervalReLU(),
        IntervalLinear(8, 4),
    )


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ),
    ],
)
def test_compiled_passes_bound_the_same(device):
    """Without gradient the margins, with it the loss; one radius each and several."""
    model = small_network().to(device)
    images, labels = torch.rand(6, 1, 8, 8, device=device), torch.arange(6, device=device) % 4

    def gradient(prepared) -> list[Tensor]:
        network = prepared(clean_pass(model, images, track=False)[1])
        model.zero_grad()
        epsilons = torch.full_like(images[:, 0, 0, 0], 0.05)
        robust_logits(network, images, labels, epsilons, BoundOptions()).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    for plain, made in zip(gradient(lambda network: network), gradient(compiled), strict=True):
        torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        network = clean_pass(model, images, track=False)[1]
        for shape in ((6,), (3, 5)):
            epsilons = 0.05 * torch.rand(shape, device=device)
            case = images[: shape[-1]], labels[: shape[-1]], epsilons
            plain, made = (
                margins(net, *case, BoundOptions()) for net in (network, compiled(network))
            )
            torch.testing.assert_close(made, plain, rtol=1e-4, atol=1e-5)


def test_compiled_passes_do_not_swallow_an_overflow():
    """relu(-inf) is not 0 in compiled passes either: not certified."""
    model = small_network().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1e20)
        images, labels = torch.rand(6, 1, 8, 8), torch.arange(6) % 4
        found = margins(
            compiled(fold(model)), images, labels, torch.full((6,), 0.05), BoundOptions()
        )
    assert found.eq(torch.inf).all()
