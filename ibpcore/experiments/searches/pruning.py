"""When a trial of a search is hopeless: a rule of the measures so far, and of other trials'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ibpcore.certification.metrics import near_chance
from ibpcore.experiments.searches.objectives import Objectives, Values, objective_values
from ibpcore.training.config import TrainConfig
from ibpcore.training.demands import History
from ibpcore.training.selection import VALIDATION

FEWEST_RIVALS = 5
"""Finished trials from which on their medians count."""

Curve = Sequence[tuple[float, Values]]
"""The share of the epochs done at each measurement of a run, and its objectives there."""


def curve_of(history: History, epochs: int, objectives: Objectives) -> Curve:
    """The curve of a run of so many epochs."""
    return [
        (row["epoch"] / epochs, objective_values(objectives, row[VALIDATION]))
        for row in history
        if VALIDATION in row
    ]


def values_at(curve: Curve, share: float) -> Values | None:
    """The objectives at the last measurement up to a share of the epochs; None before the first."""
    reached = [values for at, values in curve if at <= share]
    return reached[-1] if reached else None


@dataclass(frozen=True)
class HopelessRule:
    """Ends a run that, at a measurement after its warm-up, is near chance or behind its rivals.

    It is near chance if it was so at the measurement before, too, and that was after the warm-up:
    bounds are worst where epsilon has just stopped to grow. It is behind if it is below the median
    of its rivals in both objectives, at the same share of the epochs, and of `FEWEST_RIVALS`
    rivals or more that were measured by then.

    Attributes:
        config: of the run.
        classes: number of classes.
        objectives: of the search.
        rivals: the curves of the trials that were complete when the run began.
    """

    config: TrainConfig
    classes: int
    objectives: Objectives
    rivals: Sequence[Curve]

    def __call__(self, history: History) -> bool:
        after = [row for row in history[self.config.warmup[1] - 1 :] if VALIDATION in row]
        if not after or after[-1] is not history[-1]:
            return False
        last = [near_chance(row[VALIDATION]["accuracy"], self.classes) for row in after[-2:]]
        return last == [True, True] or self._is_behind(history[-1])

    def _is_behind(self, row: dict[str, Any]) -> bool:
        share = row["epoch"] / self.config.epochs
        found = [values_at(curve, share) for curve in self.rivals]
        rivals = [values for values in found if values is not None]
        if len(rivals) < FEWEST_RIVALS:
            return False
        own = objective_values(self.objectives, row[VALIDATION])
        medians = [median(values) for values in zip(*rivals, strict=True)]
        return all(mine < theirs for mine, theirs in zip(own, medians, strict=True))
