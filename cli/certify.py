"""`ibp certify`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore import UserError
from ibpcore.certification.certificates import CERTIFICATES, UNCHECKED, read_certificates
from ibpcore.certification.soundness.network import sound_network
from ibpcore.data.folders import is_image
from ibpcore.distributed import run_on_rank_zero, run_rank_zero_first
from ibpcore.experiments.data_folder import DATA, remember_data_dir
from ibpcore.experiments.test_set import certify_test_set
from ibpcore.io.files import read_json, write_atomic
from ibpcore.progress import unwatched
from ibpcore.roots import RootOptions
from ibpcore.visualization.html.contents import data_set_page
from ibpcore.visualization.html.page import render
from ibpcore_cli import options as shared
from ibpcore_cli.decorators import GroupedCommand, bundle
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.options import CertificateOptions
from ibpcore_cli.output import (
    Costs,
    hint_at_bounds,
    hint_at_figures,
    print_bounds,
    print_remarks,
    print_summary,
    progress,
)
from ibpcore_cli.saved_model import Saved, SavedModelOptions, open_saved

CERTIFY_SETTINGS = "certify.json"
"""File in the output folder that holds the settings of the command, for `--resume`."""
NOT_SAVED = ("out", "html", "resume", "data_dir", "download", "device")
"""Options that a resumed command takes anew."""


def refuse_image(context: click.Context, argument: click.Parameter, model: Path) -> Path:
    """MODEL, unless it is an image."""
    if is_image(model):
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
        known = {parameter.name for parameter in context.command.params} - {*NOT_SAVED}
        if unknown := sorted(settings.keys() - known):
            raise UserError(f"{path} is damaged: unknown settings: {', '.join(unknown)}")
        if isinstance(settings.get("model"), str):
            # Former versions wrote the path from the current folder.
            seen = os.path.normpath(folder / settings["model"])
            settings["model"] = seen if os.path.exists(seen) else settings["model"]
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
@bundle(SavedModelOptions, "opening")
@bundle(RootOptions, "solver")
@bundle(CertificateOptions, "proof")
def certify_command(
    model: Path,
    opening: SavedModelOptions,
    solver: RootOptions,
    proof: CertificateOptions,
    out: Path | None,
    html: Path | None,
    resume: Path | None,
) -> None:
    """Certify the test images of a data set: find the certified radius of each.

    MODEL is a file written by `ibp train`, or its run folder. The data set, epsilon_max,
    the number of test images, --elide and --clip default to those of the training.
    --resume continues where the command was interrupted. Under torchrun the images are
    distributed among the processes. For your own images see `ibp predict`.
    """
    settings = _settings_to_save(resume)
    with working_ranks(opening.device) as (ranks, device):

        def opened() -> Saved:
            shared.check_new(html)
            again = () if resume is None else (resume,)
            saved = open_saved(model, replace(opening, device=str(device)), *again)
            if proof.claim != UNCHECKED:
                sound_network(saved.model.eval(), proof.claim)  # refuses before a folder is made
            return saved

        def prepared() -> Path:
            default = saved.path.parent / "certificates"
            folder = shared.hold(resume) if resume else shared.new_folder(out, default, (DATA,))
            remember_data_dir(folder, saved.data_dir, saved.data.name)
            if not resume:
                moving = {"model": seen_from(folder, model)}
                content = json.dumps(settings | moving, indent=2) + "\n"
                write_atomic(folder / CERTIFY_SETTINGS, content.encode())
            return folder

        saved = run_rank_zero_first(ranks, opened)
        images = len(saved.data.test)
        settings["threads"] = shared.compute_with(opening.threads, saved.model, images, ranks)
        folder = run_on_rank_zero(ranks, prepared)
        if ranks.first:
            print_remarks(saved.data)
        costs = Costs()
        options = saved.ball.certification(proof, solver)
        command = f"ibp certify --resume {quote(str(folder))}"
        with resumable(command, folder / CERTIFY_SETTINGS):
            summary = certify_test_set(
                saved.model,
                saved.data,
                folder,
                options,
                facts={"method": saved.method, "model": str(saved.path)},
                watch=progress if ranks.first else unwatched,
                ranks=ranks,
                climbed=costs.add,
            )
    if not ranks.first:
        return
    print_summary(summary)
    # Summaries of former versions do not have the entry.
    print_bounds(summary.get("certified_by", {}), costs)
    table = folder / CERTIFICATES
    rows = read_certificates(table)
    hint_at_bounds(saved.model, saved.data.test, rows, options)
    hint_at_figures()
    if html is not None:
        page = data_set_page(saved.model, saved.data, table, summary, saved.trained_on)
        write_atomic(html, render(page).encode())
    click.echo(f"\nall files are in {folder}")


def seen_from(folder: Path, model: Path) -> str:
    """A model beside or above `folder` relative to it, so that both can be moved; else absolute."""
    path, beside = Path(os.path.abspath(model)), Path(os.path.abspath(folder)).parent
    return os.path.relpath(path, folder) if path.is_relative_to(beside) else str(path)


def _settings_to_save(resume: Path | None) -> dict[str, Any]:
    """The values of all options but `NOT_SAVED`, as JSON values.

    Raises UsageError if an option is typed beside `--resume` that does not go with it.
    """
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in click.get_current_context().params.items()
        if name not in NOT_SAVED
    }
    if resume and any(map(shared.typed, [*settings, "out"])):
        raise click.UsageError("--resume takes its settings from FOLDER: give no others")
    return settings
