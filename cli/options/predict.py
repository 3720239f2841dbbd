"""Options of `ibp predict`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.options import shared
from ibpcore_cli.work import call


@click.command("predict", cls=GroupedCommand)
@click.argument("images", nargs=-1, required=True, type=shared.PATH, metavar="IMAGES...")
@shared.data_option(
    "--model", shared.PATH, "Model file written by `ibp train`, or its run folder.", required=True
)
@shared.data_option(
    "--image-size",
    shared.at_least_one,
    "Side length to which images of another size are resized and cropped. Default: that of"
    " the training, if any.",
)
@shared.certification_options
@shared.device_option
@shared.threads_option
@shared.run_option(
    "--out",
    shared.PATH,
    "Write predictions and radii with all digits to this CSV file.",
    metavar="FILE",
)
@shared.run_option(
    "--html",
    shared.PATH,
    "Write a web page with images, radii, heatmaps and their curve to this file.",
    metavar="FILE",
)
@shared.run_option(
    "--heatmap",
    shared.PATH,
    "Make this folder, with a picture of each image beside the heatmap of the pixels that"
    " its certificate depends on.",
    metavar="FOLDER",
)
def predict_command(**given: Any) -> None:
    """Classify your own images, and certify each prediction.

    IMAGES are image files, and folders of them. An image in a subfolder that is named like
    a class has this label, and its radius is 0 if the prediction differs. The prediction of
    an image without a label is certified, right or wrong. epsilon_max, --elide and --clip
    default to those of the training.
    """
    call("predict", given)
