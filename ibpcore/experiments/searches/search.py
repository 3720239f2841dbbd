"""Searches: what is searched for, the folder that holds it, and its execution."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ibpcore.certification.certificates import SUMMARY
from ibpcore.data.images import Dataset
from ibpcore.errors import REFUSED, UserError
from ibpcore.experiments.data_folder import remember_data_dir
from ibpcore.experiments.results import Result, read_result
from ibpcore.experiments.run_folder import is_complete, saved_config
from ibpcore.experiments.searches.objectives import (
    Budget,
    Objectives,
    objective_values,
    objectives_of,
)
from ibpcore.experiments.searches.pruning import HopelessRule, curve_of
from ibpcore.experiments.searches.space import Problem, space_of, written
from ibpcore.experiments.searches.tables import best_of, run_name, values_of, write_tables
from ibpcore.experiments.searches.trials import (
    COMPLETE,
    DIVERGED,
    PRUNED,
    WORST,
    Ended,
    Trial,
    TrialStore,
    before,
    next_point,
)
from ibpcore.experiments.workers import RUN_LENGTH, Job, Workers, run_all
from ibpcore.io.files import read_json, write_atomic
from ibpcore.progress import Advance, Watch, unwatched
from ibpcore.training.config import TrainConfig
from ibpcore.training.demands import Demands, History, never
from ibpcore.training.loggers import Monitor
from ibpcore.training.loop import DivergedError, train_model
from ibpcore.training.run_files import saved_history
from ibpcore.training.selection import VALIDATION, chosen_epoch, is_over
from ibpcore.wording import counted

SEARCH, SPACE, JOURNAL, CLOCK = "search.json", "space.json", "optuna.journal", "seconds.json"
RUNS = "runs"
MOST_FAILURES = 5
"""Trials that fail one after another end a search: the fault is hardly in their settings."""
TICK = 10.0
"""Seconds between two records of the time spent, of which a kill loses the last."""


@dataclass(frozen=True)
class Search:
    """All that determines the trials of a search.

    Attributes:
        problem: the settings of the trials.
        objectives: to maximise on held-out images.
        budget: after which no trial begins.
        prune: whether hopeless trials end early.
    """

    problem: Problem
    objectives: Objectives
    budget: Budget
    prune: bool

    @property
    def seed(self) -> int:
        """Of the suggestions; the runs have the same one."""
        return int(self.problem.common.get("seed", 0))

    def demands(self, trial: Trial, trials: Sequence[Trial], classes: int) -> Demands:
        """What the run of a trial measures, and when it ends early."""
        radii = tuple(one.radius for one in self.objectives if one.radius is not None)
        if not self.prune:
            return Demands(radii, never)
        rivals = [
            t.ended.curve
            for t in before(trial, trials)
            if t.ended is not None and t.ended.status == COMPLETE
        ]
        config = self.problem.config(trial.point)
        return Demands(radii, HopelessRule(config, classes, self.objectives, rivals))


def write_search(folder: Path, search: Search) -> None:
    """Writes `space.json`, in the form of a file for `space_of`, and `search.json`.

    Raises:
        OSError: a file cannot be written.
    """
    problem = search.problem
    content = {
        "dataset": problem.dataset,
        "methods": problem.methods,
        "objectives": ",".join(objective.name for objective in search.objectives),
        "budget": {"trials": search.budget.trials, "seconds": search.budget.seconds},
        "prune": search.prune,
        "common": problem.common,
    }
    for name, values in ((SPACE, written(problem.space)), (SEARCH, content)):
        write_atomic(folder / name, (json.dumps(values, indent=2) + "\n").encode())


def read_search(folder: Path) -> Search:
    """Reads what `write_search` wrote.

    Raises:
        UserError: there is no search, or a file is damaged.
    """
    path = folder / SEARCH
    if not path.exists():
        raise UserError(f"there is no search in {folder}: {path} is missing")
    content, values = read_json(path), read_json(folder / SPACE)
    try:
        space = space_of(values)
    except UserError as error:
        raise UserError(f"{folder / SPACE} is damaged: {error}") from None
    try:
        common = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in content["common"].items()
        }
        problem = Problem(content["dataset"], tuple(content["methods"]), common, space)
        budget = Budget(**content["budget"])
        found = Search(problem, objectives_of(content["objectives"]), budget, content["prune"])
        problem.check()
        if not (type(found.prune) is bool and (budget.trials or budget.seconds)):
            raise ValueError
        if not budget.is_spent(10**9, math.inf) or budget.is_spent(0, 0.0):
            raise ValueError
    except UserError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    except REFUSED:
        raise UserError(f"{path} is damaged: it does not describe a search") from None
    return found


def train_trial(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str,
    resume: bool,
    monitor: Monitor,
    demands: Demands,
) -> None:
    """Trains a trial without certificates; one that diverges is left after its last good epoch."""
    with contextlib.suppress(DivergedError):
        train_model(
            config, dataset, run, device=device, resume=resume, monitor=monitor, demands=demands
        )


def ended_run(
    history: History, config: TrainConfig, demands: Demands, objectives: Objectives, place: int
) -> Ended:
    """How a trial ended, from the rows of its run, which `train_trial` has left."""
    over = is_over(history, config)
    status = COMPLETE if over else PRUNED if demands.hopeless(history) else DIVERGED
    measures: dict[str, Any] = {}
    if status != DIVERGED:
        measures = history[chosen_epoch(history, config) - 1][VALIDATION]
    return Ended(
        status,
        place,
        len(history),
        sum(row["seconds"] for row in history),
        measures,
        objective_values(objectives, measures) if measures else WORST,
        curve_of(history, config.epochs, objectives),
    )


class Clock:
    """The seconds that a search has taken so far, over all the processes that went on with it."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the file is damaged."""
        self._path, self._start = path, time.monotonic()
        self._before = self._recorded = 0.0
        if path.exists():
            seconds = read_json(path)
            if type(seconds) not in (int, float) or not 0 <= seconds < math.inf:
                raise UserError(f"{path} is damaged: it holds no number of seconds")
            self._before = self._recorded = float(seconds)

    @property
    def seconds(self) -> float:
        return self._before + time.monotonic() - self._start

    def record(self, interval: float = 0.0) -> None:
        """Writes the time, unless that was done within the last `interval` seconds."""
        now = self.seconds
        if now - self._recorded >= interval:
            write_atomic(self._path, f"{now}\n".encode())
            self._recorded = now


@dataclass
class _Execution:
    """A search while this process executes it.

    Attributes:
        search, folder, workers, classes: see `run_search`.
        store: its trials.
        clock: the time spent.
        numbers: of the trials that began or went on here, by the names of their folders.
        reasons: why trials failed here, by number.
        failures: the number of them since the last one that did not fail.
    """

    search: Search
    folder: Path
    workers: Workers
    classes: int
    store: TrialStore
    clock: Clock
    numbers: dict[str, int] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    failures: int = 0

    def jobs(self) -> Iterator[tuple[str, Job]]:
        """First those of trials that were cut off, then new ones until the budget is spent."""
        trials = self.store.trials
        for trial in [trial for trial in trials if trial.ended is None]:
            if self.failures < MOST_FAILURES:
                yield self._job(trial)
        while not self._is_over():
            point = next_point(self.search.problem, trials, self.search.seed)
            self.search.problem.config(point)  # raises before the trial is recorded
            yield self._job(self.store.begin(point))

    def _is_over(self) -> bool:
        spent = self.search.budget.is_spent(len(self.store.trials), self.clock.seconds)
        return spent or self.failures >= MOST_FAILURES

    def _job(self, trial: Trial) -> tuple[str, Job]:
        name, config = run_name(trial), self.search.problem.config(trial.point)
        self.numbers[name] = trial.number
        demands = self.search.demands(trial, self.store.trials, self.classes)
        work = partial(train_trial, demands=demands)
        return name, self.workers.job(config, self.folder / RUNS / name, work)

    def end(self, name: str, reason: str) -> tuple[Trial, str]:
        """Records the end of a trial, and returns it with the reason why it failed, or ""."""
        trial = self.store.trials[self.numbers[name]]
        if not reason:
            try:
                trial = self.store.end(trial.number, self._ended(trial))
            except UserError as error:
                reason = str(error)
        self.failures = self.failures + 1 if reason else 0
        if reason:
            self.reasons[trial.number] = reason
        self.clock.record()
        self.write_tables()
        return trial, reason

    def _ended(self, trial: Trial) -> Ended:
        history = saved_history(self.folder / RUNS / run_name(trial))
        demands = self.search.demands(trial, self.store.trials, self.classes)
        config = self.search.problem.config(trial.point)
        return ended_run(history, config, demands, self.search.objectives, self.store.ended)

    def write_tables(self) -> None:
        certified = certified_results(self.folder)
        write_tables(self.folder, self.search.problem, self.store.trials, self.reasons, certified)

    @contextlib.contextmanager
    def watched(self, watch: Watch) -> Iterator[Advance]:
        """An `Advance` for `run_all`; it reports trials or seconds, and records the seconds."""
        trials, seconds = self.search.budget.trials, self.search.budget.seconds
        done = self.store.ended
        length = math.ceil(seconds or 0) if trials is None else RUN_LENGTH * max(trials, done)
        with watch("search", length) as shown:

            def advance(work: int, facts: Sequence[str]) -> None:
                self.clock.record(TICK)
                reached = int(self.clock.seconds) if trials is None else RUN_LENGTH * done + work
                if shown is not None:
                    shown(min(reached, length), [*self._facts(), *facts])

            yield advance

    def _facts(self) -> Iterator[str]:
        limit, ended = self.search.budget.trials, self.store.ended
        yield counted(ended, "trial") if limit is None else f"{ended}/{limit} trials"
        best = best_of(self.store.trials)
        if best is not None:
            values = zip(self.search.objectives, values_of(best), strict=True)
            yield "best " + ", ".join(f"{one.title} {100 * value:.1f} %" for one, value in values)


def run_search(
    search: Search,
    folder: Path,
    workers: Workers,
    classes: int,
    *,
    ended: Callable[[Trial, str], None],
    watch: Watch = unwatched,
) -> tuple[list[Trial], dict[int, str]]:
    """Executes trials until the budget is spent, those first that were cut off.

    A trial that fails stays open: another call tries it again.

    Args:
        search: as `write_search` wrote it.
        folder: of the search, which this process holds.
        workers: the processes of the trials.
        classes: number of classes.
        ended: called with each trial whose process has terminated, and the reason why it failed
            or "".
        watch: reports the progress.

    Returns:
        all trials, and the reasons why some failed, by number.

    Raises:
        UserError: Optuna is not installed, a file is damaged, or trials fail one after another.
        OSError: the folder cannot be written.
    """
    store, clock = TrialStore(folder / JOURNAL, search.problem), Clock(folder / CLOCK)
    remember_data_dir(folder, workers.data_dir, search.problem.dataset)
    execution = _Execution(search, folder, workers, classes, store, clock)
    execution.write_tables()
    with execution.watched(watch) as advance:
        run_all(
            execution.jobs(),
            workers.at_once,
            ended=lambda name, reason: ended(*execution.end(name, reason)),
            advance=advance,
        )
    clock.record()
    if execution.failures >= MOST_FAILURES:
        last = [*execution.reasons.values()][-1]
        raise UserError(f"{MOST_FAILURES} trials failed one after another, the last one: {last}")
    return store.trials, execution.reasons


def certify_trials(
    search: Search,
    folder: Path,
    workers: Workers,
    trials: Sequence[Trial],
    *,
    ended: Callable[[str, str], None],
) -> dict[str, str]:
    """Certifies the held-out and the test images with the models of complete trials.

    Their folders then are those of complete runs. What is done already is not repeated.

    Returns:
        the reasons why some failed, by the names of their folders.
    """
    reasons: dict[str, str] = {}
    configs = {run_name(trial): search.problem.config(trial.point) for trial in trials}
    runs = {name: folder / RUNS / name for name in configs}

    def record(name: str, reason: str) -> None:
        if reason:
            reasons[name] = reason
        ended(name, reason)

    jobs = [
        (name, workers.job(config, runs[name]))
        for name, config in configs.items()
        if not is_complete(runs[name], config)
    ]
    run_all(jobs, workers.at_once, ended=record, advance=None)
    return reasons


def certified_results(folder: Path) -> list[Result]:
    """The results of the trials that are certified, by number.

    Raises:
        UserError: a file is damaged.
    """
    begun = [run for run in sorted((folder / RUNS).glob("trial-*")) if (run / SUMMARY).exists()]
    return [read_result(run) for run in begun if is_complete(run, saved_config(run))]
