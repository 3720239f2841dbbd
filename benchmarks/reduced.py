"""A preset's whole run, with as many epochs as fit into a given time; its accuracy, ACR and ART.

    python -m benchmarks.reduced --dataset cifar10 --seconds 600 --out run

The time of an epoch is measured first, as `ibp train --dry-run` does it: on steps in which every
image is classified correctly, which is an upper limit. All schedules keep their fractions of the
run. The `metrics.jsonl` of the run folder OUT has a line for each epoch, whatever comes after it.
`seconds` is the time of everything, `training_seconds` that of the epochs.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

import ibpcore
from benchmarks import harness
from ibpcore.distributed import chosen_device
from ibpcore.experiments.run import dataset_of
from ibpcore.training.config import make_config
from ibpcore.training.cost import estimate_cost
from ibpcore_cli.options.shared import device_option

FOR_TRAINING = 0.75
"""Share of the time left after the measurement; the rest is for certificates, and for errors."""
QUICK: dict[str, Any] = {
    **{"epochs": 2, "limit_train": 64, "limit_test": 32},
    **{"width": 2, "hidden": 8},
}


def epochs_within(seconds: float, of_epoch: float, most: int) -> int:
    """How many epochs fit into so many seconds: at least one, at most those of the preset."""
    return max(1, min(most, int(seconds / of_epoch)))


def reduced(
    dataset: str,
    method: str,
    seconds: float,
    run: Path,
    data_dir: Path,
    device: str,
    **settings: Any,
) -> harness.Row:
    """The row of a run that should take so many seconds, with its measurement and certificates.

    Raises:
        UserError: see `ibpcore.train`.
    """
    started = time.monotonic()
    config = make_config(dataset, method, **settings)
    data = dataset_of(config, data_dir)
    of_epoch = estimate_cost(config, data, chosen_device(device)).seconds / config.epochs
    left = seconds - (time.monotonic() - started)
    epochs = epochs_within(FOR_TRAINING * left, of_epoch, config.epochs)
    click.echo(f"{epochs} of {config.epochs} epochs, of at most {of_epoch:.2f} s each")
    given = {**settings, "epochs": epochs, "device": device, "out": run}
    done = ibpcore.train(data, method, on_epoch=click.echo, **given)
    return {
        "contender": method,
        "dataset": data.title,
        "width": config.width,
        "epochs": epochs,
        "preset_epochs": config.epochs,
        "estimated_s_per_epoch": of_epoch,
        "training_seconds": done.summary["training_seconds"],
        "seconds": time.monotonic() - started,
        "accuracy": done.evaluation.accuracy,
        "acr": done.evaluation.acr,
        "art": done.evaluation.art,
    }


@click.command()
@click.option("--dataset", default="cifar10", show_default=True, help="Data set, and its preset.")
@click.option("--method", default="acert", show_default=True, help="Training method.")
@click.option("--seconds", type=float, default=600, show_default=True, help="Time for everything.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Run folder to make.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write.")
@click.option("--quick", is_flag=True, help="Run a small case, to check that it works.")
@harness.data_dir_option
@device_option
def main(
    dataset: str,
    method: str,
    seconds: float,
    out: Path,
    json_file: Path | None,
    quick: bool,
    data_dir: str,
    device: str,
) -> None:
    """Train and certify as much of a preset as a time allows."""
    settings = QUICK if quick else {}
    row = reduced(dataset, method, seconds, out, Path(data_dir), device, **settings)
    harness.report("reduced", [row], chosen_device(device), json_file)


if __name__ == "__main__":
    main()
