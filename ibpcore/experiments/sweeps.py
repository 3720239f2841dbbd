"""Sweeps: a grid of runs as data, its folder, and its execution."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from ibpcore.choices import SELECT
from ibpcore.distributed import SINGLE_PROCESS, Ranks, all_gather_object, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import remember_data_dir
from ibpcore.experiments.results import (
    Result,
    by_setting,
    read_result,
    result_row,
    setting_row,
    write_rows,
)
from ibpcore.experiments.run_folder import config_from, is_complete, saved_config
from ibpcore.experiments.workers import RUN_LENGTH, Workers, run_all
from ibpcore.io.files import read_json, write_atomic
from ibpcore.progress import Watch, unwatched
from ibpcore.training.config import TrainConfig, check_used, make_config
from ibpcore.training.run_files import CONFIG

SWEEP, RUNS = "sweep.json", "runs"
RESULTS_TABLE, SUMMARY_TABLE = "results.csv", "summary.csv"
SWEPT_SETTINGS = ("method", "kappa", "max_iterations", "schedule", "seed")
MOST_RUNS = 10_000
RUN_NAME = re.compile(r"\w[\w.+=-]{0,199}", re.ASCII)
"""Names of run folders: a single path component, and not `..`."""


@dataclass(frozen=True)
class Sweep:
    """Configurations of runs by name, and the part of the data, in `SELECT`, to choose by."""

    runs: dict[str, TrainConfig]
    select: str


def grid(
    dataset: str,
    methods: Sequence[str],
    *,
    kappas: Sequence[float | None] = (None,),
    seeds: Sequence[int] = (0,),
    max_iterations: Sequence[int | None] = (None,),
    schedules: Sequence[str | None] = (None,),
    **settings: Any,
) -> dict[str, TrainConfig]:
    """Every combination once, by name, sorted by seed.

    `standard` has neither kappa nor schedule, so there is one run per seed. `max_iterations`
    applies to adaptive methods only.

    Args:
        dataset, methods, seeds: see `TrainConfig`.
        kappas, max_iterations, schedules: None for the preset.
        settings: common to all runs.

    Raises:
        UserError: a value is invalid, or of a setting that none of the methods uses.
    """
    check_used(settings, methods)
    swept_over = (seeds, methods, kappas, max_iterations, schedules)
    if (count := math.prod(map(len, swept_over))) > MOST_RUNS:
        raise UserError(f"a sweep has at most {MOST_RUNS} runs, but this one has {count}")
    runs = {}
    for seed, method, kappa, limit, schedule in product(*swept_over):
        swept = {"kappa": kappa, "schedule": schedule} if method != "standard" else {}
        given = {name: value for name, value in swept.items() if value is not None}
        config = make_config(dataset, method, seed=seed, **settings, **given)
        if config.adaptive:
            config = replace(config, max_iterations=limit)
        runs[run_name(config)] = config
    return runs


def run_name(config: TrainConfig) -> str:
    """Such as `acert-kappa0.25-seed0`; unique within a sweep."""
    parts = [config.method, f"kappa{config.kappa:.10g}"]
    if config.max_iterations is not None:
        parts.append(f"iterations{config.max_iterations}")
    if config.schedule != "smoothed":
        parts.append(config.schedule)
    return "-".join([*parts, f"seed{config.seed}"])


def extended(old: Sweep, new: Sweep) -> Sweep:
    """`old` with the runs of `new` added.

    Raises:
        UserError: `new` changes `select`, or a setting that is not swept over.
    """
    changed = {name for run, config in new.runs.items() for name in _conflicts(old, run, config)}
    if old.select != new.select:
        changed = {"select"}
    if changed:
        names = ", ".join(sorted(changed))
        raise UserError(f"{names} changed since the sweep began: give the same, or a new folder")
    return Sweep({**old.runs, **new.runs}, old.select)


def _conflicts(old: Sweep, run: str, config: TrainConfig) -> set[str]:
    """The settings of `config` that differ from `old`, though the sweep does not vary them."""
    if run in old.runs:
        return _different(old.runs[run], config)
    others = [*old.runs.values()]
    alike = [other for other in others if other.method == config.method]
    other = (alike or others)[0]
    # A new method may differ from another one where their presets do.
    presets = (make_config(one.dataset, one.method) for one in (other, config))
    return _different(other, config) - _different(*presets) - set(SWEPT_SETTINGS)


def _different(a: TrainConfig, b: TrainConfig) -> set[str]:
    other = b.to_dict()
    return {name for name, value in a.to_dict().items() if value != other[name]}


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """Writes `sweep.json`: `select`, the settings common to all runs, and those of each run."""
    configs = {name: config.to_dict() for name, config in sweep.runs.items()}
    first, *others = configs.values()
    common = {k: v for k, v in first.items() if all(other[k] == v for other in others)}
    runs = {n: {k: v for k, v in c.items() if k not in common} for n, c in configs.items()}
    content = {"select": sweep.select, "common": common, "runs": runs}
    write_atomic(folder / SWEEP, (json.dumps(content, indent=2) + "\n").encode())


def read_sweep(folder: Path) -> Sweep:
    """Reads what `write_sweep` wrote.

    Raises:
        UserError: there is no sweep, or its file is damaged.
    """
    path = folder / SWEEP
    if not path.exists():
        raise UserError(f"there is no sweep in {folder}: {path} is missing")
    content = read_json(path)
    try:
        values = {name: content["common"] | own for name, own in content["runs"].items()}
        select = content["select"]
    except (LookupError, TypeError, AttributeError):
        raise UserError(f"{path} is damaged: it does not describe a sweep") from None
    runs = {name: config_from(own, path) for name, own in values.items()}
    if select not in SELECT or not runs or not all(map(RUN_NAME.fullmatch, runs)):
        raise UserError(f"{path} is damaged: it does not describe a sweep")
    return Sweep(runs, select)


def results_of(folder: Path, sweep: Sweep) -> dict[str, Result]:
    """The results of the complete runs, by name.

    Raises:
        UserError: the settings of a run differ from the sweep's, or a file is damaged.
    """
    results = {}
    for name, config in sweep.runs.items():
        run = folder / RUNS / name
        if not (run / CONFIG).exists():
            continue
        if changed := _different(saved_config(run), config):
            raise UserError(f"{run}: {', '.join(sorted(changed))} differ from {folder / SWEEP}")
        if is_complete(run, config):
            results[name] = read_result(run)
    return results


def run_sweep(
    sweep: Sweep,
    folder: Path,
    workers: Workers,
    *,
    ended: Callable[[str, Result | None, str], None],
    watch: Watch = unwatched,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, str]:
    """Executes all runs that are not complete; returns the reasons why runs failed, by name.

    Whole runs are distributed over the ranks. Rank 0 writes the tables after each; they contain
    the results of the other ranks once all ranks have finished.

    Args:
        folder: of the sweep, accessible to all ranks; interrupted runs are resumed.
        workers: the processes of each rank.
        ended: called on rank 0 with the name of each run that has ended, its result or None,
            and the reason why it failed or ""; for the runs of other ranks at the very end.
        watch: reports the progress of this rank's runs.
        ranks: the ranks that share the runs.

    Raises:
        UserError: see `results_of`.
        OSError: the folder cannot be written.
    """
    reasons: dict[str, str] = {}

    def begin() -> dict[str, Result]:
        results = results_of(folder, sweep)
        write_sweep(folder, sweep)
        remember_data_dir(folder, workers.data_dir, next(iter(sweep.runs.values())).dataset)
        _write_tables(folder, sweep, results, reasons)
        return results

    results = run_on_rank_zero(ranks, begin)
    missing = [name for name in sweep.runs if name not in results]
    jobs = {
        name: workers.job(sweep.runs[name], folder / RUNS / name)
        for name in missing[ranks.rank :: ranks.size]
    }

    def record(name: str, reason: str) -> None:
        try:
            if not reason:
                results[name] = read_result(jobs[name].run)
        except UserError as error:
            reason = str(error)
        if reason:
            reasons[name] = reason
        if ranks.first:
            _write_tables(folder, sweep, results, reasons)
            ended(name, results.get(name), reason)

    with watch("sweep", RUN_LENGTH * len(missing)) as advance:
        run_all(jobs.items(), workers.at_once, ended=record, advance=advance)
        for theirs, why in all_gather_object(ranks, (results, reasons)):
            results |= theirs
            reasons |= why

        def finish() -> None:
            _write_tables(folder, sweep, results, reasons)
            others = [name for name in missing if name not in jobs]
            for count, name in enumerate(others, len(jobs) + 1):
                ended(name, results.get(name), reasons.get(name, ""))
                if advance is not None:
                    advance(RUN_LENGTH * count, [name])

        run_on_rank_zero(ranks, finish)
    return reasons


def _write_tables(
    folder: Path, sweep: Sweep, results: dict[str, Result], reasons: dict[str, str]
) -> None:
    rows = [
        result_row(name, config, results.get(name), reasons.get(name, ""))
        for name, config in sweep.runs.items()
    ]
    write_rows(folder / RESULTS_TABLE, rows)
    complete = [results[name] for name in sweep.runs if name in results]
    write_rows(folder / SUMMARY_TABLE, [setting_row(setting) for setting in by_setting(complete)])
