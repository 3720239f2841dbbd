"""What `ibp search` prints: its space, each trial that ends, the front, and the best models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from shlex import quote

import click

from ibpcore.certification.formatting import percent
from ibpcore.data.images import Dataset
from ibpcore.experiments.results import Result
from ibpcore.experiments.searches.objectives import Budget
from ibpcore.experiments.searches.search import RUNS, Search
from ibpcore.experiments.searches.space import METHOD
from ibpcore.experiments.searches.tables import (
    best_of,
    front_area,
    front_table,
    run_name,
    settings_of,
    values_of,
)
from ibpcore.experiments.searches.trials import DIVERGED, PRUNED, Trial
from ibpcore.wording import counted
from ibpcore_cli.output import print_table
from ibpcore_cli.progress import clear_progress, duration


def _budget_text(budget: Budget) -> str:
    if budget.seconds is not None:
        return f"trials for {duration(budget.seconds)}"
    return counted(budget.trials or 0, "trial")


def print_space(search: Search, data: Dataset, where: str) -> None:
    """What is searched, and where: a line, and one for each setting."""
    first, second = search.objectives
    held_out = 0 if data.validation is None else len(data.validation)
    problem = search.problem
    click.echo(
        f"{_budget_text(search.budget)} on {data.title} for {first.title} and {second.title} on"
        f" {counted(held_out, 'held-out image')}, {where}"
    )
    rows = [(METHOD, ", ".join(problem.methods))]
    rows += [(name, str(domain)) for name, domain in problem.space.items()]
    print_table(rows, "<<")


def trial_printer(search: Search) -> Callable[[Trial, str], None]:
    """A function that prints a line for each trial that ends, above the line of progress."""
    limit = "" if search.budget.trials is None else f"/{search.budget.trials}"

    def ended(trial: Trial, reason: str) -> None:
        clear_progress()
        method = settings_of(search.problem, trial)[METHOD]
        head = f"{run_name(trial)}, {method}"
        if trial.ended is None:
            click.echo(f"{head} failed: {reason}", err=True)
            return
        values = zip(search.objectives, trial.ended.values, strict=True)
        measures = ", ".join(f"{one.title} {percent(value)}" for one, value in values)
        epochs = trial.ended.epochs
        how = {
            PRUNED: f" pruned after {counted(epochs, 'epoch')}",
            DIVERGED: f" diverged in epoch {epochs + 1}",
        }
        shown = "" if trial.ended.status == DIVERGED else f": {measures}"
        seconds = f", {trial.ended.seconds:.0f} s"
        count = f"[{trial.ended.place + 1}{limit}]"
        click.echo(f"{count} {head}{how.get(trial.ended.status, '')}{shown}{seconds}")

    return ended


def print_front(search: Search, trials: Sequence[Trial], front: Sequence[Trial]) -> None:
    """How trials ended, and the front as a table."""
    counts = Counter(trial.ended.status for trial in trials if trial.ended is not None)
    ends = ", ".join(f"{count} {status}" for status, count in counts.items())
    seconds = sum(trial.ended.seconds for trial in trials if trial.ended is not None)
    click.echo(
        f"\n{counted(len(trials), 'trial')}: {ends}; {duration(seconds)} of training\n"
        f"front: {counted(len(front), 'trial')}, hypervolume {front_area(trials):.4f} with the"
        " reference point (0, 0)\n"
    )
    rows = list(front_table(search.problem, search.objectives, front))
    print_table(rows, ">" * len(rows[0]))


def print_certified(results: Sequence[Result]) -> None:
    """Test measures of the trials that are certified."""
    rows = [("trial", "accuracy", "ACR", "ART")]
    rows += [
        (
            str(int(result.run.name.rpartition("-")[2])),
            percent(result.measures["accuracy"]),
            percent(result.measures["acr"]),
            percent(result.measures["art"]),
        )
        for result in results
    ]
    click.echo()
    print_table(rows, ">>>>")


def print_best(search: Search, folder: Path, front: Sequence[Trial]) -> None:
    """The best trial by the held-out images, and the commands that use it."""
    best = best_of(front)
    if best is None:
        return
    run = folder / RUNS / run_name(best)
    config = search.problem.config(best.point)
    first, last = config.warmup
    values = zip(search.objectives, values_of(best), strict=True)
    measures = ", ".join(f"{one.title} {percent(value)}" for one, value in values)
    click.echo(
        f"\nbest by the geometric mean of both on held-out images: trial {best.number}, {measures}"
        f"\nclassify and certify images: ibp predict IMAGES --model {quote(str(run))}"
        f"\ntrain its settings longer: ibp train --config {quote(str(run / 'config.json'))}"
        f" --epochs {2 * config.epochs} --warmup {first}:{2 * last}"
    )
