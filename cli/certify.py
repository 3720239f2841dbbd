"""`ibp certify`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore import UserError, load_model
from ibpcore.certification import certify as certify_images
from ibpcore.certification import summarize
from ibpcore.checkpoint import read_facts
from ibpcore.config import STANDARD_RADII, TrainConfig
from ibpcore.data import Dataset, Request, load_dataset
from ibpcore.models import CNN7
from ibpcore.radius import RootOptions
from ibpcore.training import MODEL
from ibpcore_cli.options import (
    Epsilon,
    chosen_device,
    data_options,
    device_option,
    new_folder,
    saved_config,
    solver_options,
)
from ibpcore_cli.output import print_summary, progress, write_results


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@data_options
@click.option("--epsilon-max", type=Epsilon(), help="Largest radius, as 0.1 or 8.8/255.")
@solver_options
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
    device: str,
    out: Path | None,
    **solver: Any,
) -> None:
    """Give every test image its certified radius.

    MODEL is a file written by `ibp train`, or its run folder. What is left out is as it
    was in training: the data set, epsilon_max, the number of test images.
    """
    path = model / MODEL if model.is_dir() else model
    network, config = load_model(path), _training(path)
    given = {name: value for name, value in solver.items() if value is not None}
    options = RootOptions(**given)
    where = chosen_device(device)
    same = dataset is None or dataset == config.dataset
    data = load_dataset(
        dataset or config.dataset,
        Request(
            data_dir,
            download,
            limit_train=1,
            limit_test=limit_test or (config.limit_test if same else None),
            image_size=image_size or (config.image_size if same else None),
        ),
    )
    _check_fit(network, data, path)
    folder = new_folder(out, path.parent / "certificates")
    epsilon_max = epsilon_max or config.epsilon_max
    with progress("certifying", len(data.test)) as advance:
        certificates = certify_images(
            network.to(where),
            data.test.to(where),
            epsilon_max,
            options,
            elide=config.elide,
            clip=config.clip_range,
            report=None if advance is None else lambda done: advance(done, ""),
        )
    summary = summarize(certificates, epsilon_max, STANDARD_RADII[data.name])
    summary |= {"dataset": data.title, "model": str(path), "solver": options.solver}
    title = f"{config.method} on {data.title}"
    write_results(folder, certificates, summary, title)
    print_summary(summary, title)
    click.echo(f"\nall files are in {folder}")


def _training(path: Path) -> TrainConfig:
    facts = read_facts(path)
    if "training" not in facts:
        raise UserError(f"{path} does not say how it was trained: it is not from ibp train")
    return saved_config(facts["training"], path)


def _check_fit(network: CNN7, data: Dataset, path: Path) -> None:
    built = network.architecture
    if built.in_shape != data.in_shape or built.classes != len(data.classes):
        raise UserError(
            f"{path} takes images {built.in_shape} of {built.classes} classes, but"
            f" {data.title} has {data.in_shape} of {len(data.classes)}"
        )
