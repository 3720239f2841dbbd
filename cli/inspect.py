"""`ibp inspect`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

import ibpcore
from ibpcore.certification.summary import write_summary
from ibpcore.data.batches import as_pixels
from ibpcore.inspection.lines import DIRECTIONS
from ibpcore.inspection.report import InspectionOptions, inspect_model
from ibpcore.nn.networks import weight_like
from ibpcore.visualization.plots.inspection import write_inspection
from ibpcore.visualization.plots.style import figures_possible
from ibpcore_cli import options as shared
from ibpcore_cli.decorators import GroupedCommand, bundle, in_group
from ibpcore_cli.inspection_table import print_inspection
from ibpcore_cli.output import Contradiction, hint_at_figures, print_remarks
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import SavedModelOptions, open_saved
from ibpcore_cli.value_types import Ladder

line_option = in_group("Line in weight space")


@click.command("inspect", cls=GroupedCommand)
@click.argument("model", type=shared.PATH)
@shared.dataset_options
@shared.data_option(
    "--samples", shared.at_least_one, "Number of test images to inspect.", "limit_test", default=200
)
@shared.epsilon_max_option
@shared.radii_option(
    "--bound",
    Ladder(),
    "Tightest bound to inspect, of ibp, crown-ibp, crown and alpha-crown; all looser ones are"
    " inspected, too, unless a list names them one by one. The last two take far longer, so use"
    " few --samples. Default: crown-ibp.",
)
@shared.radii_option("--grid", int, "Number of radii at which to evaluate the margin. Default: 65.")
@shared.ball_options
@line_option(
    "--direction", click.Choice(list(DIRECTIONS)), "Direction of the line. Default: gradient."
)
@line_option(
    "--line-length",
    float,
    "Length of the line, as a share of the norm of the weights. Default: 0.01.",
)
@line_option("--line-points", int, "Number of points on the line. Default: 33.")
@shared.attack_option("--attack-steps", int, "Steps of PGD from each start. Default: 10.")
@shared.attack_option("--restarts", int, "Random starts of PGD. Default: 3.")
@shared.attack_option("--bisections", int, "Bisections of the radius that is attacked. Default: 8.")
@shared.attack_option("--seed", int, "Random seed of attacks and random directions. Default: 0.")
@shared.device_option
@shared.threads_option
@shared.out_option("Folder to make for the results. Default: inspection, beside MODEL.")
@bundle(SavedModelOptions, "opening")
@bundle(InspectionOptions, "options")
def inspect_command(
    model: Path, opening: SavedModelOptions, options: InspectionOptions, out: Path | None
) -> None:
    """Check whether the assumptions of the theory hold for a model.

    Is the certified margin monotone and continuous in epsilon, with a slope at the radius?
    How many ReLUs are stable, how far are certified radii from those that an attack
    reaches, and how does the loss behave along a line in weight space, with IBP and with
    tighter bounds up to --bound? MODEL is a file written by `ibp train`, or its run folder;
    data set, epsilon_max, --elide and --clip default to those of the training.

    If an attack succeeds within a certified radius, the exit code is 3.
    """
    saved = open_saved(model, opening)
    shared.compute_with(opening.threads, saved.model, len(saved.data.test))
    folder = shared.new_folder(out, saved.path.parent / "inspection")
    print_remarks(saved.data)
    weight = weight_like(saved.model)
    found = inspect_model(
        saved.model,
        as_pixels(saved.data.test.images).to(weight),
        saved.data.test.labels.to(weight.device),
        saved.ball.epsilon_max,
        options,
        bounds=saved.ball.bounds(),
        watch=progress,
    )
    report = {
        "method": saved.method,
        "dataset": saved.data.title,
        "model": str(saved.path),
        **saved.ball._asdict(),
        **asdict(options),
        "ibpcore": ibpcore.__version__,
        **found.report(saved.ball.epsilon_max),
    }
    write_summary(folder / "inspection.json", report)
    print_inspection(report)
    hint_at_figures()
    if figures_possible():
        title = f"{saved.method} on {saved.data.title}, {len(saved.data.test)} test images"
        write_inspection(folder / "inspection", report, title)
    click.echo(f"\nall files are in {folder}")
    if report["alarms"]:
        raise Contradiction("ALARM: " + "; ".join(report["alarms"]))
