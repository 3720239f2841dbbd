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
from ibpcore.data.images import Dataset, hold_out, usual_held_out
from ibpcore.distributed import chosen_device
from ibpcore.experiments.data_folder import data_dir_for
from ibpcore.experiments.opening import settled_together
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
from ibpcore.experiments.searches.space import (
    WARMUP_SHARE,
    Problem,
    default_space,
    space_of,
    used,
)
from ibpcore.experiments.searches.tables import draw_search, front_of, spread, write_tables
from ibpcore.experiments.searches.trials import Trial, optuna_module
from ibpcore.experiments.workers import Workers
from ibpcore.threads import computing_with
from ibpcore.training.config import NOTHING_HELD_OUT, TrainConfig, check_used
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
            "--resume takes its settings from SEARCH: give none but --budget, --jobs, --certify,"
            " --device and --data-dir"
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
    _check(search.budget, trials, reasons, uncertified, command)


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
    sizes = partial(settled_together, device=device, jobs=options.jobs)
    with computing_with(max(1, torch.get_num_threads() // options.jobs)):
        search, data = _requested(wanted, common, load, sizes)
    folder = new_folder(options.out, Path("searches") / wanted.dataset)
    return folder, data_dir, search, data


def _requested(
    wanted: Wanted,
    given: dict[str, Any],
    load: Callable[[TrainConfig], Dataset],
    sizes: Callable[..., dict[str, Any]],
) -> tuple[Search, Dataset]:
    """The search that the options describe, and its images; fails before any trial does."""
    problem = _problem(wanted, given)
    first = replace(problem.config({}), **NOTHING_HELD_OUT)
    _check_radii(wanted.objectives, first.epsilon_max)
    data = load(first)
    largest = (problem.largest(method) for method in wanted.methods)
    found = sizes(first, [replace(run, **NOTHING_HELD_OUT) for run in largest], data)
    validation = wanted.validation
    if validation is None:
        validation = usual_held_out(data)
    if validation == 0:
        raise click.UsageError("no images to measure trials on: hold out some with --validation")
    split = hold_out(data, validation)
    with values_of_options():
        problem = replace(problem, common={**given, **found, "validation": validation})
        problem.check()
    return Search(problem, wanted.objectives, wanted.budget, wanted.prune), split


def _problem(wanted: Wanted, given: dict[str, Any]) -> Problem:
    """What is searched, with one held-out image in place of a number that depends on the data."""
    with values_of_options():
        fixed = Problem(wanted.dataset, wanted.methods, given | {"validation": 1}, {})
        fixed.check()
        check_used(given, wanted.methods)
    values = {} if wanted.space is None else read_values(wanted.space)
    names = [*given, *([WARMUP_SHARE] if "warmup" in given else [])]
    try:
        space = space_of(values, names, default_space(fixed.config({}).epsilon_max))
        problem = replace(fixed, space=used(space, wanted.methods, values))
        problem.check()
        if not problem.varies:
            raise UserError("no setting is searched: give one a range or a list of values")
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
    budget: Budget,
    trials: Sequence[Trial],
    reasons: dict[int, str],
    uncertified: dict[str, str],
    command: str,
) -> None:
    """Raises UserError if trials or certificates failed, or no trial is complete."""
    all_ = counted(len(trials), "trial")
    if reasons:
        raise UserError(f"{len(reasons)} of {all_} failed; try again with: {command}")
    if uncertified:
        models = counted(len(uncertified), "model")
        raise UserError(f"{models} could not be certified; try again with: {command}")
    longer = f"{command} --budget {budget.doubled()}"
    if not trials:
        raise UserError(f"no trial began in the time of the budget; try more with: {longer}")
    if not front_of(trials):
        raise UserError(
            f"none of {all_} is complete, all were pruned or diverged: try --space with other"
            f" values, or more with: {longer}"
        )
