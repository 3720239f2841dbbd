"""Markdown tables of the results, beside those of the paper."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.paper.plan import CUSTOMARY, TIGHTER, Row, named_runs
from ibpcore.experiments.reports import mean_and_std
from ibpcore.experiments.results import Result, Setting, by_setting

HEADS = {
    "table1": "Standard, average and combined robustness of the methods",
    "table2": "Without a schedule of epsilon",
    "table5": "Mean and standard deviation over seeds",
    "table6": "Iterations of the root finder against cost",
    "table7": "Certified accuracy at a customary radius",
}
CERTIFYING = ("table1", "table7")
"""Tables that give certified accuracies, in the columns `CERTIFIED`."""
CERTIFIED = ["radius", "certified by ibp", f"certified by {TIGHTER}"]


def chosen(row: Row, dataset: str, size: str, results: Mapping[str, Result]) -> Setting | None:
    """The setting of a row with the highest ART on held-out images; None if runs are missing."""
    names = named_runs(row, dataset, size)
    if any(name not in results for name in names):
        return None
    settings = by_setting(results[name] for name in names)
    return max(settings, key=lambda setting: setting.mean("validation_art"))


def _certified(setting: Setting) -> list[str]:
    """The cells of the columns `CERTIFIED`."""
    radius = CUSTOMARY[setting.config.dataset]
    measured = all(TIGHTER in result.measures for result in setting.results)
    tighter = mean_and_std(setting, TIGHTER) if measured else "-"
    return [radius, mean_and_std(setting, f"certified_{radius}"), tighter]


def table(name: str, rows: Mapping[Row, Setting | None]) -> list[str]:
    """The lines of a table.

    Args:
        rows: the results of each row; None if they are missing.
    """
    timed, certified = name == "table6", name in CERTIFYING
    columns = ["method", "κ", "accuracy", "ACR", "ART"]
    columns += ["training, s", "/ FastIBP"] * timed + CERTIFIED * certified
    columns += ["runs", "paper (accuracy / ACR / ART)"]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    first = next((s for s in rows.values() if s is not None), None)
    for row, setting in rows.items():
        if setting is None:
            lines.append(f"| {row.label} | not run |" + " |" * (len(columns) - 2))
            continue
        tuned = " (chosen)" if row.kappas else ""
        cells = [row.label, f"{setting.config.kappa:g}{tuned}"]
        cells += [mean_and_std(setting, measure) for measure in ("accuracy", "acr", "art")]
        if timed and first is not None:
            seconds = setting.mean("training_seconds")
            cells += [f"{seconds:.0f}", f"{seconds / first.mean('training_seconds'):.2f}"]
        if certified:
            cells += _certified(setting)
        cells += [str(len(setting.results)), row.paper]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
