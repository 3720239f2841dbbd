"""A sweep: a grid of runs as data, its folder, and its carrying out."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from ibpcore.distributed import SINGLE_PROCESS, Ranks, all_gather_object, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.experiments.results import (
    Result,
    by_setting,
    read_result,
    result_row,
    setting_row,
    write_rows,
)
from ibpcore.experiments.run_folder import config_from, is_complete, saved_config
from ibpcore.experiments.workers import Job, run_all
from ibpcore.io.files import read_json, write_atomic
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loop import CONFIG

SWEEP, RUNS = "sweep.json", "runs"
RESULTS, SUMMARY = "results.csv", "summary.csv"
SWEPT = ("method", "kappa", "max_iterations", "schedule", "seed")
SELECT = ("validation", "test")
MOST_RUNS = 10_000
RUN_NAME = re.compile(r"\w[\w.+=-]{0,199}", re.ASCII)
"""Of folders: no path of several parts, and no `..`."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep consists of.

    Attributes:
        runs: configurations by name.
        select: what the best of them is chosen by, the "validation" or the "test" images.
    """

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
    """Every combination once, by its name; one seed after the other.

    `standard` has neither kappa nor schedule: it is there once a seed. `max_iterations`
    goes to those that seek radii, the adaptive ones; the others are there once.

    Args:
        dataset, methods: see `TrainConfig`, as for the rest.
        kappas, max_iterations, schedules: None for the preset.
        settings: of all runs.

    Raises:
        UserError: a value is not allowed.
    """
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
    """Such as `acert-kappa0.25-seed0`; other runs of a sweep have other names."""
    parts = [config.method, f"kappa{config.kappa:.10g}"]
    if config.max_iterations is not None:
        parts.append(f"iterations{config.max_iterations}")
    if config.schedule != "smoothed":
        parts.append(config.schedule)
    return "-".join([*parts, f"seed{config.seed}"])


def extended(old: Sweep, new: Sweep) -> Sweep:
    """`old` with the runs of `new` as well.

    Raises:
        UserError: `new` changes a setting that is not swept over, or the selection.
    """
    changed = {name for run, config in new.runs.items() for name in _changed(old, run, config)}
    if old.select != new.select:
        changed = {"select"}
    if changed:
        names = ", ".join(sorted(changed))
        raise UserError(f"{names} changed since the sweep began: give the same, or a new folder")
    return Sweep({**old.runs, **new.runs}, old.select)


def _changed(old: Sweep, run: str, config: TrainConfig) -> set[str]:
    """What `config` has otherwise than `old`, though the sweep does not vary it."""
    if run in old.runs:
        return _different(old.runs[run], config)
    others = [*old.runs.values()]
    alike = [other for other in others if other.method == config.method]
    other = (alike or others)[0]
    # A method that is new may differ from another as their presets do.
    presets = (make_config(one.dataset, one.method) for one in (other, config))
    return _different(other, config) - _different(*presets) - set(SWEPT)


def _different(a: TrainConfig, b: TrainConfig) -> set[str]:
    other = b.to_dict()
    return {name for name, value in a.to_dict().items() if value != other[name]}


def write_sweep(folder: Path, sweep: Sweep) -> None:
    """`sweep.json`: the selection, what the runs have in common, and what each has not."""
    configs = {name: config.to_dict() for name, config in sweep.runs.items()}
    first, *others = configs.values()
    common = {k: v for k, v in first.items() if all(other[k] == v for other in others)}
    runs = {
        name: {k: v for k, v in values.items() if k not in common}
        for name, values in configs.items()
    }
    content = {"select": sweep.select, "common": common, "runs": runs}
    write_atomic(folder / SWEEP, (json.dumps(content, indent=2) + "\n").encode())


def read_sweep(folder: Path) -> Sweep:
    """What `write_sweep` wrote.

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
        raise UserError(f"{path} is damaged: it describes no sweep") from None
    runs = {name: config_from(own, path) for name, own in values.items()}
    if select not in SELECT or not runs or not all(map(RUN_NAME.fullmatch, runs)):
        raise UserError(f"{path} is damaged: it describes no sweep")
    return Sweep(runs, select)


def results_of(folder: Path, sweep: Sweep) -> dict[str, Result]:
    """Of the runs that are complete, by name.

    Raises:
        UserError: a run has other settings than the sweep, or a damaged file.
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


def carry_out(
    sweep: Sweep,
    folder: Path,
    *,
    data_dir: Path,
    device: str,
    at_once: int,
    ended: Callable[[str, Result | None, str], None],
    advanced: Callable[[str, float], None],
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, str]:
    """Does all runs that are not complete, and keeps the tables up to date after each.

    Among ranks, whole runs are dealt: each trains and certifies by one rank alone. Rank 0
    writes the tables; what the others did is in them when all have come to their end.

    Args:
        folder: of the sweep, which all ranks see; what was begun there is resumed.
        data_dir, device: see `ibpcore.experiments.workers.Job`.
        at_once: runs of a rank at a time, which share the threads of torch.
        ended: is told each run that ended, with its result or why there is none; of other
            ranks in the end, and on rank 0 alone.
        advanced: see `ibpcore.experiments.workers.run_all`; of the rank's own runs.
        ranks: among which the runs are dealt.

    Returns:
        why runs failed, by name.

    Raises:
        UserError: see `results_of`.
        OSError: the folder cannot be written.
    """
    reasons: dict[str, str] = {}

    def begun() -> dict[str, Result]:
        results = results_of(folder, sweep)
        write_sweep(folder, sweep)
        _write_tables(folder, sweep, results, reasons)
        return results

    results = run_on_rank_zero(ranks, begun)
    threads = max(1, torch.get_num_threads() // at_once)
    missing = [name for name in sweep.runs if name not in results]
    jobs = {
        name: Job(sweep.runs[name], folder / RUNS / name, data_dir, device, threads)
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

    run_all(jobs, at_once, ended=record, advanced=advanced)
    for theirs, why in all_gather_object(ranks, (results, reasons)):
        results |= theirs
        reasons |= why

    def over() -> None:
        _write_tables(folder, sweep, results, reasons)
        for name in missing:
            if name not in jobs:
                ended(name, results.get(name), reasons.get(name, ""))

    run_on_rank_zero(ranks, over)
    return reasons


def _write_tables(
    folder: Path, sweep: Sweep, results: dict[str, Result], reasons: dict[str, str]
) -> None:
    rows = [
        result_row(name, config, results.get(name), reasons.get(name, ""))
        for name, config in sweep.runs.items()
    ]
    write_rows(folder / RESULTS, rows)
    complete = [results[name] for name in sweep.runs if name in results]
    write_rows(folder / SUMMARY, [setting_row(setting) for setting in by_setting(complete)])
