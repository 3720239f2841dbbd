"""`ibp certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore import UserError, load_model
from ibpcore.bounds import BOUNDS
from ibpcore.checkpoint import read_facts
from ibpcore.config import TrainConfig
from ibpcore.data import Dataset, Request, load_dataset
from ibpcore.models import CNN7
from ibpcore.radius import RootOptions
from ibpcore.training import MODEL
from ibpcore_cli.options import (
    Epsilon,
    bound_options,
    chosen_device,
    data_options,
    device_option,
    new_folder,
    saved_config,
    solver_options,
)
from ibpcore_cli.output import certify_test_set


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
    path = model / MODEL if model.is_dir() else model
    network, facts = load_model(path), read_facts(path)
    config = _training(path, facts)
    if config is None and (dataset is None or epsilon_max is None):
        raise UserError(f"{path} does not say how it was trained: give --dataset and --epsilon-max")
    if config is not None and dataset in (None, config.dataset):
        dataset = config.dataset
        limit_test = limit_test or config.limit_test
        image_size = image_size or config.image_size
    given = {name: value for name, value in solver.items() if value is not None}
    options = RootOptions(**given)
    where = chosen_device(device)
    data = load_dataset(str(dataset), Request(data_dir, download, 1, limit_test, image_size))
    _check_fit(network, facts, data, path)
    folder = new_folder(out, path.parent / "certificates")
    certify_test_set(
        network.to(where),
        data,
        folder,
        **_bounds(config, epsilon_max, elide, clip),
        bound=bound,
        options=options,
        facts={"method": config.method if config else "unknown method", "model": str(path)},
    )
    click.echo(f"\nall files are in {folder}")


def _bounds(
    config: TrainConfig | None, epsilon_max: float | None, elide: bool | None, clip: bool | None
) -> dict[str, Any]:
    """What was asked for, else what training used, else the defaults."""
    asked = {"epsilon_max": epsilon_max, "elide": elide, "clip": clip}
    usual = {"elide": True, "clip": True}
    if config is not None:
        usual = {name: getattr(config, name) for name in asked}
    return usual | {name: value for name, value in asked.items() if value is not None}


def _training(path: Path, facts: dict[str, Any]) -> TrainConfig | None:
    return saved_config(facts["training"], path) if "training" in facts else None


def _check_fit(network: CNN7, facts: dict[str, Any], data: Dataset, path: Path) -> None:
    built = network.architecture
    if built.in_shape != data.in_shape or built.classes != len(data.classes):
        raise UserError(
            f"{path} takes images {built.in_shape} of {built.classes} classes, but"
            f" {data.title} has {data.in_shape} of {len(data.classes)}"
        )
    classes = facts.get("classes", list(data.classes))
    if classes != list(data.classes):
        raise UserError(f"{path} was trained on other classes than those of {data.title}")
