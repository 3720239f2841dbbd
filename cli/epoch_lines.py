"""The line that `ibp train` prints at the end of an epoch, unless a terminal shows its progress."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator
from statistics import fmean

import click

from ibpcore.certification.formatting import in_unit_of
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import Metrics
from ibpcore.training.selection import VALIDATION
from ibpcore_cli.progress import GAP, clear_progress, duration

RECENT = 10
"""Number of epochs from whose seconds the time left is estimated."""
MEASURES = {"accuracy": "validation", "acr": "ACR", "art": "ART"}
"""Entries of the measures of held-out images, and what they are called in a line."""


def epoch_printer(config: TrainConfig, finished: int) -> Callable[[Metrics], None]:
    """Prints the rows of `metrics.jsonl` on stdout, each when its epoch ends.

    Args:
        config: of the run.
        finished: number of epochs that a resumed run has finished, whose rows are not printed.
    """
    seconds = deque[float](maxlen=RECENT)

    def print_row(row: Metrics) -> None:
        seconds.append(row["seconds"])
        if row["epoch"] > finished and not (sys.stdout.isatty() and sys.stderr.isatty()):
            clear_progress()
            left = fmean(seconds) * (config.epochs - row["epoch"])
            click.echo(GAP.join(_columns(row, config, left)))

    return print_row


def _columns(row: Metrics, config: TrainConfig, left: float) -> Iterator[str]:
    digits = len(str(config.epochs))
    yield f"epoch {row['epoch']:{digits}}/{config.epochs}"
    yield f"loss {row['loss']:7.4f}"
    yield f"accuracy {100 * row['accuracy']:6.2f} %"
    yield f"epsilon {in_unit_of(config.epsilon_max, row['epsilon']):12}"
    yield f"{row['seconds']:6.1f} s"
    yield f"{duration(left):>7} left"
    for name, title in MEASURES.items():
        if VALIDATION in row:  # not of every epoch, so at the end
            yield f"{title} {100 * row[VALIDATION][name]:6.2f} %"
