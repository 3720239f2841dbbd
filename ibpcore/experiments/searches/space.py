"""The space of a search: which settings of a run vary, over which values, for which methods."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import floor
from typing import Any

from ibpcore.errors import UserError
from ibpcore.training.config import (
    LEFT_OUT,
    TrainConfig,
    check_names,
    is_finite,
    kinds_of,
    make_config,
    value_in_file,
)
from ibpcore.training.presets import BOUNDED, ONLY_FOR

METHOD, WARMUP_SHARE = "method", "warmup_share"
"""The method is a setting of the search if there are several; the share of the epochs that the
warm-up takes stands for `warmup`."""
DEFAULTS = "defaults"
"""The entry of a file that leaves out the settings of `DEFAULT_SPACE`, if it is false."""
ZERO_SHARE = 0.25
"""Share of a logarithmic range that stands for 0, where 0 is allowed."""
INSTEAD = {
    METHOD: "give --methods",
    "warmup": f"give {WARMUP_SHARE}, the share of the epochs",
    **dict.fromkeys(
        (
            *("dataset", "epsilon_max", "claim", "seed", "model", "start", "extended_at"),
            *("validation", "limit_train", "limit_test", "image_size", "measure_every"),
            *("inspect_every", "threads", "accumulate", "compile"),
            "learning_rate_drops",
        ),
        "it is the same for all trials",
    ),
}
"""What is not searched, and what to do instead."""

DEFAULT_SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
    "batch_size": [32, 64, 128, 256],
    "kappa": {"low": 0.0, "high": 1.0},
    "initial_kappa": {"low": 0.0, "high": 1.0},
    WARMUP_SHARE: {"low": 0.1, "high": 0.7},
    "regularizer": {"low": 0.0, "high": 1.0},
    "l1": {"low": 1e-7, "high": 1e-3, "log": True, "zero": True},
    "weight_decay": {"low": 1e-5, "high": 1e-1, "log": True, "zero": True},
    "beta2": [0.999, 0.99, 0.95, 0.9],
    "train_epsilon_factor": {"low": 1.0, "high": 1.5},
    "box_size": {"low": 0.1, "high": 1.0},
    "relu_shrinkage": {"low": 0.0, "high": 0.9},
    "ibp_weight": {"low": 0.005, "high": 1.0, "log": True},
    "attack_scale": {"low": 1.0, "high": 3.0},
    "taps_weight": {"low": 1.0, "high": 10.0, "log": True},
}
"""In the form of a file. It leaves out settings that change the cost of a run more than its
result: the bound, the solver, the size of the network, the steps of attacks. Of the range of
`train_epsilon_factor` only that part is searched at which no radius is above 1."""
USED_BY = {"kappa": BOUNDED, **ONLY_FOR}
"""Methods that search a setting, if not all do: kappa is always 1 for `standard`."""


@dataclass(frozen=True)
class Choice:
    """Some values of a setting; a single one is fixed."""

    values: tuple[Any, ...]

    @property
    def ends(self) -> tuple[Any, ...]:
        """Values to be checked, all of which are allowed if these are."""
        return self.values

    def nearest(self, value: Any) -> Any:
        """The value that is closest to a setting, the first one if none can be compared."""
        if value in self.values:
            return value
        numbers = [v for v in self.values if type(v) in (int, float)]
        if type(value) not in (int, float) or not numbers:
            return self.values[0]
        return min(numbers, key=lambda v: abs(v - value))

    def setting(self, point: Any) -> Any:
        return point

    def written(self) -> Any:
        """As in a file."""
        texts = [LEFT_OUT if value is None else value for value in self.values]
        return texts[0] if len(texts) == 1 else texts

    def __str__(self) -> str:
        return ", ".join(_text(value) for value in self.values)


@dataclass(frozen=True)
class Range:
    """The numbers between two, both included.

    Attributes:
        low, high: the ends.
        log: whether the logarithm is uniform.
        zero: whether 0 is allowed beside a logarithmic range. The lowest part of a wider range,
            `ZERO_SHARE` of it, then stands for 0.
        whole: whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    zero: bool = False
    whole: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        return (self.low, self.high, *([0.0] if self.zero else []))

    @property
    def lowest(self) -> float:
        """The lowest point, see `setting`."""
        if not self.zero:
            return self.low
        return self.low * (self.low / self.high) ** (ZERO_SHARE / (1 - ZERO_SHARE))

    def nearest(self, value: Any) -> Any:
        """The point that is closest to a setting."""
        number = self.low if value is None else value
        if self.zero and number < self.low / 2:
            return self.lowest
        return min(max(number, self.low), self.high)

    def setting(self, point: Any) -> Any:
        """The setting that a point of the search stands for."""
        return 0.0 if self.zero and point < self.low else point

    def written(self) -> Any:
        flags = {name: True for name in ("log", "zero") if getattr(self, name)}
        return {"low": self.low, "high": self.high, **flags}

    def __str__(self) -> str:
        zero, log = "0 or " * self.zero, ", logarithmic" * self.log
        return f"{zero}{_text(self.low)} to {_text(self.high)}{log}"


Domain = Choice | Range
Space = Mapping[str, Domain]
"""The domain of each setting, by its name in `TrainConfig`, or `WARMUP_SHARE`."""


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return LEFT_OUT if value is None else str(value)


def default_space(epsilon_max: float) -> dict[str, Any]:
    """`DEFAULT_SPACE` without radii above 1."""
    most = min(DEFAULT_SPACE["train_epsilon_factor"]["high"], floor(100 / epsilon_max) / 100)
    factor = {"low": 1.0, "high": most} if most > 1 else 1.0
    return {**DEFAULT_SPACE, "train_epsilon_factor": factor}


def space_of(
    values: Any, given: Sequence[str] = (), defaults: Mapping[str, Any] = DEFAULT_SPACE
) -> Space:
    """The space that a file describes.

    An entry is a range, `{low = 1e-4, high = 1e-2, log = true}`, a list of choices, or one fixed
    value. Other settings keep their `defaults`, but with `defaults = false` there are none.

    Args:
        values: what was read from the file; {} without one.
        given: settings that the command line fixes, which are not searched.
        defaults: `DEFAULT_SPACE`, or `default_space` of a large radius.

    Raises:
        UserError: an entry is malformed, or its setting cannot be searched; the message names it.
    """
    if not isinstance(values, dict):
        raise UserError("it holds no named settings")
    own = {name: entry for name, entry in values.items() if name != DEFAULTS}
    with_defaults = values.get(DEFAULTS, True)
    if not isinstance(with_defaults, bool):
        raise UserError(f"{DEFAULTS} must be true or false, but is {with_defaults!r}")
    for name in own:
        if name in INSTEAD:
            raise UserError(f"{name} is not searched: {INSTEAD[name]}")
        if name in given:
            raise UserError(f"{name} stands in the command line too: give it once")
    check_names(name for name in own if name != WARMUP_SHARE)
    entries = {n: e for n, e in defaults.items() if with_defaults and n not in given} | own
    space = {name: _domain(name, entry) for name, entry in entries.items()}
    for share in space[WARMUP_SHARE].ends if WARMUP_SHARE in space else ():
        if not (type(share) in (int, float) and 0 < share <= 1):
            raise UserError(f"{WARMUP_SHARE} must be above 0 and at most 1, but is {share!r}")
    return space


def _domain(name: str, entry: Any) -> Domain:
    kinds = (float,) if name == WARMUP_SHARE else kinds_of(name)
    if isinstance(entry, dict):
        return _range(name, entry, kinds)
    listed = entry if isinstance(entry, list) else [entry]
    values = tuple(v if name == WARMUP_SHARE else value_in_file(name, v) for v in listed)
    if not values or any(isinstance(value, list | dict) for value in values):
        raise UserError(f"{name} must be a value, a list of values, or a range")
    if len({(type(value), value) for value in values}) < len(values):
        raise UserError(f"{name} has a value twice")
    return Choice(values)


def _range(name: str, entry: dict[str, Any], kinds: tuple[type, ...]) -> Range:
    if int not in kinds and float not in kinds:
        raise UserError(f"{name} is no number: give a list of its values, not a range")
    unknown = entry.keys() - {"low", "high", "log", "zero"}
    if unknown or not {"low", "high"} <= entry.keys():
        wrong = (
            f"not {', '.join(map(str, sorted(unknown)))}" if unknown else "of which one is missing"
        )
        raise UserError(f"{name}: a range has low and high, and may have log and zero, {wrong}")
    whole = float not in kinds
    for end in ("low", "high"):
        number, kind = entry[end], "a whole number" if whole else "a finite number"
        good = type(number) in ((int,) if whole else (int, float)) and is_finite(number)
        if not good:
            raise UserError(f"{name}: {end} must be {kind}, but is {number!r}")
    for flag in ("log", "zero"):
        if not isinstance(entry.get(flag, False), bool):
            raise UserError(f"{name}: {flag} must be true or false, but is {entry[flag]!r}")
    low, high = entry["low"], entry["high"]
    found = Range(low, high, entry.get("log", False), entry.get("zero", False), whole)
    if not low < high:
        raise UserError(f"{name}: low must be below high")
    if found.log and low <= 0:
        raise UserError(f"{name}: low must be above 0 in a logarithmic range")
    if found.zero and (whole or not found.log):
        raise UserError(f"{name}: zero is for logarithmic ranges; others may begin at 0")
    return found


def written(space: Space) -> dict[str, Any]:
    """The content of a file that describes this space, and no other settings."""
    return {DEFAULTS: False, **{name: domain.written() for name, domain in space.items()}}


def searched(space: Space, method: str) -> dict[str, Domain]:
    """The part of the space that a method uses."""
    return {
        name: domain for name, domain in space.items() if method in USED_BY.get(name, (method,))
    }


def used(space: Space, methods: Sequence[str], own: Iterable[str]) -> Space:
    """The part of the space that at least one of the methods uses.

    Raises:
        UserError: it leaves out a setting that is among the user's `own`.
    """
    found = {name: domain for method in methods for name, domain in searched(space, method).items()}
    for name in own:
        if name in space and name not in found:
            raise UserError(f"{name} is not for {', '.join(methods)}")
    return {name: domain for name, domain in space.items() if name in found}


@dataclass(frozen=True)
class Problem:
    """What is searched: the settings common to all runs, and the space of the others.

    Attributes:
        dataset: a name in `ibpcore.data.sources.DATASETS`.
        methods: at least one.
        common: settings of all runs, by their names in `TrainConfig`.
        space: of the other settings.
    """

    dataset: str
    methods: tuple[str, ...]
    common: Mapping[str, Any]
    space: Space

    def config(self, point: Mapping[str, Any]) -> TrainConfig:
        """The configuration of a run at a point of the space; {} for the preset.

        Raises:
            UserError: a value is not allowed.
        """
        method = point.get(METHOD, self.methods[0])
        domains = searched(self.space, method)
        chosen = {n: domains[n].setting(p) for n, p in point.items() if n != METHOD}
        settings = {**self.common, **_fixed(domains), **chosen}
        share = settings.pop(WARMUP_SHARE, None)
        if share is not None:
            epochs = make_config(self.dataset, method, **settings).epochs
            settings["warmup"] = (1, max(1, round(share * epochs)))
        return make_config(self.dataset, method, **settings)

    def largest(self, method: str) -> TrainConfig:
        """The preset of a method with the largest batches of the space."""
        sizes = self.free(method).get("batch_size", Choice(())).ends
        return self.config({METHOD: method, **({"batch_size": max(sizes)} if sizes else {})})

    def free(self, method: str) -> dict[str, Domain]:
        """The domains that a run of this method chooses from, without fixed settings."""
        domains = searched(self.space, method)
        return {n: d for n, d in domains.items() if n not in _fixed(domains)}

    @property
    def varies(self) -> bool:
        """Whether two trials can differ."""
        return len(self.methods) > 1 or bool(self.free(self.methods[0]))

    def preset(self, method: str) -> dict[str, Any]:
        """The point of the space that is closest to the preset of a method."""
        config = self.config({METHOD: method})
        usual = config.to_dict()
        usual[WARMUP_SHARE] = config.warmup[1] / config.epochs
        if usual["initial_kappa"] is None:
            usual["initial_kappa"] = config.kappa
        point = {n: domain.nearest(usual[n]) for n, domain in self.free(method).items()}
        return point | ({METHOD: method} if len(self.methods) > 1 else {})

    def check(self) -> None:
        """Raises UserError if a value in the space, or two of them together, are not allowed.

        Every rule of `TrainConfig` is one of a value or of two, so all points are allowed then.
        """
        for method in self.methods:
            self.config({METHOD: method})
            values = [*self._extremes(method)]
            for name, value in values:
                self.config({METHOD: method, name: value})
            for (name, value), (other, its_value) in combinations(values, 2):
                if name != other:
                    self._check_together(method, {name: value, other: its_value})

    def _check_together(self, method: str, values: Mapping[str, Any]) -> None:
        try:
            self.config({METHOD: method, **values})
        except UserError as error:
            named = " and ".join(f"{name} = {_text(value)}" for name, value in values.items())
            raise UserError(f"{named} cannot be searched together: {error}") from None

    def _extremes(self, method: str) -> Iterator[tuple[str, Any]]:
        for name, domain in self.free(method).items():
            for value in domain.ends:
                yield name, value


def _fixed(domains: Space) -> dict[str, Any]:
    """The settings that have a single value."""
    single = {n: d for n, d in domains.items() if isinstance(d, Choice) and len(d.values) == 1}
    return {name: domain.values[0] for name, domain in single.items()}
