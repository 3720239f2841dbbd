"""Report on runs: the tables and figures of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibpcore.certification.certificates import CERTIFICATES, read_radii
from ibpcore.certification.formatting import as_text, radius_text
from ibpcore.certification.metrics import accuracy_at, common_levels, hypervolume, pareto_front
from ibpcore.certification.summary import check_radii
from ibpcore.experiments.comparison import Section, Series, sections, setting_text
from ibpcore.experiments.results import Result, Setting, setting_row, write_rows
from ibpcore.io.files import write_atomic
from ibpcore.visualization.plots.cost import write_cost
from ibpcore.visualization.plots.curves import write_curves
from ibpcore.visualization.plots.style import Look, figures_possible
from ibpcore.visualization.plots.tradeoff import Tradeoff, write_tradeoff

FEWEST_COSTS = 3
"""Methods from which on their times are drawn: two are better read in the table."""


def _key(section: Section) -> str:
    """What the main table shows, without what does not occur in it."""
    seeds = any(len(setting.results) > 1 for _, setting in section.every)
    return (
        "Percent, on the test set"
        + "; mean ± standard deviation over the seeds" * seeds
        + "."
        + f" † κ with the highest ART on {section.chosen_on}, of those tried." * _is_chosen(section)
    )


def _is_chosen(section: Section) -> bool:
    """Whether a method has several settings, of which one is chosen."""
    return any(len(series.settings) > 1 for series in section.series)


def report(results: Sequence[Result], notes: Sequence[str]) -> str:
    """All tables as Markdown, to be printed and written, after the `notes`, one a paragraph."""
    parts = ["# Report", *notes]
    for section in sections(results):
        parts += [
            f"## {_title(section)}",
            markdown_table(*main_table(section)),
            _key(section),
        ]
        if section.common:
            said = ", ".join(setting_text(*setting) for setting in section.common.items())
            parts.append(f"Unlike the presets, in all runs: {said}.")
        if section.differing:
            parts.append(f"Not the same for all: {', '.join(section.differing)}.")
        tables = front_table(section), cost_table(section)
        parts += [markdown_table(*table) for table in tables]
        if len(section.every) > len(section.shown):
            parts += ["All settings:", markdown_table(*_accuracies(section, section.every))]
    return "\n\n".join(parts) + "\n"


Table = tuple[list[str], list[list[str]]]
"""Heads and rows."""


def main_table(section: Section) -> Table:
    """Accuracy, ACR and ART of each method (Table 1)."""
    return _accuracies(section, section.shown)


def _accuracies(section: Section, settings: list[tuple[Series, Setting]]) -> Table:
    head = ["Data set", "ε_max", "Method", "κ", "Acc", "ACR", "ART", "seeds"]
    rows = [
        [
            section.title,
            radius_text(section.epsilon_max),
            series.look.label,
            _kappa(series, setting),
            *(mean_and_std(setting, measure) for measure in ("accuracy", "acr", "art")),
            str(len(setting.results)),
        ]
        for series, setting in settings
    ]
    return head, rows


def front_table(section: Section) -> Table:
    """Quality of the whole Pareto front of each method, over all its kappas."""
    levels = common_levels([pareto_front(series.points) for series in section.series])
    head = ["Method", "ART of †" if _is_chosen(section) else "ART", "hypervolume"]
    head += [f"Acc at ACR {100 * level:.2f}" for level in levels]
    rows = []
    for series in section.series:
        row = [series.look.label, mean_and_std(series.chosen, "art")]
        row.append(f"{hypervolume(series.points):.4f}")
        for level in levels:
            accuracy = accuracy_at(series.points, level)
            row.append("-" if accuracy is None else f"{100 * accuracy:.2f}")
        rows.append(row)
    return head, rows


def cost_table(section: Section) -> Table:
    """Certified accuracies at the standard radii (Table 7), and training times (Table 6)."""
    first, *others = [setting.measures for _, setting in section.every]
    radii = [n for n in first if n.startswith("certified_") and all(n in m for m in others)]
    head = ["Method", "κ", *(f"at {name.removeprefix('certified_')}" for name in radii)]
    head += ["training, s"]
    rows = [
        [
            series.look.label,
            _kappa(series, setting),
            *(mean_and_std(setting, name) for name in radii),
            f"{setting.mean('training_seconds'):.1f}",
        ]
        for series, setting in section.shown
    ]
    return head, rows


def _kappa(series: Series, setting: Setting) -> str:
    chosen = setting is series.chosen and len(series.settings) > 1
    return f"{setting.config.kappa:.4g}" + " †" * chosen


def mean_and_std(setting: Setting, measure: str) -> str:
    """A measure in percent: "62.21", or "61.64 ± 0.34" over several seeds."""
    mean, std = setting.mean(measure), setting.std(measure)
    return f"{100 * mean:.2f}" + ("" if std is None else f" ± {100 * std:.2f}")


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def write_report(
    folder: Path, results: Sequence[Result], notes: Sequence[str], kappa_zero: bool = False
) -> None:
    """Writes `report.md`, `table.csv` and, if matplotlib is installed, the figures.

    Args:
        folder: for the files.
        results: of the runs.
        notes: see `report`.
        kappa_zero: see `drawn`.

    Raises:
        UserError: the certificates of a run are damaged.
        OSError: the folder cannot be written.
    """
    every = sections(results)
    # Read before anything is written, since the files may be damaged.
    figures = [drawn(section, kappa_zero) for section in every] if figures_possible() else []
    lines = [[(look, s.mean("accuracy"), pooled_radii(s)) for look, s in one] for one in figures]
    rows: list[dict[str, Any]] = []
    for section in every:
        for series, setting in section.every:
            title = {"title": section.title, "series": series.look.label}
            chosen = {"chosen": "yes" if setting is series.chosen else "no"}
            settings = setting.config.to_dict()
            del settings["seed"]
            rows.append(title | setting_row(setting) | chosen | settings)
    write_rows(folder / "table.csv", rows)
    write_atomic(folder / "report.md", report(results, notes).encode())
    for number, section in enumerate(every[: len(figures)]):
        suffix = f"-{number + 1}" if len(every) > 1 else ""
        write_figures(folder, section, figures[number], lines[number], suffix)


Drawn = tuple[Look, Setting]
"""Look and setting of a series in the figures that show one setting of each."""
Curve = tuple[Look, float, Tensor]
"""Look, accuracy (a fraction) and (N,) certified radii, in pixel units."""


def drawn(section: Section, kappa_zero: bool = False) -> list[Drawn]:
    """The setting of each series that the curves (Fig. 3) and the cost (Fig. 2) show.

    It is the chosen one or, with `kappa_zero`, the one without standard loss if there is one,
    as in the paper.
    """
    pairs = []
    for series in section.series:
        first = series.settings[0]
        setting = first if kappa_zero and first.config.kappa == 0 else series.chosen
        label = f"{series.look.label}, κ = {_kappa(series, setting)}"
        pairs.append((series.look._replace(label=label), setting))
    return pairs


def write_figures(
    folder: Path, section: Section, pairs: Sequence[Drawn], lines: Sequence[Curve], suffix: str
) -> None:
    """Writes `certified_accuracy`, and of enough runs `tradeoff` and `cost`.

    Args:
        folder: for the files.
        section: of the report.
        pairs: its `drawn` settings.
        lines: their curves.
        suffix: appended to the names of the files.

    Raises:
        UserError: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    title = _title(section)
    note = f"† chosen on {section.chosen_on}" if any("†" in look.label for look, _ in pairs) else ""
    path = folder / f"certified_accuracy{suffix}"
    write_curves(path, lines, section.epsilon_max, title, note)
    if len(section.every) > 1:
        tradeoffs = [_tradeoff(series) for series in section.series]
        write_tradeoff(folder / f"tradeoff{suffix}", tradeoffs, section.chosen_on, title)
    if len(pairs) >= FEWEST_COSTS:
        costs = [(look, s.mean("training_seconds"), s.mean("art")) for look, s in pairs]
        write_cost(folder / f"cost{suffix}", costs, title, note)


def _title(section: Section) -> str:
    return f"{section.title}, ε_max {as_text(section.epsilon_max)}"


def _tradeoff(series: Series) -> Tradeoff:
    labels = [f"κ {setting.config.kappa:.4g}" for setting in series.settings]
    chosen = series.chosen.point if len(series.settings) > 1 else None
    return Tradeoff(series.look, series.points, labels, chosen)


def pooled_radii(setting: Setting) -> Tensor:
    """(N,) float64 certified radii of the test images of all seeds, in pixel units.

    Raises:
        UserError: the certificates of a run are damaged.
    """
    return torch.cat([_checked_radii(result) for result in setting.results])


def _checked_radii(result: Result) -> Tensor:
    """(N,) float64, of one run, if their ACR is that of the summary."""
    path = result.run / CERTIFICATES
    radii = read_radii(path)
    check_radii(radii, result.config.epsilon_max, result.measures["acr"], path)
    return radii
