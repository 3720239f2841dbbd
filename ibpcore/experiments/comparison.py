"""Comparison of runs: which can be compared, and the kappa chosen for each method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ibpcore.certification.formatting import radius_text
from ibpcore.certification.metrics import Point
from ibpcore.errors import UserError
from ibpcore.experiments.results import Result, Setting, by_setting, read_result
from ibpcore.experiments.searches.search import SEARCH, certified_results
from ibpcore.experiments.sweeps import SWEEP, read_sweep, results_of
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.visualization.plots.style import STYLES, Look, style_of
from ibpcore.wording import counted

PRESET = object()
"""Stands for the preset's value of a setting."""
SEARCH_SETTINGS = ("solver", "max_iterations", "candidates", "xtol", "rtol")
"""Settings without effect on a method whose radii are not adaptive."""
TEST_SET, VALIDATION_IMAGES = "the test set", "validation images"


@dataclass(frozen=True)
class Series:
    """A method with one variant of its settings, at one or several kappas: a line of a figure.

    Attributes:
        look: name and look in tables and figures.
        settings: one for each kappa, ascending.
        chosen: the setting with the highest ART on the images of `Section.chosen_on`.
    """

    look: Look
    settings: tuple[Setting, ...]
    chosen: Setting

    @property
    def shown(self) -> list[Setting]:
        """The settings that Table 1 shows: with the lowest kappa, and the chosen one."""
        return list(dict.fromkeys([self.settings[0], self.chosen]))

    @property
    def points(self) -> list[Point]:
        """`Setting.point` of each setting."""
        return [setting.point for setting in self.settings]


@dataclass(frozen=True)
class Section:
    """Runs that can be compared: of one data set and one epsilon_max.

    Attributes:
        title: of the data set.
        epsilon_max: in pixel units.
        series: in the order of tables and legends.
        chosen_on: names the images on which kappa is chosen.
        differing: settings that differ between runs without being part of a series' name.
        common: settings that differ from the presets in the same way for all runs.
    """

    title: str
    epsilon_max: float
    series: tuple[Series, ...]
    chosen_on: str
    differing: tuple[str, ...]
    common: dict[str, object]

    @property
    def every(self) -> list[tuple[Series, Setting]]:
        return [(series, setting) for series in self.series for setting in series.settings]

    @property
    def shown(self) -> list[tuple[Series, Setting]]:
        return [(series, setting) for series in self.series for setting in series.shown]


def read_all(paths: Iterable[Path]) -> tuple[list[Result], list[str]]:
    """Reads the results of runs, sweeps and searches, each once, for a report.

    Returns:
        the results, and a note on each sweep that is not complete, and on each search.

    Raises:
        UserError: a path is neither of them, a single run is not complete, or no run of the sweeps
            and searches is.
    """
    results: dict[Path, Result] = {}
    notes = []
    for path in paths:
        if (path / SWEEP).exists():
            sweep = read_sweep(path)
            found = list(results_of(path, sweep).values())
            if len(found) < len(sweep.runs):
                notes.append(f"{path}: {len(found)} of {counted(len(sweep.runs), 'run')} complete.")
        elif (path / SEARCH).exists():
            found = certified_results(path)
            notes.append(f"{path}: {counted(len(found), 'certified trial')}, of its front.")
        else:
            found = [read_result(path)]
        results |= {result.run.resolve(): result for result in found}
    if not results:
        raise UserError("no run is complete: there is nothing to report")
    return list(results.values()), notes


def sections(results: Iterable[Result]) -> list[Section]:
    """Groups results by data set and epsilon_max, and within those by method and variant."""
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
    groups = ([s for s in settings if s.config.method == method] for method in methods)
    series = tuple(one for group in groups for one in _series(group, measure))
    configs = [setting.config for setting in settings]
    changes = [unlike_preset(config) for config in configs]
    # The names of the series contain what varies within every method.
    named = set[str].intersection(
        *(_varying([c for c in configs if c.method == method]) for method in methods)
    )
    if len({config.method for config in configs if config.adaptive}) == 1:
        named |= set(SEARCH_SETTINGS)
    searching = [change for config, change in zip(configs, changes, strict=True) if config.adaptive]
    differing = {
        name
        for name in _varying(configs) - named - {"kappa", "seed"}
        if _varies(name, searching if name in SEARCH_SETTINGS else changes)
    }
    common = {name: value for name, value in changes[0].items() if not _varies(name, changes)}
    chosen_on = VALIDATION_IMAGES if held_out else TEST_SET
    return Section(title, epsilon_max, series, chosen_on, tuple(sorted(differing)), common)


def _varies(name: str, changes: Sequence[dict[str, object]]) -> bool:
    return len({change.get(name, PRESET) for change in changes}) > 1


def unlike_preset(config: TrainConfig) -> dict[str, object]:
    """The settings that differ from those of the preset of data set and method."""
    # The preset's warm-up scales with the number of epochs.
    scaled = make_config(config.dataset, config.method, epochs=config.epochs)
    epochs = make_config(config.dataset, config.method).epochs
    usual = {**scaled.to_dict(), "epochs": epochs}
    return {name: value for name, value in config.to_dict().items() if value != usual[name]}


def _series(settings: list[Setting], measure: str) -> list[Series]:
    """A series for each variant of one method, named by the settings unlike the preset's."""
    varying = sorted(_varying([s.config for s in settings]) - {"kappa", "seed"})
    variants: dict[str, list[Setting]] = {}
    for setting in settings:
        usual = make_config(setting.config.dataset, setting.config.method)
        given = {name: getattr(setting.config, name) for name in varying}
        named = [setting_text(n, v) for n, v in given.items() if v != getattr(usual, n)]
        label = ", ".join([style_of(setting.config.method).title, *named])
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
    """The names of the settings that are not the same for all."""
    return {
        field.name
        for field in fields(TrainConfig)
        if len({getattr(config, field.name) for config in configs}) > 1
    }


def setting_text(name: str, value: object) -> str:
    """A setting and its value for readers: "epsilon_max 8/255"."""
    if value is None:
        text = "none"
    elif isinstance(value, tuple):
        text = ":".join(map(str, value))
    elif isinstance(value, float):
        text = radius_text(value) if name == "epsilon_max" else f"{value:g}"
    else:
        text = str(value)
    return f"{name} {text}"
