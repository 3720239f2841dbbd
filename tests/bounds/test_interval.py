"""`Interval`: how it is made, and that the box of two ends contains them exactly."""

from fractions import Fraction
from operator import add, mul

import pytest
import torch

from ibpcore import Interval, UserError

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def some_ends(dtype):
    """Pairs of ends, (2, N): of usual and extreme sizes, close to each other, and equal."""
    torch.manual_seed(0)
    facts = torch.finfo(dtype)
    mid = torch.randn(2000).double() * 10.0 ** torch.randint(-6, 3, (2000,))
    width = mid.abs() * 10.0 ** torch.randint(-8, 2, (2000,))
    ends = torch.stack([mid - width, mid + width]).to(dtype)
    low = [-facts.max, -facts.tiny, 0.0, -1.0, 1.0, facts.tiny / 2]
    high = [facts.max / 3, facts.tiny, facts.tiny / 8, 1e-30, 1.0, 1.0]
    odd = torch.tensor([low, high], dtype=torch.float64)
    return torch.cat([ends, odd.to(dtype)], 1)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_box_contains_its_ends_exactly(dtype):
    lower, upper = some_ends(dtype)
    box = Interval.from_bounds(lower, upper)
    for low, high, mid, rad in zip(
        *(x.double().tolist() for x in (lower, upper, box.mid, box.rad)), strict=True
    ):
        assert Fraction(mid) - Fraction(rad) <= Fraction(low)
        assert Fraction(high) <= Fraction(mid) + Fraction(rad)
    assert (box.lower <= lower).all()
    assert (box.upper >= upper).all()
    # Not much wider than the ends either, and a point stays one.
    facts = torch.finfo(dtype)
    spacing = facts.eps * torch.maximum(lower.abs(), upper.abs()).double().clamp(min=facts.tiny)
    usual = slice(0, 2000)
    wider = box.rad.double() - (upper.double() - lower.double()) / 2
    assert (wider <= 4 * spacing)[usual].all()
    assert (box.rad[lower == upper] == 0).all()


def test_the_ends_of_a_box_have_gradients():
    lower, upper = torch.tensor([[0.0], [1.0]]).requires_grad_().unbind()
    box = Interval.from_bounds(lower, upper)
    grads = torch.autograd.grad(box.mid.sum() + 3 * box.rad.sum(), [lower, upper])
    assert [float(g) for g in grads] == pytest.approx([-1.0, 2.0])


def test_two_tensors_without_names_are_no_interval():
    with pytest.raises(TypeError, match="positional"):
        Interval(torch.zeros(1), torch.ones(1))


@pytest.mark.parametrize("dtype", TYPES)
def test_ends_whose_radius_overflows_are_refused(dtype):
    largest = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(UserError, match="too far apart"):
        Interval.from_bounds(-largest, largest)


@pytest.mark.parametrize(
    "make", [lambda x: Interval.from_bounds(x, x), lambda x: Interval.ball(x, 0)]
)
def test_floats_of_8_bits_are_refused(make):
    with pytest.raises(UserError, match="16 bits or more, but are torch"):
        make(torch.zeros(2, 3).to(torch.float8_e5m2))


@pytest.mark.parametrize("operator", [add, mul])
@pytest.mark.parametrize("other", [2, torch.ones(2, 3)])
def test_intervals_are_combined_with_intervals_only(operator, other):
    with pytest.raises(UserError, match="an Interval is added to or multiplied by an Interval"):
        operator(Interval.from_bounds(torch.zeros(2, 3), torch.ones(2, 3)), other)
