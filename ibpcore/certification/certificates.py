"""Certificates of a set of images, and `certificates.csv`, which is written and read here."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.epsilons import rounded_up
from ibpcore.bounds.interval import at_least
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.formatting import radius_text
from ibpcore.certification.radii import RadiusStatus, in_short
from ibpcore.errors import REFUSED, UserError
from ibpcore.io.files import read_json, write_csv
from ibpcore.io.journal import Journal
from ibpcore.wording import counted

CERTIFICATES = "certificates.csv"
SUMMARY = "summary.json"
UNCHECKED = "unchecked"
"""The claim of radii from float32 bounds, without a proof that covers their rounding."""
MEANINGS = {
    "real": "radii are proved, with every rounding accounted for, for the network that the stored"
    " weights define over the real numbers",
    "float32": "radii are proved, with every rounding accounted for, for every execution of the"
    " stored network in float32, whatever the order of its sums, without TF32, Winograd or"
    " Fourier convolutions",
    UNCHECKED: "radii are found by bounds computed in float32, without accounting for rounding",
}
"""The meaning of each claim, as the end of a sentence."""
MAX_DIFFERING = 0.01
"""Share of predictions that may differ from the model's: a near tie depends on the device."""


class Certificates(NamedTuple):
    """The certificates of N images, each entry (N,) on the CPU; radii float64, in pixel units.

    Attributes:
        label, prediction: int64 class indices.
        radius, upper, status, evaluations, rung: see `ibpcore.certification.radii.Radii`.
        unchecked: the radius that was found, before the proof, which may have reduced it.
    """

    label: Tensor
    prediction: Tensor
    radius: Tensor
    upper: Tensor
    status: Tensor
    unchecked: Tensor
    evaluations: Tensor
    rung: Tensor

    def __repr__(self) -> str:
        correct = int((self.label == self.prediction).sum())
        return f"Certificates({in_short(self.radius, self.status)}; {correct} classified correctly)"


KINDS = {
    **{"label": int, "prediction": int, "radius": float, "upper": float},
    **{"status": int, "unchecked": float, "evaluations": int, "rung": int},
}
"""The type of the values of each column of `Certificates`, in their order."""


def possible(found: Certificates, epsilon_max: float, dtype: torch.dtype) -> bool:
    """Whether a search up to `epsilon_max`, in images of `dtype`, can have ended like that."""
    label, prediction, radius, upper, status, unchecked, evaluations, rung = found
    ceiling = at_least(epsilon_max, dtype)
    uncertified = (status == RadiusStatus.MISCLASSIFIED) | (status == RadiusStatus.NOT_FINITE)
    zero = uncertified | (status == RadiusStatus.UNPROVED)
    conditions = (
        (label >= 0) & (prediction >= 0) & (evaluations >= 0),
        torch.isin(status, torch.tensor([*RadiusStatus])),
        torch.where(uncertified, unchecked == 0, prediction == label),
        torch.where(zero, upper == 0, upper > 0),
        torch.where(status == RadiusStatus.EPSILON_MAX, radius >= epsilon_max, radius >= 0),
        (radius <= upper) & (radius <= unchecked),
        (upper <= ceiling) & (unchecked <= ceiling),
        (rung >= torch.where(radius > 0, 0, -1)) & (rung < len(BOUNDS)),
    )
    return all(bool(condition.all()) for condition in conditions)  # false for NaN


def record(journal: Journal, number: int, part: Certificates) -> None:
    """Appends the certificates of batch `number` to a journal, with all digits."""
    columns = {name: column.tolist() for name, column in part._asdict().items()}
    journal.append({"batch": number, **columns})


def recorded(
    journal: Journal,
    labels: Mapping[int, Tensor],
    classes: int,
    epsilon_max: float,
    dtype: torch.dtype,
) -> dict[int, Certificates]:
    """The certificates that `record` appended to a journal, by the number of their batch.

    Args:
        labels: those of the images of each batch, by its number.
        classes: number of logits of the model.
        epsilon_max, dtype: see `possible`.

    Raises:
        UserError: the journal has other batches, or values that no certificate can have.
    """
    parts = {}
    try:
        for number, columns in ((part["batch"], part) for part in journal.parts):
            part = Certificates(*(_tensor(columns[name], kind) for name, kind in KINDS.items()))
            if type(number) is not int or not torch.equal(part.label, labels[number].cpu()):
                raise ValueError
            if any(column.shape != part.label.shape for column in part):
                raise ValueError
            if bool((part.prediction >= classes).any()) or not possible(part, epsilon_max, dtype):
                raise ValueError
            parts[number] = part
    except REFUSED:
        raise UserError(
            f"{journal.path} is damaged, it holds no certificates of this model: delete it, and"
            " the journals of other ranks beside it, to start over"
        ) from None
    return parts


def _tensor(values: list[Any], kind: type) -> Tensor:
    """(N,) int64 or float64, of values that all have exactly that type."""
    if any(type(value) is not kind for value in values):
        raise TypeError
    return torch.tensor(values, dtype=torch.float64 if kind is float else torch.int64)


def certificate_rows(certificates: Certificates, claim: str) -> list[dict[str, str]]:
    """The cells of each certificate by column, without the column that names the image.

    The radii were proved for `claim`, a key of `MEANINGS`.
    """
    columns = (column.tolist() for column in (*certificates[:6], certificates.rung))
    names = [*BOUNDS]
    return [
        {
            "label": str(label),
            "prediction": str(prediction),
            # All digits: a rounded decimal could exceed the radius that was certified.
            "radius": repr(radius),
            "upper": repr(upper),
            "status": RadiusStatus(status).name.lower(),
            "unchecked": repr(unchecked),
            "claim": claim,
            "bound": names[rung] if radius > 0 else "",
        }
        for label, prediction, radius, upper, status, unchecked, rung in zip(*columns, strict=True)
    ]


def write_table(path: Path, rows: Sequence[Mapping[str, str]]) -> None:
    """Writes a table of certificates as CSV: at least one row, all with the same columns.

    Raises:
        OSError: the file cannot be written.
    """
    write_csv(path, rows[0], rows)


def write_certificates(path: Path, certificates: Certificates, claim: str) -> None:
    """Writes `certificates.csv`: one row an image, numbered from 0; see `certificate_rows`.

    Raises:
        OSError: the file cannot be written.
    """
    rows = certificate_rows(certificates, claim)
    write_table(path, [{"index": str(i), **row} for i, row in enumerate(rows)])


@dataclass(frozen=True, eq=False)
class CertificateTable:
    """A `certificates.csv` that was read back with its `summary.json`, to attack or to show it.

    Attributes:
        path: of the table.
        rows: the cells of all columns.
        index, label, prediction: (N,) int64 on the CPU.
        radius: (N,) float64 on the CPU, in pixel units.
        float32: (N,) bool on the CPU, whether the claim is `float32`.
        title: of the data set.
        epsilon_max: the limit of the radii, in pixel units.
        clip: whether perturbed pixels stay in [0, 1].
        quoted_radii: radii at which the summary quotes accuracies, in pixel units, by their
            text; rounded up.
        weights: `ibpcore.nn.checkpoint.fingerprint` of the model; None if the summary lacks it.
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
    quoted_radii: dict[str, float]
    weights: str | None

    def __repr__(self) -> str:
        return (
            f"CertificateTable({str(self.path)!r}: {len(self.rows)} certificates of {self.title})"
        )

    def at(self, samples: Sequence[int]) -> CertificateTable:
        """The table of these samples only."""
        columns = ("index", "label", "prediction", "radius", "float32")
        some = {name: getattr(self, name)[list(samples)] for name in columns}
        return replace(self, rows=[self.rows[i] for i in samples], **some)


def read_certificates(path: Path, classes: int | None = None) -> CertificateTable:
    """Reads a table of certificates and the `summary.json` beside it.

    `classes` is the number of classes, if it is known.

    Raises:
        UserError: a file is missing or damaged, or the two do not belong together.
        OSError: a file exists but cannot be read.
    """
    rows = _read_rows(path)
    index, found = _column(path, rows, "index", int), _certificates(path, rows)
    described = _read_summary(path.with_name(SUMMARY), len(rows))
    epsilon_max = described.epsilon_max
    if not (
        len(rows) > 0
        and torch.equal(index, torch.arange(len(rows)))
        # The ceiling of a float64 model is below that of a float32 one.
        and possible(found, epsilon_max, torch.float32)
        and (classes is None or bool((found.prediction < classes).all()))
        and {row.get("claim") for row in rows} <= {None, *MEANINGS}
        and not any(None in row or None in row.values() for row in rows)
    ):
        limit = radius_text(epsilon_max)
        raise UserError(f"{path} is damaged: it holds no certificates up to {limit}")
    float32 = torch.tensor([row.get("claim") == "float32" for row in rows])
    columns = index, found.label, found.prediction, found.radius, float32
    return CertificateTable(path, rows, *columns, *described)


def certificates_of(table: CertificateTable) -> Certificates:
    """The certificates in a table, see `Certificates`; it does not say how many passes each took.

    Those of former versions do not name the bounds either, which count as the first one.
    """
    return _certificates(table.path, table.rows)


def _certificates(path: Path, rows: Sequence[Mapping[str, str]]) -> Certificates:
    """`certificates_of` the table in `path`, of which these are the rows: 0 passes each."""
    places = {"": -1, **{name: place for place, name in enumerate(BOUNDS)}}

    def column(name: str) -> Tensor:
        if name == "evaluations" or (name == "rung" and not any("bound" in row for row in rows)):
            return torch.zeros(len(rows), dtype=torch.int64)
        if name == "rung":
            return _column(path, rows, "bound", places.__getitem__)
        kind = (lambda text: RadiusStatus[text.upper()]) if name == "status" else KINDS[name]
        return _column(path, rows, name, kind)

    return Certificates(*map(column, Certificates._fields))


def read_radii(path: Path) -> Tensor:
    """Reads the radii of a table of certificates, (N,) float64 in pixel units.

    Raises:
        UserError: the file is missing or damaged.
        OSError: the file exists but cannot be read.
    """
    return _column(path, _read_rows(path), "radius", float)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if path.suffix.lower() == ".json":
        raise UserError(
            f"{path} is not a table of certificates: that is a CSV file such as"
            f" {path.with_name(CERTIFICATES)}, with its {SUMMARY} beside it"
        )
    try:
        with open(path, newline="") as file:
            return list(csv.DictReader(file, strict=True))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"there are no certificates in {path}: run ibp certify first, or name a table by"
            " --certificates"
        ) from None
    except (csv.Error, UnicodeDecodeError):
        raise UserError(f"{path} is damaged: it is not a table") from None


def _column(
    path: Path, rows: Sequence[Mapping[str, str]], name: str, read: Callable[[str], float]
) -> Tensor:
    """A column of numbers, int64 or, if `read` is `float`, float64."""
    try:
        values = [read(row[name]) for row in rows]
        return torch.tensor(values, dtype=torch.float64 if read is float else torch.int64)
    except REFUSED:
        raise UserError(f"{path} is damaged: it holds no certificates") from None


class _Described(NamedTuple):
    """What a summary says of the table beside it, see `CertificateTable`."""

    title: str
    epsilon_max: float
    clip: bool
    quoted_radii: dict[str, float]
    weights: str | None


def _read_summary(path: Path, samples: int) -> _Described:
    """Reads the summary of a table of so many rows."""
    summary: Any = read_json(path)
    try:
        title, epsilon_max, clip = summary["dataset"], summary["epsilon_max"], summary["clip"]
        radii = {text: rounded_up(text) for text in summary["certified_accuracy"]}
        weights = summary.get("weights")
        good = isinstance(title, str) and isinstance(clip, bool) and 0 < epsilon_max <= 1
        good = good and isinstance(weights, str | None)
        if not (good and all(math.isfinite(radius) for radius in radii.values())):
            raise ValueError
        count = summary["samples"]
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError):
        raise UserError(f"{path} is damaged: it is not a summary of certificates") from None
    if count != samples:
        raise UserError(
            f"{path} is of {counted(count, 'certificate')}, but the table beside it has {samples}"
        )
    return _Described(title, float(epsilon_max), clip, radii, weights)


def check_table(table: CertificateTable, title: str, label: Tensor, prediction: Tensor) -> None:
    """Raises UserError unless the certificates belong to this data set and this model.

    `label` and the model's `prediction`, each (N,), are of the test images of the data set.
    """
    if table.title != title:
        raise UserError(f"{table.path} is of {table.title}, not of {title}")
    if len(table.label) != len(label):
        raise UserError(
            f"{table.path} has {counted(len(table.label), 'certificate')}, but {title} has"
            f" {counted(len(label), 'test image')}"
        )
    if not torch.equal(table.label, label):
        raise UserError(f"{table.path} has other labels than the test images of {title}")
    differing = int((table.prediction != prediction).sum())
    if differing > max(1, MAX_DIFFERING * len(label)):
        raise UserError(
            f"{table.path} is of another model: of {counted(len(label), 'prediction')},"
            f" {differing} differ; choose its own certificates with --certificates"
        )
