"""`Evaluation`: the certificates of a set of images, and their measures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ibpcore.bounds.epsilons import rounded_up, without_text
from ibpcore.certification import metrics
from ibpcore.certification.certificates import (
    CERTIFICATES,
    SUMMARY,
    Certificates,
    certificates_of,
    read_certificates,
)
from ibpcore.certification.formatting import as_text, percent
from ibpcore.errors import UserError
from ibpcore.experiments.test_set import write_results
from ibpcore.io.files import as_path, read_json
from ibpcore.io.locks import held_anew
from ibpcore.visualization.plots.curves import draw_curve
from ibpcore.visualization.plots.style import shown_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The certificates of N images, and their measures, as fractions in [0, 1].

    Attributes:
        certificates: `label`, `prediction`, `radius`, `upper`, `status` and more of each image,
            each (N,) on the CPU, radii in pixel units.
        summary: all measures and settings, as in `summary.json`.
    """

    certificates: Certificates
    summary: dict[str, Any]

    @property
    def accuracy(self) -> float:
        """Share of the images that are classified correctly."""
        return float(self.summary["accuracy"])

    @property
    def acr(self) -> float:
        """Mean certified radius as a share of epsilon_max (eq. 12)."""
        return float(self.summary["acr"])

    @property
    def art(self) -> float:
        """sqrt(accuracy * ACR) (eq. 13)."""
        return float(self.summary["art"])

    @property
    def epsilon_max(self) -> float:
        """The largest radius that was searched for, in pixel units."""
        return float(self.summary["epsilon_max"])

    def certified_accuracy(self, radius: float | str) -> float:
        """Share of the images that are certified at `radius`, in pixel units.

        Raises:
            UserError: `radius` is not a number above 0 and at most `epsilon_max`.
        """
        number = without_text(radius, "radius")
        try:
            within = 0 < number <= self.epsilon_max
        except (TypeError, ValueError, RuntimeError):
            within = False
        if not within:
            limit = as_text(self.epsilon_max)
            raise UserError(f"radius must be above 0 and at most {limit}, but is {radius!r}")
        # A text stands for its exact value, which its nearest float may miss.
        exact = rounded_up(radius) if isinstance(radius, str) else float(number)
        return metrics.certified_accuracy(self.certificates.radius, exact)

    def plot(self, axes: Axes | None = None) -> Axes:
        """Draws the certified accuracy against the radius, and returns the axes.

        Args:
            axes: of matplotlib; None for new ones.

        Raises:
            UserError: `axes` are something else, or matplotlib is not installed, which the extra
                `plot` brings.
        """
        axes = shown_axes(axes)
        draw_curve(axes, self.certificates, self.epsilon_max)
        return axes

    def write(self, folder: str | Path) -> Path:
        """Writes the files of `ibp certify` into a new folder, and returns it.

        Raises:
            UserError: the folder exists and is not empty.
            OSError: it cannot be written.
        """
        path = as_path(folder, "a folder")
        with held_anew(path, path):
            write_results(path / SUMMARY, path / CERTIFICATES, self.certificates, self.summary)
        return path

    def __repr__(self) -> str:
        facts = self.summary
        measures = f"accuracy {percent(self.accuracy)}, ACR {percent(self.acr)}"
        return (
            f"Evaluation({facts['samples']} images of {facts['dataset']}, {measures},"
            f" ART {percent(self.art)}, epsilon_max {as_text(self.epsilon_max)},"
            f" bound {facts['bound']}, claim {facts['claim']})"
        )


def read_evaluation(folder: Path) -> Evaluation:
    """Reads what `ibp certify` or `ibp train` wrote into a folder.

    Raises:
        UserError: a file is missing or damaged.
    """
    table = read_certificates(folder / CERTIFICATES)
    return Evaluation(certificates_of(table), read_json(folder / SUMMARY))
