"""Figures; they need matplotlib, the extra `plot`."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from ibpcore.certification import Certificates
from ibpcore.checkpoint import write_atomic
from ibpcore.errors import UserError


def write_curve(path: Path, certificates: Certificates, epsilon_max: float, title: str) -> None:
    """Certified accuracy against epsilon (Fig. 3), as PNG; the area under it is the ACR.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need matplotlib: pip install 'ibpcore[plot]'") from None

    radii = np.sort(certificates.radius.numpy().astype(float))
    correct = certificates.prediction == certificates.label
    # At each radius the share of samples that reach at least that far.
    share = 100 * (len(radii) - np.arange(len(radii))) / len(radii)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0, 0], [100 * float(correct.double().mean())] * 2, "o", label="accuracy")
    axes.step(
        np.concatenate([radii, [epsilon_max]]), np.concatenate([share, share[-1:]]), where="pre"
    )
    axes.set(title=title, xlabel="epsilon (pixels in [0, 1])", ylabel="certified accuracy (%)")
    axes.set(xlim=(0, epsilon_max), ylim=(0, 100))
    axes.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
