"""Runs side by side: what can be compared, and the kappa chosen for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ibpcore.certification.metrics import Point
from ibpcore.errors import UserError
from ibpcore.experiments.results import Result, Setting, by_setting, read_result
from ibpcore.experiments.sweeps import SWEEP, read_sweep, results_of
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.visualization.plots.style import STYLES, Look, style_of

PRESET = object()
OF_THE_SEARCH = ("solver", "max_iterations", "candidates", "xtol", "rtol", "bfloat16")
"""Settings that mean nothing to a method whose radii are not adaptive."""
TEST_SET, VALIDATION_IMAGES = "the test set", "validation images"


@dataclass(frozen=True)
class Series:
    """A method, with one variant of its other settings, at one kappa or several.

    Attributes:
        look: its name and looks.
        settings: by kappa.
        chosen: the one with the highest ART on the images that are chosen by.
    """

    look: Look
    settings: tuple[Setting, ...]
    chosen: Setting

    @property
    def shown(self) -> list[Setting]:
        """What Table 1 shows of it: the lowest kappa and the chosen one."""
        return list(dict.fromkeys([self.settings[0], self.chosen]))

    @property
    def points(self) -> list[Point]:
        return [point_of(setting) for setting in self.settings]


@dataclass(frozen=True)
class Section:
    """What can be compared: one data set, one epsilon_max.

    Attributes:
        chosen_on: what kappa is chosen on.
        differing: settings that are not the same for all, though no method asks for it.
        common: settings of all runs that are not those of the presets.
    """

    title: str
    epsilon_max: float
    series: tuple[Series, ...]
    chosen_on: str
    differing: tuple[str, ...]
    common: dict[str, object]


def read_all(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """The results of runs and sweeps, each once, and a line on each sweep with others missing.

    Raises:
        UserError: a path is neither, a run is not complete, or no run is.
    """
    results: dict[Path, Result] = {}
    notes = []
    for path in paths:
        if (path / SWEEP).exists():
            sweep = read_sweep(path)
            found = list(results_of(path, sweep).values())
            if len(found) < len(sweep.runs):
                notes.append(f"{path}: {len(found)} of {len(sweep.runs)} runs are complete.")
        else:
            found = [read_result(path)]
        results |= {result.run.resolve(): result for result in found}
    if not results:
        raise UserError("no run is complete: there is nothing to report")
    return list(results.values()), notes


def sections(results: Iterable[Result]) -> list[Section]:
    """The results, sorted for comparison."""
    groups: dict[tuple[str, float], list[Setting]] = {}
    for setting in by_setting(results):
        key = (setting.results[0].title, setting.config.epsilon_max)
        groups.setdefault(key, []).append(setting)
    return [_section(title, epsilon, group) for (title, epsilon), group in groups.items()]


def _section(title: str, epsilon_max: float, settings: list[Setting]) -> Section:
    held_out = all(setting.config.validation > 0 for setting in settings)
    measure = "validation_art" if held_out else "art"
    methods = sorted(
        {setting.config.method for setting in settings},
        key=lambda method: (method not in STYLES, [*STYLES, method].index(method)),
    )
    series = [
        one
        for method in methods
        for one in _series([s for s in settings if s.config.method == method], measure)
    ]
    configs = [setting.config for setting in settings]
    changes = [_changed(config) for config in configs]
    # What varies within every method is in the names of its series.
    named = set[str].intersection(
        *(_varying([c for c in configs if c.method == method]) for method in methods)
    )
    if len({config.method for config in configs if config.adaptive}) == 1:
        named |= set(OF_THE_SEARCH)
    searching = [change for config, change in zip(configs, changes, strict=True) if config.adaptive]
    differing = {
        name
        for name in _varying(configs) - named - {"kappa", "seed"}
        if _several(name, searching if name in OF_THE_SEARCH else changes)
    }
    common = {
        name: value
        for name, value in changes[0].items()
        if all(change.get(name, PRESET) == value for change in changes)
    }
    return Section(
        title,
        epsilon_max,
        tuple(series),
        VALIDATION_IMAGES if held_out else TEST_SET,
        tuple(sorted(differing)),
        common,
    )


def _several(name: str, changes: Sequence[dict[str, object]]) -> bool:
    return len({change.get(name, PRESET) for change in changes}) > 1


def _changed(config: TrainConfig) -> dict[str, object]:
    """Its settings that are not those of the presets."""
    # With other epochs, the warm-up of the preset is its share of them.
    scaled = make_config(config.dataset, config.method, epochs=config.epochs)
    epochs = make_config(config.dataset, config.method).epochs
    usual = {**scaled.to_dict(), "epochs": epochs}
    return {name: value for name, value in config.to_dict().items() if value != usual[name]}


def _series(settings: list[Setting], measure: str) -> list[Series]:
    """The settings of one method, one series for each variant of what is not its kappa.

    A variant is called by what is not of the presets, so the plain one by the method alone.
    """
    varying = sorted(_varying([s.config for s in settings]) - {"kappa", "seed"})
    variants: dict[str, list[Setting]] = {}
    for setting in settings:
        usual = make_config(setting.config.dataset, setting.config.method)
        given = {name: getattr(setting.config, name) for name in varying}
        said = [f"{n} {_plain(v)}" for n, v in given.items() if v != getattr(usual, n)]
        label = ", ".join([style_of(setting.config.method).title, *said])
        variants.setdefault(label, []).append(setting)
    return [
        Series(
            Look(label, group[0].config.method, variant),
            tuple(sorted(group, key=lambda setting: setting.config.kappa)),
            max(group, key=lambda setting: setting.mean(measure)),
        )
        for variant, (label, group) in enumerate(variants.items())
    ]


def _varying(configs: Sequence[TrainConfig]) -> set[str]:
    return {
        field.name
        for field in fields(TrainConfig)
        if len({getattr(config, field.name) for config in configs}) > 1
    }


def _plain(value: object) -> str:
    return "preset" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def point_of(setting: Setting) -> Point:
    """(ACR, accuracy), means over the seeds."""
    return setting.mean("acr"), setting.mean("accuracy")
