"""What commands print: progress on a terminal, and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from ibpcore.bounds.registry import BOUNDS, next_tighter
from ibpcore.certification.formatting import as_text
from ibpcore.certification.metrics import certifies_almost_nothing
from ibpcore.data.images import Dataset
from ibpcore.progress import Advance
from ibpcore.visualization.plots.style import figures_possible


class Contradiction(click.ClickException):
    """A bound is wrong; the exit code differs from that of the user's errors."""

    exit_code = 3


@contextmanager
def progress(label: str, length: int) -> Iterator[Advance | None]:
    """A `Watch`: a progress bar on a terminal; nothing if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, item_show_func=lambda remark: remark
    ) as bar:

        def advance(done: int, remark: str) -> None:
            bar.update(done - bar.pos, remark)

        yield advance


def print_remarks(data: Dataset) -> None:
    """How many files of a tree of images were found, passed over and changed."""
    for line in data.remarks:
        click.echo(line)


def clear_bar() -> None:
    """Clears the line of a progress bar, so that other output can replace it."""
    if sys.stderr.isatty():
        click.echo("\r\x1b[K", nl=False, err=True)


def print_summary(summary: dict[str, Any], part: str = "test") -> None:
    """The measures of a summary in percent, for the images of that part of the data set."""
    click.echo(
        f"\n{summary['method']} on {summary['dataset']}, {summary['samples']} {part} images,"
        f" epsilon_max {as_text(summary['epsilon_max'])},"
        f" certified by {summary['bound']}, claim: {summary['claim']}\n"
    )
    rows = [("accuracy", summary["accuracy"]), ("ACR", summary["acr"]), ("ART", summary["art"])]
    rows += [
        (f"certified at {radius}", share) for radius, share in summary["certified_accuracy"].items()
    ]
    print_table([(name, f"{100 * share:6.2f} %") for name, share in rows], "<<")


def print_table(rows: Sequence[Sequence[str]], sides: str) -> None:
    """Columns two spaces apart, each aligned to its side: `<` or `>`."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (f"{c:{side}{n}}" for c, side, n in zip(row, sides, widths, strict=True))
        click.echo("  " + "  ".join(cells).rstrip())


def percentage(share: float | None, digits: int = 2) -> str:
    """A share in percent; "-" if it is None."""
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def hint_at_bounds(bound: str, accuracy: float, acr: float) -> None:
    """Names the next tighter bound where this one certifies almost nothing."""
    tighter = next_tighter(bound)
    if tighter is not None and certifies_almost_nothing(accuracy, acr):
        click.echo(
            f"\nhint: {BOUNDS[bound].title} certifies almost nothing here;"
            f" {BOUNDS[tighter].title} is tighter, and slower: --bound {tighter}"
        )


def hint_at_figures() -> None:
    """Says how to install what draws figures, if it is missing."""
    if not figures_possible():
        click.echo("\nno figure: pip install 'ibpcore[plot]'")
