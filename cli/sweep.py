"""What `ibp sweep` does."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import click
import torch

from ibpcore import UserError
from ibpcore.data.images import Dataset, hold_out, usual_held_out
from ibpcore.distributed import run_on_rank_zero
from ibpcore.experiments import sweeps
from ibpcore.experiments.data_folder import data_dir_for
from ibpcore.experiments.opening import CHOSEN_BY_SIZES, settled_together
from ibpcore.experiments.results import Result
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.sweeps import Sweep, run_sweep
from ibpcore.experiments.workers import Workers
from ibpcore.io.locks import LOCK
from ibpcore.progress import unwatched
from ibpcore.threads import computing_with
from ibpcore.training.config import NOTHING_HELD_OUT, TrainConfig
from ibpcore.wording import counted
from ibpcore_cli.decorators import bundle, values_of_options
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.output import print_remarks
from ibpcore_cli.progress import clear_progress, progress
from ibpcore_cli.resources import DataSource, hold


@dataclass(frozen=True)
class SweepOptions:
    """Where and how a sweep is run; no setting in it changes a result."""

    device: str
    jobs: int
    out: Path | None = None
    resume: Path | None = None


@bundle(DataSource, "source")
@bundle(SweepOptions, "options")
def carry_out(source: DataSource, options: SweepOptions, **settings: Any) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    if options.resume and (given or options.out):
        raise click.UsageError("--resume takes its settings from SWEEP: give no others")
    dataset = given.pop("dataset", "digits")
    grid = partial(sweeps.grid, dataset, given.pop("methods", ("acert", "fastibp")))
    default = Path("sweeps") / dataset
    with working_ranks(options.device) as (ranks, device):

        def prepared() -> tuple[Path, Path, Sweep, int]:
            folder = hold(options.resume or options.out or default)
            data_dir = data_dir_for(source.data_dir, folder)

            def load(config: TrainConfig) -> Dataset:
                return dataset_of(config, data_dir, source.download)

            if options.resume:
                whole = sweeps.read_sweep(folder)
                first = next(iter(whole.runs.values()))
                print_remarks(load(first))
            else:
                with computing_with(max(1, torch.get_num_threads() // options.jobs)):
                    sharing = options.jobs * (1 if device.type == "cuda" else ranks.size)
                    sizes = partial(settled_together, device=device, jobs=sharing)
                    whole = _requested_sweep(folder, load, sizes, grid, **given)
            return folder, data_dir, whole, len(sweeps.results_of(folder, whole))

        folder, data_dir, whole, complete = run_on_rank_zero(ranks, prepared)
        if ranks.first:
            at_once = f"{options.jobs} at a time"
            at_once += f" on each of {ranks.size} ranks" * (ranks.size > 1)
            click.echo(
                f"{counted(len(whole.runs), 'run')}, {complete} complete, {at_once} on"
                f" {device.type}; kappa is chosen on the {whole.select} images; folder {folder}"
            )
        command = f"ibp sweep --resume {quote(str(folder))}"
        with resumable(command, folder / sweeps.SWEEP):
            reasons = run_sweep(
                whole,
                folder,
                Workers(data_dir, str(device), options.jobs),
                ended=_reporter(whole, complete),
                watch=progress if ranks.first else unwatched,
                ranks=ranks,
            )
    if not ranks.first:
        return
    report = f"ibp report {quote(str(folder))}"
    click.echo(f"results.csv and summary.csv are in {folder}; tables, figures: {report}")
    if reasons:
        raise UserError(
            f"{len(reasons)} of {counted(len(whole.runs), 'run')} failed; try again with: {command}"
        )


def _requested_sweep(
    folder: Path,
    load: Callable[[TrainConfig], Dataset],
    sizes: Callable[..., dict[str, Any]],
    grid: Callable[..., dict[str, TrainConfig]],
    select: str = "validation",
    validation: int | None = None,
    **given: Any,
) -> Sweep:
    """The sweep that the options describe, joined with the one in the folder if there is one."""
    if select == "test" and validation:
        raise click.UsageError("--select test holds out no images: leave out --validation")
    with values_of_options():
        runs = grid(**given | NOTHING_HELD_OUT)
    first = next(iter(runs.values()))
    data = load(first)
    print_remarks(data)
    old = sweeps.read_sweep(folder) if (folder / sweeps.SWEEP).exists() else None
    if old is not None:
        like = next(iter(old.runs.values()))
        first = replace(first, **{name: getattr(like, name) for name in CHOSEN_BY_SIZES})
    # Fails before any run does.
    found = sizes(first, [*{config.method: config for config in runs.values()}.values()], data)
    given = {**found, **{n: v for n, v in given.items() if (n, v) != ("compile", "auto")}}
    if select == "test":
        validation = 0
    elif validation is None:
        validation = usual_held_out(data)
    if select == "validation" and validation == 0:
        raise click.UsageError(
            "no images to choose kappa on: hold out some with --validation, or give --select test"
        )
    hold_out(data, validation)  # refuses too many before any run does
    requested = Sweep(grid(validation=validation, **given), select)
    if old is not None:
        return sweeps.extended(old, requested)
    if any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"the folder {folder} already exists and holds no sweep")
    return requested


def _reporter(whole: Sweep, complete: int) -> Callable[[str, Result | None, str], None]:
    """A function that prints a line for each run that ends, above the progress bar."""
    count = itertools.count(complete + 1)

    def ended(name: str, result: Result | None, reason: str) -> None:
        clear_progress()
        head = f"[{next(count)}/{len(whole.runs)}] {name}"
        if result is None:
            click.echo(f"{head} failed: {reason}", err=True)
        else:
            values = result.measures
            click.echo(
                f"{head}: accuracy {100 * values['accuracy']:.2f} %,"
                f" ACR {100 * values['acr']:.2f} %, ART {100 * values['art']:.2f} %,"
                f" {values['training_seconds']:.0f} s"
            )

    return ended
