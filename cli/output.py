"""What commands print: summaries, tables and hints."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import click

from ibpcore.bounds.ladder import next_tighter, rungs
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import Certificates, CertificateTable
from ibpcore.certification.certify import CertificationOptions
from ibpcore.certification.formatting import as_text
from ibpcore.certification.summary import left_open
from ibpcore.certification.trial import try_bound
from ibpcore.data.images import Dataset, ImageSet, listed
from ibpcore.errors import printable
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.visualization.plots.style import figures_possible
from ibpcore.wording import counted

SHARE_OPEN = 0.1
"""Share of the accurate images that are open, from which on a tighter bound is named."""


class Contradiction(click.ClickException):
    """A bound is wrong; the exit code differs from that of the user's errors."""

    exit_code = 3


def print_remarks(data: Dataset) -> None:
    """How many files of a tree of images were found, passed over and changed."""
    for line in data.remarks:
        click.echo(line)


def class_line(data: Dataset) -> str:
    """The number of classes, and their names, of many the first and the last."""
    return printable(f"{counted(len(data.classes), 'class')}: {listed(data.classes)}")


def print_summary(summary: dict[str, Any], part: str = "test") -> None:
    """The measures of a summary in percent, for the images of that part of the data set."""
    click.echo(
        f"\n{summary['method']} on {summary['dataset']},"
        f" {counted(summary['samples'], f'{part} image')},"
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


class Costs:
    """The images that each bound tried, and the seconds it took, in this process."""

    def __init__(self) -> None:
        self.images: defaultdict[str, int] = defaultdict(int)
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def add(self, bound: str, images: int, seconds: float) -> None:
        """Adds those of a batch, see `ibpcore.certification.radii.Climbed`."""
        self.images[bound] += images
        self.seconds[bound] += seconds


def print_bounds(certified_by: dict[str, int], costs: Costs) -> None:
    """How many radii above 0 each of several bounds certified, and at what cost."""
    if len(costs.images) < 2:
        return
    rows = [("bound", "tried", "radii", "seconds")]
    rows += [
        (name, str(tried), str(certified_by.get(name, 0)), f"{costs.seconds[name]:.1f}")
        for name, tried in costs.images.items()
    ]
    click.echo()
    print_table(rows, "<>>>")


def hint_at_bounds(
    model: Classifier,
    images: ImageSet,
    certificates: Certificates | CertificateTable,
    options: CertificationOptions,
    counts: str = "accurate image",
) -> None:
    """Where many accurate images are open, says what the next tighter bound makes of a few.

    `counts` is what the images are called whose label is their prediction.
    """
    label, prediction, radius = certificates.label, certificates.prediction, certificates.radius
    remaining = left_open(label, prediction, radius, options.epsilon_max).nonzero()[:, 0]
    accurate = int((label == prediction).sum())
    tighter = next_tighter(rungs(options.bounds.bound)[-1])
    if tighter is None or len(remaining) == 0 or len(remaining) < SHARE_OPEN * accurate:
        return
    some = images[remaining.to(images.labels.device)].to(weight_like(model).device)
    bounds = replace(options.bounds, bound=tighter)
    tried, certified, seconds = try_bound(model.eval(), some, options.epsilon_max, bounds)
    click.echo(
        f"\nhint: open at {as_text(options.epsilon_max)}: {len(remaining)} of"
        f" {counted(accurate, counts)}; {BOUNDS[tighter].title} tried on {tried} of them"
        f" certified {certified}, in {seconds / tried:.2g} s each: --bound {tighter}"
    )


def hint_at_figures() -> None:
    """Says how to install what draws figures, if it is missing."""
    if not figures_possible():
        click.echo("\nno figure: pip install 'ibpcore[plot]'")
