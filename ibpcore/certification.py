"""A data set to per-sample certificates, a summary and a curve."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ibpcore import metrics
from ibpcore.bounds import margins_by
from ibpcore.checkpoint import write_atomic
from ibpcore.data import ImageSet, as_pixels
from ibpcore.errors import UserError
from ibpcore.folding import fold
from ibpcore.journals import Journal
from ibpcore.margins import Clip, check_fit, clean_margins
from ibpcore.precision import full_precision
from ibpcore.radius import RadiusStatus, RootOptions, check_epsilon_max, radii_by
from ibpcore.ranks import ALONE, Ranks, told_by_all
from ibpcore.soundness import sound_network, verified_radii

BATCH_SIZE = 128
"""Samples bounded at a time; on the CPU the work then stays in cache."""


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

    Attributes: see `ibpcore.radius.Radii`, and
        unchecked: the radius that was found, before a proof may have shrunk it.
    """

    label: Tensor
    prediction: Tensor
    radius: Tensor
    upper: Tensor
    status: Tensor
    unchecked: Tensor
    evaluations: Tensor


def certify(
    model: nn.Module,
    data: ImageSet,
    epsilon_max: float,
    options: RootOptions | None = None,
    *,
    claim: str = "real",
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    journal: Journal | None = None,
    ranks: Ranks = ALONE,
    report: Callable[[int], None] | None = None,
) -> Certificates:
    """Certified radii of all images, in full precision.

    Batch by batch: what a journal has is not computed again, and the rest is what it would
    have been, whichever rank computes it.

    Args:
        model: interval layers in evaluation mode, on the device of `data`.
        data: images and labels.
        epsilon_max: largest radius asked for, in pixel units.
        options: how roots are found.
        claim: "unchecked" for what float32 passes said, or what the radii are to be proved
            for, a name in `ibpcore.soundness.CLAIMS`.
        bound, elide, clip: see `ibpcore.certified_margins`.
        journal: gets the certificates of each batch; of the same model, data, settings, ranks.
        ranks: among which the batches are dealt; in the end all of them have all certificates.
        report: is told the number of images done, after each batch; of other ranks' images
            those that were to be done by then.

    Raises:
        UserError: the model does not take such images or has no rule for a layer, no proof
            covers it, there is no such bound or claim, `epsilon_max` is not above 0 and
            finite, or the journal is damaged.
        OSError: the journal cannot be written.
    """
    options = options or RootOptions()
    batches = torch.arange(len(data), device=data.images.device).split(BATCH_SIZE)
    sizes = {number: len(samples) for number, samples in enumerate(batches)}
    parts = {} if journal is None else recorded(journal, sizes)
    missing = [number for number in sizes if number not in parts]
    mine: dict[int, Certificates] = {}
    dtype = next(model.parameters()).dtype
    check_epsilon_max(epsilon_max, dtype)
    margins_by(bound)
    proof = None if claim == UNCHECKED else sound_network(model, claim)
    ball: dict[str, Any] = {"bound": bound, "elide": elide, "clip": clip}
    with torch.no_grad(), full_precision():
        network = fold(model)
        check_fit(network, as_pixels(data.images[:1]).to(dtype), data.labels)
        for number in missing[ranks.rank :: ranks.size]:
            samples = batches[number]
            images, labels = as_pixels(data.images[samples]).to(dtype), data.labels[samples]
            logits = network(images)
            at_zero = clean_margins(logits, labels)
            radii = radii_by(
                network,
                at_zero,
                images,
                labels,
                epsilon_max,
                options,
                **ball,
            )
            found = radii.radius
            if proof is not None:
                radii = verified_radii(proof, images, labels, radii, **ball)
            ends = radii.radius.double(), radii.upper.double()
            columns = (*ends, radii.status, found.double(), radii.evaluations)
            part = Certificates(*(t.cpu() for t in (labels, logits.argmax(1), *columns)))
            mine[number] = part
            if journal is not None:
                record(journal, number, part)
            if report is not None:
                ahead = missing[len(mine) * ranks.size :]
                report(len(data) - sum(sizes[other] for other in ahead))
    for theirs in told_by_all(ranks, mine):
        parts |= theirs
    ordered = [parts[number] for number in sizes]
    return Certificates(*(torch.cat(column) for column in zip(*ordered, strict=True)))


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


def summarize(
    certificates: Certificates, epsilon_max: float, standard_radii: Sequence[str]
) -> dict[str, Any]:
    """Accuracy, ACR, ART and certified accuracies, all fractions.

    Args:
        certificates: of a whole test set.
        epsilon_max: the limit they were found under, in pixel units.
        standard_radii: such as "2/255"; those above `epsilon_max` are left out, since
            nothing was certified there, and `epsilon_max` itself is added.
    """
    accuracy = float((certificates.prediction == certificates.label).double().mean())
    acr = metrics.acr(certificates.radius, epsilon_max)
    quoted = {text: as_number(text) for text in standard_radii}
    if epsilon_max not in quoted.values():
        quoted[in_digits(epsilon_max)] = epsilon_max
    return {
        "samples": len(certificates.label),
        "accuracy": accuracy,
        "acr": acr,
        "art": metrics.art(accuracy, acr),
        "epsilon_max": epsilon_max,
        "certified_accuracy": {
            text: metrics.certified_accuracy(certificates.radius, value)
            for text, value in quoted.items()
            if value <= epsilon_max
        },
        "bound_passes_per_sample": float(certificates.evaluations.double().mean()),
        "shrunk_by_proof": float((certificates.radius < certificates.unchecked).double().mean()),
        "lost_by_proof": _lost(certificates),
    }


def _lost(certificates: Certificates) -> float:
    """The share of the radii, taken together, that is not proved."""
    found = float(certificates.unchecked.sum())
    return 1 - float(certificates.radius.sum()) / found if found else 0.0


def as_number(text: str) -> float:
    """A radius as it is typed: "0.1" or "8/255".

    Raises:
        ValueError: it is neither.
    """
    numerator, slash, denominator = text.partition("/")
    return float(numerator) / float(denominator if slash else 1)


def as_text(radius: float) -> str:
    """A radius as it is read: "0.03137 (8/255)", to four digits."""
    return f"{radius:.4g} ({255 * radius:.4g}/255)"


def rounded_down(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` as a decimal that is not above it: certified at that too.

    Args:
        radius: in pixel units, not negative.
        unit: 1, or 255 for 255ths.
        digits: behind the point.
    """
    whole, rest = divmod(int(Fraction(radius) * unit * 10**digits), 10**digits)
    return f"{whole}.{rest:0{digits}d}"


def in_digits(radius: float, unit: int = 1, digits: int = 6) -> str:
    """`radius` times `unit` in so many digits, in nine behind the point if that is above it."""
    text = f"{radius * unit:.{digits}g}"
    return text if float(text) / unit <= radius else rounded_down(radius, unit, 9)


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


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """`summary.json`."""
    write_atomic(path, (json.dumps(summary, indent=2) + "\n").encode())
