"""VNN-LIB properties for other verifiers, in the form of VNN-COMP's image benchmarks.

A property describes the *violation*: that some other class wins although no pixel changes by
more than epsilon. It is `unsat` if the image is robust.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from math import inf
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ibpcore.bounds.checks import Clip
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.interval import outward
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.errors import UserError
from ibpcore.io.files import write_atomic
from ibpcore.nn.networks import Classifier

ONNX, VNNLIB, INSTANCES = "onnx/model.onnx", "vnnlib", "instances.csv"
PLACES = Decimal("1e-12")
IMAGES_AT_A_TIME = 128


def outer_box(image: Tensor, epsilon: float, clip: Clip) -> tuple[Tensor, Tensor]:
    """A float32 box that contains the ball around an image, intersected with the pixel range.

    The ends are moved outwards by one float32, so that neither the rounding here nor that of a
    program that reads them as float32 makes the box too small. Ends of the pixel range are
    rounded outwards.

    Args:
        image: float32, any shape.
        epsilon: in pixel units.
        clip: valid pixel range, or None.

    Returns:
        lower and upper ends, of the shape of `image`.
    """
    exact = image.double()
    lower = torch.nextafter((exact - epsilon).float(), torch.tensor(-inf))
    upper = torch.nextafter((exact + epsilon).float(), torch.tensor(inf))
    if clip is None:
        return lower, upper
    low, high = outward(clip, torch.float32)
    return lower.clamp(min=low), upper.clamp(max=high)


def property_text(lower: Tensor, upper: Tensor, label: int, classes: int, comment: str) -> str:
    """The content of a VNN-LIB 1.0 file.

    Args:
        lower, upper: ends of the pixels, of the shape of an image; they are printed with
            twelve decimals, rounded outwards.
        label: the class that must win.
        classes: number of logits.
        comment: one line at the top of the file.
    """
    lines = [f"; {comment}", ""]
    lines += [f"(declare-const X_{i} Real)" for i in range(lower.numel())]
    lines += [*(f"(declare-const Y_{i} Real)" for i in range(classes)), ""]
    ends = zip(lower.flatten().tolist(), upper.flatten().tolist(), strict=True)
    for i, (low, high) in enumerate(ends):
        lines.append(f"(assert (<= X_{i} {Decimal(high).quantize(PLACES, ROUND_CEILING):f}))")
        lines.append(f"(assert (>= X_{i} {Decimal(low).quantize(PLACES, ROUND_FLOOR):f}))")
    wins = [f"    (and (>= Y_{i} Y_{label}))" for i in range(classes) if i != label]
    return "\n".join([*lines, "", "(assert (or", *wins, "))", ""])


@torch.no_grad()
def correct_images(model: Classifier, data: ImageSet, limit: int | None) -> list[int]:
    """Ascending indices of correctly classified images; others have no property in VNN-COMP.

    Args:
        model: in evaluation mode.
        data: images and labels, on the device of the model.
        limit: the number of images, always the same ones from all of `data`; None for all.

    Raises:
        UserError: no image is classified correctly.
    """
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data)))
    found = torch.empty(0, dtype=torch.int64)
    for part in order.split(IMAGES_AT_A_TIME):
        logits = model(as_pixels(data.images[part]))
        # A tie counts as violated.
        found = torch.cat([found, part[clean_margins(logits, data.labels[part]) < 0]])
        if limit is not None and len(found) >= limit:
            break
    if len(found) == 0:
        raise UserError("no image is classified correctly: there is nothing to verify")
    return found[:limit].sort().values.tolist()


def properties(
    data: ImageSet, indices: Iterable[int], classes: int, epsilon: float, clip: Clip = (0.0, 1.0)
) -> Iterator[tuple[str, str]]:
    """Names and contents of the VNN-LIB files for some images, which `write_benchmark` expects.

    Args:
        data: images and labels.
        indices: the images; they become part of the names.
        classes: number of logits.
        epsilon: in pixel units.
        clip: valid pixel range, or None.
    """
    reach = "any pixel values" if clip is None else f"pixels in [{clip[0]:g}, {clip[1]:g}]"
    for index in indices:
        label = int(data.labels[index])
        comment = f"Test image {index}, label {label}, epsilon {epsilon!r}, {reach}."
        box = outer_box(as_pixels(data.images[index]), epsilon, clip)
        text = property_text(*box, label, classes, comment)
        yield f"image_{index}_eps_{epsilon:.6g}.vnnlib", text


def write_benchmark(
    folder: Path, onnx: bytes, texts: Iterable[tuple[str, str]], timeout: int = 100
) -> None:
    """Writes a folder as VNN-COMP's tools expect it: `onnx/`, `vnnlib/` and `instances.csv`.

    `instances.csv` is written last, with paths relative to the folder.

    Args:
        folder: an existing empty folder.
        onnx: the content of the ONNX file, see `ibpcore.interop.exporting.onnx.to_onnx`.
        texts: names and contents of the properties, see `properties`.
        timeout: seconds that a tool may spend on each.

    Raises:
        OSError: a file cannot be written.
    """
    for name in (Path(ONNX).parent, VNNLIB):
        (folder / name).mkdir()
    write_atomic(folder / ONNX, onnx)
    table = io.StringIO()
    for name, text in texts:
        write_atomic(folder / VNNLIB / name, text.encode())
        csv.writer(table, lineterminator="\n").writerow([ONNX, f"{VNNLIB}/{name}", timeout])
    write_atomic(folder / INSTANCES, table.getvalue().encode())
