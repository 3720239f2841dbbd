"""`ibp certify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ibpcore import UserError
from ibpcore.bounds import BOUNDS
from ibpcore.certification import UNCHECKED
from ibpcore.checkpoint import write_atomic
from ibpcore.radius import RootOptions
from ibpcore.ranks import after_first, by_first
from ibpcore.runs import certify_test_set, read_json, unwatched
from ibpcore.soundness import CLAIMS
from ibpcore_cli.joining import going_on, working_ranks
from ibpcore_cli.options import (
    Epsilon,
    bound_options,
    data_options,
    device_option,
    hold,
    new_folder,
    solver_options,
)
from ibpcore_cli.output import hint_at_figures, print_summary, progress
from ibpcore_cli.saved import Saved, open_saved
from ibpcore_cli.train import data_dir_hint

SETTINGS = "certify.json"
"""What was asked for, of the folder that it was asked for in."""
NOT_SETTINGS = ("out", "resume", "data_dir", "download", "device")


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
    help="Folder to make for the results. Default: certificates, beside MODEL.",
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
    resume: Path | None,
    elide: bool | None,
    clip: bool | None,
    **solver: Any,
) -> None:
    """Give every test image its certified radius.

    MODEL is a file written by `ibp train`, or its run folder. The data set, epsilon_max,
    the number of test images and what a perturbation may do (--elide, --clip) are as they
    were in training where they are left out. --resume goes on where the command was cut off.
    """
    settings = _settings(click.get_current_context(), resume)
    with working_ranks(device) as (ranks, where):

        def opened() -> tuple[RootOptions, Saved]:
            options = RootOptions(**{name: v for name, v in solver.items() if v is not None})
            saved = open_saved(
                model,
                dataset=dataset,
                data_dir=data_dir,
                download=download,
                image_size=image_size,
                limit_test=limit_test,
                epsilon_max=epsilon_max,
                device=str(where),
                elide=elide,
                clip=clip,
            )
            return options, saved

        def begun() -> Path:
            if resume:
                return hold(resume)
            folder = new_folder(out, saved.path.parent / "certificates")
            write_atomic(folder / SETTINGS, (json.dumps(settings, indent=2) + "\n").encode())
            return folder

        options, saved = after_first(ranks, opened)
        folder = by_first(ranks, begun)
        with going_on(f"ibp certify --resume {folder}{data_dir_hint(data_dir)}"):
            summary = certify_test_set(
                saved.model,
                saved.data,
                folder,
                epsilon_max=saved.epsilon_max,
                bound=bound,
                claim=claim,
                options=options,
                elide=saved.elide,
                clip=saved.clip,
                facts={"method": saved.method, "model": str(saved.path)},
                watch=progress if ranks.first else unwatched,
                ranks=ranks,
            )
    if ranks.first:
        print_summary(summary)
        hint_at_figures()
        click.echo(f"\nall files are in {folder}")


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
