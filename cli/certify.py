"""`ibp certify`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore import UserError
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certificates import CERTIFICATES, UNCHECKED
from ibpcore.certification.certify import CertificationOptions
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.data.folders import is_image
from ibpcore.distributed import after_first, by_first, ranks_of_environment
from ibpcore.experiments.test_set import certify_test_set
from ibpcore.io.files import read_json, write_atomic
from ibpcore.progress import unwatched
from ibpcore.roots import RootOptions
from ibpcore.visualization.html.contents import data_set_page
from ibpcore.visualization.html.page import render
from ibpcore_cli.certify_images import certify_images
from ibpcore_cli.distributed import going_on, working_ranks
from ibpcore_cli.options import (
    Epsilon,
    bound_options,
    check_new,
    data_options,
    device_option,
    hold,
    new_folder,
    solver_options,
)
from ibpcore_cli.output import hint_at_figures, print_summary, progress
from ibpcore_cli.saved_model import Saved, open_saved
from ibpcore_cli.train import data_dir_hint

SETTINGS = "certify.json"
"""What was asked for, of the folder that it was asked for in."""
NOT_SETTINGS = (
    *("out", "resume", "data_dir", "download", "device"),
    *("images", "of_model", "heatmap", "html"),
)
FOR_DATA_SETS = ("dataset", "data_dir", "download", "limit_test", "resume")


def resumed(context: click.Context, option: click.Parameter, folder: Path | None) -> Path | None:
    """`--resume`: what the folder was asked for becomes the default of every other option."""
    if folder is not None:
        path = folder / SETTINGS
        if not path.exists():
            raise UserError(f"there is nothing to resume in {folder}: {path} is missing")
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise UserError(f"{path} is damaged: it holds no settings")
        # As texts, which the options take as if they were typed.
        context.default_map = {k: str(v) for k, v in settings.items() if v is not None}
    return folder


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path), metavar="| IMAGES...")
@click.option(
    "--model",
    "of_model",
    type=click.Path(path_type=Path),
    metavar="MODEL",
    help="Certify images, or folders of them, instead of a data set: this is their model.",
)
@data_options
@click.option("--epsilon-max", type=Epsilon(), help="Largest radius, as 0.1 or 8.8/255.")
@click.option(
    "--bound",
    type=click.Choice(list(BOUNDS)),
    default="ibp",
    show_default=True,
    help="Which bound certifies; crown-ibp takes the better of both, and longer.",
)
@click.option(
    "--claim",
    type=click.Choice([UNCHECKED, *CLAIMS]),
    default="real",
    show_default=True,
    help="What is proved of each radius: it holds for the real-valued network, or for every"
    " float32 execution of it; unchecked is what float32 bounds say, without a proof.",
)
@solver_options
@bound_options
@device_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make for the results. Default: certificates, beside MODEL. Of IMAGES the CSV"
    " file to write; none by default.",
)
@click.option(
    "--html",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write a page for a browser: images, radii, heatmaps and their curve.",
)
@click.option(
    "--heatmap",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="Folder to make for pictures of IMAGES, each beside the map of the pixels that its"
    " certificate hangs on.",
)
@click.option(
    "--resume",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    is_eager=True,
    callback=resumed,
    help="Go on with the certificates in this folder, with its own settings and MODEL.",
)
def certify(
    model: Path,
    images: tuple[Path, ...],
    of_model: Path | None,
    dataset: str | None,
    data_dir: Path,
    download: bool,
    image_size: int | None,
    limit_test: int | None,
    epsilon_max: float | None,
    bound: str,
    claim: str,
    device: str,
    out: Path | None,
    html: Path | None,
    heatmap: Path | None,
    resume: Path | None,
    elide: bool | None,
    clip: bool | None,
    **solver: Any,
) -> None:
    """Give every test image its certified radius, or every image of one's own.

    MODEL is a file written by `ibp train`, or its run folder. The data set, epsilon_max,
    the number of test images and what a perturbation may do (--elide, --clip) are as they
    were in training where they are left out. --resume goes on where the command was cut off.
    Under torchrun the images are shared out among its processes.

    With --model MODEL the arguments are images, and folders of them: images in a subfolder
    that is called like a class have this label, and of others the prediction is certified.
    """
    context = click.get_current_context()
    if of_model is not None or images or is_image(model):
        if of_model is None:
            raise click.UsageError("images need the model to certify them: give --model MODEL")
        _check_none(context, FOR_DATA_SETS, "for data sets, not for images")
        if ranks_of_environment().size > 1:
            raise click.UsageError("images are certified by one process: start without torchrun")
        certify_images(
            [model, *images],
            of_model,
            image_size=image_size,
            epsilon_max=epsilon_max,
            bound=bound,
            claim=claim,
            device=device,
            elide=elide,
            clip=clip,
            options=_root_options(solver),
            table=out,
            heatmap=heatmap,
            page=html,
        )
        return
    _check_none(context, ("heatmap",), "for images, with --model; over a data set --html has them")
    opened = partial(
        open_saved,
        model,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
        limit_test=limit_test,
        epsilon_max=epsilon_max,
        elide=elide,
        clip=clip,
    )
    settings = _settings(context, resume)
    _certify_data_set(
        opened,
        solver,
        settings,
        bound=bound,
        claim=claim,
        device=device,
        out=out,
        html=html,
        resume=resume,
        data_dir_option=data_dir_hint(data_dir),
    )


def _certify_data_set(
    opened: Callable[..., Saved],
    solver: dict[str, Any],
    settings: dict[str, Any],
    *,
    bound: str,
    claim: str,
    device: str,
    out: Path | None,
    html: Path | None,
    resume: Path | None,
    data_dir_option: str,
) -> None:
    """Certifies the test images among the ranks; writes and prints what comes of it.

    Args:
        opened: gives the model and its data, on `device`.
        solver: options as they were given.
        settings: to go on with, for the folder.
        data_dir_option: that the command to go on ends with.
    """
    with working_ranks(device) as (ranks, where):

        def prepared() -> tuple[RootOptions, Saved]:
            check_new(html)
            return _root_options(solver), opened(device=str(where))

        def begun() -> Path:
            if resume:
                return hold(resume)
            folder = new_folder(out, saved.path.parent / "certificates")
            write_atomic(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
            return folder

        options, saved = after_first(ranks, prepared)
        folder = by_first(ranks, begun)
        with going_on(f"ibp certify --resume {quote(str(folder))}{data_dir_option}"):
            summary = certify_test_set(
                saved.model,
                saved.data,
                folder,
                CertificationOptions(saved.epsilon_max, claim, saved.bounds(bound), options),
                facts={"method": saved.method, "model": str(saved.path)},
                watch=progress if ranks.first else unwatched,
                ranks=ranks,
            )
    if ranks.first:
        print_summary(summary)
        hint_at_figures()
        if html is not None:
            table = folder / CERTIFICATES
            page = data_set_page(saved.model, saved.data, table, summary, saved.trained_on)
            write_atomic(html, render(page).encode())
        click.echo(f"\nall files are in {folder}")


def _root_options(solver: dict[str, Any]) -> RootOptions:
    """Those that were given, the others as they are by default."""
    return RootOptions(**{name: value for name, value in solver.items() if value is not None})


def _check_none(context: click.Context, names: Sequence[str], says: str) -> None:
    """Raises UsageError where one of these options was typed."""
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} is {says}")


def _settings(context: click.Context, resume: Path | None) -> dict[str, Any]:
    """All that was asked for but where, as JSON values.

    Raises:
        UsageError: something was asked for beside `resume`.
    """
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in context.params.items()
        if name not in NOT_SETTINGS
    }
    typed = [
        name
        for name in [*settings, "out"]
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
    ]
    if resume and typed:
        raise click.UsageError("--resume goes on with the settings of FOLDER: give no others")
    return settings
