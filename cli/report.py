"""What `ibp report` does."""

from __future__ import annotations

from pathlib import Path

import click

from ibpcore.experiments.comparison import read_all
from ibpcore.experiments.reports import report, write_report
from ibpcore.experiments.searches.search import SEARCH
from ibpcore.experiments.sweeps import SWEEP
from ibpcore_cli.output import hint_at_figures
from ibpcore_cli.resources import new_folder


def carry_out(paths: tuple[Path, ...], out: Path | None, kappa_zero: bool) -> None:
    results, notes = read_all(paths)
    text = report(results, notes)
    alone = len(paths) == 1 and any((paths[0] / name).exists() for name in (SWEEP, SEARCH))
    folder = new_folder(out, (paths[0] if alone else Path()) / "report")
    write_report(folder, results, notes, kappa_zero)
    click.echo(text)
    hint_at_figures()
    click.echo(f"all files are in {folder}")
