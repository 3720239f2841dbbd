"""Attackable radii: the box, the search upwards and between, by hand; AutoAttack stood in for."""

import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from test_pgd import linear_model, seeded

from ibpcore import Interval
from ibpcore.attacks.autoattack import HALF_WIDTH, autoattack_version, autoattacker
from ibpcore.attacks.pgd import Attack, pgd_attacker
from ibpcore.attacks.search import Found, attempted, attempts, bisected, inner_box, upwards
from ibpcore.bounds.ibp import clean_margins
from ibpcore.nn import IntervalFlatten, IntervalLinear, IntervalSequential
from ibpcore.nn.folding import fold


def none(samples):
    return Found(torch.full((samples,), torch.inf).double(), torch.zeros(samples, 1, 1, 1))


class Ladder:
    """Attempts that succeed from a threshold (B,) on, at exactly the radius; all are noted."""

    def __init__(self, *thresholds):
        self.thresholds, self.asked = torch.tensor(thresholds).double(), []

    def __call__(self, samples, radii):
        self.asked.append(dict(zip(samples.tolist(), radii.tolist(), strict=True)))
        success = radii >= self.thresholds[samples]
        images = radii.view(-1, 1, 1, 1).float()
        return Found(torch.where(success, radii, torch.inf), images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_the_inner_box_is_the_largest_in_the_ball(clip, dtype):
    """Its corners are in, and the next floats beyond them out; measured in float64."""
    images = torch.rand(500, 1, 3, 3, generator=seeded()).to(dtype)
    images[:50] = images[:50].round()
    radii = 10 ** (-6 * torch.rand(500, generator=seeded(1)).double())
    lower, upper = inner_box(images, radii, clip)
    assert lower.dtype == dtype
    assert (lower <= images).all()
    assert (upper >= images).all()
    limit, exact = radii.view(-1, 1, 1, 1), images.double()
    for end, away in ((lower, -torch.inf), (upper, torch.inf)):
        distance = (end.double() - exact).abs()
        further = torch.nextafter(end, torch.full_like(end, away)).double()
        # In float64 the ends themselves are rounded, and so may be half a digit off.
        slack = 0 if dtype == torch.float32 else 2**-53
        assert (distance <= limit + slack).all()
        beyond = (further - exact).abs() > limit - slack
        if clip:
            beyond |= (further < 0) | (further > 1)
            assert end.min() >= 0
            assert end.max() <= 1
        assert beyond.all()


def test_upwards_by_hand():
    """From 1 on, in steps of 16 / 16, twice that, ...: 2, 3, 5, 9, 10. The last fails always."""
    ladder = Ladder(2.5, 1.5, 9.5, 11.0)
    start = torch.ones(4).double()
    found, lower = upwards(none(4), ladder, start, 1600.0, 10.0)
    assert found.distance.tolist() == [3, 2, 10, torch.inf]
    assert found.images.flatten()[:3].tolist() == [3, 2, 10]
    assert lower.tolist() == [2, 1, 9, 10]
    assert [list(asked) for asked in ladder.asked] == [[0, 1, 2, 3], [0, 2, 3], *[[2, 3]] * 3]
    assert [asked[3] for asked in ladder.asked] == [2, 3, 5, 9, 10]


def test_steps_are_of_the_radius_itself():
    """Where that is more than a hundredth of epsilon_max: 3.2 / 16 above it, 3.2 / 8."""
    ladder = Ladder(3.5)
    upwards(none(1), ladder, torch.tensor([3.2]).double(), 1.0, 10.0)
    assert [asked[0] for asked in ladder.asked] == pytest.approx([3.4, 3.6])


def test_what_is_found_or_beyond_the_limit_is_left_alone():
    ladder = Ladder(0.0, 0.0)
    found = Found(torch.tensor([0.5, torch.inf]).double(), torch.zeros(2, 1, 1, 1))
    lower = torch.tensor([0.1, 1.0]).double()
    again, same = upwards(found, ladder, lower, 1.0, 1.0)
    assert ladder.asked == []
    assert torch.equal(again.distance, found.distance)
    assert torch.equal(same, lower)


def test_narrowed_by_hand():
    """Between 1 and 2, threshold 1.3: 1.5 succeeds, 1.25 fails, 1.375 succeeds."""
    ladder = Ladder(1.3, 0.0, 0.0)
    found = Found(torch.tensor([2.0, torch.inf, 0.0]).double(), torch.zeros(3, 1, 1, 1))
    found = bisected(found, ladder, torch.ones(3).double(), 3)
    assert ladder.asked == [{0: 1.5}, {0: 1.25}, {0: 1.375}]
    assert found.distance.tolist() == [1.375, torch.inf, 0]
    assert found.images[0].item() == 1.375


def test_a_success_that_is_not_nearer_changes_nothing():
    found = Found(torch.tensor([1.0]).double(), torch.zeros(1, 1, 1, 1))
    again = attempted(found, Ladder(0.0), torch.tensor([0]), torch.tensor([1.0]).double())
    assert torch.equal(again.images, found.images)


def searched(model, images, labels, clip, radii, attack=None):
    """Attackable radii, from the given ones on, with the float64 network as the judge."""
    exact = fold(model.double())
    attack = attack or pgd_attacker(fold(model.float()), 10, 2, seeded())

    def judge(samples, attacked):
        return clean_margins(exact(attacked.double()), labels[samples]) >= 0

    attempt = attempts(images, labels, clip, attack, judge)
    found = Found(torch.full((len(images),), torch.inf).double(), images)
    found, lower = upwards(found, attempt, radii, 0.1, 1.0)
    return bisected(found, attempt, lower, 5)


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_a_linear_network_is_attacked_at_its_true_radius(clip):
    """f_1 - f_0 = 3 a - b + c / 2 + const falls by 4.5 r, or less where pixels are clipped.

    Within 1 % of the true radius, and never below it, whatever the rounding.
    """
    model = linear_model().eval()
    with torch.no_grad():
        model[1].bias.copy_(torch.tensor([2.0, 0.0]))
    images = torch.rand(200, 1, 2, 2, generator=seeded())
    weight, pixels = torch.tensor([3.0, -1.0, 0.5, 0.0]).double(), images.double().flatten(1)
    margin = pixels @ weight - 2
    labels = (margin > 0).long()
    # Towards the boundary; the rise is piecewise linear in r, and solved for by bisection.
    direction = weight * torch.where(margin > 0, -1.0, 1.0)[:, None]
    low, high = torch.zeros(200).double(), torch.ones(200).double()
    for _ in range(60):
        middle = (low + high) / 2
        moved = pixels + middle[:, None] * direction.sign()
        moved = moved.clamp(0, 1) if clip else moved
        reached = (moved @ weight - 2) * margin.sign() <= 0
        low, high = torch.where(reached, low, middle), torch.where(reached, middle, high)
    some = (high < 0.99) & (high > 1e-3)
    assert some.sum() > 150
    images, labels, true = images[some], labels[some], high[some]
    found = searched(model, images, labels, clip, 0.97 * true)
    # The oracle is rounded too.
    assert (found.distance >= true * (1 - 1e-12)).all()
    assert (found.distance <= true * 1.01).all()
    assert torch.equal(found.distance, (found.images.double() - images).abs().flatten(1).amax(1))


def test_only_the_judge_decides():
    """An attack that boasts, and one that does not know it won."""
    images, labels = torch.full((2, 1, 1, 1), 0.5), torch.tensor([0, 0])

    def attack(box, labels):
        return Attack(box.upper, torch.full((len(labels),), torch.inf))

    def always(samples, images):
        return torch.ones_like(samples).bool()

    def never(samples, images):
        return torch.zeros_like(samples).bool()

    for judge, distance in ((never, torch.inf), (always, 0.25)):
        attempt = attempts(images, labels, None, attack, judge)
        assert attempt(torch.tensor([1]), torch.tensor([0.25])).distance.tolist() == [distance]


def test_pgd_in_pieces(monkeypatch):
    """Each sample its box and label, whatever the size of a batch."""
    network = fold(linear_model().eval())
    images = torch.rand(5, 1, 2, 2, generator=seeded())
    box, labels = Interval.ball(images, torch.linspace(0, 0.2, 5), None), torch.tensor([0, 1] * 3)
    whole = pgd_attacker(network, 10, 1, seeded())(box, labels[:5])
    monkeypatch.setattr("ibpcore.attacks.pgd.ATTACK_BATCH", 2)
    pieces = pgd_attacker(network, 10, 1, seeded())(box, labels[:5])
    torch.testing.assert_close(whole.values, pieces.values)
    torch.testing.assert_close(whole.images[:, :, 0], pieces.images[:, :, 0])


# AutoAttack


class Adversary:
    """In place of AutoAttack: a corner of its ball, chosen by the gradient."""

    made: ClassVar = []

    def __init__(self, model, *, eps, seed, device, **kind):
        self.model, self.eps, self.kind = model, eps, kind
        self.apgd_targeted, self.fab = SimpleNamespace(), SimpleNamespace()
        torch.manual_seed(seed)
        self.made.append(self)

    def run_standard_evaluation(self, shown, labels, /, *, batch_size):
        torch.manual_seed(1)
        rows = torch.randperm(len(shown))  # it picks samples as it likes
        x = shown[rows].requires_grad_()
        with torch.enable_grad():
            loss = clean_margins(self.model(x), labels[rows]).sum()
        (gradient,) = torch.autograd.grad(loss, x)
        noise = torch.rand_like(gradient) - 0.5  # where there is no gradient
        moved = x + self.eps * torch.where(gradient == 0, noise, gradient).sign()
        return moved.detach()[rows.argsort()], None


@pytest.fixture
def adversaries(monkeypatch):
    module = SimpleNamespace(AutoAttack=Adversary, __version__="9.9")
    monkeypatch.setitem(sys.modules, "pyautoattack", module)
    monkeypatch.setattr(Adversary, "made", [])
    return Adversary.made


@pytest.mark.parametrize("clip", [(0.0, 1.0), None], ids=["clipped", "bare"])
def test_autoattack_gets_each_image_its_own_ball(clip, adversaries):
    """The corner of each ball, of 37 radii at once, without a trace in the global generator."""
    network = fold(linear_model().eval())
    images = torch.rand(37, 1, 2, 2, generator=seeded())
    labels = torch.arange(37) % 2
    box = Interval.ball(images, torch.linspace(0, 0.4, 37), clip)
    before = torch.get_rng_state()
    found = autoattacker(network, 3)(box, labels)
    assert torch.equal(torch.get_rng_state(), before)
    sign = torch.where(labels[:, None] == 0, 1.0, -1.0) * torch.tensor([1.0, -1, 1])
    corner = torch.where(sign > 0, box.upper.flatten(1)[:, :3], box.lower.flatten(1)[:, :3])
    torch.testing.assert_close(found.images.flatten(1)[:, :3], corner)
    assert torch.equal(found.values, clean_margins(network(found.images), labels))
    assert autoattack_version() == "9.9"
    (adversary,) = adversaries
    assert adversary.eps == HALF_WIDTH < 0.5
    # Two classes.
    assert adversary.kind == {"attacks": ["apgd-ce", "square"], "version": "custom"}
    assert adversary.fab.n_target_classes == 1


@pytest.mark.parametrize(("classes", "targets"), [(4, 3), (10, 9), (200, 9)])
def test_autoattack_has_targets_as_there_are_classes(classes, targets, adversaries):
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(1, classes)).eval()
    autoattacker(fold(model), 0)(Interval.ball(torch.rand(2, 1, 1, 1), 0.1), torch.tensor([0, 1]))
    assert adversaries[0].kind == {}
    assert adversaries[0].apgd_targeted.n_target_classes == targets
    assert adversaries[0].fab.n_target_classes == targets


def test_without_autoattack_there_is_no_version(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    assert autoattack_version() is None


def test_the_real_autoattack():
    """Where it is installed: a twentieth beyond the true radius it succeeds."""
    pytest.importorskip("pyautoattack")
    model = linear_model().eval()
    images = torch.rand(6, 1, 2, 2, generator=seeded()) / 4 + 0.4
    margin = model(images).diff().flatten()
    radii = 1.05 * margin.abs() / 4.5  # 3 a - b + c / 2 falls by 4.5 r
    labels = (margin > 0).long()
    found = autoattacker(fold(model), 0)(Interval.ball(images, radii, None), labels)
    assert (found.values >= 0).all()
    assert ((found.images - images).abs().flatten(1).amax(1) <= radii * (1 + 1e-5)).all()
