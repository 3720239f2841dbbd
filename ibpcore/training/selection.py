"""What the measures of held-out images decide: the weights that a run delivers, and its end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ibpcore.training.config import TrainConfig

MEASUREMENTS = 10
"""Number of measurements in a run, if the configuration does not say how often to measure."""
VALIDATION = "validation"
"""The entry of an epoch's row that holds the measures."""


def is_measured(epoch: int, config: TrainConfig) -> bool:
    """Whether held-out images are measured after `epoch`, counted from 1; always after the last."""
    if config.validation == 0:
        return False
    every = config.measure_every or math.ceil(config.epochs / MEASUREMENTS)
    return epoch % every == 0 or epoch == config.epochs


def best_epoch(history: Sequence[dict[str, Any]]) -> int | None:
    """The epoch with the highest ART on held-out images, the first of equal ones.

    None if none was measured. Epochs of the warm-up take part: whatever epsilon they trained
    at, radii are measured up to the final epsilon_max.
    """
    measured = [row for row in history if VALIDATION in row]
    best = max(measured, key=lambda row: float(row[VALIDATION]["art"]), default=None)
    return None if best is None else int(best["epoch"])


def is_over(history: Sequence[dict[str, Any]], config: TrainConfig) -> bool:
    """Whether the run has ended: after its last epoch, or when its patience is exhausted.

    That is after a measurement `patience` epochs or more after the best epoch, where an epoch
    of the warm-up counts as its last one.
    """
    epoch = len(history)
    if epoch >= config.epochs:
        return True
    best = best_epoch(history)
    if config.patience is None or best is None or VALIDATION not in history[-1]:
        return False
    return epoch - max(best, config.warmup[1]) >= config.patience


def chosen_epoch(history: Sequence[dict[str, Any]], config: TrainConfig) -> int:
    """The epoch whose weights the run delivers: until it is over, the last one."""
    best = best_epoch(history)
    if best is None or config.select_weights == "last" or not is_over(history, config):
        return len(history)
    return best
