"""Content of the pages: of a test set, or of pictures, with their certificates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import Certificates, read_certificates
from ibpcore.certification.formatting import as_text, certified_text, percent
from ibpcore.certification.radii import RadiusStatus
from ibpcore.data.image_files import Pictures
from ibpcore.data.images import Dataset, ImageSet, subset_indices
from ibpcore.inspection.heatmap import heatmaps
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.visualization.html.image_table import Entry
from ibpcore.visualization.html.page import Facts, Page
from ibpcore.wording import counted

SHOWN = 200
"""Images on a page: as many as a browser on a phone can hold."""


def data_set_page(
    model: Classifier, dataset: Dataset, table: Path, summary: dict[str, Any], trained_on: str
) -> Page:
    """Page of the certificates that `ibpcore.experiments.test_set.certify_test_set` wrote.

    Args:
        model: on the device to compute heatmaps on.
        dataset: whose test images were certified.
        table: path of `certificates.csv`.
        summary: returned by `certify_test_set`.
        trained_on: names the data set of the model.

    Raises:
        UserError: the table is damaged.
    """
    certificates = read_certificates(table)
    rows = torch.from_numpy(subset_indices(len(certificates.rows), SHOWN))
    names = dataset.classes
    some = dataset.test.to(weight_like(model).device)[rows]
    maps = _heatmaps(model, some, certificates.radius[rows], summary)
    entries = [
        Entry(
            f"test image {index}",
            names[int(certificates.label[index])],
            names[int(certificates.prediction[index])],
            float(certificates.radius[index]),
            certificates.rows[index]["status"],
            image.cpu(),
            heat,
        )
        for index, image, heat in zip(rows.tolist(), some.images, maps, strict=True)
    ]
    measures = [("images", f"{len(certificates.rows):,}")]
    measures += [(name, percent(summary[name.lower()])) for name in ("accuracy", "ACR", "ART")]
    quoted = summary["certified_accuracy"].items()
    measures += [(f"certified at {radius}", percent(share)) for radius, share in quoted]
    return Page(
        f"Certificates of {summary['method']} on {dataset.title}",
        f"{counted(len(certificates.rows), 'test image')}, certified up to {_limit(summary)}",
        measures,
        [
            ("certified", f"test images of {dataset.title}"),
            *(("read", remark) for remark in dataset.remarks),
            *_facts(model, summary, trained_on),
        ],
        summary["claim"],
        certificates.radius,
        summary["epsilon_max"],
        summary["accuracy"],
        entries,
        _note(len(certificates.rows), table.name),
    )


def picture_page(
    model: Classifier,
    pictures: Pictures,
    certificates: Certificates,
    classes: Sequence[str],
    settings: dict[str, Any],
    trained_on: str,
    table: str | None,
) -> Page:
    """Page of pictures from image files.

    Args:
        model: on the device to compute heatmaps on.
        pictures: N image files.
        certificates: made by `ibpcore.certification.image_files.certify_pictures`.
        classes: names, in the order of the labels.
        settings: as in a summary, see `_facts`.
        trained_on: names the data set of the model.
        table: name of the file that lists all certificates; None if there is none.
    """
    known = torch.tensor([label is not None for label in pictures.labels])
    right = certificates.prediction[known] == certificates.label[known]
    accuracy = float(right.double().mean()) if len(right) else None
    median = float(certificates.radius.median())
    measures = [
        ("images", f"{len(pictures):,}"),
        ("certified", f"{int((certificates.radius > 0).sum()):,}"),
        ("median radius", certified_text(settings["epsilon_max"], median)),
    ]
    if accuracy is not None:
        measures += [("labelled", f"{len(right):,}"), ("accuracy of these", percent(accuracy))]
    changed = sum(map(bool, pictures.changes))
    note = " ".join([_note(len(pictures), table), *(f"{text}." for text in pictures.remarks)])
    if changed:
        note += f" Changed when read: {changed:,}; the images as shown are certified."
    return Page(
        f"Certificates of {settings['method']} for {counted(len(pictures), 'image')}",
        f"Certified up to {_limit(settings)}; without a label the certificate is of the prediction",
        measures,
        _facts(model, settings, trained_on),
        settings["claim"],
        certificates.radius,
        settings["epsilon_max"],
        accuracy if bool(known.all()) else None,
        _picture_entries(model, pictures, certificates, classes, settings),
        note,
    )


def _picture_entries(
    model: Classifier,
    pictures: Pictures,
    certificates: Certificates,
    classes: Sequence[str],
    settings: dict[str, Any],
) -> list[Entry]:
    rows = torch.from_numpy(subset_indices(len(pictures), SHOWN))
    some = ImageSet(pictures.images[rows], certificates.label[rows])
    device = weight_like(model).device
    maps = _heatmaps(model, some.to(device), certificates.radius[rows], settings)
    return [
        Entry(
            str(pictures.paths[index]),
            None if (label := pictures.labels[index]) is None else classes[label],
            classes[int(certificates.prediction[index])],
            float(certificates.radius[index]),
            RadiusStatus(int(certificates.status[index])).name.lower(),
            pictures.images[index],
            heat,
            ", ".join(pictures.changes[index]),
        )
        for index, heat in zip(rows.tolist(), maps, strict=True)
    ]


def _heatmaps(
    model: Classifier, data: ImageSet, radii: Tensor, settings: dict[str, Any]
) -> list[Tensor | None]:
    clip = (0.0, 1.0) if settings["clip"] else None
    return heatmaps(model, data, radii, BoundOptions(settings["bound"], settings["elide"], clip))


def _limit(settings: dict[str, Any]) -> str:
    return f"epsilon_max {as_text(settings['epsilon_max'])}"


def _note(total: int, table: str | None) -> str:
    if total <= SHOWN:
        return f"All {total:,} images are shown." if total > 1 else ""
    where = f"; {table} lists all" if table else ""
    return f"{SHOWN} of {total:,} images are shown, spread over all; figures are of all{where}."


def _facts(model: Classifier, settings: dict[str, Any], trained_on: str) -> Facts:
    """Facts about model and certificates, from settings as in a summary with a `model`."""
    channels, height, width = model.in_shape
    parameters = sum(parameter.numel() for parameter in model.parameters())
    inside = "pixels stay in [0, 1]" if settings["clip"] else "pixels may leave [0, 1]"
    merged = "" if settings["elide"] else ", last layer not merged into the margin"
    return [
        ("model", settings["model"]),
        ("trained by", settings["method"]),
        ("trained on", trained_on),
        ("input", f"{width}x{height} pixels, {counted(channels, 'channel')}"),
        ("output", f"{counted(model.classes, 'class')}"),
        ("parameters", f"{parameters:,}"),
        ("fingerprint", settings["weights"]),
        ("certified by", settings["bound"] + merged),
        ("claim", settings["claim"]),
        ("limit", f"{_limit(settings)}; {inside}"),
        ("search", f"{settings['solver']}, xtol {settings['xtol']:g}, rtol {settings['rtol']:g}"),
        ("made with", f"ibpcore {settings['ibpcore']}"),
    ]
