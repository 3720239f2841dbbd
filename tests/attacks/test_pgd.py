"""Attacks: known worst points, the box, the points visited, and what decides the result."""

import pytest
import torch
import torch.nn.functional as F

from ibpcore import Interval
from ibpcore.attacks.pgd import constant_steps, cross_entropy, decaying_steps, pgd
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.interval import between
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalReLU, IntervalSequential
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.folding import clean_pass, fold
from ibpcore.training.config import make_config
from ibpcore.training.methods import CleanBatch
from ibpcore.training.methods.adaptive_radii import step_radii
from ibpcore.training.methods.adversarial import attack_batch, attacked_balls

EIGHT = constant_steps(8, 0.25)  # two half widths: from any point to any end


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def linear_model():
    """f_1 - f_0 = 3 a - b + 0.5 c + 0 d on images (1, 2, 2) of pixels a, b, c, d."""
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(4, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0], [3.0, -1.0, 0.5, 1.0]]))
        model[1].bias.zero_()
    return model


def two_hills():
    """f_1 - f_0 = relu(0.2 - x) + relu(x - 0.3) / 10: 0.2 at x = 0, 0.07 at x = 1."""
    model = IntervalSequential(
        IntervalFlatten(), IntervalLinear(1, 2), IntervalReLU(), IntervalLinear(2, 2)
    )
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[-1.0], [1.0]]))
        model[1].bias.copy_(torch.tensor([0.2, -0.3]))
        model[3].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.1]]))
        model[3].bias.zero_()
    return model


def small_cnn():
    torch.manual_seed(0)
    return cnn7((1, 8, 8), 3, width=3, hidden=8)


def small_batch(samples=6):
    """Some pixels at 0 and 1, so that clipping cuts their intervals."""
    images = torch.rand(samples, 1, 8, 8, generator=seeded()).mul(1.4).sub(0.2).clamp(0, 1)
    return images, torch.arange(samples) % 3


class Watched:
    """A network that remembers what it was asked, and its answers."""

    def __init__(self, network, objective):
        self.network, self.objective = network, objective
        self.points, self.values = [], []

    def __call__(self, x):
        logits = self.network(x)
        self.points.append(x.detach().clone())
        self.values.append(self.objective(logits.detach()))
        return logits


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_a_linear_classifier_is_worst_in_a_corner(clip):
    """Label 0 wants a, c up and b down, label 1 the opposite; nobody cares for d.

    Pixels 0.05, 0.5, 0.95, 0.5 and radius 0.1. Label 0: a = 0.15, b = 0.4, c = 1.05 or
    clipped 1; 0.45 - 0.4 + c / 2 = 0.575 or 0.55. Label 1: a = -0.05 or clipped 0, b = 0.6,
    c = 0.85; -(3 a - 0.6 + 0.425) = 0.325 or 0.175.
    """
    images = torch.tensor([0.05, 0.5, 0.95, 0.5]).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    labels = torch.tensor([0, 1])
    box = Interval.ball(images, 0.1, clip)
    found = pgd(linear_model(), box, labels, EIGHT, generator=seeded())
    high, low = (1.0, 0.0) if clip else (1.05, -0.05)
    expected = torch.tensor([[0.15, 0.4, high], [low, 0.6, 0.85]])
    torch.testing.assert_close(found.images.flatten(1)[:, :3], expected)
    values = torch.tensor([0.55, 0.175]) if clip else torch.tensor([0.575, 0.325])
    torch.testing.assert_close(found.values, values)


def test_cross_entropy_is_climbed_too():
    """The same corner, and the loss of each sample there: softplus(0.55), not a mean."""
    images = torch.tensor([0.05, 0.5, 0.95, 0.5]).view(1, 1, 2, 2).expand(2, 1, 2, 2)
    box = Interval.ball(images, torch.tensor([0.1, 0.0]))
    labels = torch.tensor([0, 0])
    found = pgd(linear_model(), box, labels, EIGHT, objective=cross_entropy, generator=seeded())
    # At radius 0: 0.15 - 0.5 + 0.475 = 0.125.
    torch.testing.assert_close(found.values, F.softplus(torch.tensor([0.55, 0.125])))


def test_a_restart_finds_the_higher_hill():
    """From the centre 0.5 and 4 of 5 starts the way is up to x = 1, the lower of the two."""
    box = Interval.ball(torch.full((1, 1, 1, 1), 0.5), 0.5)
    labels = torch.tensor([0])
    lower = pgd(two_hills(), box, labels, EIGHT, generator=seeded())
    torch.testing.assert_close(lower.values, torch.tensor([0.07]))
    torch.testing.assert_close(lower.images, torch.ones(1, 1, 1, 1))
    higher = pgd(two_hills(), box, labels, EIGHT, restarts=20, generator=seeded())
    torch.testing.assert_close(higher.values, torch.tensor([0.2]))
    torch.testing.assert_close(higher.images, torch.zeros(1, 1, 1, 1))


def test_the_centre_counts():
    """f_1 - f_0 = -|x - 0.5|: one step of two half widths is worse than where it began."""
    model = two_hills()
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([0.5, -0.5]))
        model[3].weight.copy_(torch.tensor([[0.0, 0.0], [-1.0, -1.0]]))
    box = Interval.ball(torch.full((1, 1, 1, 1), 0.5), 0.25)
    found = pgd(model, box, torch.tensor([0]), (2.0,), generator=seeded())
    assert found.images.item() == 0.5
    assert found.values.item() == 0


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
@pytest.mark.parametrize("objective", [clean_margins, cross_entropy])
def test_the_worst_of_all_visited_points_in_the_box(objective, clip):
    """Every point that the network is shown, against a record of them."""
    images, labels = small_batch()
    box = Interval.ball(images, torch.linspace(0.01, 0.4, len(images)), clip)

    def value(logits):
        return objective(logits, labels.repeat(len(logits) // len(labels)))

    watched = Watched(small_cnn().eval(), value)
    steps = (0.7, 0.7, 0.01)
    found = pgd(watched, box, labels, steps, restarts=2, objective=objective, generator=seeded())
    assert len(watched.points) == 1 + len(steps) + 1
    points = torch.cat(watched.points).view(-1, *images.shape)
    values = torch.cat(watched.values).view(-1, len(images))
    assert len(points) == 1 + 2 * (len(steps) + 1)
    assert torch.equal(points[0], box.mid)
    assert (points >= box.lower).all()
    assert (points <= box.upper).all()
    if clip:
        assert points.min() >= 0
        assert points.max() <= 1
    assert torch.equal(found.values, values.amax(0))
    where = values.argmax(0)
    assert torch.equal(found.images, points[where, torch.arange(len(images))])
    assert len(set(where.tolist())) > 1


def test_starts_fill_the_box():
    """Of 20 000 pixels in [0, 0.3] and [0.3, 0.7] each fifth gets its share: no clipped heap."""
    images = torch.tensor([0.1, 0.5]).repeat(20_000).view(1, 1, 200, 200)
    box = Interval.ball(images, 0.2)
    watched = Watched(IntervalSequential(IntervalFlatten()), lambda logits: logits)
    pgd(watched, box, torch.tensor([0]), (), generator=seeded(), objective=lambda z, y: z[:, 0])
    place = ((watched.points[1] - box.lower) / (2 * box.rad)).view(-1, 2)
    assert len(watched.points) == 2
    for column in place.T:
        counts = torch.histc(column, 5, 0, 1)
        # Standard deviation sqrt(20000 / 5 * 4 / 5) = 57.
        assert (counts - 4000).abs().max() < 5 * 57


def test_steps_are_shares_of_each_pixels_half_width():
    """Half widths 0.15 and 0.2; at the start s, one step of 0.1 goes 0.015 and 0.02 up."""
    images = torch.tensor([0.1, 0.5]).view(1, 1, 1, 2)
    box = Interval.ball(images, 0.2)
    watched = Watched(IntervalSequential(IntervalFlatten()), lambda logits: logits)
    pgd(
        watched,
        box,
        torch.tensor([0]),
        (0.1,),
        generator=seeded(1),
        objective=lambda z, y: z.sum(1),
    )
    start, end = watched.points[1:]
    torch.testing.assert_close((end - start).flatten(), torch.tensor([0.015, 0.02]))


def test_values_are_those_of_the_images():
    images, labels = small_batch()
    model = small_cnn().eval()
    found = pgd(model, Interval.ball(images, 0.2), labels, EIGHT, generator=seeded())
    assert torch.equal(found.values, clean_margins(model(found.images), labels))
    assert (found.values > clean_margins(model(images), labels)).all()


def test_a_generator_decides_all():
    images, labels = small_batch()
    model, box = small_cnn().eval(), Interval.ball(images, 0.2)
    before = torch.get_rng_state()
    one, two, other = (pgd(model, box, labels, EIGHT, generator=seeded(s)) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.images, two.images)
    assert torch.equal(one.values, two.values)
    assert not torch.equal(one.images, other.images)


def test_without_one_the_global_seed_does():
    images, labels = small_batch()
    model, box = small_cnn().eval(), Interval.ball(images, 0.2)
    torch.manual_seed(5)
    one, other = (pgd(model, box, labels, EIGHT) for _ in range(2))
    torch.manual_seed(5)
    two = pgd(model, box, labels, EIGHT)
    assert torch.equal(one.images, two.images)
    assert not torch.equal(one.images, other.images)


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_a_ball_of_radius_0_is_the_image(clip):
    images, labels = small_batch()
    model = small_cnn().eval()
    found = pgd(model, Interval.ball(images, 0.0, clip), labels, EIGHT, restarts=2)
    assert torch.equal(found.images, images)
    # All restarts are one batch, which some processors round differently; the worst value counts.
    once = clean_margins(model(images), labels)
    twice = clean_margins(model(images.repeat(2, 1, 1, 1)), labels.repeat(2))
    assert torch.equal(found.values, torch.stack([once, *twice.chunk(2)]).amax(0))


def test_restarts_only_improve():
    images, labels = small_batch(24)
    model, box = small_cnn().eval(), Interval.ball(images, 0.3)
    few, more = (
        pgd(model, box, labels, (0.1, 0.1), restarts=n, generator=seeded()).values for n in (1, 5)
    )
    assert (more >= few).all()
    assert (more > few).any()


def test_no_gradient_is_left_behind():
    """Neither in the parameters nor in the result, and none has to be enabled outside."""
    images, labels = small_batch()
    model = small_cnn().eval()
    with torch.no_grad():
        found = pgd(model, Interval.ball(images, 0.2), labels, EIGHT, generator=seeded())
    again = pgd(model, Interval.ball(images, 0.2), labels, EIGHT, generator=seeded())
    assert torch.equal(found.images, again.images)
    assert not again.images.requires_grad
    assert not again.values.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_as_published():
    """Müller et al.: of 8 steps a tenth of 0.5 after 4, a hundredth after 7 (6.4 rounded up)."""
    assert decaying_steps(8, 0.5) == pytest.approx([0.5] * 4 + [0.05] * 3 + [0.005])
    assert decaying_steps(10, 1.0) == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] + [0.001])
    assert decaying_steps(1, 2.0) == (2.0,)
    assert constant_steps(3, 0.25) == (0.25, 0.25, 0.25)


def test_training_attacks_the_network_of_the_batch():
    """Batch norm by the statistics of the clean batch, as in the bounds, not the running ones."""
    model = small_cnn().train()
    images, labels = small_batch(12)
    running = {name: buffer.clone() for name, buffer in model.named_buffers()}
    logits, network = clean_pass(model, images, track=False)
    slopes = torch.full((len(images),), torch.nan)
    batch = CleanBatch(network, logits, images, labels, slopes)
    config = make_config("digits", "mtl-ibp", attack_steps=8, attack_step_size=0.25)
    at = step_radii(batch, 0.2, config)
    box = attacked_balls(batch, at, config)

    torch.manual_seed(0)
    found = attack_batch(batch, at, box, constant_steps, config)
    assert not found.images.requires_grad
    torch.manual_seed(0)
    expected = pgd(network, box, labels, EIGHT, objective=cross_entropy)
    assert torch.equal(found.images, expected.images)
    torch.testing.assert_close(found.values, cross_entropy(network(found.images), labels))

    other = pgd(fold(model.eval()), box, labels, EIGHT, objective=cross_entropy)
    weaker = cross_entropy(network(other.images), labels)
    assert weaker.mean() < found.values.mean()
    assert all(torch.equal(buffer, running[name]) for name, buffer in model.named_buffers())


def test_a_given_start():
    """From the middle between two hills, and from the foot of the lower one."""
    fold_of, labels = fold(two_hills()), torch.tensor([0])
    box = between(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1))
    for start, top in ((0.1, 0.2), (0.4, 0.07)):
        at = torch.full((1, 1, 1, 1), start)
        found = pgd(fold_of, box, labels, EIGHT, start=at)
        assert found.values.item() == pytest.approx(top)
