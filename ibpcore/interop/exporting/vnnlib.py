"""VNN-LIB properties: can some other class win where no pixel changes by more than epsilon?

In the form of VNN-COMP's image benchmarks. A property describes the *violation*: it is
`unsat` where the image is robust.
"""

from __future__ import annotations

import csv
import io
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibpcore.bounds.checks import Clip
from ibpcore.bounds.ibp import clean_margins
from ibpcore.certification.certify import BATCH_SIZE
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic
from ibpcore.nn.networks import Classifier

ONNX, VNNLIB, INSTANCES = "onnx/model.onnx", "vnnlib", "instances.csv"
PLACES = Decimal("1e-12")


def outer_box(image: Tensor, epsilon: float, clip: Clip) -> tuple[Tensor, Tensor]:
    """Lower and upper ends of float32 that hold all pixels within `epsilon`, met with `clip`.

    One float32 further out than the nearest: no rounding of the sum, and none of a reader
    that takes the ends as float32, makes the box smaller than it should be.

    Args:
        image: float32, any shape.
        epsilon: in pixel units.
        clip: valid pixel range, or None.
    """
    exact = image.double()
    lower = torch.nextafter((exact - epsilon).float(), torch.tensor(-inf))
    upper = torch.nextafter((exact + epsilon).float(), torch.tensor(inf))
    return (lower, upper) if clip is None else (lower.clamp(min=clip[0]), upper.clamp(max=clip[1]))


def property_text(lower: Tensor, upper: Tensor, label: int, classes: int, comment: str) -> str:
    """The content of a file of VNN-LIB 1.0.

    Args:
        lower, upper: ends of the pixels, of the shape of an image; they are printed with
            twelve decimals, rounded outwards.
        label: class that shall win.
        classes: number of logits.
        comment: one line.
    """
    lines = [f"; {comment}", ""]
    lines += [f"(declare-const X_{i} Real)" for i in range(lower.numel())]
    lines += [f"(declare-const Y_{i} Real)" for i in range(classes)]
    lines.append("")
    ends = zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
    for i, (low, high) in enumerate(ends):
        lines.append(f"(assert (<= X_{i} {Decimal(high).quantize(PLACES, ROUND_CEILING):f}))")
        lines.append(f"(assert (>= X_{i} {Decimal(low).quantize(PLACES, ROUND_FLOOR):f}))")
    others = (i for i in range(classes) if i != label)
    wins = [f"    (and (>= Y_{i} Y_{label}))" for i in others]
    return "\n".join([*lines, "", "(assert (or", *wins, "))", ""])


@torch.no_grad()
def correct_images(model: Classifier, data: ImageSet, limit: int | None) -> Tensor:
    """Indices of correctly classified images in ascending order.

    Args:
        model: in evaluation mode.
        data: images and labels, on its device.
        limit: as many, spread over all and the same every time; None for all there are.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data)))
    found = torch.empty(0, dtype=torch.int64)
    for part in order.split(BATCH_SIZE):
        logits = model(as_pixels(data.images[part]))
        # A tie counts as violated.
        found = torch.cat([found, part[clean_margins(logits, data.labels[part]) < 0]])
        if limit is not None and len(found) >= limit:
            break
    return found[:limit].sort().values


def write_benchmark(
    folder: Path,
    onnx: bytes,
    model: Classifier,
    data: ImageSet,
    epsilon: float,
    *,
    clip: Clip = (0.0, 1.0),
    limit: int | None = None,
    timeout: int = 100,
) -> int:
    """Writes a folder as VNN-COMP's tools read it: `onnx/`, `vnnlib/` and `instances.csv`.

    As in VNN-COMP, images that are classified wrongly have no property. `instances.csv` is
    written last, with paths relative to the folder.

    Args:
        folder: an existing one.
        onnx: the content of the ONNX file, see `ibpcore.interop.exporting.onnx.to_onnx`.
        model: what it was made of, on the CPU.
        data: the images, whose indices name the files.
        epsilon: in pixel units.
        clip: valid pixel range, or None.
        limit: number of properties; None for all correctly classified images.
        timeout: seconds that a tool shall spend on each.

    Returns:
        the number of properties.

    Raises:
        UserError: no image is classified correctly.
        OSError: a file cannot be written.
    """
    chosen = correct_images(model, data, limit).tolist()
    if not chosen:
        raise UserError("no image is classified correctly: there is nothing to verify")
    for name in (Path(ONNX).parent, VNNLIB):
        (folder / name).mkdir()
    write_atomic(folder / ONNX, onnx)
    reach = "any pixel values" if clip is None else f"pixels in [{clip[0]:g}, {clip[1]:g}]"
    table = io.StringIO()
    for index in chosen:
        label = int(data.labels[index])
        name = f"{VNNLIB}/image_{index}_eps_{epsilon:.6g}.vnnlib"
        comment = f"Test image {index}, label {label}, epsilon {epsilon!r}, {reach}."
        box = outer_box(as_pixels(data.images[index]), epsilon, clip)
        text = property_text(*box, label, model.classes, comment)
        write_atomic(folder / name, text.encode())
        csv.writer(table, lineterminator="\n").writerow([ONNX, name, timeout])
    write_atomic(folder / INSTANCES, table.getvalue().encode())
    return len(chosen)
