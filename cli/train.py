"""What `ibp train` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import click
import torch

from ibpcore.certification.certificates import SUMMARY
from ibpcore.certification.summary import read_summary
from ibpcore.data.arrays import OWN
from ibpcore.data.images import Dataset
from ibpcore.distributed import (
    SINGLE_PROCESS,
    Ranks,
    current_device,
    ranks_of_environment,
    run_on_rank_zero,
    run_rank_zero_first,
)
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import data_dir_for, remember_data_dir
from ibpcore.experiments.extension import extend, with_epochs
from ibpcore.experiments.opening import opened_run, with_threads
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import (
    VALIDATION,
    is_complete,
    metrics_of,
    saved_config,
    starting_model,
)
from ibpcore.nn.checkpoint import MODEL, fingerprint
from ibpcore.nn.networks import Classifier
from ibpcore.progress import unwatched
from ibpcore.training.config import TrainConfig, make_config, unused
from ibpcore.training.cost import estimate_cost
from ibpcore.training.loggers import LOGGERS, Metrics, Monitor, logged, require_loggers
from ibpcore.training.rehearsal import rehearse
from ibpcore.training.run_files import CONFIG, METRICS, saved_history
from ibpcore.training.selection import is_over
from ibpcore.wording import counted
from ibpcore_cli import resources
from ibpcore_cli.advice import advice, doubts
from ibpcore_cli.configuration import configured, to_toml
from ibpcore_cli.decorators import bundle, values_of_options
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.epoch_lines import epoch_printer
from ibpcore_cli.output import class_line, hint_at_figures, print_remarks, print_summary
from ibpcore_cli.progress import clear_progress, progress
from ibpcore_cli.resources import DataSource
from ibpcore_cli.saved_model import read_model_file


@dataclass(frozen=True)
class RunOptions:
    """Where and how a run is made; no setting in it changes the weights."""

    device: str
    dry_run: bool
    tensorboard: bool
    wandb: bool
    out: Path | None = None
    resume: Path | None = None
    from_model: Path | None = None
    config_file: Path | None = None

    @property
    def loggers(self) -> list[str]:
        return [name for name in LOGGERS if getattr(self, name)]

    @property
    def resumed(self) -> list[Path]:
        return [] if self.resume is None else [self.resume]


@bundle(DataSource, "source")
@bundle(RunOptions, "options")
def carry_out(
    source: DataSource,
    options: RunOptions,
    dataset: str | None,
    method: str | None,
    **settings: Any,
) -> None:
    given = {name: value for name, value in settings.items() if value is not None}
    if options.resume is None:
        config, start = _requested(options, dataset, method, given)
    else:
        chosen = (dataset, method, options.out, options.from_model, options.config_file)
        if given.keys() - {"epochs"} or any(chosen):
            raise click.UsageError(
                "--resume takes its settings from RUN: give no others but --epochs"
            )
        config = _resumed_config(options.resume, given.get("epochs"))
        start = starting_model(options.resume, config)
    require_loggers(options.loggers)
    if options.dry_run:
        _print_dry_run(config, start, source, options)
    else:
        _train(config, start, source, options, given.get("epochs"))


def _resumed_config(run: Path, epochs: int | None) -> TrainConfig:
    """The configuration of a run, with other epochs if they are given."""
    config = saved_config(run)
    if epochs is None:
        return config
    history = saved_history(run)
    with values_of_options():
        return with_epochs(config, epochs, history)


def _requested(
    options: RunOptions, dataset: str | None, method: str | None, given: dict[str, Any]
) -> tuple[TrainConfig, Classifier | None]:
    """The configuration that the options describe, and the saved model to start from, if any."""
    if options.from_model is None:
        return _requested_config(options.config_file, dataset, method, given), None
    file = read_model_file(options.from_model)
    if dataset is None and options.config_file is None:
        if file.dataset is None:
            raise UserError(f"{file.path} does not say how it was trained: give --dataset")
        dataset = file.dataset
    own: dict[str, Any] = {"start": fingerprint(file.network)}
    if file.config is not None and dataset == file.config.dataset and file.config.image_size:
        own["image_size"] = file.config.image_size
    return _requested_config(options.config_file, dataset, method, own | given), file.network


def _requested_config(
    file: Path | None, dataset: str | None, method: str | None, given: dict[str, Any]
) -> TrainConfig:
    """The configuration that the options describe, and the file if there is one."""
    if file is None:
        with values_of_options():
            config = make_config(dataset or "digits", method or "acert", **given)
    else:
        config = configured(file, dataset, method, given)
    for name, reason in unused(given, config.method):
        raise click.UsageError(f"--{name.replace('_', '-')} {reason}")
    return config


def _train(
    config: TrainConfig,
    start: Classifier | None,
    source: DataSource,
    options: RunOptions,
    epochs: int | None,
) -> None:
    """Trains and certifies in a run folder, and prints the results.

    `epochs` are those that are given; a run to resume is read again once no other process has it.
    """
    resume = options.resume
    with working_ranks(options.device, tensors=True) as (ranks, device):
        if resume is not None:
            config = run_on_rank_zero(
                ranks, lambda: _resumed_config(resources.hold(resume), epochs)
            )
            if run_on_rank_zero(ranks, lambda: is_complete(resume, config)):
                if ranks.first:
                    _print_complete(resume, config)
                return
        data_dir = data_dir_for(source.data_dir, *options.resumed)
        data = run_rank_zero_first(ranks, lambda: dataset_of(config, data_dir, source.download))
        # The rehearsal fails before the folder is made or changed.
        opened = opened_run(config, data, start, out=options.out, resume=resume, ranks=ranks)
        with opened as (config, run):
            if ranks.first:
                _print_head(config, data, run, f"{device}{_several(ranks)}")
            command = f"ibp train --resume {quote(str(run))}"
            if resume is not None:
                with resumable(f"{command} --epochs {config.epochs}", run / CONFIG):
                    run_on_rank_zero(ranks, lambda: _take_up(run, config))
            with (
                resumable(command, run / CONFIG),
                logged(options.loggers if ranks.first else [], run, config, _warn) as log,
            ):
                run_on_rank_zero(ranks, lambda: remember_data_dir(run, data_dir, config.dataset))
                print_epoch = epoch_printer(config, _finished_epochs(run))

                def row(metrics: Metrics) -> None:
                    print_epoch(metrics)
                    log.row(metrics)

                summary = train_and_certify(
                    config,
                    data,
                    run,
                    device=device,
                    resume=resume is not None,
                    monitor=Monitor(progress if ranks.first else unwatched, log._replace(row=row)),
                    ranks=ranks,
                    start=start,
                )
    if not ranks.first:
        return
    _print_results(run, config, summary)
    for line in advice(config, summary, len(data.classes)):
        click.echo(f"\n{line}")
    hint_at_figures()
    claim = "" if config.claim == "real" else f" --claim {config.claim}"
    bound = "" if config.train_bound == "ibp" else f" --bound {config.train_bound}"
    again = f"ibp certify {quote(str(run / MODEL))}{bound}{claim}"
    click.echo(f"\nall files are in {run}; certify again with: {again}")


def _print_head(config: TrainConfig, data: Dataset, run: Path, devices: str) -> None:
    """What is trained, and where, with doubts if the run is too short."""
    print_remarks(data)
    click.echo(class_line(data))
    click.echo(
        f"training {config.method} on {data.title}: {counted(len(data.train), 'image')},"
        f" epochs: {config.epochs}, {devices}, threads:"
        f" {config.threads or torch.get_num_threads()}; run folder {run}"
    )
    for line in doubts(config, len(data.train)):
        click.echo(line)


def _several(ranks: Ranks) -> str:
    return f" each of {ranks.size} processes" if ranks.size > 1 else ""


def _take_up(run: Path, config: TrainConfig) -> None:
    """Gives a run the epochs of `config`, and says after which it goes on."""
    kept = extend(run, config)
    if kept is not None:
        click.echo(f"the results so far are kept in {kept}")
    history = saved_history(run)
    after = f"after epoch {len(history)} of {config.epochs}"
    if is_over(history, config):
        click.echo(f"training ended {after}: resuming the certification")
    else:
        click.echo(f"resuming {after}")


def _print_complete(run: Path, config: TrainConfig) -> None:
    """The results of a run in which nothing is left to do, and how to train it further."""
    summary = read_summary(run / SUMMARY)
    _print_results(run, config, summary)
    click.echo(
        f"\nthe run in {run} is complete: training ended after epoch {summary['epochs']} of"
        f" {config.epochs}, and the test images are certified; {_further(run, config)}"
    )


def _further(run: Path, config: TrainConfig) -> str:
    """How a complete run is trained further, or why it is not: the end of a sentence."""
    epochs = 2 * config.epochs
    if is_over(metrics_of(run), replace(config, epochs=epochs)):
        return "its patience ended, so it cannot be trained further"
    if config.dataset == OWN:
        call = f"ibpcore.resume({str(run)!r}, (images, labels), epochs={epochs})"
        return f"to train it further, give its images again in Python: {call}"
    return f"to train it further: ibp train --resume {quote(str(run))} --epochs {epochs}"


def _print_results(run: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """`summary`, of the test images, after that of the validation images if there are any."""
    _print_choice(config, summary)
    if config.validation > 0:
        print_summary(read_summary(run / VALIDATION), "validation")
    print_summary(summary)


def _finished_epochs(run: Path) -> int:
    """Number of epochs in the metrics of a run folder, 0 before there are any."""
    metrics = run / METRICS
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _print_choice(config: TrainConfig, summary: dict[str, Any]) -> None:
    """When the run stopped early, and whose epoch's weights it delivers if not the last one's."""
    if summary["epochs"] < config.epochs:
        click.echo(
            f"stopped after epoch {summary['epochs']} of {config.epochs}: held-out ART rose no"
            f" more (--patience {config.patience})"
        )
    if config.select_weights == "best":
        click.echo(
            f"weights of epoch {summary['weights_of_epoch']}, the best of {summary['epochs']}"
            " by held-out ART"
        )


def _print_dry_run(
    config: TrainConfig, start: Classifier | None, source: DataSource, options: RunOptions
) -> None:
    """The configuration as TOML, and as comments what a run of it costs."""
    if source.download:
        raise click.UsageError("--dry-run writes nothing: leave out --download")
    if ranks_of_environment().size > 1:
        raise click.UsageError("--dry-run runs in a single process: start it without torchrun")
    where = current_device(options.device)
    data = dataset_of(config, data_dir_for(source.data_dir, *options.resumed))
    network = rehearse(config, data, start)
    click.echo(to_toml(config))
    run = with_threads(config, network, SINGLE_PROCESS)
    found = estimate_cost(run, data, where, start)
    memory = "not known here" if found.memory is None else f"{found.memory / 2**30:.2f} GiB"
    for line in data.remarks:
        click.echo(f"# {line}")
    click.echo(
        f"# {class_line(data)}\n"
        f"# {data.title}: {counted(len(data.train), 'training image')}\n"
        f"# {found.parameters:,} parameters\n"
        f"# {counted(found.steps_per_epoch, 'step')} an epoch, {found.steps:,} in all\n"
        f"# memory: {memory} at most, measured in a few steps on {where}\n"
        f"# threads: {run.threads}\n"
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
    clear_progress()
    click.echo(f"Warning: {message}", err=True)
