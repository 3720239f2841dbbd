"""`ibp train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore.distributed import ranks_of_environment, run_on_rank_zero, run_rank_zero_first
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import VALIDATION, saved_config
from ibpcore.io.files import read_json
from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.progress import unwatched
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.cost import estimate_cost
from ibpcore.training.loggers import LOGGERS, Monitor, logged, require_loggers
from ibpcore.training.loop import MODEL
from ibpcore.training.methods import METHODS
from ibpcore.training.model import fresh_network
from ibpcore.training.presets import ONLY_FOR
from ibpcore.training.schedules import LEARNING_RATES, SCHEDULES
from ibpcore_cli.configuration import configured, to_toml
from ibpcore_cli.decorators import GroupedCommand, bundle, in_group, options
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.options import (
    DataSource,
    at_least_one,
    ball_options,
    chosen_device,
    data_dir_hint,
    data_option,
    dataset_options,
    device_option,
    epsilon_max_option,
    hold,
    limit_test_option,
    new_folder,
    radii_option,
    run_option,
    solver_options,
)
from ibpcore_cli.output import hint_at_figures, print_summary, progress
from ibpcore_cli.value_types import Epochs

method_option = in_group("Method")
optimisation_option = in_group("Optimisation")
network_option = in_group("Network")

training_data_options = options(
    dataset_options,
    limit_test_option,
    data_option("--limit-train", type=at_least_one, help="Use only this many training images."),
    data_option(
        "--validation",
        type=int,
        help="Hold out this many training images for the choice of settings. Default: 0.",
    ),
    data_option("--flip/--no-flip", default=None, help="Flip images horizontally at random."),
    data_option("--padding", type=int, help="Shift images at random by up to this many pixels."),
)

method_options = options(
    method_option(
        "--method", type=click.Choice(list(METHODS)), help="Training method. Default: acert."
    ),
    method_option(
        "--kappa",
        type=float,
        help="Weight of the standard loss, from 0 to 1. Default: 1 for standard, 0.5 for ibp, 0"
        " for other methods.",
    ),
    method_option(
        "--initial-kappa",
        type=float,
        help="Value of kappa at epsilon 0, from which it changes to --kappa as epsilon grows."
        " Default: 1 for ibp, --kappa for other methods.",
    ),
    method_option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Train each image at its own certified radius; any method but standard can."
        " Default: on for acert.",
    ),
    method_option(
        "--box-size", type=float, help="Size of the boxes of sabr, as a share of the ball."
    ),
    method_option(
        "--relu-shrinkage",
        type=float,
        help="Share by which sabr lowers the upper bounds of unstable neurons. Default: 0.",
    ),
    method_option(
        "--ibp-weight",
        type=float,
        help="Weight alpha of the IBP loss in mtl-ibp, cc-ibp and exp-ibp, from 0 to 1.",
    ),
    method_option(
        "--attack-steps",
        type=int,
        help="Steps of PGD in sabr, mtl-ibp, cc-ibp and exp-ibp.",
    ),
    method_option(
        "--attack-step-size", type=float, help="Size of a step of PGD, as a share of the radius."
    ),
    method_option(
        "--attack-scale",
        type=float,
        help="Radius that mtl-ibp, cc-ibp and exp-ibp attack, as a multiple of the radius of"
        " training. Default: 1.",
    ),
    method_option(
        "--loss-fusion/--no-loss-fusion",
        default=None,
        help="Bound the loss of crown-ibp as one function, which is faster with many classes.",
    ),
)

radii_options = options(
    epsilon_max_option,
    radii_option(
        "--schedule",
        type=click.Choice(list(SCHEDULES)),
        help="Schedule of epsilon during the warm-up. Default: smoothed.",
    ),
    radii_option(
        "--warmup",
        type=Epochs(),
        help="First and last epoch of the growth of epsilon, such as 1:20. Default: the share of"
        " --epochs that it has in the paper.",
    ),
    solver_options,
    ball_options,
)

optimisation_options = options(
    optimisation_option("--epochs", type=int, help="Number of passes over the training images."),
    optimisation_option("--batch-size", type=int, help="Number of images in each step."),
    optimisation_option(
        "--learning-rate", type=float, help="Largest learning rate of the optimiser Adam."
    ),
    optimisation_option(
        "--learning-rate-schedule",
        type=click.Choice(list(LEARNING_RATES)),
        help="Schedule of the learning rate over the run.",
    ),
    optimisation_option(
        "--regularizer", type=float, help="Weight of the regularisers of the warm-up."
    ),
    optimisation_option("--l1", type=float, help="Weight of the L1 norm of the weights."),
    optimisation_option(
        "--gradient-clip", type=float, help="Largest norm of the gradient. Default: 10."
    ),
    optimisation_option(
        "--accumulate",
        type=int,
        metavar="PARTS",
        help="Bound each batch in this many parts, one after the other, to save memory; batch"
        " statistics are still those of the whole batch. Default: 1.",
    ),
    optimisation_option(
        "--compile/--no-compile",
        default=None,
        help="Compile interval passes, on CUDA into CUDA graphs. This takes a minute at the start"
        " and needs a C++ compiler or Triton. Default: off.",
    ),
    optimisation_option(
        "--tf32/--no-tf32", default=None, help="Train with TF32 on CUDA. Default: on."
    ),
    optimisation_option(
        "--seed",
        type=int,
        help="Random seed for weights, shuffling and augmentation. Default: 0.",
    ),
)

network_options = options(
    network_option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Train your own network instead of a CNN7: FUNCTION(in_shape, classes) returns a"
        " classifier of supported layers, for normalised images.",
    ),
    network_option("--width", type=int, help="Number of channels of the first convolution."),
    network_option("--hidden", type=int, help="Number of units of the hidden linear layer."),
    network_option(
        "--initialization",
        type=click.Choice(list(INITIALIZATIONS)),
        help="Initialisation of the weights; own keeps the weights that --model returns."
        " Default: kaiming for ibp, ibp for other methods.",
    ),
)

run_options = options(
    run_option(
        "--inspect-every",
        type=int,
        metavar="EPOCHS",
        help="Check every so many epochs how far the margin meets the assumptions of the theory,"
        " and write this to metrics.jsonl.",
    ),
    device_option,
    run_option(
        "--out",
        type=click.Path(path_type=Path),
        help="Run folder to make. Default: runs/DATASET-METHOD, numbered if that exists.",
    ),
    run_option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="RUN",
        help="Resume the run in this folder, with its own settings.",
    ),
    run_option(
        "--config",
        "config_file",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        metavar="FILE",
        help="Read settings from a TOML file or the config.json of a run; other options override"
        " them. If these change --epochs, --method or --dataset, settings of the file that are"
        " those of the presets change with them (so the warm-up keeps its share of the epochs),"
        " and the others stay.",
    ),
    run_option(
        "--dry-run",
        is_flag=True,
        help="Print the settings, as --config reads them, and the cost of the run, estimated from"
        " a few steps; write nothing.",
    ),
    run_option(
        "--tensorboard",
        is_flag=True,
        help="Also log to RUN/tensorboard; this needs the extra tensorboard.",
    ),
    run_option(
        "--wandb",
        is_flag=True,
        help="Also log to Weights & Biases, or to RUN/wandb if WANDB_MODE=offline; this needs the"
        " extra wandb.",
    ),
)


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is made; no setting in it changes the weights."""

    device: str
    dry_run: bool
    tensorboard: bool
    wandb: bool
    out: Path | None = None
    resume: Path | None = None
    config_file: Path | None = None

    @property
    def loggers(self) -> list[str]:
        return [name for name in LOGGERS if getattr(self, name)]


@click.command("train", cls=GroupedCommand)
@training_data_options
@method_options
@radii_options
@optimisation_options
@network_options
@run_options
@bundle(DataSource, "source")
@bundle(RunOptions, "options")
def train_command(
    source: DataSource,
    options: RunOptions,
    dataset: str | None,
    method: str | None,
    **settings: Any,
) -> None:
    """Train a classifier, certify its test set, and write a run folder.

    Without options: ACERT on the built-in digits, in about a minute. An option that is not
    given takes its value from the preset of the data set (Table 4 of the paper). The solver
    options apply to training; the test set is certified to full precision.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if options.resume is None:
        config = _requested_config(options.config_file, dataset, method, given)
    else:
        if given or dataset or method or options.out or options.config_file:
            raise click.UsageError("--resume takes its settings from RUN: give no others")
        config = saved_config(options.resume)
    require_loggers(options.loggers)
    if options.dry_run:
        _print_dry_run(config, source, options.device)
    else:
        _train(config, source, options)


def _requested_config(
    file: Path | None, dataset: str | None, method: str | None, given: dict[str, Any]
) -> TrainConfig:
    """The configuration that the options describe, and the file if there is one."""
    if file is None:
        config = make_config(dataset or "digits", method or "acert", **given)
    else:
        config = configured(file, dataset, method, given)
    _refuse_unused(config.method, given)
    return config


def _train(config: TrainConfig, source: DataSource, options: RunOptions) -> None:
    """Trains and certifies in a run folder, and prints the results."""
    default = Path("runs") / f"{config.dataset}-{config.method}"
    hint, resume = data_dir_hint(source.data_dir), options.resume
    with working_ranks(options.device, tensors=True) as (ranks, device):
        data = run_rank_zero_first(
            ranks, lambda: dataset_of(config, source.data_dir, source.download)
        )
        # Fails before the folder is made.
        run_rank_zero_first(ranks, lambda: fresh_network(config, data))
        run = run_on_rank_zero(
            ranks, lambda: hold(resume) if resume else new_folder(options.out, default)
        )
        if ranks.first:
            several = f" each of {ranks.size} processes" if ranks.size > 1 else ""
            click.echo(
                f"training {config.method} on {data.title}: {len(data.train)} images,"
                f" {config.epochs} epochs, {device}{several}; run folder {run}"
            )
        with (
            resumable(f"ibp train --resume {quote(str(run))}{hint}"),
            logged(options.loggers if ranks.first else [], run, config, _warn) as log,
        ):
            summary = train_and_certify(
                config,
                data,
                run,
                device=device,
                resume=resume is not None,
                monitor=Monitor(progress if ranks.first else unwatched, log),
                ranks=ranks,
            )
    if not ranks.first:
        return
    if config.validation > 0:
        print_summary(read_json(run / VALIDATION), "validation")
    print_summary(summary)
    hint_at_figures()
    again = f"ibp certify {quote(str(run / MODEL))}{hint}"
    click.echo(f"\nall files are in {run}; certify again with: {again}")


def _print_dry_run(config: TrainConfig, source: DataSource, device: str) -> None:
    """The configuration as TOML, and as comments what a run of it costs."""
    if source.download:
        raise click.UsageError("--dry-run writes nothing: leave out --download")
    if ranks_of_environment().size > 1:
        raise click.UsageError("--dry-run runs in a single process: start it without torchrun")
    where = chosen_device(device)
    data = dataset_of(config, source.data_dir)
    click.echo(to_toml(config))
    found = estimate_cost(config, data, where)
    memory = "not known here" if found.memory is None else f"{found.memory / 2**30:.2f} GiB"
    click.echo(
        f"# {data.title}: {len(data.train)} training images\n"
        f"# {found.parameters:,} parameters\n"
        f"# {found.steps_per_epoch:,} steps an epoch, {found.steps:,} in all\n"
        f"# memory: {memory} at most, measured in a few steps on {where}\n"
        f"# training: about {in_words(found.seconds)}, estimated from {found.timed} steps;"
        " certification comes on top"
    )


def in_words(seconds: float) -> str:
    """A duration in its two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"


def _warn(message: str) -> None:
    click.echo(f"Warning: {message}", err=True)


def _refuse_unused(method: str, given: dict[str, Any]) -> None:
    """Raises UsageError for an option of another method."""
    for name in given:
        known = ONLY_FOR.get(name, (method,))
        if method not in known:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} is for {', '.join(known)}, not for {method}")
