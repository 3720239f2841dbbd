"""`ibp import`."""

from __future__ import annotations

import math
from pathlib import Path
from shlex import quote
from typing import Any

import click

from ibpcore import save_model
from ibpcore.interop.importing.architectures import ARCHITECTURES
from ibpcore.interop.importing.models import Description, import_model
from ibpcore.interop.importing.normalizations import KNOWN_DATASETS, SOURCES
from ibpcore.nn.architecture import CNN7
from ibpcore_cli.options import check_new


class Numbers(click.ParamType):
    """Numbers with commas between them."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        if isinstance(value, tuple):  # the default
            return value
        try:
            numbers = tuple(self.kind(text) for text in str(value).split(","))
        except ValueError:
            numbers = ()
        if not numbers or not all(map(math.isfinite, numbers)):
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return numbers


class Shape(Numbers):
    """Channels, height and width."""

    def __init__(self) -> None:
        super().__init__(int, "channels,height,width")

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        shape = super().convert(value, param, ctx)
        if len(shape) != 3 or min(shape) < 1:
            self.fail(f"{value!r} is not {self.name}", param, ctx)
        return shape


@click.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--architecture",
    type=click.Choice(list(ARCHITECTURES)),
    default="cnn7",
    show_default=True,
    help="What the weights are of; widths, classes and batch norm are seen in the file.",
)
@click.option("--dataset", type=click.Choice(list(KNOWN_DATASETS)), help="What it was trained on.")
@click.option("--in-shape", type=Shape(), help="Instead of --dataset: shape of an image.")
@click.option(
    "--source",
    type=click.Choice(list(SOURCES)),
    help="Whose code trained it: its normalisation of the data set, if the file holds none.",
)
@click.option(
    "--mean",
    type=Numbers(float, "numbers"),
    default=(),
    help="Normalisation, in pixel units of [0, 1]: a number a channel or one for all.",
)
@click.option("--std", type=Numbers(float, "numbers"), default=(), help="Likewise.")
@click.option(
    "--crop", type=click.IntRange(min=1), help="Side of the middle of the images that it sees."
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="File to make, such as model.safetensors.",
)
def import_(checkpoint: Path, out: Path, **said: Any) -> None:
    """Make a model for all other commands of a checkpoint of another program.

    CHECKPOINT is what torch.save wrote in the repositories of FastIBP, CROWN-IBP, expressive
    losses, SABR, CTBench or CTRAIN: a state dict, one within a dictionary, or a whole module.
    Nothing in it is run.

    Certificates of the model are about what these weights compute behind the normalisation
    that is said here or that the file holds, with the architecture that is said here. Accuracy
    as published is the check that these are the right ones.
    """
    check_new(out)
    model, facts = import_model(checkpoint, Description(**said))
    save_model(model, out, **facts)
    imported = facts["imported"]
    shape = " x ".join(map(str, model.in_shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{checkpoint}\n")
    for name, value in {
        "sha256": imported["sha256"],
        "model": "CNN7" if isinstance(model, CNN7) else f"{imported['architecture']}, as layers",
        "images": f"{shape}, {model.classes} classes",
        "mean": ", ".join(f"{number:.6g}" for number in imported["mean"]) or "none",
        "std": ", ".join(f"{number:.6g}" for number in imported["std"]) or "none",
        "parameters": f"{parameters:,}",
    }.items():
        click.echo(f"  {name:<12}{value}")
    dataset = imported["dataset"] or "..."
    click.echo(f"\nin {out}: ibp certify {quote(str(out))} --dataset {dataset} --epsilon-max ...")
