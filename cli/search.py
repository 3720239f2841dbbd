"""What `ibp search` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import click
import torch

from ibpcore import UserError
from ibpcore.bounds.epsilons import as_number
from ibpcore.data.images import Dataset, hold_out
from ibpcore.distributed import chosen_device
from ibpcore.experiments.data_folder import data_dir_for
from ibpcore.experiments.opening import settled
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.searches.objectives import Budget, Objective, Objectives
from ibpcore.experiments.searches.search import (
    SEARCH,
    Search,
    certified_results,
    certify_trials,
    read_search,
    run_search,
    write_search,
)
from ibpcore.experiments.searches.space import METHOD, Problem, space_of
from ibpcore.experiments.searches.tables import draw_search, front_of, spread, write_tables
from ibpcore.experiments.searches.trials import Trial, optuna_module
from ibpcore.experiments.workers import Workers
from ibpcore.threads import computing_with
from ibpcore.training.config import NOTHING_HELD_OUT, TrainConfig
from ibpcore.training.rehearsal import rehearse
from ibpcore.wording import counted
from ibpcore_cli.configuration import read_values
from ibpcore_cli.decorators import bundle, values_of_options
from ibpcore_cli.distributed import resumable
from ibpcore_cli.output import hint_at_figures, print_remarks
from ibpcore_cli.progress import progress
from ibpcore_cli.resources import DataSource, hold, new_folder
from ibpcore_cli.search_output import (
    print_best,
    print_certified,
    print_front,
    print_space,
    trial_printer,
)

BUDGET = Budget(trials=50)


@dataclass(frozen=True)
class SearchOptions:
    """Where and how a search is run; no setting in it changes a trial."""

    device: str
    jobs: int
    certify: int
    out: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Wanted:
    """What is searched for; the settings of runs that are not in it are common to all trials.

    Without a number of `validation` images it is a tenth of the training images.
    """

    dataset: str = "digits"
    methods: tuple[str, ...] = ("acert",)
    objectives: Objectives = (Objective("accuracy"), Objective("acr"))
    space: Path | None = None
    budget: Budget = BUDGET
    prune: bool = True
    validation: int | None = None


@bundle(DataSource, "source")
@bundle(SearchOptions, "options")
def carry_out(source: DataSource, options: SearchOptions, **settings: Any) -> None:
    optuna_module()  # before anything is made
    given = {name: value for name, value in settings.items() if value is not None}
    if options.resume and (given.keys() - {"budget"} or options.out):
        raise click.UsageError(
            "--resume takes its settings from SEARCH: give no others but --budget"
        )
    device = chosen_device(options.device)
    folder, data_dir, search, data = _opened(source, options, given, device)
    print_remarks(data)
    print_space(search, data, f"{options.jobs} at a time on {device.type}; folder {folder}")
    command = f"ibp search --resume {quote(str(folder))}"
    workers = Workers(data_dir, str(device), options.jobs)
    with resumable(command, folder / SEARCH):
        write_search(folder, search)
        trials, reasons = run_search(
            search,
            folder,
            workers,
            len(data.classes),
            ended=trial_printer(search),
            watch=progress,
        )
        front = front_of(trials)
        uncertified: dict[str, str] = {}
        if front:
            print_front(search, trials, front)
            title = f"{data.title}, {counted(len(trials), 'trial')}"
            draw_search(folder, search.problem, search.objectives, trials, title)
            uncertified = _certify(search, folder, workers, spread(front, options.certify))
            write_tables(folder, search.problem, trials, reasons, certified_results(folder))
            print_best(search, folder, front)
    click.echo(f"\ntrials.csv and front.csv are in {folder}")
    hint_at_figures()
    _check(trials, front, {**reasons, **uncertified}, command)


def _opened(
    source: DataSource, options: SearchOptions, given: dict[str, Any], device: torch.device
) -> tuple[Path, Path, Search, Dataset]:
    """The folder, which is held, that of the data sets, the search, and its images."""
    if options.resume:
        folder = hold(options.resume)
        search = read_search(folder)
        search = replace(search, budget=given.get("budget", search.budget))
        data_dir = data_dir_for(source.data_dir, folder)
        data = dataset_of(search.problem.config({}), data_dir, source.download)
        return folder, data_dir, search, data
    names = [field.name for field in fields(Wanted) if field.name in given]
    wanted = Wanted(**{name: given[name] for name in names})
    common = {name: value for name, value in given.items() if name not in names}
    data_dir = data_dir_for(source.data_dir)
    load = partial(dataset_of, data_dir=data_dir, download=source.download)
    with computing_with(max(1, torch.get_num_threads() // options.jobs)):
        search, data = _requested(wanted, common, load, device)
    folder = new_folder(options.out, Path("searches") / wanted.dataset)
    return folder, data_dir, search, data


def _requested(
    wanted: Wanted,
    given: dict[str, Any],
    load: Callable[[TrainConfig], Dataset],
    device: torch.device,
) -> tuple[Search, Dataset]:
    """The search that the options describe, and its images; fails before any trial does."""
    problem = _problem(wanted, given)
    first = problem.config({})
    _check_radii(wanted.objectives, first.epsilon_max)
    data = load(first)
    network, *_ = [rehearse(problem.config({METHOD: method}), data) for method in wanted.methods]
    like = settled(first, network, data, device)
    validation = wanted.validation
    if validation is None:
        validation = max(1, round(len(data.train) / 10))
    if validation == 0:
        raise click.UsageError("no images to measure trials on: hold out some with --validation")
    split = hold_out(data, validation)
    sizes = {"threads": like.threads, "accumulate": like.accumulate, "compile": like.compile}
    with values_of_options():
        problem = replace(problem, common={**given, **sizes, "validation": validation})
        problem.check()
    return Search(problem, wanted.objectives, wanted.budget, wanted.prune), split


def _problem(wanted: Wanted, given: dict[str, Any]) -> Problem:
    """What is searched, without held-out images, whose number depends on the data."""
    with values_of_options():
        fixed = Problem(wanted.dataset, wanted.methods, given | NOTHING_HELD_OUT, {})
        fixed.check()
    values = {} if wanted.space is None else read_values(wanted.space)
    names = [*given, *(["warmup_share"] if "warmup" in given else [])]
    try:
        problem = replace(fixed, space=space_of(values, names))
        problem.check()
    except UserError as error:
        raise UserError(f"{wanted.space}: {error}" if wanted.space else str(error)) from None
    return problem


def _check_radii(objectives: Objectives, epsilon_max: float) -> None:
    for objective in objectives:
        if objective.radius is not None and as_number(objective.radius) > epsilon_max:
            raise click.UsageError(
                f"the radius of {objective.name} is above epsilon_max, {epsilon_max:g}: radii are"
                " measured up to that (--epsilon-max)"
            )


def _certify(
    search: Search, folder: Path, workers: Workers, chosen: Sequence[Trial]
) -> dict[str, str]:
    """Certifies the models of some trials, and prints their measures."""
    if not chosen:
        return {}
    click.echo(f"\ncertifying {counted(len(chosen), 'model')} on the test images ...")

    def ended(name: str, reason: str) -> None:
        if reason:
            click.echo(f"{name} was not certified: {reason}", err=True)

    reasons = certify_trials(search, folder, workers, chosen, ended=ended)
    print_certified(certified_results(folder))
    return reasons


def _check(
    trials: Sequence[Trial], front: Sequence[Trial], reasons: dict[Any, str], command: str
) -> None:
    """Raises UserError if trials failed, or none is complete."""
    if reasons:
        raise UserError(
            f"{len(reasons)} of {counted(len(trials), 'trial')} failed; try again with: {command}"
        )
    if not front:
        raise UserError(
            f"none of {counted(len(trials), 'trial')} is complete, all were pruned or diverged: try"
            f" --space with other values, or more with: {command} --budget {2 * len(trials)}"
        )
