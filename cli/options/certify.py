"""Options of `ibp certify`."""

from __future__ import annotations

import os
from mimetypes import guess_type
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore.errors import UserError
from ibpcore.io.files import read_json
from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.options import shared
from ibpcore_cli.work import call

CERTIFY_SETTINGS = "certify.json"
"""File in the output folder that holds the settings of the command, for `--resume`."""
BESIDE = "model_beside"
"""Entry there: the path of a model beside or above the folder from it, if both are moved."""
NOT_SAVED = ("out", "html", "resume", "data_dir", "download", "device")
"""Options that a resumed command takes anew."""


def refuse_image(context: click.Context, argument: click.Parameter, model: Path) -> Path:
    """MODEL, unless it is an image."""
    kind, _ = guess_type(model.name, strict=False)
    if kind is not None and kind.startswith("image/"):
        raise click.UsageError(
            f"{model} is an image; certify it with: ibp predict {quote(str(model))} --model MODEL"
        )
    return model


def resumed(context: click.Context, option: click.Parameter, folder: Path | None) -> Path | None:
    """`--resume`: the settings saved in the folder become the defaults of all other options."""
    if folder is not None:
        path = folder / CERTIFY_SETTINGS
        if not path.exists():
            raise UserError(f"there is nothing to resume in {folder}: {path} is missing")
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise UserError(f"{path} is damaged: it holds no settings")
        beside = settings.pop(BESIDE, None)
        if isinstance(beside, str) and os.path.exists(moved := os.path.normpath(folder / beside)):
            settings["model"] = moved
        known = {parameter.name for parameter in context.command.params} - {*NOT_SAVED}
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"{path} is damaged: unknown settings: {', '.join(unknown)}")
        # As texts, which the options convert as if they were typed.
        context.default_map = {k: str(v) for k, v in settings.items() if v is not None}
    return folder


@click.command("certify", cls=GroupedCommand)
@click.argument("model", type=shared.PATH, callback=refuse_image)
@shared.data_options
@shared.certification_options
@shared.device_option
@shared.threads_option
@shared.out_option("Folder to make for the results. Default: certificates, beside MODEL.")
@shared.run_option(
    "--html",
    shared.PATH,
    "Also write a web page with images, radii, heatmaps and their curve to this file.",
    metavar="FILE",
)
@shared.run_option(
    "--resume",
    shared.PATH,
    "Resume the certificates in this folder, with their own settings and MODEL.",
    metavar="FOLDER",
    is_eager=True,
    callback=resumed,
)
def certify_command(**given: Any) -> None:
    """Certify the test images of a data set: find the certified radius of each.

    MODEL is a file written by `ibp train`, or its run folder. The data set, epsilon_max,
    the number of test images, --elide and --clip default to those of the training.
    --resume continues where the command was interrupted. Under torchrun the images are
    distributed among the processes. For your own images see `ibp predict`.
    """
    call("certify", given)
