"""What `ibp predict` prints: a table of the images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import click
import torch

from ibpcore import RadiusStatus
from ibpcore.certification.certificates import Certificates
from ibpcore.certification.formatting import as_text, certified_texts
from ibpcore.data.image_files import Pictures
from ibpcore.errors import printable
from ibpcore.wording import counted
from ibpcore_cli.output import print_table

RADIUS_HEADS = ("radius", "in [0, 1]")
"""Heads of `certified_texts`."""


def print_predictions(
    pictures: Pictures, certificates: Certificates, classes: Sequence[str], summary: dict[str, Any]
) -> None:
    """A line for each picture, its radius rounded down, between a heading and remarks."""
    count = len(pictures)
    click.echo(
        f"\n{summary['method']}, {counted(count, 'image')},"
        f" epsilon_max {as_text(summary['epsilon_max'])}, certified by {summary['bound']},"
        f" claim: {summary['claim']}\n"
    )
    rows = _table_rows(pictures, certificates, classes, summary["epsilon_max"])
    print_table(rows, "".join(">" if head in RADIUS_HEADS else "<" for head in rows[0]))
    click.echo("")
    for line in _remarks(pictures, certificates):
        click.echo(f"  {line}")


def _table_rows(
    pictures: Pictures, certificates: Certificates, classes: Sequence[str], epsilon_max: float
) -> list[list[str]]:
    """The cells of the table, headings first; labels only if there are any."""
    labelled = any(label is not None for label in pictures.labels)
    radius_heads = RADIUS_HEADS[: len(certified_texts(epsilon_max, 0.0))]
    rows = [["image", *["label"] * labelled, "prediction", *radius_heads, "status"]]
    for i, path in enumerate(pictures.paths):
        label, radius = pictures.labels[i], float(certificates.radius[i])
        known = ["-" if label is None else classes[label]] if labelled else []
        status = RadiusStatus(int(certificates.status[i])).name.lower().replace("_", " ")
        status = ", ".join([status, *pictures.changes[i]])
        texts = certified_texts(epsilon_max, radius)
        prediction = classes[int(certificates.prediction[i])]
        rows.append([printable(str(path)), *known, prediction, *texts, status])
    return rows


def _remarks(pictures: Pictures, certificates: Certificates) -> Iterator[str]:
    """What the table does not say by itself."""
    known = torch.tensor([label is not None for label in pictures.labels])
    if known.any():
        right = (certificates.prediction == certificates.label)[known].double().mean()
        yield f"accuracy {100 * right:.2f} % of {counted(int(known.sum()), 'labelled image')}"
    if not known.all():
        yield "without a label, the certificate is of the prediction, right or wrong"
    if kinds := sorted({change for changes in pictures.changes for change in changes}):
        yield f"{', '.join(kinds)}: the certificate is of the image after this change"
    yield from pictures.remarks
