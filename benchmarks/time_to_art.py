"""Seconds of training until the ART of held-out images passes given values.

Contenders have the same network and images. Each trains by its own schedule. As in the paper,
5,000 images are held out, of which 1,000 are measured after every epoch, with radii up to the
final epsilon_max; measuring is not part of the time. `fastibp` and `acert` follow the paper's
recipe (Table 4): its epochs, warm-up, batch size and learning rates. The others are settings of
this repository at several lengths of the run, because a schedule decides when a run is at its
best.

A contender ends when it has passed the last value or used up its time, or when its loss is no
longer finite. Contenders run one after the other, on a machine that should be idle otherwise. The
file has the rows of all that have ended so far. No time is tested.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import Row, data_dir_option, report, report_options, save
from ibpcore.data.images import Dataset
from ibpcore.distributed import chosen_device
from ibpcore.errors import UserError
from ibpcore.experiments.run import dataset_of
from ibpcore.threads import computing_with
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.loggers import UNLOGGED, Monitor
from ibpcore.training.loop import DivergedError, train_model
from ibpcore.training.selection import VALIDATION

TARGETS = {"mnist": (0.90, 0.93, 0.95), "cifar10": (0.25, 0.30, 0.33), "digits": (0.7, 0.8, 0.9)}
LENGTHS: dict[str, tuple[int, ...]] = {
    "mnist": (4, 8, 16),
    "cifar10": (4, 8, 16),
    "digits": (8, 15, 30),
}
"""Epochs of the runs with our settings."""
HELD_OUT = {"mnist": 5000, "cifar10": 5000, "digits": 200}
OURS = "best"
"""The preset of our settings."""


class _EndedError(Exception):
    """A contender has passed the last value, or used up its time."""


def contenders(dataset: str, lengths: tuple[int, ...], **settings: Any) -> dict[str, TrainConfig]:
    """The configurations by name."""
    paper = {
        f"{method}, paper": make_config(dataset, method, **settings)
        for method in ("fastibp", "acert")
    }
    ours = {
        f"acert, {OURS}, {epochs} epochs": make_config(
            dataset, "acert", preset=OURS, epochs=epochs, **settings
        )
        for epochs in lengths
    }
    return {**paper, **ours}


def curve(config: TrainConfig, data: Dataset, last: float, limit: float, device: str) -> list[Row]:
    """Seconds and held-out measures after each epoch, until ART passes `last` or at `limit`."""
    points: list[Row] = []

    def seen(row: dict[str, Any]) -> None:
        before = points[-1]["seconds"] if points else 0.0
        point = {"epoch": row["epoch"], "seconds": before + row["seconds"], **row[VALIDATION]}
        points.append(point)
        click.echo(f"  epoch {point['epoch']}: {point['seconds']:.0f} s, ART {point['art']:.4f}")
        if point["art"] >= last or point["seconds"] >= limit:
            raise _EndedError

    with tempfile.TemporaryDirectory() as folder:
        monitor = Monitor(log=UNLOGGED._replace(row=seen))
        with suppress(_EndedError, DivergedError):
            train_model(config, data, Path(folder), device=device, monitor=monitor)
    return points


def row_of(name: str, points: list[Row], targets: tuple[float, ...]) -> Row:
    """When a contender has passed the values, its best ART, and its last epoch."""
    reached = {f"seconds to {100 * x:.0f}": passed(points, x) for x in targets}
    best = max((point["art"] for point in points), default=None)
    return {"contender": name, **reached, "best_art": best, **(points[-1] if points else {})}


def passed(points: list[Row], target: float) -> float | None:
    """Seconds until ART is `target` or more; None if it never is."""
    return next((point["seconds"] for point in points if point["art"] >= target), None)


@click.command()
@click.option("--dataset", type=click.Choice([*TARGETS]), default="mnist", show_default=True)
@data_dir_option
@click.option("--width", default=16, show_default=True)
@click.option("--hidden", default=128, show_default=True)
@click.option("--limit-train", type=int, help="Training images, with those held out. Default: all.")
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int, help="Default: as many as torch has.")
@click.option("--minutes", default=40.0, show_default=True, help="Limit of each contender.")
@click.option("--only", multiple=True, help="Contenders to run. Default: all.")
@report_options
def main(
    dataset: str,
    data_dir: str,
    minutes: float,
    only: tuple[str, ...],
    json_file: Path | None,
    quick: bool,
    device: str,
    **settings: Any,
) -> None:
    """Compare how soon runs reach a quality; a blank is a value that was not reached."""
    given = {name: value for name, value in settings.items() if value is not None}
    given |= {"validation": HELD_OUT[dataset], "measure_every": 1}
    lengths = LENGTHS[dataset]
    if quick:
        dataset, lengths, minutes = "digits", (2,), 0.05
        given |= {"width": 2, "hidden": 8, "limit_train": 300, "validation": 50}
    chosen = chosen_device(device)
    try:
        configs = contenders(dataset, lengths, **given)
        if unknown := {*only} - {*configs}:
            raise UserError(f"no contender is called {unknown.pop()}: try {', '.join(configs)}")
        data = dataset_of(next(iter(configs.values())), Path(data_dir))
    except UserError as error:
        raise click.ClickException(str(error)) from None
    targets, table = TARGETS[dataset], list[Row]()
    with computing_with(given.get("threads")):
        for name, config in configs.items():
            if only and name not in only:
                continue
            click.echo(name)
            points = curve(config, data, targets[-1], 60 * minutes, str(chosen))
            table.append(row_of(name, points, targets))
            save("time_to_art", table, chosen, json_file)
        report("time_to_art", table, chosen, None)  # the file is up to date


if __name__ == "__main__":
    main()
