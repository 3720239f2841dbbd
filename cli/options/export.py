"""Options of `ibp export`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand, in_group
from ibpcore_cli.options import shared
from ibpcore_cli.value_types import Epsilon
from ibpcore_cli.work import call

target_option = in_group("Targets")
property_option = in_group("Properties")


@click.command("export", cls=GroupedCommand)
@click.argument("model", type=shared.PATH)
@target_option("--onnx", click.Path(path_type=Path, dir_okay=False), "ONNX file to make.")
@target_option(
    "--vnnlib",
    click.Path(path_type=Path, file_okay=False),
    "Folder to make with the ONNX file, VNN-LIB properties and instances.csv, as in VNN-COMP.",
)
@target_option(
    "--hub",
    click.Path(path_type=Path, file_okay=False),
    "Folder to make with model and model card, as a repository of the Hugging Face Hub.",
)
@target_option("--license", str, "License of the weights on the model card, such as apache-2.0.")
@shared.dataset_options
@property_option(
    "--epsilon",
    Epsilon(),
    "Radius of the properties, such as 0.1 or 2/255. Default: epsilon_max of the training.",
    "--epsilon-max",
    "--eps",
    "epsilon_max",
)
@property_option(
    "--clip/--no-clip",
    bool,
    "Restrict perturbed pixels to [0, 1] in the properties. Default: on.",
    default=None,
)
@property_option(
    "--limit",
    shared.at_least_one,
    "Largest number of properties, each for a correctly classified image.",
    default=100,
)
@property_option(
    "--timeout", shared.at_least_one, "Seconds for each property, in instances.csv.", default=100
)
def export_command(**given: Any) -> None:
    """Export a model to ONNX, VNN-LIB or the Hugging Face Hub.

    MODEL is a file written by `ibp train`, or its run folder; --hub takes the folder. An
    ONNX file is only written if onnxruntime and PyTorch agree on test images.
    """
    call("export", given)
