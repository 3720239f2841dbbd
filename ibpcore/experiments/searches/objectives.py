"""Objectives of a search, measures of held-out images, and its length. No numpy, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from ibpcore.bounds.epsilons import as_number
from ibpcore.errors import UserError

TITLES = {"accuracy": "accuracy", "acr": "ACR", "art": "ART"}
"""Measures that need no radius, and what tables call them."""
CERTIFIED = "certified"
KNOWN = f"{', '.join(TITLES)} or {CERTIFIED}@RADIUS"
Values = tuple[float, float]
"""The two objectives of a run, fractions in [0, 1], to be maximised."""
SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0}


@dataclass(frozen=True)
class Objective:
    """A measure to maximise.

    Attributes:
        measure: a key of `TITLES`, or "certified" for the certified accuracy at a radius.
        radius: as it was typed, such as "8/255"; None for other measures.
    """

    measure: str
    radius: str | None = None

    @property
    def name(self) -> str:
        """As in a command line and in tables: "acr", "certified@8/255"."""
        return self.measure if self.radius is None else f"{self.measure}@{self.radius}"

    @property
    def title(self) -> str:
        """For readers: "ACR", "certified at 8/255"."""
        return TITLES.get(self.measure, f"{CERTIFIED} at {self.radius}")

    def value(self, measures: Mapping[str, Any]) -> float:
        """Of the `measures` of held-out images, see `ibpcore.training.observations.measured`."""
        if self.radius is None:
            return float(measures[self.measure])
        return float(measures["certified_accuracy"][self.radius])


Objectives = tuple[Objective, Objective]


def objectives_of(text: str) -> Objectives:
    """The two objectives in a text such as "accuracy,certified@8/255".

    Raises:
        UserError: they are not two, or one is unknown.
    """
    found = [_objective(part.strip()) for part in text.split(",") if part.strip()]
    if len(found) != 2 or found[0] == found[1]:
        raise UserError(f"objectives must be two different ones of {KNOWN}, but are {text!r}")
    return found[0], found[1]


def _objective(text: str) -> Objective:
    measure, _, radius = text.partition("@")
    if text in TITLES:
        return Objective(text)
    if measure != CERTIFIED:
        raise UserError(f"objectives must be {KNOWN}, but one is {text!r}")
    try:
        number = as_number(radius)
    except (ValueError, ZeroDivisionError):
        number = math.nan
    if not 0 < number <= 1:
        raise UserError(f"the radius of {text!r} is not a number such as 0.05 or 8/255, up to 1")
    return Objective(CERTIFIED, radius)


def objective_values(objectives: Objectives, measures: Mapping[str, Any]) -> Values:
    """Both objectives of the measures of held-out images."""
    first, second = (objective.value(measures) for objective in objectives)
    return first, second


@dataclass(frozen=True)
class Budget:
    """How long a search lasts: a number of trials, or seconds, after which none begins.

    Attributes:
        trials: their number, or None.
        seconds: or None.
    """

    trials: int | None = None
    seconds: float | None = None

    def is_spent(self, trials: int, seconds: float) -> bool:
        """Whether no trial is to begin after so many `trials` and so many `seconds`."""
        if self.trials is not None:
            return trials >= self.trials
        return self.seconds is not None and seconds >= self.seconds

    def doubled(self) -> str:
        """The text of a budget twice as large, see `budget_of`."""
        if self.trials is not None:
            return f"{2 * self.trials}"
        return f"{Decimal(repr(2 * (self.seconds or 0.0))).normalize():f}s"


def budget_of(text: str) -> Budget:
    """The budget in a text: "50" trials, or a time such as "2h", "30m", "1h30m" or "90s".

    Raises:
        UserError: it is neither, or is not above 0.
    """
    parts = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m)?(?:([\d.]+)s)?", text)
    try:
        if re.fullmatch(r"\d{1,9}", text) and int(text) > 0:
            return Budget(trials=int(text))
        if parts is not None:
            units = zip(SECONDS.values(), parts.groups(), strict=True)
            seconds = sum(unit * float(number) for unit, number in units if number)
            if 0 < seconds < math.inf:
                return Budget(seconds=seconds)
    except ValueError:  # two points in a number
        pass
    raise UserError(f"budget must be a number of trials, or a time such as 2h, but is {text!r}")
