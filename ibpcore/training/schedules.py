"""Schedules of epsilon and of the learning rate over the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.optim import lr_scheduler

EXPONENT = 4.0
"""Exponent of the first part of the smoothed schedule, as in the FastIBP code."""
SWITCH = 0.25
"""Share of the warm-up at which the smoothed schedule becomes linear."""


def smoothed_schedule(progress: float) -> float:
    """x^4 in the first quarter, then linear up to 1; value and slope are continuous.

    Args:
        progress: share of the warm-up done; below 0 before its start, above 1 after its end.

    Returns:
        The share of the largest epsilon, in [0, 1].
    """
    if progress <= 0:
        return 0.0
    if progress >= 1:
        return 1.0
    # The line from (SWITCH, c SWITCH^p) to (1, 1) has the slope of c x^p at SWITCH.
    scale = 1 / (SWITCH**EXPONENT + (1 - SWITCH) * EXPONENT * SWITCH ** (EXPONENT - 1))
    at_switch = scale * SWITCH**EXPONENT
    if progress < SWITCH:
        return scale * progress**EXPONENT
    return at_switch + (1 - at_switch) * (progress - SWITCH) / (1 - SWITCH)


def linear_schedule(progress: float) -> float:
    """Linear from 0 to 1 over the warm-up."""
    return min(max(progress, 0.0), 1.0)


def full_schedule(progress: float) -> float:
    """The full epsilon from the first step on (Table 2)."""
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "smoothed": smoothed_schedule,
    "linear": linear_schedule,
    "none": full_schedule,
}


def epsilon_share(schedule: str, step: int, steps_per_epoch: int, warmup: tuple[int, int]) -> float:
    """Share of the largest epsilon after `step` steps of the run, by a schedule in `SCHEDULES`.

    `warmup` holds the first and the last epoch of the warm-up, from 1, both included.
    """
    first, last = warmup
    start, length = (first - 1) * steps_per_epoch, (last - first + 1) * steps_per_epoch
    progress = (step - start) / length if length > 0 else float(step >= start)
    return SCHEDULES[schedule](progress)


def onecycle(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    drops: Sequence[float],
    epochs: int,
    steps_per_epoch: int,
) -> lr_scheduler.LRScheduler:
    """OneCycle with linear annealing up to `learning_rate` (ACERT, Table 4); it has no `drops`."""
    return lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=learning_rate,
        total_steps=epochs * steps_per_epoch,
        anneal_strategy="linear",
    )


def multistep(
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    drops: Sequence[float],
    epochs: int,
    steps_per_epoch: int,
) -> lr_scheduler.LRScheduler:
    """Constant, multiplied by 0.2 after each of the `drops`, shares of the epochs (FastIBP)."""
    milestones = [round(share * epochs) * steps_per_epoch for share in drops]
    return lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.2)


LEARNING_RATES: dict[str, Callable[..., lr_scheduler.LRScheduler]] = {
    "onecycle": onecycle,
    "multistep": multistep,
}
