"""What `ibp train` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import click
import torch

from ibpcore.distributed import (
    SINGLE_PROCESS,
    Ranks,
    ranks_of_environment,
    run_on_rank_zero,
    run_rank_zero_first,
)
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import VALIDATION, saved_config
from ibpcore.io.files import read_json
from ibpcore.nn.checkpoint import MODEL
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import multiplications
from ibpcore.progress import unwatched
from ibpcore.threads import suitable_threads
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.cost import estimate_cost
from ibpcore.training.loggers import LOGGERS, Metrics, Monitor, logged, require_loggers
from ibpcore.training.rehearsal import rehearse
from ibpcore.training.run_files import METRICS
from ibpcore_cli import resources
from ibpcore_cli.configuration import configured, to_toml, unused
from ibpcore_cli.decorators import bundle, values_of_options
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.epoch_lines import epoch_printer
from ibpcore_cli.output import class_line, hint_at_figures, print_remarks, print_summary
from ibpcore_cli.progress import clear_progress, progress
from ibpcore_cli.resources import DataSource


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
        with values_of_options():
            config = make_config(dataset or "digits", method or "acert", **given)
    else:
        config = configured(file, dataset, method, given)
    for name, reason in unused(given, config.method):
        raise click.UsageError(f"--{name.replace('_', '-')} {reason}")
    return config


def _train(config: TrainConfig, source: DataSource, options: RunOptions) -> None:
    """Trains and certifies in a run folder, and prints the results."""
    default = Path("runs") / f"{config.dataset}-{config.method}"
    hint, resume = resources.data_dir_hint(source.data_dir), options.resume
    with working_ranks(options.device, tensors=True) as (ranks, device):
        data = run_rank_zero_first(
            ranks, lambda: dataset_of(config, source.data_dir, source.download)
        )
        # Fails before the folder is made.
        network = run_rank_zero_first(ranks, lambda: rehearse(config, data))
        if resume is None:
            config = run_on_rank_zero(ranks, lambda: with_threads(config, network, ranks))
        run = run_on_rank_zero(
            ranks,
            lambda: (
                resources.hold(resume) if resume else resources.new_folder(options.out, default)
            ),
        )
        if ranks.first:
            print_remarks(data)
            click.echo(class_line(data))
            several = f" each of {ranks.size} processes" if ranks.size > 1 else ""
            click.echo(
                f"training {config.method} on {data.title}: {len(data.train)} images,"
                f" epochs: {config.epochs}, {device}{several}, threads:"
                f" {config.threads or torch.get_num_threads()}; run folder {run}"
            )
        with (
            resumable(f"ibp train --resume {quote(str(run))}{hint}"),
            logged(options.loggers if ranks.first else [], run, config, _warn) as log,
        ):
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
            )
    if not ranks.first:
        return
    _print_choice(config, summary)
    if config.validation > 0:
        print_summary(read_json(run / VALIDATION), "validation")
    print_summary(summary)
    hint_at_figures()
    claim = "" if config.claim == "real" else f" --claim {config.claim}"
    bound = "" if config.train_bound == "ibp" else f" --bound {config.train_bound}"
    again = f"ibp certify {quote(str(run / MODEL))}{hint}{bound}{claim}"
    click.echo(f"\nall files are in {run}; certify again with: {again}")


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


def with_threads(config: TrainConfig, network: Classifier, ranks: Ranks) -> TrainConfig:
    """The configuration with its number of threads, chosen by the size of a step if left out."""
    if config.threads is not None:
        return config
    work = config.batch_size / ranks.size * multiplications(network)
    return replace(config, threads=suitable_threads(work))


def _print_dry_run(config: TrainConfig, source: DataSource, device: str) -> None:
    """The configuration as TOML, and as comments what a run of it costs."""
    if source.download:
        raise click.UsageError("--dry-run writes nothing: leave out --download")
    if ranks_of_environment().size > 1:
        raise click.UsageError("--dry-run runs in a single process: start it without torchrun")
    where = resources.current_device(device)
    data = dataset_of(config, source.data_dir)
    network = rehearse(config, data)
    click.echo(to_toml(config))
    run = with_threads(config, network, SINGLE_PROCESS)
    found = estimate_cost(run, data, where)
    memory = "not known here" if found.memory is None else f"{found.memory / 2**30:.2f} GiB"
    for line in data.remarks:
        click.echo(f"# {line}")
    click.echo(
        f"# {class_line(data)}\n"
        f"# {data.title}: {len(data.train)} training images\n"
        f"# {found.parameters:,} parameters\n"
        f"# {found.steps_per_epoch:,} steps an epoch, {found.steps:,} in all\n"
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
