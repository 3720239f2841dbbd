"""`ibp inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import ibpcore
from ibpcore.certification.summary import write_summary
from ibpcore.data.batches import as_pixels
from ibpcore.inspection.lines import DIRECTIONS
from ibpcore.inspection.report import PARTS, InspectionOptions, inspect_model
from ibpcore.visualization.plots.inspection import write_inspection
from ibpcore.visualization.plots.style import figures_possible
from ibpcore_cli.inspection_table import print_inspection
from ibpcore_cli.options import (
    Epsilon,
    at_least_one,
    bound_options,
    dataset_options,
    device_option,
    new_folder,
    options,
)
from ibpcore_cli.output import Contradiction, progress
from ibpcore_cli.saved_model import open_saved

inspection_options = options(
    click.option("--grid", type=int, help="Radii at which the margin is evaluated. Preset: 65."),
    click.option(
        "--direction",
        type=click.Choice(list(DIRECTIONS)),
        help="Of the line in weight space. Preset: gradient.",
    ),
    click.option(
        "--line-length",
        type=float,
        help="Of that line, as a share of the norm of the weights. Preset: 0.01.",
    ),
    click.option("--line-points", type=int, help="Places on the line. Preset: 33."),
    click.option("--attack-steps", type=int, help="Steps of PGD. Preset: 10."),
    click.option("--restarts", type=int, help="Random starts of PGD. Preset: 3."),
    click.option("--bisections", type=int, help="Of the attackable radius. Preset: 8."),
    click.option("--seed", type=int, help="Of attacks and random directions. Preset: 0."),
)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@dataset_options
@click.option(
    "--samples", type=at_least_one, default=200, show_default=True, help="Test images to look at."
)
@click.option("--epsilon-max", type=Epsilon(), help="Largest radius, as 0.1 or 8.8/255.")
@inspection_options
@bound_options
@device_option
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder to make for the results. Default: inspection, beside MODEL.",
)
def inspect(
    model: Path,
    dataset: str | None,
    data_dir: Path,
    download: bool,
    image_size: int | None,
    samples: int,
    epsilon_max: float | None,
    elide: bool | None,
    clip: bool | None,
    device: str,
    out: Path | None,
    **settings: Any,
) -> None:
    """Measure whether the assumptions is firm that the theory stands on.

    Is the certified margin monotone and continuous in epsilon, with a slope at the radius?
    How many ReLUs are stable, how far are certified radii from those that an attack
    reaches, and how does the loss look along a line in weight space, with IBP and with
    CROWN-IBP? MODEL is a file written by `ibp train`, or its run folder; data set,
    epsilon_max, --elide and --clip are as in training where they are left out.

    An attack that succeeds within a certified radius ends with exit code 3.
    """
    options = InspectionOptions(**{name: v for name, v in settings.items() if v is not None})
    saved = open_saved(
        model,
        dataset=dataset,
        data_dir=data_dir,
        download=download,
        image_size=image_size,
        limit_test=samples,
        epsilon_max=epsilon_max,
        device=device,
        elide=elide,
        clip=clip,
    )
    folder = new_folder(out, saved.path.parent / "inspection")
    weight = next(saved.model.parameters())
    with progress("inspecting", len(PARTS)) as advance:
        found = inspect_model(
            saved.model,
            as_pixels(saved.data.test.images).to(weight),
            saved.data.test.labels.to(weight.device),
            saved.epsilon_max,
            options,
            bounds=saved.bounds(),
            begin=None if advance is None else lambda part: advance(PARTS.index(part), part),
        )
    report = {
        "method": saved.method,
        "dataset": saved.data.title,
        "model": str(saved.path),
        "epsilon_max": saved.epsilon_max,
        "elide": saved.elide,
        "clip": saved.clip,
        **asdict(options),
        "ibpcore": ibpcore.__version__,
        **found.report(saved.epsilon_max),
    }
    write_summary(folder / "inspection.json", report)
    print_inspection(report)
    if not figures_possible():
        click.echo("\nno figure: pip install 'ibpcore[plot]'")
    else:
        title = f"{saved.method} on {saved.data.title}, {len(saved.data.test)} test images"
        write_inspection(folder / "inspection", report, title)
    click.echo(f"\nall files are in {folder}")
    if report["alarms"]:
        raise Contradiction("ALARM: " + "; ".join(report["alarms"]))
