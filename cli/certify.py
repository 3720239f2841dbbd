"""`ibp certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore.bounds import BOUNDS
from ibpcore.certification import UNCHECKED
from ibpcore.radius import RootOptions
from ibpcore.runs import certify_test_set
from ibpcore.soundness import CLAIMS
from ibpcore_cli.options import (
    Epsilon,
    bound_options,
    data_options,
    device_option,
    new_folder,
    solver_options,
)
from ibpcore_cli.output import hint_at_figures, print_summary, progress
from ibpcore_cli.saved import open_saved


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
    elide: bool | None,
    clip: bool | None,
    **solver: Any,
) -> None:
    """Give every test image its certified radius.

    MODEL is a file written by `ibp train`, or its run folder. The data set, epsilon_max,
    the number of test images and what a perturbation may do (--elide, --clip) are as they
    were in training where they are left out.
    """
    options = RootOptions(**{name: v for name, v in solver.items() if v is not None})
    saved = open_saved(
        model,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
        limit_test=limit_test,
        epsilon_max=epsilon_max,
        device=device,
        elide=elide,
        clip=clip,
    )
    folder = new_folder(out, saved.path.parent / "certificates")
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
        watch=progress,
    )
    print_summary(summary)
    hint_at_figures()
    click.echo(f"\nall files are in {folder}")
