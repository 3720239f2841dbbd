"""`ibp certify IMAGE... --model MODEL`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

import ibpcore
from ibpcore import RadiusStatus, UserError
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import Certificates
from ibpcore.certification.certify import CertificationOptions
from ibpcore.certification.formatting import as_text, rounded_down
from ibpcore.certification.image_files import certify_pictures, write_picture_table
from ibpcore.data.image_files import Pictures, read_pictures
from ibpcore.data.images import ImageSet
from ibpcore.errors import printable
from ibpcore.inspection.heatmap import heatmaps
from ibpcore.io.files import write_atomic
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.networks import Classifier
from ibpcore.roots import RootOptions
from ibpcore.visualization.heatmaps import beside, png
from ibpcore.visualization.html.contents import picture_page
from ibpcore.visualization.html.page import render
from ibpcore_cli.options import check_new, chosen_device, new_folder
from ibpcore_cli.output import progress
from ibpcore_cli.saved_model import Opened, ball_of, open_model

LONGEST = 50
"""Characters of a picture's name in that of its heatmap, which a file system must take."""


def certify_images(
    paths: Sequence[Path],
    model: Path,
    *,
    image_size: int | None,
    epsilon_max: float | None,
    bound: str,
    claim: str,
    device: str,
    elide: bool | None,
    clip: bool | None,
    options: RootOptions,
    table: Path | None,
    heatmap: Path | None,
    page: Path | None,
) -> None:
    """Certifies pictures and prints a table of them; writes what has a path.

    Raises:
        UserError: something is missing or damaged, or does not fit; no file is written then.
        OSError: a file cannot be written.
    """
    for file in (table, page):
        check_new(file)
    if table is not None and table == page:
        raise UserError(f"--out and --html both name {table}")
    opened = open_model(model)
    if opened.config is None and epsilon_max is None:
        raise UserError(f"{opened.path} does not say how it was trained: give --epsilon-max")
    ball = ball_of(opened.config, epsilon_max, elide, clip)
    classes, network = class_names(opened), opened.network.to(chosen_device(device))
    size = image_size or (opened.config.image_size if opened.config else None)
    pictures = read_pictures(paths, classes, network.in_shape, size)
    folder = None if heatmap is None else new_folder(heatmap, heatmap)
    bounds = BoundOptions(bound, ball["elide"], (0.0, 1.0) if ball["clip"] else None)
    chosen = CertificationOptions(ball["epsilon_max"], claim, bounds, options)
    with progress("certifying", len(pictures)) as advance:
        report = None if advance is None else lambda done: advance(done, "")
        certificates = certify_pictures(network, pictures, chosen, report=report)
    settings = {
        "method": opened.method,
        "model": str(opened.path),
        "weights": fingerprint(network),
        "bound": bound,
        "claim": claim,
        **ball,
        **asdict(options),
        "ibpcore": ibpcore.__version__,
    }
    print_pictures(pictures, certificates, classes, settings)
    if table is not None:
        write_picture_table(table, pictures, certificates, classes, claim)
    if folder is not None:
        write_heatmaps(folder, network, pictures, certificates, bounds)
    if page is not None:
        made = picture_page(
            network,
            pictures,
            certificates,
            classes,
            settings,
            opened.trained_on,
            table.name if table else None,
        )
        write_atomic(page, render(made).encode())


def write_heatmaps(
    folder: Path,
    network: Classifier,
    pictures: Pictures,
    certificates: Certificates,
    bounds: BoundOptions,
) -> None:
    """A PNG file for each picture with a certificate, numbered as they were read."""
    images = ImageSet(pictures.images, certificates.label).to(next(network.parameters()).device)
    maps = heatmaps(network, images, certificates.radius, bounds)
    digits = len(str(len(maps) - 1))
    for number, (image, heat) in enumerate(zip(pictures.images, maps, strict=True)):
        if heat is not None:
            name = f"{number:0{digits}d}-{pictures.paths[number].stem[:LONGEST]}.png"
            write_atomic(folder / name, png(beside(image, heat)))


def class_names(opened: Opened) -> list[str]:
    """Those that the model was saved with; numbers where it has none."""
    names, count = opened.facts.get("classes"), opened.network.classes
    if isinstance(names, list) and len(names) == count and all(isinstance(n, str) for n in names):
        return [printable(name) for name in names]
    return [str(label) for label in range(count)]


def print_pictures(
    pictures: Pictures,
    certificates: Certificates,
    classes: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """A line a picture, its radius rounded down, and what holds for all."""
    count = len(pictures)
    click.echo(
        f"\n{settings['method']}, {count} image{'s' * (count > 1)},"
        f" epsilon_max {as_text(settings['epsilon_max'])}, certified by {settings['bound']},"
        f" claim: {settings['claim']}\n"
    )
    labelled = any(label is not None for label in pictures.labels)
    rows = [["image", *["label"] * labelled, "prediction", "radius", "in [0, 1]", "status"]]
    for i, path in enumerate(pictures.paths):
        label, radius = pictures.labels[i], float(certificates.radius[i])
        known = ["-" if label is None else classes[label]] if labelled else []
        status = RadiusStatus(int(certificates.status[i])).name.lower().replace("_", " ")
        if pictures.resized[i]:
            status += ", resized"
        texts = [f"{rounded_down(radius, 255, 3)}/255", rounded_down(radius)]
        prediction = classes[int(certificates.prediction[i])]
        rows.append([printable(str(path)), *known, prediction, *texts, status])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            f"{cell:>{width}}" if len(row) - 4 < place < len(row) - 1 else f"{cell:<{width}}"
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        click.echo("  " + "  ".join(cells).rstrip())
    click.echo("")
    for line in _remarks(pictures, certificates):
        click.echo(f"  {line}")


def _remarks(pictures: Pictures, certificates: Certificates) -> list[str]:
    """What the table does not say by itself."""
    known = torch.tensor([label is not None for label in pictures.labels])
    lines = []
    if known.any():
        right = (certificates.prediction == certificates.label)[known].double().mean()
        lines.append(f"accuracy {100 * right:.2f} % of {int(known.sum())} labelled images")
    if not known.all():
        lines.append("without a label, the certificate is of the prediction, right or wrong")
    if any(pictures.resized):
        lines.append("resized images: the certificate is of what they were resized and cropped to")
    return lines
