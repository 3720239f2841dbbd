"""`ibp report`."""

from __future__ import annotations

from pathlib import Path

import click

from ibpcore.experiments.comparison import read_all
from ibpcore.experiments.reports import report, write_report
from ibpcore.experiments.sweeps import SWEEP
from ibpcore_cli.options import PATH, new_folder
from ibpcore_cli.output import hint_at_figures


@click.command("report")
@click.argument("paths", nargs=-1, required=True, metavar="RUN...|SWEEP", type=PATH)
@click.option(
    "--out",
    type=PATH,
    help="Folder to make for tables and figures. Default: report, within SWEEP if that is the only"
    " argument.",
)
@click.option(
    "--kappa-zero",
    is_flag=True,
    help="Draw certified accuracies and times of the runs without standard loss (kappa = 0), as"
    " the paper does, instead of those with the best kappa. A method without such a run is drawn"
    " with its best kappa.",
)
def report_command(paths: tuple[Path, ...], out: Path | None, kappa_zero: bool) -> None:
    """Compare runs in the tables and figures of the paper.

    RUN is the folder of a run, SWEEP that of a sweep; any number of both can be given. The
    best kappa of a method is the one with the highest ART on the validation images, or on the
    test images if a run has no validation images; the report says which, and marks it by a
    dagger. The figures show the runs with this kappa.
    """
    results, notes = read_all(paths)
    text = report(results, notes)
    alone = len(paths) == 1 and (paths[0] / SWEEP).exists()
    folder = new_folder(out, (paths[0] if alone else Path()) / "report")
    write_report(folder, results, notes, kappa_zero)
    click.echo(text)
    hint_at_figures()
    click.echo(f"all files are in {folder}")
