"""`ibp sweep`."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore import UserError
from ibpcore.data.images import Dataset, hold_out
from ibpcore.distributed import run_on_rank_zero
from ibpcore.experiments.results import Result
from ibpcore.experiments.run import dataset_of
from ibpcore.experiments.sweeps import (
    SELECT,
    SWEEP,
    Sweep,
    extended,
    grid,
    read_sweep,
    results_of,
    run_sweep,
)
from ibpcore.experiments.workers import Workers
from ibpcore.io.locks import LOCK
from ibpcore.progress import unwatched
from ibpcore.training.config import TrainConfig
from ibpcore.training.methods import METHODS
from ibpcore.training.model import fresh_network
from ibpcore.training.schedules import SCHEDULES
from ibpcore_cli.distributed import going_on, working_ranks
from ibpcore_cli.options import Kappas, Seeds, Values, at_least_one, hold
from ibpcore_cli.output import clear_bar, progress
from ibpcore_cli.train import data_dir_hint, train

SWEPT = [
    click.Option(
        ["--methods"],
        type=Values(click.Choice(list(METHODS)), "list"),
        help="Training methods. Default: acert,fastibp.",
    ),
    click.Option(
        ["--kappa", "kappas"],
        type=Kappas(),
        help="Weights of the standard loss: one, a list, or START:STOP:STEP with STOP included.",
    ),
    click.Option(["--seeds"], type=Seeds(), help="3 for 0, 1 and 2; or a list. Default: 1."),
    click.Option(
        ["--max-iterations"],
        type=Values(click.IntRange(min=0), "list"),
        help="Bound passes of the root finder, of the adaptive methods.",
    ),
    click.Option(
        ["--schedule", "schedules"],
        type=Values(click.Choice(list(SCHEDULES)), "list"),
        help="Courses of epsilon over the warm-up. Preset: smoothed.",
    ),
]
REPLACED = ("method", "kappa", "seed", "max_iterations", "schedule", "out", "resume")
SINGLE = ("config_file", "dry_run", "tensorboard", "wandb")
"""Options for a run alone."""
SHARED = [option for option in train.params if option.name not in REPLACED + SINGLE]


@click.command(params=[*SWEPT, *SHARED])
@click.option(
    "--select",
    type=click.Choice(SELECT),
    help="What reports choose kappa by: images held out of the training images, a tenth of"
    " them or --validation, or the test images, as the paper does. Default: validation.",
)
@click.option("--jobs", type=at_least_one, default=1, show_default=True, help="Runs at a time.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the sweep; one that is there is gone on with. Default: sweeps/DATASET.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="SWEEP",
    help="Go on with the sweep in this folder, with its own settings.",
)
def sweep(
    data_dir: Path,
    download: bool,
    device: str,
    jobs: int,
    out: Path | None,
    resume: Path | None,
    **settings: Any,
) -> None:
    """Train and certify a grid of runs: methods, kappas, seeds.

    Every other option is as in `ibp train`, and goes for all runs; settings in a file, dry
    runs and logs beside the run folder are for single runs. The same command goes
    on where it was stopped, and with more methods, kappas or seeds it adds their runs.
    Runs have processes of their own: one that fails is reported, and the others go on.
    Under torchrun whole runs are shared out among its processes.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if resume and (given or out):
        raise click.UsageError("--resume goes on with the settings of SWEEP: give no others")
    with working_ranks(device) as (ranks, where):
        load = partial(dataset_of, data_dir=data_dir, download=download)

        def begin() -> tuple[Path, Sweep, int]:
            folder = hold(resume or out or Path("sweeps") / given.get("dataset", "digits"))
            if resume:
                whole = read_sweep(folder)
                load(next(iter(whole.runs.values())))
            else:
                whole = _requested_sweep(folder, load, **given)
            return folder, whole, len(results_of(folder, whole))

        folder, whole, complete = run_on_rank_zero(ranks, begin)
        if ranks.first:
            at_once = f"{jobs} at a time" + f" on each of {ranks.size} ranks" * (ranks.size > 1)
            click.echo(
                f"{len(whole.runs)} runs, {complete} complete, {at_once} on {where.type};"
                f" kappa is chosen on the {whole.select} images; folder {folder}"
            )
        command = f"ibp sweep --resume {quote(str(folder))}{data_dir_hint(data_dir)}"
        with going_on(command):
            reasons = run_sweep(
                whole,
                folder,
                Workers(data_dir, str(where), jobs),
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
            f"{len(reasons)} of {len(whole.runs)} runs failed; try again with: {command}"
        )


def _requested_sweep(
    folder: Path,
    load: Callable[[TrainConfig], Dataset],
    dataset: str = "digits",
    methods: tuple[str, ...] = ("acert", "fastibp"),
    select: str = "validation",
    validation: int | None = None,
    **given: Any,
) -> Sweep:
    """The sweep that the options describe, together with the one already in the folder."""
    if select == "test" and validation:
        raise click.UsageError("--select test holds no images out: leave --validation away")
    runs = grid(dataset, methods, **given)
    first = next(iter(runs.values()))
    data = load(first)
    fresh_network(first, data)  # fails before any run does
    if select == "test":
        validation = 0
    elif validation is None:
        validation = round(len(data.train) / 10)
    if select == "validation" and validation == 0:
        raise click.UsageError(
            "no images to choose by: hold some out with --validation, or --select test"
        )
    hold_out(data, validation)  # refuses too many before any run does
    asked = Sweep(grid(dataset, methods, validation=validation, **given), select)
    if (folder / SWEEP).exists():
        return extended(read_sweep(folder), asked)
    if any(path.name != LOCK for path in folder.iterdir()):
        raise UserError(f"the folder {folder} is there already and holds no sweep")
    return asked


def _reporter(whole: Sweep, complete: int) -> Callable[[str, Result | None, str], None]:
    """A function that prints a line for each run that ends, above the progress bar."""
    count = itertools.count(complete + 1)

    def ended(name: str, result: Result | None, reason: str) -> None:
        clear_bar()
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
