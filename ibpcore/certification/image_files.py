"""Certificates of image files outside any data set, and their table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ibpcore.certification.certificates import Certificates, certificate_rows, write_table
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.radii import Climbed
from ibpcore.data.batches import ordered_batches
from ibpcore.data.image_files import Pictures
from ibpcore.data.images import ImageSet
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import weight_like
from ibpcore.precision import full_precision
from ibpcore.progress import Advance


def certify_pictures(
    model: nn.Module,
    pictures: Pictures,
    options: CertificationOptions,
    *,
    advance: Advance | None = None,
    climbed: Climbed | None = None,
) -> Certificates:
    """Certifies pictures as `certify` does a data set; an unknown label becomes the prediction.

    The certificate of a picture without a label says that no perturbation up to its radius
    changes the prediction, right or wrong. The pictures have the model's input shape.

    Raises:
        UserError: see `certify`.
    """
    device = weight_like(model).device
    images = ImageSet(pictures.images, torch.zeros(len(pictures), dtype=torch.long)).to(device)
    predicted = _predictions(model, images, options.batch_size).tolist()
    pairs = zip(predicted, pictures.labels, strict=True)
    labels = [prediction if label is None else label for prediction, label in pairs]
    labelled = ImageSet(images.images, torch.tensor(labels, device=device))
    return certify(model, labelled, options, advance=advance, climbed=climbed)


@torch.no_grad()
def _predictions(model: nn.Module, images: ImageSet, batch_size: int) -> Tensor:
    """(N,) int64, computed in the same batches and precision as by `certify`."""
    dtype = weight_like(model).dtype
    with full_precision():
        network = fold(model)
        batches = ordered_batches(images, batch_size)
        return torch.cat([network(batch.images.to(dtype)).argmax(1) for batch in batches])


def write_picture_table(
    path: Path, pictures: Pictures, certificates: Certificates, classes: Sequence[str], claim: str
) -> None:
    """Writes the certificates of pictures as CSV, in the columns of `certificates.csv`.

    Instead of the index stands `image`, the file. Classes are named, the label is empty if
    unknown, and `changes` says how the certified pixels differ from the file.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
            "image": str(pictures.paths[i]),
            **row,
            "label": "" if (label := pictures.labels[i]) is None else classes[label],
            "prediction": classes[int(row["prediction"])],
            "changes": ", ".join(pictures.changes[i]),
        }
        for i, row in enumerate(certificate_rows(certificates, claim))
    ]
    write_table(path, rows)
