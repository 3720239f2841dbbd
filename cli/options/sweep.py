"""Options of `ibp sweep`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click

from ibpcore.choices import METHODS, SCHEDULES, SELECT, WEIGHTS
from ibpcore_cli.decorators import GroupedCommand, GroupedOption
from ibpcore_cli.options import shared
from ibpcore_cli.options.train import train_command
from ibpcore_cli.value_types import Kappas, Seeds, Values
from ibpcore_cli.work import call

sweep_option = partial(GroupedOption, group="Sweep")

SWEPT_OPTIONS = [
    sweep_option(
        ["--methods"],
        type=Values(click.Choice(METHODS), "list"),
        help="Training methods. Default: acert,fastibp.",
    ),
    sweep_option(
        ["--kappa", "kappas"],
        type=Kappas(),
        help="Weights of the standard loss: one, a list, or START:STOP:STEP with STOP included.",
    ),
    sweep_option(
        ["--seeds"],
        type=Seeds(),
        help="Number of seeds, counted from 0, or a list of them. Default: 1.",
    ),
    sweep_option(
        ["--max-iterations"],
        type=Values(click.IntRange(min=0), "list"),
        help="Largest numbers of bound passes of the root finder in adaptive methods.",
    ),
    sweep_option(
        ["--schedule", "schedules"],
        type=Values(click.Choice(SCHEDULES), "list"),
        help="Schedules of epsilon during the warm-up. Default: smoothed.",
    ),
    sweep_option(
        ["--select"],
        type=click.Choice(SELECT),
        help="Images on which reports choose kappa: held-out training images, a tenth of them or"
        " --validation, or the test images as in the paper. Default: validation.",
    ),
    sweep_option(
        ["--select-weights"],
        type=click.Choice(WEIGHTS),
        help="Weights that each run delivers, as ibp train --select. Default: last.",
    ),
    sweep_option(
        ["--jobs"], type=shared.at_least_one, default=1, help="Number of runs at the same time."
    ),
]
REPLACED = (
    *("method", "kappa", "seed", "max_iterations", "schedule", "select_weights", "out", "resume"),
)
SINGLE = ("from_model", "config_file", "dry_run", "tensorboard", "wandb")
"""Options of `ibp train` that make sense for a single run only."""
SHARED = [option for option in train_command.params if option.name not in REPLACED + SINGLE]


@click.command("sweep", cls=GroupedCommand, params=[*SWEPT_OPTIONS, *SHARED])
@shared.run_option(
    "--out",
    click.Path(path_type=Path, file_okay=False),
    "Folder of the sweep, which is extended if it exists. Default: sweeps/DATASET.",
)
@shared.run_option(
    "--resume",
    shared.PATH,
    "Resume the sweep in this folder, with its own settings.",
    metavar="SWEEP",
)
def sweep_command(**given: Any) -> None:
    """Train and certify a grid of runs over methods, kappas and seeds.

    All other options are those of `ibp train`, and apply to every run. The same command
    resumes a sweep that was interrupted; with more methods, kappas or seeds it adds their
    runs. Each run has its own process: a failed run is reported, and the others continue.
    Under torchrun whole runs are distributed among the processes.
    """
    call("sweep", given)
