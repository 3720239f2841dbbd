"""`ibp export`."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click
import torch

from ibpcore import UserError
from ibpcore.certification.formatting import as_text
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import chosen
from ibpcore.interop.exporting.onnx import check_onnx, to_onnx
from ibpcore.interop.exporting.vnnlib import correct_images, properties, write_benchmark
from ibpcore.io.files import write_atomic
from ibpcore_cli.options import Epsilon, at_least_one, check_new, dataset_options, new_folder
from ibpcore_cli.saved_model import Saved, open_saved

COMPARED = 100
"""Test images on which onnxruntime must agree before anything is written."""


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@dataset_options
@click.option("--onnx", type=click.Path(path_type=Path, dir_okay=False), help="File to make.")
@click.option(
    "--vnnlib",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to make: ONNX, VNN-LIB properties and instances.csv, as in VNN-COMP.",
)
@click.option(
    "--epsilon",
    "--epsilon-max",
    "epsilon_max",
    type=Epsilon(),
    help="Radius of the properties, as 0.1 or 2/255. Default: epsilon_max of the training.",
)
@click.option(
    "--clip/--no-clip",
    default=None,
    help="Keep perturbed pixels of the properties in [0, 1]. Preset: on.",
)
@click.option(
    "--limit",
    type=at_least_one,
    default=100,
    show_default=True,
    help="Properties of at most this many images, all of them classified correctly.",
)
@click.option(
    "--timeout",
    type=at_least_one,
    default=100,
    show_default=True,
    help="Seconds for each property, in instances.csv.",
)
@click.option(
    "--hub",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder to make: model and model card, as the Hugging Face Hub keeps them.",
)
@click.option("--license", help="Of the weights, on the model card, as apache-2.0.")
def export(
    model: Path,
    dataset: str | None,
    data_dir: Path,
    download: bool,
    image_size: int | None,
    onnx: Path | None,
    vnnlib: Path | None,
    epsilon_max: float | None,
    clip: bool | None,
    limit: int,
    timeout: int,
    hub: Path | None,
    license: str | None,
) -> None:
    """Write a model, and what is to be verified of it, for other tools.

    MODEL is a file written by `ibp train`, or its run folder; --hub takes the folder. Before
    an ONNX file is put in place, onnxruntime must agree with PyTorch on test images.
    """
    if not (onnx or vnnlib or hub):
        raise click.UsageError("say what to write: --onnx FILE, --vnnlib FOLDER, --hub FOLDER")
    if onnx is not None and onnx.suffix != ".onnx":
        raise click.UsageError(f"--onnx writes a file that ends in .onnx, not {onnx}")
    check_new(onnx)
    for folder in filter(None, (vnnlib, hub)):
        new_folder(folder, folder)
    if onnx or vnnlib:
        saved = open_saved(
            model,
            dataset=dataset,
            data_dir=data_dir,
            download=download,
            image_size=image_size,
            limit_test=None,
            # A lone ONNX file has none, and a model need not know of one.
            epsilon_max=epsilon_max if vnnlib else 1.0,
            device="cpu",
            elide=None,
            clip=clip,
        )
        content = _checked_onnx(saved)
        if onnx is not None:
            write_atomic(onnx, content)
            click.echo(f"the network is in {onnx}")
        if vnnlib is not None:
            _write_properties(vnnlib, content, saved, limit, timeout)
    if hub is not None:
        _write_repository(hub, model, license)


def _checked_onnx(saved: Saved) -> bytes:
    test = saved.data.test
    images = as_pixels(test.images[torch.from_numpy(chosen(len(test), COMPARED))])
    content = to_onnx(saved.model)
    difference = check_onnx(content, saved.model, images)
    click.echo(
        f"onnxruntime and PyTorch differ by {difference:.2g} at most in the logits of"
        f" {len(images)} test images"
    )
    return content


def _write_properties(folder: Path, content: bytes, saved: Saved, limit: int, timeout: int) -> None:
    test, clip = saved.data.test, (0.0, 1.0) if saved.clip else None
    indices = correct_images(saved.model, test, limit)
    texts = properties(test, indices, saved.model.classes, saved.epsilon_max, clip)
    write_benchmark(folder, content, texts, timeout)
    click.echo(
        f"{len(indices)} properties for epsilon {as_text(saved.epsilon_max)} are in {folder}"
    )


def _write_repository(folder: Path, run: Path, license: str | None) -> None:
    if not run.is_dir():
        raise UserError(f"--hub takes the folder of a run, and {run} is none")
    try:
        from ibpcore.hub import Pretrained
    except ImportError as error:
        raise UserError(str(error)) from None
    pretrained = Pretrained(run)
    pretrained.save_pretrained(folder, model_card_kwargs={"license": license})
    publish = f"hf upload USER/NAME {quote(str(folder))} ."
    click.echo(f"the repository is in {folder}; publish it with: {publish}")
