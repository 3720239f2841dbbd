"""What `ibp predict` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

import ibpcore
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import Certificates
from ibpcore.certification.formatting import certified_text
from ibpcore.certification.image_files import certify_pictures, write_picture_table
from ibpcore.certification.summary import certified_by
from ibpcore.data.image_files import Pictures, read_pictures
from ibpcore.data.images import ImageSet
from ibpcore.distributed import current_device
from ibpcore.inspection.heatmap import heatmaps
from ibpcore.io.files import write_atomic
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.networks import Classifier, weight_like
from ibpcore.roots import RootOptions
from ibpcore.visualization.heatmaps import beside, captioned, png
from ibpcore.visualization.html.contents import picture_page
from ibpcore.visualization.html.page import render
from ibpcore_cli import resources
from ibpcore_cli.decorators import bundle
from ibpcore_cli.output import Costs, hint_at_bounds, print_bounds
from ibpcore_cli.prediction_table import print_predictions
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import CertificateOptions, SavedModelOptions, read_model_file

LONGEST_STEM = 50
"""Characters of an image's name in that of its heatmap: file systems limit the length."""


@dataclass(frozen=True)
class PredictionFiles:
    """What to write: a CSV file, a web page, a folder of PNG files; None for what is not."""

    out: Path | None = None
    html: Path | None = None
    heatmap: Path | None = None

    def check(self) -> None:
        """Raises UserError or UsageError unless both files can be made."""
        resources.check_new(self.out)
        resources.check_new(self.html)
        if self.out is not None and self.out == self.html:
            raise click.UsageError(f"--out and --html both name {self.out}")


@bundle(SavedModelOptions, "opening")
@bundle(RootOptions, "solver")
@bundle(CertificateOptions, "proof")
@bundle(PredictionFiles, "files")
def carry_out(
    images: tuple[Path, ...],
    model: Path,
    opening: SavedModelOptions,
    solver: RootOptions,
    proof: CertificateOptions,
    files: PredictionFiles,
) -> None:
    files.check()
    file = read_model_file(model)
    ball, network = file.ball(opening), file.network.to(current_device(opening.device))
    size = opening.image_size or (file.config.image_size if file.config else None)
    pictures = read_pictures(images, file.class_names, network.in_shape, size)
    resources.compute_with(opening.threads, network, len(pictures))
    folder = None if files.heatmap is None else resources.new_folder(files.heatmap, files.heatmap)
    options = ball.certification(proof, solver)
    costs = Costs()
    with progress("certifying", len(pictures)) as advance:
        certificates = certify_pictures(
            network, pictures, options, advance=advance, climbed=costs.add
        )
    summary = {
        "method": file.method,
        "model": str(file.path),
        "weights": fingerprint(network),
        **asdict(proof),
        **ball._asdict(),
        **asdict(solver),
        "ibpcore": ibpcore.__version__,
    }
    for line in file.remarks(opening):
        click.echo(line)
    print_predictions(pictures, certificates, file.class_names, summary)
    print_bounds(certified_by(certificates), costs)
    counts = "correct or unlabelled image"
    labelled = ImageSet(pictures.images, certificates.label)
    hint_at_bounds(network, labelled, certificates, options, counts)
    if files.out is not None:
        write_picture_table(files.out, pictures, certificates, file.class_names, proof.claim)
    if folder is not None:
        captions = _captions(certificates, file.class_names, options.epsilon_max)
        write_heatmaps(folder, network, pictures, certificates, options.bounds, captions)
    if files.html is not None:
        table = files.out.name if files.out else None
        page = picture_page(
            network, pictures, certificates, file.class_names, summary, file.trained_on, table
        )
        write_atomic(files.html, render(page).encode())
    written = [str(path) for path in (files.out, folder, files.html) if path is not None]
    if written:
        click.echo(f"\nwritten: {', '.join(written)}")


def write_heatmaps(
    folder: Path,
    network: Classifier,
    pictures: Pictures,
    certificates: Certificates,
    bounds: BoundOptions,
    captions: Sequence[str],
) -> None:
    """A PNG file for each picture with a certificate, numbered as they were read."""
    images = ImageSet(pictures.images, certificates.label).to(weight_like(network).device)
    maps = heatmaps(network, images, certificates.radius, bounds)
    digits = len(str(len(maps) - 1))
    for number, (image, heat) in enumerate(zip(pictures.images, maps, strict=True)):
        if heat is not None:
            name = f"{number:0{digits}d}-{pictures.paths[number].stem[:LONGEST_STEM]}.png"
            picture = captioned(beside(image, heat), captions[number], float(heat.max()))
            write_atomic(folder / name, png(picture))


def _captions(certificates: Certificates, classes: Sequence[str], epsilon_max: float) -> list[str]:
    """What each certificate is of, and its radius."""
    pairs = zip(certificates.prediction.tolist(), certificates.radius.tolist(), strict=True)
    return [
        f"class {classes[prediction]}, certified radius {certified_text(epsilon_max, radius)}"
        for prediction, radius in pairs
    ]
