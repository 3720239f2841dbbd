"""Schedules of epsilon and of the learning rate: values at their corners, worked by hand."""

import itertools

import pytest
import torch

from ibpcore.training.schedules import (
    SCHEDULES,
    SWITCH,
    epsilon_share,
    full_schedule,
    linear_schedule,
    multistep,
    onecycle,
    smoothed_schedule,
)


@pytest.mark.parametrize("schedule", [smoothed_schedule, linear_schedule])
def test_zero_before_the_start_and_one_after_the_end(schedule):
    assert [schedule(p) for p in (-5.0, -1e-9, 0.0)] == [0, 0, 0]
    assert [schedule(p) for p in (1.0, 1.0 + 1e-9, 7.0)] == [1, 1, 1]


def test_smoothed_by_hand():
    """c x^4 with c = 1 / (4^-4 + (3/4) 4 / 4^3) = 1 / (13/256): at 1/4, 1/13."""
    assert smoothed_schedule(0.125) == pytest.approx(1 / 13 / 16)
    assert smoothed_schedule(0.25) == pytest.approx(1 / 13)
    assert smoothed_schedule(0.625) == pytest.approx(7 / 13)  # half the way from 1/13 to 1


def test_smoothed_joins_in_value_and_slope():
    h = 1e-6
    left, right = smoothed_schedule(SWITCH - h), smoothed_schedule(SWITCH + h)
    assert left == pytest.approx(right, abs=1e-5)
    slope_left = (smoothed_schedule(SWITCH) - left) / h
    slope_right = (right - smoothed_schedule(SWITCH)) / h
    assert slope_left == pytest.approx(16 / 13, rel=1e-4)
    assert slope_right == pytest.approx(16 / 13, rel=1e-4)
    assert smoothed_schedule(1 - 1e-9) == pytest.approx(1, abs=1e-8)


def test_smoothed_is_linear_after_the_join_and_convex_before():
    late = [smoothed_schedule(0.25 + 0.05 * i) for i in range(16)]
    steps = [b - a for a, b in itertools.pairwise(late)]
    assert steps == pytest.approx([steps[0]] * 15)
    early = [smoothed_schedule(0.025 * i) for i in range(11)]
    steps = [b - a for a, b in itertools.pairwise(early)]
    assert steps == sorted(steps)
    assert steps[0] > 0


def test_linear_and_none():
    assert [linear_schedule(p) for p in (0.25, 0.5)] == [0.25, 0.5]
    assert [full_schedule(p) for p in (-1.0, 0.0, 0.5, 2.0)] == [1, 1, 1, 1]


def test_epochs_of_the_warmup_count_from_1_and_include_both_ends():
    """10 steps an epoch, warm-up 2-5: from step 10 to step 50."""
    share = [epsilon_share("linear", step, 10, (2, 5)) for step in (0, 9, 10, 20, 30, 49, 50, 99)]
    assert share == pytest.approx([0, 0, 0, 0.25, 0.5, 39 / 40, 1, 1])


def test_the_warmup_of_the_presets_starts_at_the_first_step():
    """MNIST: epochs 1-20."""
    assert epsilon_share("linear", 0, 469, (1, 20)) == 0
    assert epsilon_share("linear", 469 * 10, 469, (1, 20)) == 0.5
    assert epsilon_share("smoothed", 469 * 5, 469, (1, 20)) == pytest.approx(1 / 13)
    assert epsilon_share("smoothed", 469 * 20, 469, (1, 20)) == 1


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_shares_never_fall_and_end_at_one(schedule):
    shares = [epsilon_share(schedule, step, 4, (2, 6)) for step in range(32)]
    assert shares == sorted(shares)
    assert shares[0] >= 0
    assert shares[24:] == [1] * 8


@pytest.mark.parametrize("schedule", ["smoothed", "linear"])
def test_a_warmup_of_no_length_is_a_step(schedule):
    shares = [epsilon_share(schedule, step, 4, (2, 1)) for step in (0, 3, 4, 5)]
    assert shares == [0, 0, 1, 1]


def rates(make, learning_rate, epochs, steps_per_epoch, drops=(0.7, 0.85)) -> list[float]:
    """The learning rate of every step of a run."""
    parameter = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([parameter], lr=learning_rate)
    scheduler = make(optimizer, learning_rate, drops, epochs, steps_per_epoch)
    seen = []
    for _ in range(epochs * steps_per_epoch):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_multistep_falls_at_70_and_85_percent_of_the_epochs():
    seen = rates(multistep, 5e-4, epochs=20, steps_per_epoch=3)
    assert seen[: 14 * 3] == pytest.approx([5e-4] * 42)
    assert seen[14 * 3 : 17 * 3] == pytest.approx([1e-4] * 9)
    assert seen[17 * 3 :] == pytest.approx([2e-5] * 9)


def test_multistep_falls_at_the_given_shares():
    seen = rates(multistep, 1.0, epochs=8, steps_per_epoch=2, drops=(0.25, 0.5, 0.75))
    assert seen == pytest.approx([1.0] * 4 + [0.2] * 4 + [0.04] * 4 + [0.008] * 4)
    assert rates(multistep, 1.0, epochs=2, steps_per_epoch=2, drops=()) == [1.0] * 4


def test_onecycle_rises_and_falls_on_straight_lines():
    """The defaults of torch: from 1/25 up over 30 % of the steps, down to 1/25 / 1e4."""
    seen = rates(onecycle, 2e-3, epochs=10, steps_per_epoch=10)
    assert len(seen) == 100
    assert max(seen) == seen[29] == pytest.approx(2e-3)
    assert seen[0] == pytest.approx(2e-3 / 25)
    assert seen[-1] == pytest.approx(2e-3 / 25 / 1e4)
    for part in (seen[:30], seen[29:]):
        steps = [b - a for a, b in itertools.pairwise(part)]
        assert steps == pytest.approx([steps[0]] * len(steps))
