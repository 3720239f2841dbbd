"""What `ibp train` says of a run: at its start, and of its results."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click
import torch

from ibpcore.certification.certificates import SUMMARY
from ibpcore.certification.summary import read_summary
from ibpcore.data.arrays import OWN
from ibpcore.data.images import Dataset
from ibpcore.experiments.run_folder import VALIDATION, metrics_of
from ibpcore.training.config import TrainConfig
from ibpcore.training.selection import is_over
from ibpcore.wording import counted
from ibpcore_cli.advice import doubts
from ibpcore_cli.output import class_line, print_remarks, print_summary


def print_start(config: TrainConfig, data: Dataset, run: Path, devices: str) -> None:
    """What is trained, and where, with doubts if the run is too short."""
    print_remarks(data)
    click.echo(class_line(data))
    compiled = ", compiled first (a minute or more)" if config.compile == "on" else ""
    click.echo(
        f"training {config.method} on {data.title}: {counted(len(data.train), 'image')},"
        f" epochs: {config.epochs}, {devices}, threads:"
        f" {config.threads or torch.get_num_threads()}"
        f"{compiled}; run folder {run}"
    )
    if (config.accumulate or 1) > 1:
        click.echo(
            f"each batch is bounded in {config.accumulate} parts, one after the other, to save"
            " memory (--accumulate)"
        )
    for line in doubts(config, len(data.train)):
        click.echo(line)


def print_results(run: Path, config: TrainConfig, summary: dict[str, Any]) -> None:
    """`summary`, of the test images, after that of the validation images if there are any."""
    _print_choice(config, summary)
    if config.validation > 0:
        print_summary(read_summary(run / VALIDATION), "validation")
    print_summary(summary)


def print_complete(run: Path, config: TrainConfig) -> None:
    """The results of a run in which nothing is left to do, and how to train it further."""
    summary = read_summary(run / SUMMARY)
    print_results(run, config, summary)
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
