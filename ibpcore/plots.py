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

    accuracy = 100 * float((certificates.prediction == certificates.label).double().mean())
    # A radius stored in float32 may be the float just above epsilon_max.
    radii = np.sort(certificates.radius.double().clamp(max=epsilon_max).numpy())
    radii = radii[radii > 0]
    # From each radius to the next: the share of all samples that reach at least that far.
    share = 100 * np.arange(len(radii), 0, -1) / len(certificates.radius)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(0, accuracy, "o", clip_on=False, label=f"accuracy {accuracy:.1f} %")
    ends, heights = [0, *radii], [100 * len(radii) / len(certificates.radius), *share]
    if ends[-1] < epsilon_max:
        ends, heights = [*ends, epsilon_max], [*heights, 0]
    axes.step(ends, heights, where="pre", label="certified accuracy")
    axes.set(title=title, xlabel="epsilon (pixels in [0, 1])", ylabel="share of images (%)")
    axes.set(xlim=(0, epsilon_max), ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_atomic(path, buffer.getvalue())
