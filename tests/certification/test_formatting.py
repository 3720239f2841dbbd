"""Radii as text: in the unit in which their limit was typed, and never above what is certified."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ibpcore.bounds.epsilons import as_number
from ibpcore.certification.formatting import (
    LEVELS,
    as_text,
    certified_text,
    certified_texts,
    exact_text,
    in_digits,
    in_unit_of,
    quarters,
    radius_text,
    reported_radii,
    rounded_down,
    unit_of,
)
from ibpcore.data.sources import STANDARD_RADII

AS_TYPED = ["16/255", "8.8/255", "2/255", "1/255", "0.5/255", "0.2/255", "0.123456/255", "85/255"]
AS_TYPED += ["0.1", "0.3", "0.4", "1", "0.05", "0.0125", "5e-05", "0.123456", "1e-45"]
BESIDE = {"16/255": " (0.06274)", "8.8/255": " (0.03450)", "1/255": " (0.003921)"}


def exact(text):
    numerator, _, denominator = text.partition("/")
    return Fraction(numerator) / Fraction(denominator or 1)


@pytest.mark.parametrize("text", AS_TYPED)
def test_a_limit_is_printed_as_it_was_typed(text):
    limit = as_number(text)
    assert radius_text(limit) == exact_text(limit) == text
    assert (unit_of(limit) is LEVELS) == ("/" in text)
    assert quarters(limit)[-1] == text
    beside = BESIDE.get(text)
    if beside or "/" not in text:
        assert as_text(limit) == text + (beside or "")


def test_what_is_computed_has_its_unit_too():
    assert radius_text(16 * (1 / 255)) == "16/255"
    assert radius_text(math.nextafter(16 / 255, 1)) == "16/255"
    assert radius_text(math.nextafter(16 / 255, 0)) == "15.9999/255"
    assert radius_text(2 / 7) == "0.285714"
    # 51/255 is a decimal of few digits, and equal to it.
    assert radius_text(51 / 255) == "0.2"


@given(st.floats(0, 1, exclude_min=True))
def test_every_limit_has_texts(limit):
    assert as_number(exact_text(limit)) == limit
    assert as_number(radius_text(limit)) <= limit
    assert as_number(radius_text(limit)) == pytest.approx(limit, rel=1e-5, abs=0)
    numbers = list(map(as_number, quarters(limit)))
    assert numbers == pytest.approx([limit / 4, limit / 2, limit * 3 / 4, limit], rel=1e-5, abs=0)


@given(st.sampled_from(AS_TYPED), st.floats(0, 1))
def test_a_certified_radius_is_never_printed_above(text, share):
    limit = as_number(text)
    radius = share * limit
    printed = certified_text(limit, radius)
    assert printed.endswith("/255") == ("/" in text)
    assert exact(printed) <= Fraction(radius)
    assert Fraction(radius) - exact(printed) < Fraction(limit) / 1000
    assert all(exact(one) <= Fraction(radius) for one in certified_texts(limit, radius))


def test_radii_below_a_limit_by_hand():
    assert certified_texts(16 / 255, 0.0625) == ["15.937/255", "0.062500"]  # 15.9375
    assert certified_texts(0.1, 0.0625) == ["0.06250"]
    assert certified_texts(0.2 / 255, 2**-12) == ["0.06225/255", "0.000244"]
    assert certified_texts(5e-5, 1.23456789e-5) == ["0.000012345"]
    assert certified_texts(1.0, 1.0) == ["1.0000"]
    assert in_unit_of(16 / 255, 4 / 255) == "4/255"
    assert in_unit_of(0.1, 4 / 255) == "0.01569"
    assert quarters(8.8 / 255) == ["2.2/255", "4.4/255", "6.6/255", "8.8/255"]
    assert quarters(0.3) == ["0.075", "0.15", "0.225", "0.3"]


def test_accuracies_are_reported_in_the_unit_of_the_limit():
    """At the radii of the data set, or at the quarters of a limit in another unit."""
    digits, cifar = STANDARD_RADII["digits"], STANDARD_RADII["cifar10"]
    assert reported_radii(0.08, digits) == ["0.025", "0.05", "0.075"]
    assert reported_radii(16 / 255, digits) == ["4/255", "8/255", "12/255", "16/255"]
    assert reported_radii(8.8 / 255, cifar) == ["1/255", "2/255", "4/255", "8/255"]
    assert reported_radii(0.03, cifar) == ["0.0075", "0.015", "0.0225", "0.03"]
    assert reported_radii(0.5 / 255, cifar) == ["0.125/255", "0.25/255", "0.375/255", "0.5/255"]


@given(st.floats(0, 1), st.sampled_from([1, 255]), st.integers(0, 9))
def test_rounding_down(radius, scale, decimals):
    printed = Fraction(rounded_down(radius, scale, decimals))
    exact = Fraction(radius) * scale
    assert printed <= exact < printed + Fraction(1, 10**decimals)


def test_rounding_down_by_hand():
    assert rounded_down(0.1) == "0.100000"  # as a float it is above
    assert rounded_down(0.3) == "0.299999"  # as a float it is below
    assert rounded_down(2 / 3, 255, 3) == "169.999"
    assert rounded_down(1.0, 255, 2) == "255.00"
    assert rounded_down(0.0009999, 1, 3) == "0.000"


@given(st.floats(1e-300, 1), st.sampled_from([1, 255]), st.integers(1, 7))
def test_a_limit_in_few_digits_is_never_above(radius, scale, digits):
    """As it is typed: a figure quoted at it is one at no larger radius than was asked for."""
    text = in_digits(radius, scale, digits)
    assert 0 < float(text) / scale <= radius


def test_limits_in_few_digits_by_hand():
    assert in_digits(0.3) == "0.3"
    assert in_digits(8.8 / 255, 255, 4) == "8.8"
    assert in_digits(2 / 3) == "0.666666"  # 0.666667 would be above
    assert in_digits(8.8146 / 255, 255, 4) == "8.814"
