"""CROWN and optimised CROWN: by hand, against dense matrices, sampled images, gradients, radii."""

from __future__ import annotations

import pytest
import torch
from balls import worst_corners
from test_crown_ibp import double, linear
from test_linear_proofs import CLASSES, denses, numbered

from ibpcore import Interval, UserError, certified_margins, certified_radii, verified_radii
from ibpcore.bounds import alpha_crown, crown
from ibpcore.bounds.ibp import differences, largest_difference
from ibpcore.bounds.interval import between
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.bounds.visits import trace
from ibpcore.certification.radii import RadiusStatus
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.nn.folding import fold

SEEDS = range(24)
ALL_OPTIONS = {
    "margins": BoundOptions(bound="alpha-crown"),
    "inner layers": BoundOptions(bound="alpha-crown", slope_steps=8, inner_slopes=True),
    "no step": BoundOptions(bound="alpha-crown", slope_steps=0),
}


def chain() -> IntervalSequential:
    """x, y in [-1, 1]; a = relu(x + y), b = relu(x - y); c = relu(a + b - 1/2); f = (c, 0)."""
    return IntervalSequential(
        linear([[1, 1], [1, -1]], [0, 0]),
        IntervalReLU(),
        linear([[1, 1]], [-0.5]),
        IntervalReLU(),
        linear([[1], [0]], [0, 0]),
    )


def over(model, lower, upper, label, options):
    box = between(double(lower), double(upper))
    labels = torch.tensor([label])
    return BOUNDS[options.bound].box_logits(fold(model), box, labels, options)


def test_inner_bounds_by_hand():
    """By IBP a, b in [0, 2], so a + b - 1/2 reaches 7/2. By chords a <= (x + y + 2) / 2 and
    b <= (x - y + 2) / 2, so that a + b - 1/2 <= x + 3/2, at most 5/2. Below, both are 0: the ends
    are as far from 0, and 0 is taken.
    """
    box = between(double([-1, -1]), double([1, 1]))
    refined = []

    def refine(operator, number, x, path):
        refined.append((x, *crown._refined(operator, number, x, path, box, 2**20, {})))
        return refined[-1][1:]

    trace(fold(chain()).operators, box, refine)
    before, after, _ = refined[1]
    assert (before.lower.item(), before.upper.item()) == (-0.5, 3.5)
    assert (after.lower.item(), after.upper.item()) == (-0.5, 2.5)
    # The chord of c over [-1/2, 5/2] is 5/6 (z + 1/2), so f_0 - f_1 <= 5/6 (x + 2), at most 5/2.
    found = {
        name: over(chain(), [-1, -1], [1, 1], 1, BoundOptions(name))[0, 0].item() for name in BOUNDS
    }
    assert found["ibp"] == pytest.approx(3.5)
    assert found["crown"] == pytest.approx(2.5)


def test_the_best_slopes_by_hand():
    """-relu(z) - relu(-z), z in [-1, 1]: with slopes s and t it is below -s z + t z, at most
    |s - t|. CROWN takes 0 and 0. Moved by relu(z) / 2 above, of chord (z + 1) / 4, it is at most
    1/4 + |1/4 - s + t|, and least at s - t = 1/4; CROWN gives 1/2.
    """
    model = IntervalSequential(
        linear([[1], [-1], [1]], [0, 0, 0]),
        IntervalReLU(),
        linear([[-1, -1, 0.5], [0, 0, 0]], [0, 0]),
    )
    # The third relu is the first one again; rows of its own coefficient do not cancel.
    found = [
        over(model, [-1], [1], 1, BoundOptions(bound=name)) for name in ("crown", "alpha-crown")
    ]
    assert found[0][0, 0].item() == pytest.approx(0.5)
    assert found[1][0, 0].item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_networks_have_the_bounds_of_dense_matrices(seed):
    model, box, labels = numbered(seed)
    model = model.double()
    with torch.no_grad():
        found = crown.box_logits(fold(model), box, labels, BoundOptions("crown"))
        plain = BoundOptions("alpha-crown", slope_steps=0)
        search = alpha_crown.optimised(fold(model), box, labels, plain)
    expected, _ = denses(model, box, labels, alpha_crown.slopes(search))
    others = torch.arange(CLASSES) != labels[:, None]
    torch.testing.assert_close(found[others], expected[others], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("how", ALL_OPTIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_searched_slopes_are_sound_and_no_looser(seed, how):
    """They hold at sampled corners and points, and their slopes give the dense bounds."""
    model, box, labels = numbered(seed)
    model, options = model.double(), ALL_OPTIONS[how]
    network = fold(model)
    with torch.no_grad():
        plain = crown.box_logits(network, box, labels, options)
        search = alpha_crown.optimised(network, box, labels, options)
        found = search.logits()
        signs = torch.rand(200, *box.shape, dtype=torch.float64) * 2 - 1
        points = torch.cat([box.mid + signs * box.rad, box.mid + signs.sign() * box.rad])
        logits = network(points.flatten(0, 1))
        reached = differences(logits, labels.repeat(400)).view(400, *found.shape).amax(0)
    assert (found <= plain + 1e-12).all()
    assert (reached <= found + 1e-9 * (1 + found.abs())).all()
    slopes = alpha_crown.slopes(search)
    expected, _ = denses(model, box, labels, slopes)
    wide = (plain >= 0) & (torch.arange(CLASSES) != labels[:, None])
    assert (found[wide] <= expected[wide] + 1e-9 * (1 + expected[wide].abs())).all()
    if how != "inner layers":  # the slopes of whose rows are kept for the margin, not for each row
        # An end that is 0 but for rounding has a choice of slopes here, and none there.
        torch.testing.assert_close(found[wide], expected[wide], rtol=1e-3, atol=1e-9)


def narrow_net(width: float = 1.0):
    torch.manual_seed(0)
    layers = [IntervalFlatten(), IntervalLinear(16, 24), IntervalReLU()]
    layers += [IntervalLinear(24, 24), IntervalReLU(), IntervalLinear(24, 24), IntervalReLU()]
    model = IntervalSequential(*layers, IntervalLinear(24, 4)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(width)
    images = torch.rand(6, 1, 4, 4)
    return model, images, model(images).argmax(1)


def test_the_search_finds_tighter_bounds():
    model, images, labels = narrow_net(width=2.0)
    found = [
        certified_margins(model, images, labels, 0.1, bound="alpha-crown", slope_steps=steps)
        for steps in (0, 10, 60)
    ]
    plain = certified_margins(model, images, labels, 0.1, bound="crown")
    torch.testing.assert_close(found[0], plain)
    assert (found[1] <= found[0]).all()
    assert (found[1] < found[0] - 1e-3).any()
    assert (found[2] <= found[0]).all()


def test_a_search_ends_at_the_goal():
    """With a goal that all bounds meet, the bounds are CROWN's."""
    model, images, labels = narrow_net(width=2.0)
    box = Interval.ball(images, torch.full((6,), 0.05))
    given = fold(model), box, labels, BoundOptions("alpha-crown")
    with torch.no_grad():
        plain = crown.box_logits(*given)
        met = alpha_crown.optimised(*given, goal=lambda x: x[:, 0] - torch.inf).logits()
        assert torch.equal(met, plain)
        # A deadline in the past leaves one evaluation, at CROWN's own slopes.
        late = alpha_crown.optimised(*given, deadline=0.0).logits()
    torch.testing.assert_close(late, plain)


@pytest.mark.parametrize("bound", ["crown", "alpha-crown"])
def test_batches_budgets_and_several_radii_give_the_same(bound):
    model, images, labels = narrow_net()
    epsilons = torch.tensor([[0.01], [0.05], [0.1]]).expand(3, 6)
    model, images, epsilons = model.double(), images.double(), epsilons.double()
    whole = certified_margins(model, images, labels, epsilons, bound=bound)
    assert whole.shape == (3, 6)
    for budget in (1, 30_000):
        parts = certified_margins(model, images, labels, epsilons, bound=bound, budget=budget)
        torch.testing.assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    one = certified_margins(model, images[2:3], labels[2:3], 0.05, bound=bound)
    torch.testing.assert_close(one, whole[1, 2:3], rtol=1e-9, atol=1e-9)


def test_the_network_keeps_its_gradients():
    """A search makes no gradients of the parameters, also where they need some."""
    model, images, labels = narrow_net(width=2.0)
    certified_margins(model, images, labels, 0.05, bound="alpha-crown")
    certified_radii(model, images, labels, 0.1, bound="alpha-crown")
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_a_search_needs_no_gradients_outside(mode):
    model, images, labels = narrow_net(width=2.0)
    expected = certified_margins(model, images, labels, 0.3, bound="alpha-crown").detach()
    assert (expected > 0).any()
    with mode():
        found = certified_margins(model, images, labels, 0.3, bound="alpha-crown")
        radii = certified_radii(model, images, labels, 0.3, bound="alpha-crown")
        proved = verified_radii(model, images, labels, radii, bound="alpha-crown")
    torch.testing.assert_close(found, expected)
    assert (proved.radius > 0).all()


@pytest.mark.parametrize("bound", ["crown", "alpha-crown"])
def test_gradients_are_those_of_finite_differences(bound):
    """With respect to the weights, at which the choice of lines does not change."""
    model, images, labels = narrow_net()
    model, images = model.double(), images.double()
    steps = 0 if bound == "alpha-crown" else 20
    options = BoundOptions(bound, slope_steps=steps)
    weight, direction = model[3].weight, torch.randn(24, 24, dtype=torch.float64)

    def loss():
        radii = torch.full((6,), 0.05, dtype=torch.float64)
        logits = BOUNDS[bound].robust_logits(fold(model), images, labels, radii, options)
        return largest_difference(logits, labels).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    with torch.no_grad():
        values = []
        for step in (1e-6, -1e-6):
            weight.add_(step * direction)
            values.append(loss())
            weight.sub_(step * direction)
    expected = (values[0] - values[1]) / 2e-6
    torch.testing.assert_close((gradient * direction).sum(), expected, rtol=1e-4, atol=1e-6)


def test_each_rung_goes_on_from_the_one_below():
    model, images, labels = narrow_net(width=1.6)
    found = {name: certified_radii(model, images, labels, 0.2, bound=name) for name in BOUNDS}
    for below, above in zip(found.values(), [*found.values()][1:], strict=False):
        assert (above.radius >= below.radius).all()
        same = above.radius == below.radius
        assert torch.equal(above.rung[same], below.rung[same])
    assert (found["crown"].radius > found["ibp"].radius).any()
    for place, (name, radii) in enumerate(found.items()):
        assert radii.rung.max() <= place
        for rung in radii.rung.unique().tolist():
            some = (radii.rung == rung) & (radii.radius > 0)
            given = images[some], labels[some], radii.radius[some]
            at = certified_margins(model, *given, bound=[*BOUNDS][rung])
            # At the largest certified radii the sign may change with the size of a batch.
            assert (at < 1e-5).all(), name
        corners = worst_corners(model, images, labels, radii.radius, (0, 1))
        logits = model(corners.flatten(0, 1))
        assert (
            largest_difference(differences(logits, labels.repeat(4)), labels.repeat(4)) < 0
        ).all()


@pytest.mark.parametrize("claim", ["real", "float32"])
@pytest.mark.parametrize("inner", [False, True])
def test_radii_of_every_rung_are_proved(claim, inner):
    model, images, labels = narrow_net(width=1.6)
    radii = certified_radii(model, images, labels, 0.2, bound="alpha-crown", inner_slopes=inner)
    assert len(radii.rung.unique()) > 1
    proved = verified_radii(
        model, images, labels, radii, claim=claim, bound="alpha-crown", inner_slopes=inner
    )
    assert (proved.radius <= radii.radius).all()
    torch.testing.assert_close(proved.radius.float(), radii.radius, rtol=1e-2, atol=1e-5)
    assert (proved.radius > 0).all()


def test_a_list_names_the_rungs():
    assert rungs("crown") == ("ibp", "crown-ibp", "crown")
    assert rungs("ibp, crown") == ("ibp", "crown")
    assert rungs("crown-ibp,alpha-crown") == ("crown-ibp", "alpha-crown")
    model, images, labels = narrow_net(width=1.6)
    listed = certified_radii(model, images, labels, 0.2, bound="crown-ibp,crown")
    assert set(listed.rung.tolist()) <= {1, 2}
    climbed = certified_radii(model, images, labels, 0.2, bound="crown")
    torch.testing.assert_close(listed.radius, climbed.radius, rtol=1e-3, atol=2e-6)
    wrong = IntervalSequential(IntervalFlatten(), IntervalLinear(16, 4))
    missed = certified_radii(wrong, images, (wrong(images).argmax(1) + 1) % 4, 0.2, bound="crown")
    assert missed.status.tolist() == [RadiusStatus.MISCLASSIFIED] * 6


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        (
            "crown,ibp",
            "must be listed from the loosest to the tightest: ibp, crown-ibp, crown, alpha-crown",
        ),
        ("ibp,ibp", "must be listed from the loosest"),
        ("ibp,cronw", "'cronw' is not one of"),
        ("ibp,", "'' is not one of"),
        ("", "'' is not one of"),
        (None, "None is not one of"),
        (["ibp"], "is not one of"),
    ],
)
def test_lists_that_are_none(bound, message):
    model, images, labels = narrow_net()
    with pytest.raises(UserError, match=message):
        certified_radii(model, images, labels, 0.2, bound=bound)


@pytest.mark.parametrize("name", ["slope_steps", "inner_slopes"])
def test_settings_that_are_wrong(name):
    for value in (-1, "many", 1.5, None):
        with pytest.raises(UserError, match=name):
            BoundOptions(**{name: value})


@pytest.mark.parametrize("bound", ["crown", "alpha-crown"])
def test_what_is_not_finite_is_not_certified(bound):
    model, images, labels = narrow_net()
    with torch.no_grad():
        model[3].weight[0, 0] = 3e38
        model[1].weight[0] = 3e38
    assert certified_margins(model, images, labels, 0.1, bound=bound).tolist() == [torch.inf] * 6
