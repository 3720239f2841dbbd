"""The memory of slopes: smoothed by their logarithms, on a common scale."""

import math

import pytest
import torch
from torch import Tensor

from ibpcore.training.slopes import (
    FIRST_DEVIATION,
    FOLLOW,
    NEW,
    expected_slopes,
    first_trend,
    learn,
)


def memory(size: int = 6) -> tuple[Tensor, Tensor]:
    slopes = torch.full((size,), torch.nan)
    return slopes, first_trend(slopes)


def visit(slopes: Tensor, trend: Tensor, samples: list[int], found: list[float]) -> None:
    """A batch in which these slopes were found; NaN for none."""
    index, slope = torch.tensor(samples), torch.tensor(found)
    expected = expected_slopes(slopes, trend, index).slopes
    learn(slopes, trend, index, expected, torch.where(slope.isnan(), expected, slope))


def expected(slopes: Tensor, trend: Tensor) -> Tensor:
    return expected_slopes(slopes, trend, torch.arange(len(slopes))).slopes


def test_the_first_slope_is_expected_again():
    slopes, trend = memory()
    visit(slopes, trend, [4, 1], [3.0, 0.25])
    assert expected(slopes, trend)[[4, 1]].tolist() == [3.0, 0.25]
    assert expected(slopes, trend)[[0, 2, 3, 5]].isnan().all()
    assert torch.equal(trend, first_trend(slopes))


def test_further_slopes_are_mixed_by_their_logarithms():
    """Twice and half of it: no common change, so the others stay as they are."""
    slopes, trend = memory()
    visit(slopes, trend, [0, 1, 2], [1.0, 1.0, 5.0])
    visit(slopes, trend, [0, 1], [2.0, 0.5])
    assert expected(slopes, trend)[:3].tolist() == pytest.approx([2**NEW, 2**-NEW, 5.0])


def test_the_scale_follows_what_a_batch_has_in_common():
    """Also for images that are not in it; nothing is learnt where nothing was found."""
    slopes, trend = memory()
    visit(slopes, trend, [0, 1, 2, 3], [1.0, 1.0, 5.0, 1.0])
    visit(slopes, trend, [0, 1, 3, 4], [1.5, 1.5, math.nan, math.nan])
    change = math.log(1.5)
    assert float(trend[0]) == pytest.approx(FOLLOW * change)
    assert float(trend[1]) == pytest.approx(FIRST_DEVIATION + FOLLOW * (change - FIRST_DEVIATION))
    factor = 1.5**FOLLOW
    assert expected(slopes, trend)[[2, 3]].tolist() == pytest.approx([5 * factor, factor])
    assert expected(slopes, trend)[4].isnan()


def test_a_steady_change_is_expected_in_time():
    """Slopes grow by 2 % in each batch, and each image is seen in every tenth."""
    slopes, trend = memory(40)
    for step in range(200):
        samples = [4 * (step % 10) + i for i in range(4)]
        before = expected(slopes, trend)[samples]
        visit(slopes, trend, samples, [1.02**step] * 4)
    assert float((1.02**199 / before).log().mean()) < 0.7 * math.log(1.02**10)
    assert float(trend[1]) < FIRST_DEVIATION


def test_the_deviation_tells_how_far_slopes_are_from_those_expected():
    torch.manual_seed(0)
    slopes, trend = memory(1000)
    for _ in range(100):
        visit(slopes, trend, list(range(1000)), (0.1 * torch.randn(1000)).exp().tolist())
    assert 0.07 < float(trend[1]) < 0.11
    assert abs(float(trend[0])) < 0.05


def test_nothing_found_in_a_batch_changes_nothing():
    slopes, trend = memory()
    visit(slopes, trend, [0, 1], [1.0, 2.0])
    before = slopes.clone(), trend.clone()
    visit(slopes, trend, [0, 5], [math.nan, math.nan])
    assert torch.equal(trend, before[1])
    torch.testing.assert_close(slopes, before[0], equal_nan=True)
