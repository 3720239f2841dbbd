"""Certificates of image files outside any data set."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ibpcore.certification.certificates import Certificates
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import RadiusStatus
from ibpcore.data.batches import ordered_batches
from ibpcore.data.image_files import Pictures
from ibpcore.data.images import ImageSet
from ibpcore.io.files import write_atomic
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision
from ibpcore.progress import Advance


def certify_pictures(
    model: nn.Module,
    pictures: Pictures,
    options: CertificationOptions,
    *,
    advance: Advance | None = None,
) -> Certificates:
    """`certify`; the label of a picture without one is the prediction.

    Such a certificate says that no change up to its radius changes this prediction, right or
    wrong.

    Args:
        model: interval layers in evaluation mode, on the device to compute on.
        options, advance: see `certify`.

    Raises:
        UserError: see `certify`.
    """
    device = next(model.parameters()).device
    images = ImageSet(pictures.images, torch.zeros(len(pictures), dtype=torch.long)).to(device)
    predicted = _predictions(model, images, options.batch_size).tolist()
    labels = [
        p if known is None else known for p, known in zip(predicted, pictures.labels, strict=True)
    ]
    labelled = ImageSet(images.images, torch.tensor(labels, device=device))
    return certify(model, labelled, options, advance=advance)


@torch.no_grad()
def _predictions(model: nn.Module, images: ImageSet, batch_size: int) -> Tensor:
    """(N,), from the very passes that `certify` makes."""
    dtype = next(model.parameters()).dtype
    with full_precision():
        network = fold(model)
        batches = ordered_batches(images, batch_size)
        return torch.cat([network(batch.images.to(dtype)).argmax(1) for batch in batches])


def write_table(
    path: Path,
    pictures: Pictures,
    certificates: Certificates,
    classes: Sequence[str],
    claim: str,
) -> None:
    """A CSV file with a row a picture; the columns are those of `certificates.csv`.

    But `image`, the file, stands instead of the index, classes are named, the label is empty
    where there is none, and `resized` is yes or no.

    Raises:
        OSError: it cannot be written.
    """
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    heads = ("label", "prediction", "radius", "upper", "status", "unchecked", "claim", "resized")
    writer.writerow(["image", *heads])
    for i, file in enumerate(pictures.paths):
        label, prediction = pictures.labels[i], int(certificates.prediction[i])
        # All digits of each number: a rounded decimal could exceed what was certified.
        radius, upper, found = (
            repr(float(column[i]))
            for column in (certificates.radius, certificates.upper, certificates.unchecked)
        )
        status = RadiusStatus(int(certificates.status[i])).name.lower()
        known = "" if label is None else classes[label]
        resized = "yes" if pictures.resized[i] else "no"
        row = [known, classes[prediction], radius, upper, status, found, claim, resized]
        writer.writerow([file, *row])
    # Names of files are bytes, which need not be UTF-8.
    write_atomic(path, buffer.getvalue().encode(errors="surrogateescape"))
