"""`ibp train --dry-run`: the settings of a run, and what it would cost."""

from __future__ import annotations

import click
import torch

from ibpcore.data.images import Dataset
from ibpcore.experiments.opening import settled
from ibpcore.nn.networks import Classifier
from ibpcore.training.compiling import is_long_enough
from ibpcore.training.config import TrainConfig
from ibpcore.training.cost import estimate_cost
from ibpcore.training.rehearsal import rehearse
from ibpcore.wording import counted
from ibpcore_cli.configuration import to_toml
from ibpcore_cli.output import class_line


def print_dry_run(
    config: TrainConfig, start: Classifier | None, data: Dataset, device: torch.device
) -> None:
    """The configuration as TOML, and as comments what a run of it costs on `device`.

    `start` is the saved model to start from, if any.
    """
    network = rehearse(config, data, start)
    click.echo(to_toml(config))
    run = settled(config, network, data, device)
    found = estimate_cost(run, data, device, start)
    auto = config.compile == "auto"
    short = auto and not is_long_enough(config, network, len(data.train), device)
    reason = ", since it would cost more than it saves" if short else ""
    memory = "not known here" if found.memory is None else f"{found.memory / 2**30:.2f} GiB"
    for line in data.remarks:
        click.echo(f"# {line}")
    click.echo(
        f"# {class_line(data)}\n"
        f"# {data.title}: {counted(len(data.train), 'training image')}\n"
        f"# {found.parameters:,} parameters\n"
        f"# {counted(found.steps_per_epoch, 'step')} an epoch, {found.steps:,} in all\n"
        f"# memory: {memory} at most, measured in a few steps on {device}\n"
        f"# threads: {run.threads}\n"
        f"# parts of a batch: {run.accumulate}\n"
        f"# compile: {run.compile}{reason}\n"
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
