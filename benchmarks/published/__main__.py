"""Certifies images by published networks with every bound, beside auto_LiRPA's CROWN.

    python -m benchmarks.published --networks FOLDER --repeats 3

Claims: CROWN here is as tight as auto_LiRPA's, in less time; proving its certificates loses none
of them. FOLDER contains clones of the repositories that `benchmarks.published.networks` names,
and `trained`, the networks that the commands in docs/benchmarks.md make; a network whose file is
missing is skipped. The images are the test images that `--limit-test` of `ibp certify` would
take; counted are those that are classified correctly and that PGD does not break (`robust`).
Times are those of all of these, in turns with auto_LiRPA, which counts only if it can be
imported: see `harness` and `measures`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import torch

from benchmarks import harness
from benchmarks.published.measures import Subject, measure, subject, totals
from benchmarks.published.networks import NETWORKS, Published
from ibpcore.bounds.epsilons import as_number
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.data.sources import Request, load_dataset
from ibpcore.errors import UserError
from ibpcore_cli.resources import chosen_device

QUICK_IMAGES = 4


def present(folder: Path, names: tuple[str, ...]) -> dict[str, Published]:
    """Those of the networks `names`, or of all if there are none, whose files are in `folder`."""
    chosen = {name: NETWORKS[name] for name in names or NETWORKS}
    found = {name: net for name, net in chosen.items() if (folder / net.file).exists()}
    for name, net in chosen.items():
        if name not in found:
            click.echo(f"skipped {name}: {folder / net.file} is missing", err=True)
    if not found:
        raise UserError(f"there is no published network in {folder}")
    return found


def subjects(
    folder: Path, found: dict[str, Published], data_dir: Path, images: int, device: torch.device
) -> Iterator[Subject]:
    """The networks with the images that are certified."""
    tests: dict[str, ImageSet] = {}
    for name, net in found.items():
        if net.dataset not in tests:
            loaded = load_dataset(net.dataset, Request(data_dir, False, 1, images))
            tests[net.dataset] = loaded.test.to(device)
        test = tests[net.dataset]
        model, epsilon = net.read(folder).to(device), as_number(net.epsilon)
        yield subject(name, model, as_pixels(test.images), test.labels.long(), epsilon)


@click.command()
@click.option(
    "--networks",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder with clones of the repositories.",
)
@click.option(
    "--only",
    multiple=True,
    type=click.Choice([*NETWORKS]),
    help="Measure this network; may be repeated.",
)
@click.option(
    "--images",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Test images of each network.",
)
@harness.data_dir_option
@harness.common_options
def main(
    folder: Path,
    only: tuple[str, ...],
    images: int,
    data_dir: str,
    json_file: Path | None,
    quick: bool,
    device: str,
    repeats: int,
) -> None:
    """Certify by published networks; ratios are to auto_LiRPA's time if it can be imported."""
    on = chosen_device(device)
    images, repeats = (QUICK_IMAGES, 1) if quick else (images, repeats)
    table: list[harness.Row] = []
    for one in subjects(folder, present(folder, only), Path(data_dir), images, on):
        rows = measure(one, repeats)
        click.echo(harness.as_text(rows), err=True)
        table += rows
    harness.report("published", [*table, *totals(table)], on, json_file)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        raise SystemExit(f"Error: {error}") from None
