"""What runs came to: their numbers, and the means over seeds."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import SUMMARY
from ibpcore.errors import UserError, printable
from ibpcore.experiments.run_folder import VALIDATION, is_complete, saved_config
from ibpcore.io.files import read_json, write_atomic
from ibpcore.training.config import TrainConfig

RUN_SETTINGS = (
    "dataset",
    "method",
    "kappa",
    "max_iterations",
    "schedule",
    "epsilon_max",
    "epochs",
)
"""The columns that say what a row is of; the seed comes on top."""
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Result:
    """A complete run.

    Attributes:
        run: its folder.
        config: how it was trained.
        title: of the data set that was really read.
        measures: fractions, and `training_seconds`; see `_measures`.
    """

    run: Path
    config: TrainConfig
    title: str
    measures: dict[str, float]


@dataclass(frozen=True, eq=False)
class Setting:
    """Runs that differ in their seeds alone.

    Attributes:
        config: of the first.
        results: at least one.
    """

    config: TrainConfig
    results: tuple[Result, ...]

    def mean(self, measure: str) -> float:
        """Over the seeds."""
        return statistics.fmean(result.measures[measure] for result in self.results)

    def std(self, measure: str) -> float | None:
        """Over the seeds, with n - 1; None of a single one."""
        values = [result.measures[measure] for result in self.results]
        return statistics.stdev(values) if len(values) > 1 else None


def read_result(run: Path) -> Result:
    """What a complete run came to.

    Raises:
        UserError: there is no run, it is not complete, or a file is damaged.
    """
    config = saved_config(run)
    if not is_complete(run, config):
        raise UserError(f"the run {run} is not complete")
    summary = read_json(run / SUMMARY)
    measures = _measures(summary, run / SUMMARY)
    if config.validation > 0:
        held_out = _measures(read_json(run / VALIDATION), run / VALIDATION)
        measures |= {f"validation_{name}": held_out[name] for name in ("accuracy", "acr", "art")}
    return Result(run, config, printable(str(summary.get("dataset"))), measures)


def _measures(summary: Any, path: Path) -> dict[str, float]:
    """`accuracy`, `acr`, `art`, `certified_RADIUS` for each standard radius, the seconds."""
    try:
        certified = summary["certified_accuracy"].items()
        measures = {name: float(summary[name]) for name in ("accuracy", "acr", "art")}
        measures |= {f"certified_{printable(radius)}": float(share) for radius, share in certified}
        if not all(0 <= share <= 1 for share in measures.values()):
            raise ValueError
        measures["training_seconds"] = float(summary["training_seconds"])
        if not 0 <= measures["training_seconds"] < math.inf:
            raise ValueError
    except (LookupError, TypeError, AttributeError, ValueError, OverflowError):
        raise UserError(f"{path} is damaged: it is no summary of a run") from None
    return measures


def by_setting(results: Iterable[Result]) -> list[Setting]:
    """The results in groups that differ in their seeds alone, each seed once, as they appear.

    Raises:
        UserError: the summaries of a group do not say the same things.
    """
    groups: dict[tuple[TrainConfig, str], dict[int, Result]] = {}
    for result in results:
        group = groups.setdefault((replace(result.config, seed=0), result.title), {})
        group.setdefault(result.config.seed, result)
        first = next(iter(group.values()))
        if first.measures.keys() != result.measures.keys():
            raise UserError(f"{result.run} is damaged: its summary differs from {first.run}'s")
    seeds = (tuple(group.values()) for group in groups.values())
    return [Setting(group[0].config, group) for group in seeds]


def result_row(name: str, config: TrainConfig, result: Result | None, reason: str) -> Row:
    """A row of `results.csv`; `result` is None of a run that is not complete."""
    row: Row = {"run": name, **{field: getattr(config, field) for field in RUN_SETTINGS}}
    row["seed"] = config.seed
    if result is not None:
        row |= result.measures
    row["status"] = "complete" if result else "failed" if reason else "pending"
    return row | {"reason": reason}


def setting_row(setting: Setting) -> Row:
    """A row of `summary.csv`: mean and standard deviation of each measure."""
    row: Row = {field: getattr(setting.config, field) for field in RUN_SETTINGS}
    row["seeds"] = len(setting.results)
    for measure in setting.results[0].measures:
        row[f"{measure}_mean"], row[f"{measure}_std"] = setting.mean(measure), setting.std(measure)
    return row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A table as CSV; a row need not have all columns."""
    columns = sorted(
        dict.fromkeys(column for row in rows for column in row),
        key=lambda column: column in ("status", "reason"),
    )
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())
