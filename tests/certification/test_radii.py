"""Certified radii: Definition 3.1 by hand, sound brackets, no pass too many, bad arguments."""

import copy
import itertools
import math
from functools import partial

import oracle
import pytest
import torch
from activations import ACTIVATIONS
from torch import Tensor

import ibpcore.certification.radii
from ibpcore import Interval, UserError, certified_margins, certified_radii, cnn7
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.radii import RadiusStatus, RootOptions
from ibpcore.nn import (
    IntervalAvgPool2d,
    IntervalBatchNorm,
    IntervalFlatten,
    IntervalLinear,
    IntervalMaxPool2d,
    IntervalReLU,
    IntervalResidual,
    IntervalSequential,
    IntervalSigmoid,
    IntervalTanh,
)
from ibpcore.roots import SOLVERS

SOLVER_NAMES = sorted(SOLVERS)


def linear_net(weight, bias) -> IntervalSequential:
    """Flatten and one linear layer, in float64; weight is (classes, inputs)."""
    weight = torch.tensor(weight, dtype=torch.float64)
    layer = IntervalLinear(weight.shape[1], weight.shape[0])
    model = IntervalSequential(IntervalFlatten(), layer).double().eval()
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.tensor(bias, dtype=torch.float64))
    return model


def pixels(*values: float) -> Tensor:
    """(B, 1, 1, 1) images of one pixel."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)


# f_0 = x, f_1 = 1 - x, label 0: the margin is 1 - 2 (x - epsilon), the root x - 1/2.
LINE = linear_net([[1], [-1]], [0, 1])


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_definition_3_1_case_by_case(solver, elide):
    images = pixels(0.25, 0.5, 0.625, 0.75, 0.875)
    radii = certified_radii(LINE, images, zeros(5), 0.25, solver=solver, elide=elide)

    # Wrong; R(0) = 0; root 0.125; R(0.25) = 0, so the root is epsilon_max; root 0.375.
    wrong, root, ceiling = (
        RadiusStatus.MISCLASSIFIED,
        RadiusStatus.CONVERGED,
        RadiusStatus.EPSILON_MAX,
    )
    assert radii.status.tolist() == [wrong, wrong, root, root, ceiling]
    assert radii.radius.tolist() == pytest.approx([0, 0, 0.125, 0.25, 0.25], abs=3e-5)
    assert radii.upper.tolist() == pytest.approx([0, 0, 0.125, 0.25, 0.25], abs=3e-5)
    assert radii.root.tolist() == pytest.approx([0, 0, 0.125, 0.25, 0.25], abs=3e-5)
    assert radii.radius[2] < 0.125 <= radii.upper[2]
    assert radii.radius[3] < 0.25 == radii.upper[3]
    assert radii.radius[4] == radii.upper[4] == 0.25
    assert radii.evaluations[[0, 1, 4]].tolist() == [0, 0, 1]


def test_three_classes_the_nearest_one_counts():
    """f = (2x, 1, 1.5 - x): classes 1 and 2 draw level with 0 at x = 0.5."""
    model = linear_net([[2], [0], [-1]], [0, 1, 1.5])
    images = pixels(0.9, 0.9, 0.1)
    labels = torch.tensor([0, 1, 2])
    radii = certified_radii(model, images, labels, 0.7, xtol=1e-9, rtol=1e-9)
    # Class 0 over 1: x - e = 0.5; class 2 over 1 at 0.1: 1.5 - x - e = 1, so e = 0.4.
    assert radii.radius.tolist() == pytest.approx([0.4, 0, 0.4], abs=1e-8)


def test_clipping_ends_the_ball_at_black():
    """Margin -0.2 - 2 (x - e) is 0 at x - e = -0.1, which no pixel can be."""
    model = linear_net([[1], [-1]], [0, -0.2])
    clipped = certified_radii(model, pixels(0.3), zeros(1), 0.9)
    bare = certified_radii(model, pixels(0.3), zeros(1), 0.9, clip=None)
    assert clipped.radius.tolist() == [0.9]
    assert clipped.status.tolist() == [RadiusStatus.EPSILON_MAX]
    assert bare.radius.tolist() == pytest.approx([0.4], abs=1e-4)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("epsilon_max", [1.0, 0.9, 0.37, 0.25])
def test_leftmost_root_where_the_margin_is_flat_at_zero(solver, epsilon_max):
    """f = (relu(x - 1/2), relu(1/4 - x)) at x = 3/4: R is 0 from e = 1/4 to 1/2."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU(), IntervalLinear(2, 2)
    ).double()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, 0.25]))
        model[3].weight.copy_(torch.eye(2))
        model[3].bias.zero_()
    grid = torch.tensor([[0.125], [0.25], [0.375], [0.5], [0.625]], dtype=torch.float64)
    margins = certified_margins(model, pixels(0.75), zeros(1), grid, clip=None)
    assert margins[:, 0].tolist() == [-0.125, 0, 0, 0, 0.125]

    radii = certified_radii(
        model, pixels(0.75), zeros(1), epsilon_max, solver=solver, clip=None, xtol=1e-9, rtol=1e-9
    )

    assert radii.status.tolist() == [RadiusStatus.CONVERGED]
    assert float(radii.radius) < 0.25 <= float(radii.upper)
    assert float(radii.radius) == pytest.approx(0.25, abs=1e-8)


def random_problem(dtype=torch.float64, count: int = 24):
    """A CNN7, images, and labels that it gets right for most of them."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(count, 1, 8, 8, generator=rng, dtype=torch.float64)
    model = cnn7((1, 8, 8), 4, width=3, hidden=7).double()
    model = oracle.randomize_batch_norm(model, images, rng).to(dtype)
    images = images.to(dtype)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[::6] = (labels[::6] + 1) % 4
    return model, images, labels


def a_middle_radius(model, images, labels) -> float:
    """An epsilon_max that some images reach and some do not."""
    radii = certified_radii(model, images, labels, 1.0).radius
    return float(radii[radii > 0].median())


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_the_radius_is_certified_and_the_upper_end_is_not(solver, elide, clip):
    model, images, labels = random_problem()
    epsilon_max = a_middle_radius(model, images, labels)
    radii = certified_radii(
        model, images, labels, epsilon_max, solver=solver, elide=elide, clip=clip
    )
    assert set(radii.status.tolist()) == {
        RadiusStatus.MISCLASSIFIED,
        RadiusStatus.EPSILON_MAX,
        RadiusStatus.CONVERGED,
    }

    ends = torch.stack([radii.radius, radii.upper])
    with torch.no_grad():
        at_radius, at_upper = certified_margins(model, images, labels, ends, elide=elide, clip=clip)

    right = radii.status != RadiusStatus.MISCLASSIFIED
    full = radii.status == RadiusStatus.EPSILON_MAX
    assert bool((at_radius[right] < 0).all())
    assert bool((at_upper[~full] >= 0).all())
    assert bool((radii.radius[full] == epsilon_max).all())
    assert bool((radii.radius[~right] == 0).all())
    between = radii.status == RadiusStatus.CONVERGED
    assert bool((radii.radius <= radii.root).all() & (radii.root <= radii.upper).all())
    tolerance = 1e-6 + 1e-4 * radii.root[between]
    assert bool(((radii.root - radii.radius)[between] <= tolerance).any())


def test_solvers_agree():
    model, images, labels = random_problem()
    results = [certified_radii(model, images, labels, 1.0, solver=s) for s in SOLVER_NAMES]
    exact = certified_radii(model, images, labels, 1.0, xtol=1e-13, rtol=1e-13).root
    for radii in results:
        assert bool(((radii.root - exact).abs() <= 1e-6 + 1e-4 * exact).all())
        assert radii.status.tolist() == results[0].status.tolist()


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_radii_agree_with_bisection_of_the_oracle(elide):
    model, images, labels = random_problem()
    radii = certified_radii(model, images, labels, 1.0, elide=elide, xtol=1e-12, rtol=1e-12)
    low, high = torch.zeros_like(radii.root), torch.ones_like(radii.root)
    for _ in range(40):
        middle = (low + high) / 2
        certified = oracle.margins(model, images, labels, middle, elide, (0.0, 1.0)) < 0
        low, high = torch.where(certified, middle, low), torch.where(certified, high, middle)
    torch.testing.assert_close(radii.radius, low, rtol=0, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVER_NAMES)
def test_only_undecided_samples_are_evaluated(solver, monkeypatch):
    model, images, labels = random_problem()
    epsilon_max = a_middle_radius(model, images, labels)
    per_pass = RootOptions().candidates if solver == "fused" else 1
    calls = []
    margins = ibpcore.certification.radii.margins

    def counted(network, chosen, *args, **kwargs):
        same = (chosen.flatten(1)[:, None] == images.flatten(1)).all(2)
        calls.append(same.nonzero()[:, 1].tolist())
        return margins(network, chosen, *args, **kwargs)

    monkeypatch.setattr(ibpcore.certification.radii, "margins", counted)
    radii = certified_radii(model, images, labels, epsilon_max, solver=solver)

    wrong = radii.status == RadiusStatus.MISCLASSIFIED
    full = radii.status == RadiusStatus.EPSILON_MAX
    assert calls[0] == (~wrong).nonzero().flatten().tolist()
    assert calls[1] == (~wrong & ~full).nonzero().flatten().tolist()
    for earlier, later in itertools.pairwise(calls):
        assert set(later) <= set(earlier)
    counts = torch.bincount(torch.tensor(list(itertools.chain(*calls))), minlength=len(images))
    passes = torch.where(wrong | full, counts, 1 + per_pass * (counts - 1))
    assert radii.evaluations.tolist() == passes.tolist()
    assert radii.evaluations[wrong].tolist() == [0] * int(wrong.sum())
    assert radii.evaluations[full].tolist() == [1] * int(full.sum())


def test_nothing_is_bounded_when_every_label_is_wrong(monkeypatch):
    monkeypatch.setattr(ibpcore.certification.radii, "margins", None)
    radii = certified_radii(LINE, pixels(0.1, 0.2), zeros(2), 0.5)
    assert radii.radius.tolist() == radii.upper.tolist() == radii.root.tolist() == [0, 0]
    assert radii.status.tolist() == [RadiusStatus.MISCLASSIFIED] * 2


@pytest.mark.parametrize("solver", SOLVER_NAMES)
@pytest.mark.parametrize("iterations", [0, 1, 2, 4])
def test_the_iteration_cap_leaves_a_valid_bracket(solver, iterations):
    model, images, labels = random_problem()
    radii = certified_radii(model, images, labels, 1.0, solver=solver, max_iterations=iterations)
    open_ = radii.status == RadiusStatus.ITERATION_LIMIT
    assert bool(open_.any())
    per_pass = RootOptions().candidates if solver == "fused" else 1
    assert int(radii.evaluations.max()) == 1 + per_pass * iterations
    ends = torch.stack([radii.radius, radii.upper])
    with torch.no_grad():
        at_radius, at_upper = certified_margins(model, images, labels, ends)
    assert bool((at_radius[open_] < 0).all())
    assert bool((at_upper[open_] >= 0).all())
    if iterations == 0:
        assert radii.radius[open_].tolist() == [0] * int(open_.sum())


def test_an_empty_batch():
    radii = certified_radii(LINE, pixels(), zeros(0), 0.5)
    assert [part.shape for part in radii] == [(0,)] * 6
    assert certified_margins(LINE, pixels(), zeros(0), 0.1, elide=False).shape == (0,)
    assert certified_margins(LINE, pixels(), zeros(0), 0.1).shape == (0,)


# --- networks that break ------------------------------------------------------------------


def swallowing_net(*middle) -> IntervalSequential:
    """Logits (1, 0) from the biases alone, if `middle` turns an overflow into a number."""
    last = IntervalLinear(4, 2)
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(4, 4), *middle, last)
    with torch.no_grad():
        model[1].weight.fill_(-3e38)  # the sum over four white pixels is -inf in float32
        model[1].bias.zero_()
        last.weight.fill_(0.5)
        last.bias.copy_(torch.tensor([1.0, 0.0]))
    return model.eval()


SWALLOWING = {
    **{
        name: partial(lambda make: swallowing_net(make(4)), ACTIVATIONS[name])
        for name in (
            "hardtanh",
            "relu6",
            "hardsigmoid",
            "maximum",
            "softplus",
            "elu",
            "celu",
            "selu",
        )
    },
    "relu": lambda: swallowing_net(IntervalReLU()),
    "sigmoid": lambda: swallowing_net(IntervalSigmoid()),
    "tanh": lambda: swallowing_net(IntervalTanh()),
    "relu in a branch": lambda: swallowing_net(
        IntervalResidual(IntervalSequential(IntervalReLU()), IntervalSequential(IntervalReLU()))
    ),
}


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
@pytest.mark.parametrize("name", SWALLOWING)
def test_an_overflow_that_the_activation_swallows_is_no_certificate(name, elide):
    model, images = SWALLOWING[name](), torch.ones(1, 1, 2, 2)
    assert model(images).argmax(1).tolist() == [0]  # it does come out as a fine prediction
    radii = certified_radii(model, images, zeros(1), 0.5, elide=elide)
    assert radii.radius.tolist() == [0]
    margins = certified_margins(model, images, zeros(1), 0.0, elide=elide)
    assert margins.tolist() == [math.inf]


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", SWALLOWING)
def test_no_bound_makes_a_certificate_of_an_overflow(name, bound):
    """Whatever linear bounds say of the other numbers."""
    model, images = SWALLOWING[name](), torch.ones(2, 1, 2, 2)
    box = Interval.from_bounds(images * 0.5, images)
    for epsilons in (0.0, 0.1, torch.full((1, 2, 2), 0.1)):
        margins = certified_margins(model, images, zeros(2), epsilons, bound=bound)
        assert margins.tolist() == [math.inf] * 2
    assert certified_margins(model, box, zeros(2), bound=bound).tolist() == [math.inf] * 2
    for given in (bound, f"ibp,{bound}"):
        if given != "ibp,ibp":
            assert not certified_radii(model, images, zeros(2), 0.5, bound=given).radius.any()


def test_an_overflow_before_max_pooling_is_no_certificate():
    body = IntervalLinear(2, 2)
    model = IntervalSequential(body, IntervalMaxPool2d(2), IntervalFlatten(), IntervalLinear(1, 2))
    with torch.no_grad():
        body.weight.copy_(torch.tensor([[-3e38, -3e38], [0.0, 0.0]]))
        body.bias.zero_()
        model[3].weight.zero_()
        model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    images = torch.ones(1, 1, 2, 2)
    assert certified_radii(model.eval(), images, zeros(1), 0.5).radius.tolist() == [0]


@pytest.mark.parametrize("elide", [True, False], ids=["elided", "eq. 3"])
def test_an_overflow_in_the_logit_of_one_wrong_class_is_no_certificate(elide):
    """h = 2 - x is 1.01 in the middle of the ball, and the partial sums of class 2 reach -inf.

    Its logit is w (sum of h over one half less that over the other) - 1. Whether summing up
    overflows depends on the order, i.e. on the machine; a certificate may not.
    """
    count, weight = 64, 1.695e38
    first, last = IntervalLinear(count, count), IntervalLinear(count, 3)
    model = IntervalSequential(IntervalFlatten(), first, IntervalReLU(), last).eval()
    with torch.no_grad():
        first.weight.copy_(-torch.eye(count))
        first.bias.fill_(2.0)
        last.weight.zero_()
        last.weight[2, : count // 2] = -weight
        last.weight[2, count // 2 :] = weight
        last.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    images = torch.ones(1, 1, 8, 8)
    attack = images.clone()
    attack.flatten()[count // 2 :] -= 0.01
    exact = copy.deepcopy(model).double()  # in which nothing overflows
    assert exact(images.double()).argmax(1).tolist() == [0]
    assert exact(attack.double()).argmax(1).tolist() == [2]

    margins = certified_margins(model, images, zeros(1), 0.02, elide=elide)
    radii = certified_radii(model, images, zeros(1), 0.02, elide=elide)

    assert margins.item() >= 0
    assert radii.radius.item() < 0.01


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 1, 3, 5])
@pytest.mark.parametrize("part", ["weight", "bias"])
def test_a_parameter_that_is_not_finite_is_no_certificate(bad, place, part):
    torch.manual_seed(0)
    model = IntervalSequential(
        IntervalResidual(IntervalLinear(4, 4)),
        IntervalBatchNorm(1),
        IntervalAvgPool2d(2, 2),
        IntervalResidual(IntervalSequential(IntervalLinear(2, 2), IntervalTanh())),
        IntervalFlatten(),
        IntervalLinear(4, 3),
    ).eval()
    layer = model[place]
    if place == 0:
        layer = layer.branch
    elif place == 3:
        layer = layer.branch[0]
    images, labels = torch.rand(3, 1, 4, 4), torch.arange(3)
    with torch.no_grad():
        getattr(layer, part).view(-1)[0] = bad
    for elide in (True, False):
        for clip in ((0.0, 1.0), None):
            options = {"elide": elide, "clip": clip}
            margins = certified_margins(model, images, labels, 0.01, **options)
            assert margins.tolist() == [math.inf] * 3
            assert (
                certified_radii(model, images, labels, 0.01, **options).radius.tolist() == [0] * 3
            )


def test_a_broken_image_costs_only_itself():
    """f = (1, relu(-2 x)): the margin is 2 (e - x) - 1, but -2 * 3e38 is -inf in float32."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(1, 1), IntervalReLU(), IntervalLinear(1, 2)
    )
    with torch.no_grad():
        model[1].weight.fill_(-2.0)
        model[1].bias.zero_()
        model[3].weight.copy_(torch.tensor([[0.0], [1.0]]))
        model[3].bias.copy_(torch.tensor([1.0, 0.0]))
    images = torch.tensor([2.0, 3e38, 4.0]).view(-1, 1, 1, 1)
    radii = certified_radii(model, images, zeros(3), 10.0, clip=None)
    assert radii.radius.tolist() == pytest.approx([2.5, 0, 4.5], rel=1e-3)


# --- modes and precision ------------------------------------------------------------------


def test_batch_statistics_certify_nothing():
    """They would change with the perturbed images; and the buffers are left alone."""
    model, images, labels = random_problem()
    model.train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=r"batch statistics.*eval"):
        certified_radii(model, images, labels, 1.0)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_radii_carry_no_gradient():
    model, images, labels = random_problem()
    assert not any(part.requires_grad for part in certified_radii(model, images, labels, 0.5))


def test_autocast_does_not_touch_margins():
    """bfloat16 has 8 bits: margins in it are far off, and negative ones prove nothing."""
    model, images, labels = random_problem(torch.float32)
    expected = certified_radii(model, images, labels, 0.5)
    with torch.no_grad():
        failing = certified_margins(model, images, labels, expected.upper)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert torch.equal(certified_margins(model, images, labels, expected.upper), failing)


def test_autocast_does_not_touch_radii():
    model, images, labels = random_problem(torch.float32)
    expected = certified_radii(model, images, labels, 0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = certified_radii(model, images, labels, 0.5)
        assert torch.is_autocast_enabled("cpu")
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
    for part, other in zip(inside, expected, strict=True):
        assert part.dtype == other.dtype
        assert torch.equal(part, other)


def switches() -> list[tuple[object, str]]:
    backends = torch.backends
    if hasattr(backends.cudnn, "conv"):
        owners = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        owners += [backends.mkldnn.matmul, backends.mkldnn.conv]
        return [(owner, "fp32_precision") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32")]


@pytest.fixture
def restored_switches():
    before = [(owner, name, getattr(owner, name)) for owner, name in switches()]
    yield
    for owner, name, value in before:
        setattr(owner, name, value)


@pytest.mark.parametrize("loose", ["tf32", "ieee"])
@pytest.mark.usefixtures("restored_switches")
def test_tf32_switches_are_left_as_they_were(loose, monkeypatch):
    model, images, labels = random_problem(torch.float32)
    expected = certified_radii(model, images, labels, 0.5)
    for owner, name in switches():
        setattr(owner, name, loose if name == "fp32_precision" else loose == "tf32")
    before = [getattr(owner, name) for owner, name in switches()]
    inside = []
    margins = ibpcore.certification.radii.margins

    def spying(*args, **kwargs):
        inside.append([getattr(owner, name) for owner, name in switches()])
        return margins(*args, **kwargs)

    monkeypatch.setattr(ibpcore.certification.radii, "margins", spying)
    radii = certified_radii(model, images, labels, 0.5)

    assert [getattr(owner, name) for owner, name in switches()] == before
    for part, other in zip(radii, expected, strict=True):
        assert torch.equal(part, other)
    products = [i for i, (owner, _) in enumerate(switches()) if owner is not _rnn()]
    exact = {states[i] for states in inside for i in products}
    assert exact in ({"ieee"}, {False})


def _rnn() -> object:
    return getattr(torch.backends.cudnn, "rnn", None)


@pytest.mark.usefixtures("restored_switches")
def test_switches_are_restored_after_an_error():
    for owner, name in switches():
        setattr(owner, name, "tf32" if name == "fp32_precision" else True)
    before = [getattr(owner, name) for owner, name in switches()]
    with pytest.raises(UserError, match="classes"):
        certified_radii(LINE, pixels(0.5), torch.tensor([7]), 0.5)
    assert [getattr(owner, name) for owner, name in switches()] == before


# --- bad arguments ------------------------------------------------------------------------

IMAGES, LABELS = pixels(0.6, 0.7), zeros(2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"images": IMAGES + 0.5}, "images"),
        ({"images": -IMAGES}, "images"),
        ({"images": IMAGES * math.nan}, "images"),
        ({"images": IMAGES * math.inf, "clip": None}, "images"),
        ({"images": IMAGES.long()}, "images"),
        ({"images": IMAGES.flatten()}, "images"),
        ({"labels": LABELS.double()}, "labels"),
        ({"labels": LABELS - 1}, "labels"),
        ({"labels": LABELS + 2}, "labels"),
        ({"labels": torch.tensor([0, 7])}, "labels"),
        ({"labels": zeros(3)}, "labels"),
        ({"labels": zeros(1)}, "labels"),
        ({"labels": LABELS[:, None]}, "labels"),
        ({"labels": torch.tensor([True, False])}, "labels"),
    ],
    ids=str,
)
def test_bad_batches_are_named(arguments, named):
    given = {"images": IMAGES, "labels": LABELS, **arguments}
    for elide in (True, False):
        with pytest.raises(UserError, match=named):
            certified_radii(LINE, epsilon_max=0.2, elide=elide, **given)
        with pytest.raises(UserError, match=named):
            certified_margins(LINE, epsilons=0.2, elide=elide, **given)


@pytest.mark.parametrize(
    "epsilons",
    [
        -0.1,
        math.nan,
        math.inf,
        torch.tensor([0.1, -0.1]),
        torch.tensor([[0.1, math.nan]]),
        torch.tensor([0.1, 0.1, 0.1]),
        torch.tensor([0.1]),
        torch.tensor([[0.1], [0.1]]),
        torch.zeros(1, 1, 2),
    ],
    ids=str,
)
def test_bad_epsilons_are_named(epsilons):
    with pytest.raises(UserError, match="epsilons"):
        certified_margins(LINE, IMAGES, LABELS, epsilons)


@pytest.mark.parametrize("epsilon_max", [0.0, -0.1, math.nan, math.inf])
def test_a_bad_epsilon_max_is_named(epsilon_max):
    with pytest.raises(UserError, match="epsilon_max"):
        certified_radii(LINE, IMAGES, LABELS, epsilon_max)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"solver": "newton"}, "newton.*brentq"),
        ({"xtol": 0.0}, "xtol"),
        ({"rtol": math.nan}, "rtol"),
        ({"rtol": 1e-20}, "rtol"),
        ({"max_iterations": -1}, "max_iterations"),
    ],
    ids=str,
)
def test_bad_solver_options_are_named(arguments, named):
    with pytest.raises(UserError, match=named):
        certified_radii(LINE, IMAGES, LABELS, 0.4, **arguments)


def test_the_options_stand_by_the_paper():
    assert RootOptions() == RootOptions("brentq", xtol=1e-6, rtol=1e-4, max_iterations=100)


def test_any_pixel_range_will_do_without_clipping():
    images = pixels(-3.0, 250.0)
    radii = certified_radii(LINE, images, torch.tensor([1, 0]), 300.0, clip=None)
    assert radii.root.tolist() == pytest.approx([3.5, 249.5], rel=1e-3)
    radii = certified_radii(LINE, images, torch.tensor([1, 0]), 300.0, clip=(-5.0, 255.0))
    assert radii.root.tolist() == pytest.approx([3.5, 249.5], rel=1e-3)


def test_the_threat_model_may_be_narrower_than_the_ball():
    """Clipped to [0.5, 1], no pixel falls below the boundary at 0.5 (margin 0: a tie)."""
    radii = certified_radii(LINE, pixels(0.75), zeros(1), 1.0, clip=(0.5, 1.0))
    assert float(radii.root) == pytest.approx(0.25, abs=1e-4)
