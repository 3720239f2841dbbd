"""Options of `ibp train`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.options import shared
from ibpcore_cli.options.training import training_options
from ibpcore_cli.work import call


@click.command("train", cls=GroupedCommand)
@training_options
@shared.run_option(
    "--inspect-every",
    int,
    "Check every so many epochs how far the margin meets the assumptions of the theory,"
    " and write this to metrics.jsonl.",
    metavar="EPOCHS",
)
@shared.device_option
@shared.out_option("Run folder to make. Default: runs/DATASET-METHOD, numbered if that exists.")
@shared.run_option(
    "--resume",
    shared.PATH,
    "Resume the run in this folder, with its own settings. With --epochs its training ends after"
    " so many, also if it had ended before.",
    metavar="RUN",
)
@shared.run_option(
    "--from",
    shared.PATH,
    "Train a saved model further, in a file or a run folder, instead of a new network.",
    "from_model",
    metavar="MODEL",
)
@shared.run_option(
    "--config",
    click.Path(path_type=Path, dir_okay=False),
    "Read settings from a TOML file or the config.json of a run; other options override"
    " them. If these change --epochs, --method or --dataset, settings of the file that are"
    " those of the presets change with them (so the warm-up keeps its share of the epochs),"
    " and the others stay.",
    "config_file",
    metavar="FILE",
)
@shared.run_option(
    "--dry-run",
    bool,
    "Print the settings, as --config reads them, and the cost of the run, estimated from"
    " a few steps; write nothing.",
    is_flag=True,
)
@shared.run_option(
    "--tensorboard",
    bool,
    "Also log to RUN/tensorboard; this needs the extra tensorboard.",
    is_flag=True,
)
@shared.run_option(
    "--wandb",
    bool,
    "Also log to Weights & Biases, or to RUN/wandb if WANDB_MODE=offline; this needs the"
    " extra wandb.",
    is_flag=True,
)
def train_command(**given: Any) -> None:
    """Train a classifier, certify its test set, and write a run folder.

    Without options: ACERT on the built-in digits, in about a minute. An option that is not
    given takes its value from the preset of the data set (Table 4 of the paper). The solver
    options apply to training; the test set is certified to full precision.
    """
    call("train", given)
