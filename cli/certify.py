"""What `ibp certify` does."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore.certification.certificates import CERTIFICATES, UNCHECKED, read_certificates
from ibpcore.certification.soundness.network import sound_network
from ibpcore.distributed import run_on_rank_zero, run_rank_zero_first
from ibpcore.experiments.data_folder import DATA, remember_data_dir
from ibpcore.experiments.test_set import certify_test_set
from ibpcore.io.files import write_atomic
from ibpcore.progress import unwatched
from ibpcore.roots import RootOptions
from ibpcore.visualization.html.contents import data_set_page
from ibpcore.visualization.html.page import render
from ibpcore_cli import resources
from ibpcore_cli.decorators import bundle
from ibpcore_cli.distributed import resumable, working_ranks
from ibpcore_cli.options.certify import BESIDE, CERTIFY_SETTINGS, NOT_SAVED
from ibpcore_cli.output import (
    Costs,
    hint_at_bounds,
    hint_at_figures,
    print_bounds,
    print_remarks,
    print_summary,
)
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import CertificateOptions, Saved, SavedModelOptions, open_saved


@bundle(SavedModelOptions, "opening")
@bundle(RootOptions, "solver")
@bundle(CertificateOptions, "proof")
def carry_out(
    model: Path,
    opening: SavedModelOptions,
    solver: RootOptions,
    proof: CertificateOptions,
    out: Path | None,
    html: Path | None,
    resume: Path | None,
) -> None:
    settings = _settings_to_save(resume)
    with working_ranks(opening.device) as (ranks, device):

        def opened() -> Saved:
            resources.check_new(html)
            again = () if resume is None else (resume,)
            saved = open_saved(model, replace(opening, device=str(device)), *again)
            if proof.claim != UNCHECKED:
                sound_network(saved.model.eval(), proof.claim)  # refuses before a folder is made
            return saved

        def prepared() -> Path:
            default = saved.path.parent / "certificates"
            folder = (
                resources.hold(resume) if resume else resources.new_folder(out, default, (DATA,))
            )
            remember_data_dir(folder, saved.data_dir, saved.data.name)
            if not resume:
                places = {"model": os.path.abspath(model), BESIDE: beside(folder, model)}
                content = json.dumps(settings | places, indent=2) + "\n"
                write_atomic(folder / CERTIFY_SETTINGS, content.encode())
            return folder

        saved = run_rank_zero_first(ranks, opened)
        images = len(saved.data.test)
        settings["threads"] = resources.compute_with(opening.threads, saved.model, images, ranks)
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
                facts={"method": saved.method, "model": os.path.abspath(saved.path)},
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
    beside_them = f"; the page is {html}" if html is not None else ""
    click.echo(f"\nall files are in {folder}{beside_them}")


def beside(folder: Path, model: Path) -> str | None:
    """The path from `folder` to a model beside or above it; None for a model elsewhere."""
    path, above = Path(os.path.abspath(model)), Path(os.path.abspath(folder)).parent
    return os.path.relpath(path, folder) if path.is_relative_to(above) else None


def _settings_to_save(resume: Path | None) -> dict[str, Any]:
    """The values of all options but `NOT_SAVED`, as JSON values.

    Raises UsageError if an option is typed beside `--resume` that does not go with it.
    """
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in click.get_current_context().params.items()
        if name not in NOT_SAVED
    }
    if resume and any(map(resources.typed, [*settings, "out"])):
        raise click.UsageError("--resume takes its settings from FOLDER: give no others")
    return settings
