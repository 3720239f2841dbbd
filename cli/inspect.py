"""What `ibp inspect` does."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

import ibpcore
from ibpcore.certification.summary import write_summary
from ibpcore.data.batches import as_pixels
from ibpcore.inspection.report import InspectionOptions, inspect_model
from ibpcore.nn.networks import weight_like
from ibpcore.visualization.plots.inspection import write_inspection
from ibpcore.visualization.plots.style import figures_possible
from ibpcore_cli import resources
from ibpcore_cli.decorators import bundle
from ibpcore_cli.inspection_table import print_inspection
from ibpcore_cli.output import Contradiction, hint_at_figures, print_remarks
from ibpcore_cli.progress import progress
from ibpcore_cli.saved_model import SavedModelOptions, open_saved


@bundle(SavedModelOptions, "opening")
@bundle(InspectionOptions, "options")
def carry_out(
    model: Path, opening: SavedModelOptions, options: InspectionOptions, out: Path | None
) -> None:
    saved = open_saved(model, opening)
    resources.compute_with(opening.threads, saved.model, len(saved.data.test))
    folder = resources.new_folder(out, saved.path.parent / "inspection")
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
        title = f"{saved.method} on {saved.data.title}"
        write_inspection(folder / "inspection", report, title)
    click.echo(f"\nall files are in {folder}")
    if report["alarms"]:
        raise Contradiction("ALARM: " + "; ".join(report["alarms"]))
