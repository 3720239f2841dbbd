"""Margins over any boxes, radii of pixels and masks, by every bound."""

from __future__ import annotations

import pytest
import torch

from ibpcore import Interval, UserError, certified_margins
from ibpcore.bounds.registry import BOUNDS
from ibpcore.nn import (
    IntervalBatchNorm,
    IntervalConv2d,
    IntervalFlatten,
    IntervalLinear,
    IntervalReLU,
    IntervalSequential,
)

EVERY = pytest.mark.parametrize("bound", BOUNDS)


@pytest.fixture(scope="module")
def given():
    torch.manual_seed(0)
    model = IntervalSequential(
        IntervalConv2d(3, 4, 3, padding=1),
        IntervalBatchNorm(4),
        IntervalReLU(),
        IntervalFlatten(),
        IntervalLinear(4 * 20, 12),
        IntervalReLU(),
        IntervalLinear(12, 3),
    ).eval()
    images = torch.rand(4, 3, 4, 5)
    return model, images, model(images).argmax(1)


@EVERY
def test_a_ball_as_a_box(given, bound):
    model, images, labels = given
    expected = certified_margins(model, images, labels, 0.03, bound=bound)
    ball = Interval.ball(images, 0.03)
    box = Interval.from_bounds(ball.lower, ball.upper)
    torch.testing.assert_close(certified_margins(model, box, labels, bound=bound), expected)
    for epsilons in (torch.full((1, 4, 5), 0.03), torch.full((3, 1, 1), 0.03), 0.03 + 0 * images):
        found = certified_margins(model, images, labels, epsilons, bound=bound)
        torch.testing.assert_close(found, expected)
    mask = torch.ones(4, 5, dtype=torch.bool)
    for epsilons in (0.03, torch.full((4,), 0.03)):
        found = certified_margins(model, images, labels, epsilons, mask=mask, bound=bound)
        torch.testing.assert_close(found, expected)


@EVERY
def test_a_patch_holds_for_images_that_change_there_alone(given, bound):
    model, images, labels = given
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1:3, 2:4] = True
    margins = certified_margins(model, images, labels, 1.0, mask=mask, bound=bound)
    whole = certified_margins(model, images, labels, 1.0, bound=bound)
    assert (margins < whole).all()
    none = certified_margins(model, images, labels, 1.0, mask=mask & False, bound=bound)
    clean = certified_margins(model, images, labels, 0.0, bound=bound)
    torch.testing.assert_close(none, clean)
    for _ in range(50):
        changed = torch.where(mask, torch.rand_like(images).round(), images)
        logits = model(changed)
        others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        reached = others - logits.gather(1, labels[:, None])[:, 0]
        assert (reached <= margins + 1e-5).all()


def test_radii_of_pixels_by_hand():
    """f_1 - f_0 = 2 x - y - 1 over x in 0.5 +- 0.1 and y in 0.5 +- 0.3: at most 1.2 - 0.2 - 1."""
    model = IntervalSequential(IntervalFlatten(), IntervalLinear(2, 2))
    model[1].weight.data = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    model[1].bias.data = torch.tensor([1.0, 0.0])
    image, label = torch.full((1, 2, 1, 1), 0.5), torch.tensor([0])
    epsilons = torch.tensor([0.1, 0.3]).view(2, 1, 1)
    for bound in BOUNDS:
        found = certified_margins(model, image, label, epsilons, bound=bound)
        assert found.item() == pytest.approx(0.0, abs=1e-6)
        box = Interval.from_bounds(image - epsilons, image + epsilons)
        wider = certified_margins(model, box, label, bound=bound).item()  # by roundings
        assert found.item() <= wider <= found.item() + 1e-6


@EVERY
def test_boxes_that_break_are_not_certified(given, bound):
    _, images, labels = given
    big = IntervalSequential(IntervalFlatten(), IntervalLinear(60, 5), IntervalReLU())
    big.append(IntervalLinear(5, 3))
    big[1].weight.data.fill_(3e38)
    box = Interval.ball(images, 0.1)
    found = certified_margins(big, box, labels, bound=bound)
    assert not (found < 0).any()
    assert (found == torch.inf).all()


def test_an_empty_batch_of_boxes(given):
    model, images, labels = given
    box = Interval.from_bounds(images[:0], images[:0])
    for bound in BOUNDS:
        assert certified_margins(model, box, labels[:0], bound=bound).shape == (0,)


@EVERY
def test_boxes_keep_to_a_budget(given, bound):
    model, images, labels = given
    epsilons = torch.rand(3, 4, 5) * 0.05
    whole = certified_margins(model, images, labels, epsilons, bound=bound)
    parts = certified_margins(model, images, labels, epsilons, bound=bound, budget=1)
    torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x, x[:2]), "one shape"),
        (lambda x: (x, x.double()), "one shape, type and device"),
        (lambda x: (x, x - 0.1), "must not be above"),
        (lambda x: (x, x * torch.nan), "must be finite"),
        (lambda x: (x - torch.inf, x), "must be finite"),
        (lambda x: (x.long(), x.long()), "floating point"),
        (lambda x: (x.tolist(), x), "must be a torch tensor"),
    ],
)
def test_boxes_that_are_none(given, change, message):
    with pytest.raises(UserError, match=message):
        Interval.from_bounds(*change(given[1]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"epsilons": torch.rand(2, 4, 5)}, r"but has shape \(2, 4, 5\)|must fit images"),
        ({"epsilons": torch.rand(5, 3, 4, 5)}, "must fit images"),
        ({"epsilons": -torch.rand(3, 4, 5)}, "finite and not negative"),
        ({"epsilons": None}, "epsilons are missing"),
        ({"epsilons": 0.1, "mask": torch.ones(4, 5)}, "mask must be bool"),
        ({"epsilons": 0.1, "mask": torch.ones(5, 4, dtype=torch.bool)}, "must fit images"),
        ({"epsilons": 0.1, "mask": [True]}, "mask must be a torch tensor"),
        (
            {"epsilons": torch.rand(2, 4), "mask": torch.ones(4, 5, dtype=torch.bool)},
            "with a mask, epsilons",
        ),
    ],
)
def test_radii_and_masks_that_do_not_fit(given, how, message):
    model, images, labels = given
    with pytest.raises(UserError, match=message):
        certified_margins(model, images, labels, **how)


def test_boxes_have_neither_radii_nor_mask(given):
    model, images, labels = given
    box = Interval.from_bounds(images, images)
    with pytest.raises(UserError, match="boxes have no epsilons"):
        certified_margins(model, box, labels, 0.1)
    with pytest.raises(UserError, match="no radius below 0"):
        certified_margins(model, Interval(mid=images, rad=-images), labels)
    with pytest.raises(UserError, match="labels must have shape"):
        certified_margins(model, box, labels[:2])
