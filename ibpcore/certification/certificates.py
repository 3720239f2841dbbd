"""Certificates: their table on disk, written, read and checked."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.certification.formatting import as_number
from ibpcore.certification.radii import RadiusStatus
from ibpcore.errors import UserError
from ibpcore.io.files import read_json, write_atomic
from ibpcore.io.journal import Journal

NEEDED = ("index", "label", "prediction", "radius")


DIFFERING = 0.01
"""Share of predictions that may not be the model's: near a tie another device may differ."""


@dataclass(frozen=True, eq=False)
class Claims:
    """What certificates say, one entry a sample, (N,) on the CPU.

    Attributes:
        path: of the table.
        rows: the table as it was read, all columns.
        index, label, prediction: int64.
        radius: float64, in pixel units.
        float32: whether the claim is one of every execution in float32.
        summary: what stands beside the table; of it `title`, `epsilon_max` and `clip` are
            what the certificates hold for, `radii` those that accuracies are quoted at.
    """

    path: Path
    rows: list[dict[str, str]]
    index: Tensor
    label: Tensor
    prediction: Tensor
    radius: Tensor
    float32: Tensor
    title: str
    epsilon_max: float
    clip: bool
    radii: dict[str, float]

    def at(self, samples: Sequence[int]) -> Claims:
        """The same, of these samples only."""
        columns = ("index", "label", "prediction", "radius", "float32")
        some = {name: getattr(self, name)[list(samples)] for name in columns}
        return replace(self, rows=[self.rows[i] for i in samples], **some)


def read_claims(path: Path) -> Claims:
    """The certificates in a table, with the `summary.json` beside it.

    Raises:
        UserError: a file is missing or damaged, or both do not fit.
        OSError: it is there, but cannot be read.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, strict=True))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there are no certificates in {path}: run ibp certify first, or name a table by"
            " --certificates"
        ) from None
    except (csv.Error, UnicodeDecodeError):
        raise UserError(f"{path} is damaged: it is no table") from None
    try:
        index, label, prediction = (
            torch.tensor([int(row[name]) for row in rows]) for name in NEEDED[:3]
        )
        radius = torch.tensor([float(row["radius"]) for row in rows], dtype=torch.float64)
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(f"{path} is damaged: it holds no certificates") from None
    float32 = torch.tensor([row.get("claim") == "float32" for row in rows])
    title, epsilon_max, clip, radii = _read_summary(path.with_name(SUMMARY), len(rows))
    if not (
        len(rows) > 0
        and torch.equal(index, torch.arange(len(rows)))
        # A radius in float32 may be the float just above epsilon_max.
        and bool(((radius >= 0) & (radius <= epsilon_max * (1 + 1e-6))).all())
        and bool((prediction == label)[radius > 0].all())
        and not any(None in row or None in row.values() for row in rows)
    ):
        raise UserError(f"{path} is damaged: it holds no certificates up to {epsilon_max:g}")
    columns = (index, label, prediction, radius, float32)
    return Claims(path, rows, *columns, title, epsilon_max, clip, radii)


def _read_summary(path: Path, samples: int) -> tuple[str, float, bool, dict[str, float]]:
    summary: Any = read_json(path)
    try:
        title, epsilon_max, clip = summary["dataset"], summary["epsilon_max"], summary["clip"]
        radii = {text: as_number(text) for text in summary["certified_accuracy"]}
        good = isinstance(title, str) and isinstance(clip, bool) and 0 < epsilon_max <= 1
        if not (good and all(math.isfinite(radius) for radius in radii.values())):
            raise ValueError
        count = summary["samples"]
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{path} is damaged: it is no summary of certificates") from None
    if count != samples:
        raise UserError(f"{path} is of {count} certificates, but {samples} are beside it")
    return title, float(epsilon_max), clip, radii


def check_claims(claims: Claims, title: str, label: Tensor, prediction: Tensor) -> None:
    """Raises UserError unless the certificates are of this data set and this model.

    Args:
        claims: all that a table holds.
        title: of the data set.
        label, prediction: (N,) of its test images, by the model.
    """
    if claims.title != title:
        raise UserError(f"{claims.path} is of {claims.title}, not of {title}")
    if len(claims.label) != len(label):
        raise UserError(
            f"{claims.path} has {len(claims.label)} certificates, but {title} has"
            f" {len(label)} test images"
        )
    if not torch.equal(claims.label, label):
        raise UserError(f"{claims.path} has other labels than the test images of {title}")
    differing = int((claims.prediction != prediction).sum())
    if differing > max(1, DIFFERING * len(label)):
        raise UserError(
            f"{claims.path} is of another model: {differing} of {len(label)} predictions differ"
        )


UNCHECKED = "unchecked"
"""The claim of a bound pass that rounding may have helped."""


MEANINGS = {
    "real": "radii are proved, every rounding accounted for, of the network that the stored"
    " weights define over the real numbers",
    "float32": "radii are proved, every rounding accounted for, of every execution of the stored"
    " network in float32, whatever the order of its sums, without TF32, Winograd or Fourier"
    " convolutions",
    UNCHECKED: "radii are what bounds computed in float32 say, rounding not accounted for",
}
"""What each claim says, as the end of a sentence."""


class Certificates(NamedTuple):
    """One entry a sample, each (N,) on the CPU; radii float64, in pixel units.

    Attributes: see `ibpcore.certification.radii.Radii`, and
        unchecked: the radius that was found, before a proof may have shrunk it.
    """

    label: Tensor
    prediction: Tensor
    radius: Tensor
    upper: Tensor
    status: Tensor
    unchecked: Tensor
    evaluations: Tensor


def record(journal: Journal, number: int, part: Certificates) -> None:
    """Puts the certificates of a batch into a journal, each with all its digits."""
    columns = {n: [str(x.dtype).partition(".")[2], x.tolist()] for n, x in part._asdict().items()}
    journal.append({"batch": number, **columns})


def recorded(journal: Journal, sizes: Mapping[int, int]) -> dict[int, Certificates]:
    """The certificates of batches, by their numbers, as `record` was given them.

    Raises:
        UserError: the journal is damaged, or of other batches than those of these `sizes`.
    """
    parts = {}
    try:
        for columns in journal.parts:
            number = columns["batch"]
            cells = (columns[name] for name in Certificates._fields)
            tensors = (torch.tensor(values, dtype=getattr(torch, kind)) for kind, values in cells)
            parts[number] = Certificates(*tensors)
            if any(column.shape != (sizes[number],) for column in parts[number]):
                raise ValueError
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"{journal.path} is damaged: delete it to begin anew") from None
    return parts


def write_certificates(path: Path, certificates: Certificates, claim: str) -> None:
    """`certificates.csv`: a row an image, with what its radius was proved for, `claim`."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["index", *Certificates._fields[:6], "claim"])
    names = {int(status): status.name.lower() for status in RadiusStatus}
    # All digits of each number: a rounded decimal could exceed what was certified.
    columns = [column.tolist() for column in certificates[:6]]
    for index, (label, prediction, *ends, status, found) in enumerate(zip(*columns, strict=True)):
        radii = [repr(number) for number in (*ends, found)]
        writer.writerow([index, label, prediction, *radii[:2], names[status], radii[2], claim])
    write_atomic(path, buffer.getvalue().encode())


CERTIFICATES = "certificates.csv"


SUMMARY = "summary.json"
