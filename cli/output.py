"""What a person sees: progress on a terminal, and tables."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

import ibpcore
from ibpcore.certification import certify, summarize, write_certificates, write_summary
from ibpcore.config import STANDARD_RADII
from ibpcore.data import Dataset
from ibpcore.models import CNN7
from ibpcore.plots import write_curve
from ibpcore.radius import RootOptions

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


def certify_test_set(
    model: CNN7,
    data: Dataset,
    folder: Path,
    *,
    epsilon_max: float,
    options: RootOptions,
    elide: bool,
    clip: bool,
    facts: dict[str, Any],
    bound: str = "ibp",
) -> None:
    """Certifies the test images of `data`, prints the summary, writes all into `folder`.

    Args:
        model: on the device to compute on.
        folder: gets the table, the summary and, if matplotlib is there, the curve.
        epsilon_max, options, elide, clip, bound: see `ibpcore.certification.certify`.
        facts: `method`, and what else the summary shall say of the model.
    """
    with progress("certifying", len(data.test)) as advance:
        certificates = certify(
            model.eval(),
            data.test.to(next(model.parameters()).device),
            epsilon_max,
            options,
            bound=bound,
            elide=elide,
            clip=(0.0, 1.0) if clip else None,
            report=None if advance is None else lambda done: advance(done, ""),
        )
    summary = summarize(certificates, epsilon_max, STANDARD_RADII[data.name])
    summary |= {"dataset": data.title, **facts, **asdict(options)}
    summary |= {"bound": bound, "elide": elide, "clip": clip}
    summary["ibpcore"] = ibpcore.__version__
    write_certificates(folder / "certificates.csv", certificates)
    write_summary(folder / "summary.json", summary)
    title = f"{facts['method']} on {data.title}"
    print_summary(summary, title)
    if find_spec("matplotlib") is None:
        click.echo("\nno figure: pip install 'ibpcore[plot]'")
    else:
        write_curve(folder / "certified_accuracy.png", certificates, epsilon_max, title)


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
