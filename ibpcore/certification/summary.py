"""`summary.json`: accuracy, ACR, ART and certified accuracies of a data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ibpcore.bounds.epsilons import as_number, rounded_up
from ibpcore.bounds.interval import at_least
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification import metrics
from ibpcore.certification.certificates import Certificates
from ibpcore.certification.formatting import radius_text
from ibpcore.errors import REFUSED, UserError, printable
from ibpcore.io.files import read_json, write_atomic

SAME_ACR = 1e-6
"""Tolerance for the order of summation of float32 radii."""


def summarize(
    certificates: Certificates, epsilon_max: float, standard_radii: Sequence[str]
) -> dict[str, Any]:
    """Computes the measures of a set of certificates, all fractions in [0, 1].

    Args:
        certificates: of a whole test set.
        epsilon_max: the limit of the radii, in pixel units.
        standard_radii: radii to report the certified accuracy at, such as "2/255", without
            those above `epsilon_max`, where nothing was certified, but with `epsilon_max` itself.

    Returns:
        `samples`, `accuracy`, `acr`, `art`, `epsilon_max`, `certified_accuracy` by radius,
        `certified_by`, the number of radii above 0 that each bound certified, `open`, the number
        of correctly classified samples that are not certified at `epsilon_max`,
        `bound_passes_per_sample`, `shrunk_by_proof` (share of the radii that the proof
        reduced) and `lost_by_proof` (share of the sum of the radii that it took away).
    """
    accuracy = float((certificates.prediction == certificates.label).double().mean())
    acr = metrics.acr(certificates.radius, epsilon_max)
    found = float(certificates.unchecked.sum())
    quoted = {text: as_number(text) for text in standard_radii}
    if epsilon_max not in quoted.values():
        quoted[radius_text(epsilon_max)] = epsilon_max
    return {
        "samples": len(certificates.label),
        "accuracy": accuracy,
        "acr": acr,
        "art": metrics.art(accuracy, acr),
        "epsilon_max": epsilon_max,
        "certified_accuracy": {
            text: metrics.certified_accuracy(certificates.radius, rounded_up(text))
            for text, value in quoted.items()
            if value <= epsilon_max
        },
        "certified_by": certified_by(certificates),
        "open": int(left_open(*certificates[:3], epsilon_max).sum()),
        "bound_passes_per_sample": float(certificates.evaluations.double().mean()),
        "shrunk_by_proof": float((certificates.radius < certificates.unchecked).double().mean()),
        "lost_by_proof": 1 - float(certificates.radius.sum()) / found if found else 0.0,
    }


def certified_by(certificates: Certificates) -> dict[str, int]:
    """The number of radii above 0 that each bound certified, without those that certified none."""
    rungs = certificates.rung[certificates.radius > 0].tolist()
    return {name: rungs.count(place) for place, name in enumerate(BOUNDS) if place in rungs}


def left_open(label: Tensor, prediction: Tensor, radius: Tensor, epsilon_max: float) -> Tensor:
    """Which samples are classified correctly, but not certified at `epsilon_max`; all (N,)."""
    return (prediction == label) & ~(radius.double() >= epsilon_max)


def measures_of(summary: Any, path: Path) -> dict[str, float]:
    """`accuracy`, `acr`, `art` and `certified_RADIUS` of a summary that was read from `path`.

    Raises:
        UserError: one is missing, or is no fraction in [0, 1].
    """
    try:
        measures = {name: summary[name] for name in ("accuracy", "acr", "art")}
        certified = summary["certified_accuracy"].items()
        measures |= {f"certified_{printable(radius)}": share for radius, share in certified}
        if not all(type(x) in (int, float) and 0 <= x <= 1 for x in measures.values()):
            raise ValueError
    except REFUSED:
        raise UserError(f"{path} is damaged: it is not a summary of certificates") from None
    return {name: float(share) for name, share in measures.items()}


FACTS = ("dataset", "method", "samples", "epochs", "epsilon_max", "bound", "claim")
"""Entries of the summary of a run, beside the measures, that say what was certified and how."""


def read_summary(path: Path) -> dict[str, Any]:
    """Reads the summary of a run, with all its `FACTS` and measures.

    Raises:
        UserError: it is missing or damaged.
        OSError: it exists but cannot be read.
    """
    summary = read_json(path)
    measures_of(summary, path)
    kinds = {"samples": (int,), "epochs": (int,), "epsilon_max": (int, float)}
    if any(type(summary.get(name)) not in kinds.get(name, (str,)) for name in FACTS):
        raise UserError(f"{path} is damaged: it does not say what was certified, and how")
    return dict(summary)


def check_radii(radius: Tensor, epsilon_max: float, acr: float, path: Path) -> None:
    """Raises UserError unless the radii, (N,) read from `path`, are those of a summary.

    `epsilon_max` and `acr` are of the summary.
    """
    within = (radius >= 0) & (radius <= at_least(epsilon_max, torch.float32))
    # False for NaN, and for no radii at all.
    if not (abs(metrics.acr(radius, epsilon_max) - acr) < SAME_ACR and bool(within.all())):
        raise UserError(f"{path} is damaged: its radii are not those of the summary")


def write_summary(path: Path, summary: dict[str, Any]) -> None:
    """Writes a summary as indented JSON.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomic(path, (json.dumps(summary, indent=2) + "\n").encode())
