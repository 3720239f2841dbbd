"""What training remembers of each image: the slope of its margin, smoothed over the visits.

While the weights change, all slopes change together. So each is kept relative to a scale that
follows the mean change from batch to batch, like the trend in Holt's exponential smoothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore.distributed import SINGLE_PROCESS, Ranks, summed

NEW = 0.7
"""The share of the slope just found in what is remembered; both count by their logarithms."""
FOLLOW = 0.1
"""The share of a batch's mean change that the scale follows, and of its deviation."""
FIRST_DEVIATION = 1.0


class ExpectedSlopes(NamedTuple):
    """The slopes of a batch, before they are known.

    Attributes:
        slopes: (n,) as in `ibpcore.training.methods.base.MethodLoss`, NaN if never visited.
        deviation: scalar, the mean |log(slope / expected slope)| of the last batches.
    """

    slopes: Tensor
    deviation: Tensor


NONE = ExpectedSlopes(torch.empty(0), torch.empty(()))
"""For methods that remember no slopes."""


def first_trend(slopes: Tensor) -> Tensor:
    """(2,) the logarithm of the scale and the deviation at the start, for `slopes`, (N,)."""
    return torch.tensor([0.0, FIRST_DEVIATION], device=slopes.device)


def expected_slopes(slopes: Tensor, trend: Tensor, samples: Tensor) -> ExpectedSlopes:
    """Those of the images `samples`, (n,), from all relative ones, (N,), and the trend, (2,)."""
    log_scale, deviation = trend.unbind()
    return ExpectedSlopes(slopes.index_select(0, samples) * log_scale.exp(), deviation)


@torch.no_grad()
def learn(
    slopes: Tensor,
    trend: Tensor,
    samples: Tensor,
    expected: Tensor,
    found: Tensor,
    ranks: Ranks = SINGLE_PROCESS,
) -> None:
    """Updates relative slopes, (N,), and trend, (2,), by a batch of all ranks.

    Args:
        samples: (B,) this rank's images.
        expected, found: (B,) slopes before and after the step, the same where none was found.
    """
    log_scale, deviation = trend.unbind()
    now = found.log()
    change = (now - expected.log()).nan_to_num_(nan=0.0)  # NaN at the first visit
    smoothed = torch.sub(now, change, alpha=1 - NEW).sub_(log_scale)
    slopes.index_copy_(0, samples, smoothed.exp_().to(slopes.dtype))
    change.clamp_(-2, 2)
    # The sum, and by the norms of order 1 and 0 that of magnitudes and the number of non-zeros.
    sums = change.sum(), *(torch.linalg.vector_norm(change, order) for order in (1, 0))
    if ranks.size > 1:
        sums = summed(torch.stack(sums), ranks).unbind()
    total, absolute, number = sums
    known = number.clamp_min(1)
    log_scale.add_(total / known, alpha=FOLLOW)
    # The mean magnitude less the deviation.
    excess = torch.addcmul(absolute, deviation, number, value=-1)
    deviation.add_(excess.div_(known), alpha=FOLLOW)
