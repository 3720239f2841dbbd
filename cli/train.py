"""What `ibp train` does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore.distributed import (
    Ranks,
    current_device,
    ranks_of_environment,
    run_on_rank_zero,
    run_rank_zero_first,
)
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import data_dir_for, remember_data_dir
from ibpcore.experiments.extension import extend, with_epochs
from ibpcore.experiments.opening import opened_run
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import (
    is_complete,
    saved_config,
    starting_model,
)
from ibpcore.nn.checkpoint import MODEL, fingerprint
from ibpcore.nn.networks import Classifier
from ibpcore.progress import unwatched
from ibpcore.training.config import TrainConfig, check_used, make_config
from ibpcore.training.loggers import LOGGERS, Metrics, Monitor, logged, require_loggers
from ibpcore.training.run_files import CONFIG, METRICS, saved_history
from ibpcore.training.selection import is_over
from ibpcore_cli import resources
from ibpcore_cli.advice import advice
from ibpcore_cli.configuration import configured
from ibpcore_cli.decorators import bundle, values_of_options
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.dry_run import print_dry_run
from ibpcore_cli.epoch_lines import epoch_printer
from ibpcore_cli.output import hint_at_figures
from ibpcore_cli.progress import clear_progress, progress
from ibpcore_cli.resources import DataSource
from ibpcore_cli.run_output import print_complete, print_results, print_start
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
        _dry_run(config, start, source, options)
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
    with values_of_options():
        check_used(given, [config.method])
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
                    print_complete(resume, config)
                return
        data_dir = data_dir_for(source.data_dir, *options.resumed)
        data = run_rank_zero_first(ranks, lambda: dataset_of(config, data_dir, source.download))
        # The rehearsal fails before the folder is made or changed.
        opened = opened_run(
            config, data, device, start, out=options.out, resume=resume, ranks=ranks
        )
        with opened as (config, run):
            if ranks.first:
                print_start(config, data, run, f"{device}{_several(ranks)}")
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
    print_results(run, config, summary)
    for line in advice(config, summary, len(data.classes)):
        click.echo(f"\n{line}")
    hint_at_figures()
    claim = "" if config.claim == "real" else f" --claim {config.claim}"
    bound = "" if config.train_bound == "ibp" else f" --bound {config.train_bound}"
    again = f"ibp certify {quote(str(run / MODEL))}{bound}{claim}"
    click.echo(f"\nall files are in {run}; certify again with: {again}")


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


def _finished_epochs(run: Path) -> int:
    """Number of epochs in the metrics of a run folder, 0 before there are any."""
    metrics = run / METRICS
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def _dry_run(
    config: TrainConfig, start: Classifier | None, source: DataSource, options: RunOptions
) -> None:
    if source.download:
        raise click.UsageError("--dry-run writes nothing: leave out --download")
    if ranks_of_environment().size > 1:
        raise click.UsageError("--dry-run runs in a single process: start it without torchrun")
    data = dataset_of(config, data_dir_for(source.data_dir, *options.resumed))
    print_dry_run(config, start, data, current_device(options.device))


def _warn(message: str) -> None:
    clear_progress()
    click.echo(f"Warning: {message}", err=True)
