"""What a person sees: progress on a terminal, and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from ibpcore.certification import Certificates, write_certificates, write_summary
from ibpcore.plots import write_curve

Advance = Callable[[int, str], None]


@contextmanager
def progress(label: str, length: int) -> Iterator[Advance | None]:
    """A bar with the time left on a terminal; None, hence silence, in a pipe.

    Yields:
        a function of the work done so far, up to `length`, and a remark.
    """
    if not sys.stderr.isatty():
        yield None
        return
    with click.progressbar(
        length=length, label=label, file=sys.stderr, item_show_func=lambda remark: remark
    ) as bar:

        def advance(done: int, remark: str) -> None:
            bar.update(done - bar.pos, remark)

        yield advance


def write_results(
    folder: Path, certificates: Certificates, summary: dict[str, Any], title: str
) -> None:
    """The table, the summary and, if matplotlib is there, the curve, into `folder`."""
    write_certificates(folder / "certificates.csv", certificates)
    write_summary(folder / "summary.json", summary)
    if find_spec("matplotlib") is None:
        click.echo("no figure: pip install 'ibpcore[plot]'", err=True)
        return
    write_curve(folder / "certified_accuracy.png", certificates, summary["epsilon_max"], title)


def print_summary(summary: dict[str, Any], title: str) -> None:
    """The numbers in percent."""
    epsilon_max = summary["epsilon_max"]
    click.echo(
        f"\n{title}, {summary['samples']} test images,"
        f" epsilon_max {epsilon_max:.4g} ({255 * epsilon_max:.4g}/255)\n"
    )
    rows = [("accuracy", summary["accuracy"]), ("ACR", summary["acr"]), ("ART", summary["art"])]
    rows += [
        (f"certified at {radius}", share) for radius, share in summary["certified_accuracy"].items()
    ]
    width = max(len(name) for name, _ in rows)
    for name, share in rows:
        click.echo(f"  {name:<{width}}  {100 * share:6.2f} %")
