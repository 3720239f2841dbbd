"""Options of `ibp report`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.options import shared
from ibpcore_cli.work import call


@click.command("report", cls=GroupedCommand)
@click.argument("paths", nargs=-1, required=True, metavar="RUN...|SWEEP|SEARCH", type=shared.PATH)
@click.option(
    "--out",
    type=shared.PATH,
    help="Folder to make for tables and figures. Default: report, within SWEEP or SEARCH if that is"
    " the only argument.",
)
@click.option(
    "--kappa-zero",
    is_flag=True,
    help="Draw certified accuracies and times of the runs without standard loss (kappa = 0), as"
    " the paper does, instead of those with the best kappa. A method without such a run is drawn"
    " with its best kappa.",
)
def report_command(**given: Any) -> None:
    """Compare runs in the tables and figures of the paper.

    RUN is the folder of a run, SWEEP that of a sweep, and SEARCH that of a search, of which the
    certified trials are reported; any number of them can be given. The best kappa of a method is
    the one with the highest ART on the validation images, or on the test images if a run has no
    validation images; the report says which, and marks it by a dagger. The figures show the runs
    with this kappa.
    """
    call("report", given)
