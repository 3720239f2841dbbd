"""Options of `ibp import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore.choices import ARCHITECTURES, KNOWN_DATASETS, ORDERS, SOURCES
from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.value_types import ArchitectureType, Numbers, ShapeType
from ibpcore_cli.work import call


@click.command("import", cls=GroupedCommand)
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--architecture",
    type=ArchitectureType(),
    default="cnn7",
    show_default=True,
    help="Architecture of the network: its layers, such as 'conv 4x4 s2 p1, relu, linear, relu,"
    f" linear', or one of {', '.join(ARCHITECTURES)}, or mlpN with N linear layers. What it leaves"
    " open is read from the file.",
)
@click.option(
    "--dataset",
    type=click.Choice(KNOWN_DATASETS),
    help="Data set that the network was trained on.",
)
@click.option(
    "--in-shape", type=ShapeType(), help="Shape of an image, for a data set not in --dataset."
)
@click.option(
    "--source",
    type=click.Choice(SOURCES),
    help="Repository whose code trained the network: its normalisation of the data set is used if"
    " the file holds none.",
)
@click.option(
    "--mean",
    type=Numbers(float, "numbers"),
    default=(),
    help="Mean of the normalisation, in pixel units of [0, 1]: one number for each channel, or"
    " one for all.",
)
@click.option(
    "--std",
    type=Numbers(float, "numbers"),
    default=(),
    help="Standard deviation of the normalisation, given like --mean.",
)
@click.option(
    "--crop",
    type=click.IntRange(min=1),
    help="Side length of the central crop that the network takes.",
)
@click.option(
    "--order",
    type=click.Choice(ORDERS),
    help="Order of the layers if the file leaves it open: that of the file, or that of the numbers"
    " in their names.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="Model file to make, such as model.safetensors.",
)
def import_command(**given: Any) -> None:
    """Import a network that another program trained.

    CHECKPOINT is an ONNX file, such as those of VNN-COMP, which holds the whole network and
    needs no options. Or it is a file of torch.save, of any version, or a safetensors file: a
    state dict, a dictionary that holds one, or a whole module, such as those of FastIBP,
    CROWN-IBP, expressive losses, SABR, CTBench or CTRAIN. No code in it is executed.

    Certificates hold for these weights in the given architecture, behind the normalisation
    that is given or that the file holds. To check that these are the right ones, compare the
    accuracy with the published one.
    """
    call("import_", given)
