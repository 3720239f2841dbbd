"""Results of runs, their means over seeds, and their tables as CSV."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import SUMMARY
from ibpcore.certification.metrics import Point
from ibpcore.certification.summary import measures_of
from ibpcore.errors import REFUSED, UserError, printable
from ibpcore.experiments.run_folder import VALIDATION, is_complete, saved_config
from ibpcore.io.files import read_json, write_csv
from ibpcore.training.config import TrainConfig

SETTING_COLUMNS = (
    *("dataset", "method", "kappa", "max_iterations", "schedule", "epsilon_max", "epochs"),
)
"""Columns that identify the setting of a row, besides the seed."""


@dataclass(frozen=True, eq=False)
class Result:
    """The result of a complete run.

    Attributes:
        run: its folder.
        config: its training configuration.
        title: of the data set as it was found on disk.
        measures: `accuracy`, `acr`, `art` and `certified_RADIUS` for each standard radius as
            fractions, the first three also as `validation_...` if images were held out; and
            `training_seconds`.
    """

    run: Path
    config: TrainConfig
    title: str
    measures: dict[str, float]


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in their seed alone, which tables report as one mean.

    Attributes:
        config: of the first run.
        results: of at least one run.
    """

    config: TrainConfig
    results: tuple[Result, ...]

    @property
    def measures(self) -> list[str]:
        """The names of the measures that all runs have."""
        first, *others = (result.measures for result in self.results)
        return [name for name in first if all(name in other for other in others)]

    def mean(self, measure: str) -> float:
        """Mean over the seeds."""
        return statistics.fmean(result.measures[measure] for result in self.results)

    @property
    def point(self) -> Point:
        """(ACR, accuracy), fractions, means over the seeds."""
        return self.mean("acr"), self.mean("accuracy")

    def std(self, measure: str) -> float | None:
        """Sample standard deviation over the seeds; None for a single one."""
        values = [result.measures[measure] for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else None


def read_result(run: Path) -> Result:
    """Reads the result of a complete run from its folder.

    Raises:
        UserError: there is no run, it is not complete, or a file is damaged.
        OSError: a file exists but cannot be read.
    """
    config = saved_config(run)
    if not is_complete(run, config):
        raise UserError(f"the run {run} is not complete")
    summary = read_json(run / SUMMARY)
    measures = _summary_measures(summary, run / SUMMARY)
    if config.validation > 0:
        held_out = _summary_measures(read_json(run / VALIDATION), run / VALIDATION)
        measures |= {f"validation_{name}": held_out[name] for name in ("accuracy", "acr", "art")}
    return Result(run, config, printable(str(summary.get("dataset"))), measures)


def _summary_measures(summary: Any, path: Path) -> dict[str, float]:
    """`Result.measures` of one part of the data set, from its summary, read from `path`."""
    measures = measures_of(summary, path)
    try:
        measures["training_seconds"] = float(summary["training_seconds"])
        if not 0 <= measures["training_seconds"] < math.inf:
            raise ValueError
    except REFUSED:
        raise UserError(f"{path} is damaged: it is not a summary of a run") from None
    return measures


def by_setting(results: Iterable[Result]) -> list[Setting]:
    """Groups results that differ in seed and in what is chosen by sizes alone.

    They are in order of appearance. Each seed counts once.
    """
    groups: dict[tuple[TrainConfig, str], dict[int, Result]] = {}
    for result in results:
        config = result.config
        alike = replace(config, seed=0, threads=None, accumulate=None, compile="auto")
        group = groups.setdefault((alike, result.title), {})
        group.setdefault(result.config.seed, result)
    seeds = (tuple(group.values()) for group in groups.values())
    return [Setting(group[0].config, group) for group in seeds]


def result_row(
    name: str, config: TrainConfig, result: Result | None, reason: str
) -> dict[str, Any]:
    """The row of a run in `results.csv`, by column.

    `result` is None if the run is not complete, `reason` why it failed, or empty.
    """
    status = "complete" if result else "failed" if reason else "pending"
    setting = {field: getattr(config, field) for field in (*SETTING_COLUMNS, "seed")}
    measures = result.measures if result else {}
    return {"run": name, **setting, **measures, "status": status, "reason": reason}


def setting_row(setting: Setting) -> dict[str, Any]:
    """The row of a setting in `summary.csv`: mean and standard deviation of each measure."""
    row = {field: getattr(setting.config, field) for field in SETTING_COLUMNS}
    row["seeds"] = len(setting.results)
    for measure in setting.measures:
        row[f"{measure}_mean"], row[f"{measure}_std"] = setting.mean(measure), setting.std(measure)
    return row


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes rows as CSV, cells empty where a row lacks a column.

    Raises:
        OSError: the file cannot be written.
    """
    columns = sorted(
        dict.fromkeys(column for row in rows for column in row),
        key=lambda column: column in ("status", "reason"),
    )
    write_csv(path, columns, rows)
