"""The rules that follow from sizes."""

import pytest
import torch

from ibpcore import cnn7
from ibpcore.nn import IntervalConv2d, IntervalSequential
from ibpcore.nn.folding import fold
from ibpcore.nn.work import multiplications
from ibpcore.training import effort
from ibpcore.training.effort import accepted_doubt, worth_leaving_out


def folded(width: int, size: int = 8):
    return fold(cnn7((1, size, size), 10, width, 16).eval())


def test_multiplications_are_those_of_midpoint_and_radius():
    model = cnn7((3, 12, 12), 5, 4, 7).eval()
    found = effort._multiplications(fold(model), torch.rand(1, 3, 12, 12))
    assert found == 2 * multiplications(model)


@pytest.mark.parametrize("width", [4, 16])
def test_the_border_lies_where_arithmetic_takes_as_long_as_overhead(width):
    network = folded(width)
    images = torch.rand(1, 1, 8, 8)
    lane = effort._multiplications(network, images)
    border = int(effort.OVERHEAD["cpu"] / lane)
    below, above = (accepted_doubt(network, images, n) for n in (border, border + 1))
    assert (below, above) == (effort.COSTLY_PASSES, effort.CHEAP_PASSES)


def test_samples_are_left_out_where_their_arithmetic_is_more_than_selecting():
    network, images = folded(16), torch.rand(64, 1, 8, 8)
    lane = effort._multiplications(network, images[:1])
    border = int(effort.SELECTION * effort.OVERHEAD["cpu"] / lane)
    chosen = [worth_leaving_out(network, images, n) for n in (0, 1, border, border + 1)]
    assert chosen == [False, False, False, True]


def test_images_of_another_size_are_counted_anew():
    network = fold(IntervalSequential(IntervalConv2d(1, 4, 3, padding=1)))
    shares = [effort._share(network, torch.rand(4, 1, size, size), 4) for size in (8, 32, 8)]
    assert shares == [share * shares[0] for share in (1, 16, 1)]


def test_other_devices_have_more_arithmetic_for_the_same_overhead():
    network = folded(64, 28)
    images = torch.rand(8, 1, 28, 28)
    assert accepted_doubt(network, images, 8) == effort.CHEAP_PASSES
    elsewhere = fold(cnn7((1, 28, 28), 10, 64, 16).eval().to("meta"))
    assert accepted_doubt(elsewhere, images.to("meta"), 8) == effort.COSTLY_PASSES
