"""Types of option values."""

from __future__ import annotations

import math
import re
from typing import Any

import click
from click.shell_completion import CompletionItem

from ibpcore.bounds.epsilons import as_number
from ibpcore.bounds.ladder import rungs
from ibpcore.choices import ARCHITECTURES
from ibpcore.errors import UserError
from ibpcore.experiments.searches.objectives import (
    CERTIFIED,
    TITLES,
    Budget,
    Objectives,
    budget_of,
    objectives_of,
)

MOST_VALUES = 1000
"""Limit on the values of a swept setting; more are probably a typing error."""


class Epsilon(click.ParamType):
    """A radius in pixel units, above 0 and at most 1, typed as 0.1 or 8/255."""

    name = "epsilon"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        try:
            number = as_number(str(value))
        except (ValueError, ZeroDivisionError):
            self.fail(f"{value!r} is not a number such as 0.1 or 8/255", param, ctx)
        if not (math.isfinite(number) and 0 < number <= 1):
            self.fail(f"{value} is not above 0 and at most 1", param, ctx)
        return number


class DeviceType(click.ParamType):
    """`auto`, `cpu`, `cuda`, or one of several CUDA devices by its number, typed as cuda:1."""

    name = "auto|cpu|cuda|cuda:n"
    KINDS = ("auto", "cpu", "cuda")

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        if value not in self.KINDS and not re.fullmatch(r"cuda:\d{1,4}", str(value)):
            self.fail(f"{value!r} is not auto, cpu, cuda, or cuda:1 and the like", param, ctx)
        return str(value)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(kind) for kind in self.KINDS if kind.startswith(incomplete)]


class Ladder(click.ParamType):
    """A bound, or several ones from the loosest to the tightest, typed as ibp,crown."""

    name = "bound"

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        try:
            rungs(value)
        except UserError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class Epochs(click.ParamType):
    """First and last epoch, typed as 1:20."""

    name = "first:last"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        try:
            first, last = (int(part) for part in str(value).split(":"))
        except ValueError:
            self.fail(f"{value!r} is not FIRST:LAST, such as 1:20", param, ctx)
        return first, last


class Values(click.ParamType):
    """A comma-separated list of values of one type; duplicates are dropped."""

    def __init__(self, item: click.ParamType, name: str) -> None:
        self.item, self.name = item, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        texts = [text.strip() for text in str(value).split(",") if text.strip()]
        if not texts:
            self.fail("no value", param, ctx)
        return tuple(dict.fromkeys(self.item.convert(text, param, ctx) for text in texts))

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        items = self.item.shell_complete(ctx, param, last)
        return [CompletionItem(before + comma + item.value, item.type) for item in items]


class Kappas(click.ParamType):
    """A number, a comma-separated list of them, or START:STOP:STEP with STOP included."""

    name = "start:stop:step"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[float, ...]:
        kappas: dict[float, None] = {}
        for text in str(value).split(","):
            kappas |= dict.fromkeys(self._range(text, param, ctx))
            if len(kappas) > MOST_VALUES:
                self.fail(f"more than {MOST_VALUES} values", param, ctx)
        return tuple(kappas)

    def _range(self, text: str, param: Any, ctx: Any) -> list[float]:
        try:
            numbers = [float(part) for part in text.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)):
            self.fail(f"{text!r} is neither a number nor START:STOP:STEP", param, ctx)
        start, stop, step = numbers if len(numbers) == 3 else (numbers[0], numbers[0], 1.0)
        if not (start <= stop and step > 0):
            self.fail(f"{text!r} does not go up from START to STOP", param, ctx)
        steps = (stop - start) / step
        if steps > MOST_VALUES:
            self.fail(f"{text!r} has more than {MOST_VALUES} values", param, ctx)
        # Rounded, so that 3 * 0.1 is the 0.3 that the user means.
        return [round(start + i * step, 10) for i in range(int(steps + 1e-6) + 1)]


class Seeds(click.ParamType):
    """A number of seeds, counted from 0, or a comma-separated list of seeds."""

    name = "count|list"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, ...]:
        if "," in str(value):
            return Values(click.IntRange(min=0), self.name).convert(value, param, ctx)
        count = click.IntRange(min=1, max=MOST_VALUES).convert(value, param, ctx)
        return tuple(range(count))


class ObjectivesType(click.ParamType):
    """Two measures, typed as accuracy,acr or accuracy,certified@8/255."""

    name = "measure,measure"

    def convert(self, value: Any, param: Any, ctx: Any) -> Objectives:
        try:
            return objectives_of(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        before, comma, last = incomplete.rpartition(",")
        names = [name for name in (*TITLES, f"{CERTIFIED}@") if name.startswith(last)]
        return [CompletionItem(before + comma + name) for name in names]


class BudgetType(click.ParamType):
    """A number of trials, or a time, typed as 50, 2h, 30m or 1h30m."""

    name = "trials|time"

    def convert(self, value: Any, param: Any, ctx: Any) -> Budget:
        try:
            return budget_of(str(value))
        except UserError as error:
            self.fail(str(error), param, ctx)


class Numbers(click.ParamType):
    """A comma-separated list of numbers of one kind."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):  # a default
            return value
        try:
            numbers = tuple(self.kind(text) for text in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return numbers


class ShapeType(Numbers):
    """Channels, height and width of an image, typed as 3,32,32."""

    def __init__(self) -> None:
        super().__init__(int, "channels,height,width")

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        shape = super().convert(value, param, ctx)
        if len(shape) != 3 or min(shape) < 1:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return shape


class ArchitectureType(click.ParamType):
    """Layers in the grammar of architectures, or a name, which the shell completes."""

    name = "layers|name"

    def shell_complete(self, ctx: Any, param: Any, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in ARCHITECTURES if name.startswith(incomplete)]
