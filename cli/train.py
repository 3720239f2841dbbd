"""`ibp train`."""

from __future__ import annotations

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
from ibpcore_cli.distributed import going_on, working_ranks
from ibpcore_cli.options import (
    Epochs,
    Epsilon,
    at_least_one,
    bound_options,
    chosen_device,
    data_options,
    device_option,
    hold,
    new_folder,
    options,
    solver_options,
)
from ibpcore_cli.output import hint_at_figures, print_summary, progress

training_options = options(
    click.option(
        "--method", type=click.Choice(list(METHODS)), help="Training method. Default: acert."
    ),
    click.option("--epsilon-max", type=Epsilon(), help="Largest radius, as 0.1 or 8.8/255."),
    click.option("--kappa", type=float, help="Weight of the standard loss, 0 to 1. Preset: 0."),
    click.option("--epochs", type=int, help="Passes over the training images."),
    click.option("--batch-size", type=int, help="Images a step."),
    click.option("--learning-rate", type=float, help="Largest learning rate of Adam."),
    click.option(
        "--learning-rate-schedule",
        type=click.Choice(list(LEARNING_RATES)),
        help="Its course over the run.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(list(SCHEDULES)),
        help="Course of epsilon over the warm-up. Preset: smoothed.",
    ),
    click.option(
        "--warmup",
        type=Epochs(),
        help="Epochs over which epsilon grows, as 1:20. Preset: the paper's share of --epochs.",
    ),
    click.option("--regularizer", type=float, help="Weight of the warm-up regularisers."),
    click.option(
        "--accumulate",
        type=int,
        metavar="PARTS",
        help="Bound each batch in so many parts, one after the other, to save memory."
        " Statistics stay those of the whole batch. Preset: 1.",
    ),
    click.option("--l1", type=float, help="Weight of the L1 norm of the weights."),
    click.option("--gradient-clip", type=float, help="Largest gradient norm. Preset: 10."),
    click.option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="Your own network instead of a CNN7: FUNCTION(in_shape, classes) gives any"
        " classifier of supported layers, for normalised images.",
    ),
    click.option("--width", type=int, help="Channels of the first convolution."),
    click.option("--hidden", type=int, help="Units of the linear layer."),
    click.option("--flip/--no-flip", default=None, help="Mirror images at random."),
    click.option("--padding", type=int, help="Shift images by up to this many pixels."),
    click.option(
        "--bfloat16/--no-bfloat16",
        default=None,
        help="Seek radii to train at in bfloat16. Preset: off.",
    ),
    click.option(
        "--compile/--no-compile",
        default=None,
        help="Compile interval passes, on CUDA as CUDA graphs; takes a minute at the start"
        " and needs a C++ compiler or Triton. Preset: off.",
    ),
    click.option("--tf32/--no-tf32", default=None, help="Train with TF32 on CUDA. Preset: on."),
    click.option(
        "--adaptive/--no-adaptive",
        default=None,
        help="Train each image at its own certified radius, with any method but standard."
        " Preset: on for acert.",
    ),
    click.option(
        "--initialization",
        type=click.Choice(list(INITIALIZATIONS)),
        help="Of the weights; own leaves what --model comes with. Preset: ibp, but kaiming"
        " for ibp.",
    ),
    click.option(
        "--initial-kappa",
        type=float,
        help="kappa at epsilon 0, from where it goes to --kappa as epsilon grows."
        " Preset: 1 for ibp, --kappa for the others.",
    ),
    click.option("--box-size", type=float, help="Size of SABR's boxes, as a share of the ball."),
    click.option(
        "--relu-shrinkage",
        type=float,
        help="Share by which SABR lowers upper ends of unstable neurons. Preset: 0.",
    ),
    click.option("--ibp-weight", type=float, help="alpha of MTL-IBP, CC-IBP and Exp-IBP, 0 to 1."),
    click.option(
        "--attack-steps", type=int, help="Steps of PGD, of SABR, MTL-IBP, CC-IBP and Exp-IBP."
    ),
    click.option("--attack-step-size", type=float, help="Their size, as a share of the radius."),
    click.option(
        "--attack-scale",
        type=float,
        help="Radius that MTL-IBP, CC-IBP and Exp-IBP attack, as a multiple of that trained at."
        " Preset: 1.",
    ),
    click.option(
        "--loss-fusion/--no-loss-fusion",
        default=None,
        help="Bound CROWN-IBP's loss as one function, for many classes.",
    ),
)


@click.command()
@data_options
@click.option("--limit-train", type=at_least_one, help="Use this many training images.")
@click.option(
    "--validation", type=int, help="Hold this many training images out, to choose by. Preset: 0."
)
@training_options
@solver_options
@bound_options
@click.option(
    "--inspect-every",
    type=int,
    metavar="EPOCHS",
    help="Write to metrics.jsonl whether the margin behaves as the theory supposes.",
)
@click.option("--seed", type=int, help="Of weights, order and augmentation. Preset: 0.")
@device_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Run folder to make. Default: runs/DATASET-METHOD, numbered where that is there.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Go on with the run in this folder, with its own settings.",
)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Settings in TOML, or a run's config.json; other options override them. With other"
    " --epochs, a --method or a --dataset, what the file has of the presets follows them (so"
    " the warm-up keeps its share of the epochs), and what it has of its own stays.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Print the settings, as --config reads them, and what the run would cost, by a few"
    " steps of it. Writes nothing.",
)
@click.option(
    "--tensorboard", is_flag=True, help="Log to RUN/tensorboard, too; needs the extra tensorboard."
)
@click.option(
    "--wandb",
    is_flag=True,
    help="Log to Weights & Biases, too, or with WANDB_MODE=offline to RUN/wandb; needs the"
    " extra wandb.",
)
def train(
    data_dir: Path,
    download: bool,
    device: str,
    out: Path | None,
    resume: Path | None,
    config_file: Path | None,
    dry_run: bool,
    dataset: str | None,
    method: str | None,
    **settings: Any,
) -> None:
    """Train a classifier, certify the test set, and write a run folder.

    With no options: ACERT on the built-in digits, in about a minute. An option that is
    left out has the value of the data set's preset (Table 4 of the paper). The solver
    options are those of training; the test set is certified to full precision.
    """
    loggers = [name for name in LOGGERS if settings.pop(name)]
    given = {name: value for name, value in settings.items() if value is not None}
    if resume is None:
        config = _asked(config_file, dataset, method, given)
    else:
        if given or dataset or method or out or config_file:
            raise click.UsageError("--resume goes on with the settings of RUN: give no others")
        config = saved_config(resume)
    require_loggers(loggers)
    if dry_run:
        _show(config, data_dir, download, device)
        return
    default = Path("runs") / f"{config.dataset}-{config.method}"
    hint = data_dir_hint(data_dir)
    with working_ranks(device, tensors=True) as (ranks, where):
        data = run_rank_zero_first(ranks, lambda: dataset_of(config, data_dir, download))
        # Fails before the folder is made.
        run_rank_zero_first(ranks, lambda: fresh_network(config, data))
        run = run_on_rank_zero(ranks, lambda: hold(resume) if resume else new_folder(out, default))
        if ranks.first:
            several = f" each of {ranks.size} processes" if ranks.size > 1 else ""
            click.echo(
                f"training {config.method} on {data.title}: {len(data.train)} images,"
                f" {config.epochs} epochs, {where}{several}; run folder {run}"
            )
        with (
            going_on(f"ibp train --resume {quote(str(run))}{hint}"),
            logged(loggers if ranks.first else [], run, config, _complain) as log,
        ):
            summary = train_and_certify(
                config,
                data,
                run,
                device=where,
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


def _asked(
    file: Path | None, dataset: str | None, method: str | None, given: dict[str, Any]
) -> TrainConfig:
    """The configuration that the options describe, with the file that they name."""
    if file is None:
        config = make_config(dataset or "digits", method or "acert", **given)
    else:
        config = configured(file, dataset, method, given)
    _refuse_what_does_nothing(config.method, given)
    return config


def _show(config: TrainConfig, data_dir: Path, download: bool, device: str) -> None:
    """The configuration, and as comments what a run of it costs."""
    if download:
        raise click.UsageError("--dry-run writes nothing: leave --download away")
    if ranks_of_environment().size > 1:
        raise click.UsageError("--dry-run is done by one process: start it without torchrun")
    where = chosen_device(device)
    data = dataset_of(config, data_dir)
    click.echo(to_toml(config))
    found = estimate_cost(config, data, where)
    memory = "not known here" if found.memory is None else f"{found.memory / 2**30:.2f} GiB"
    click.echo(
        f"# {data.title}: {len(data.train)} training images\n"
        f"# {found.parameters:,} parameters\n"
        f"# {found.steps_per_epoch:,} steps an epoch, {found.steps:,} in all\n"
        f"# memory: {memory}, the most while a few steps ran on {where}\n"
        f"# training: about {in_words(found.seconds)}, an estimate from {found.timed} steps as"
        " they are at the end; certificates come on top"
    )


def in_words(seconds: float) -> str:
    """A duration in the two largest units that it has."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.2g} s"


def _complain(message: str) -> None:
    click.echo(f"Warning: {message}", err=True)


def _refuse_what_does_nothing(method: str, given: dict[str, Any]) -> None:
    for name in given:
        known = ONLY_FOR.get(name, (method,))
        if method not in known:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} is for {', '.join(known)}, not for {method}")


def data_dir_hint(data_dir: Path) -> str:
    """`--data-dir`, where the next command will need it again."""
    source = click.get_current_context().get_parameter_source("data_dir")
    typed = source is click.core.ParameterSource.COMMANDLINE
    return f" --data-dir {quote(str(data_dir))}" if typed else ""
