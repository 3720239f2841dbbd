"""What `ibp export` does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

import click
import torch

from ibpcore import UserError
from ibpcore.certification.formatting import as_text
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import subset_indices
from ibpcore.interop.exporting.onnx import check_onnx, to_onnx
from ibpcore.interop.exporting.vnnlib import correct_images, properties, write_benchmark
from ibpcore.io.files import write_atomic
from ibpcore.wording import counted
from ibpcore_cli.decorators import bundle
from ibpcore_cli.output import print_remarks
from ibpcore_cli.resources import check_new, new_folder
from ibpcore_cli.saved_model import Saved, SavedModelOptions, open_saved

COMPARED = 100
"""Number of test images on which onnxruntime and PyTorch must agree."""


@dataclass(frozen=True)
class ExportTargets:
    """What to write: a file and two folders; None for what is not."""

    onnx: Path | None = None
    vnnlib: Path | None = None
    hub: Path | None = None

    def prepare(self) -> None:
        """Makes the folders.

        Raises:
            UsageError: there is nothing to write, or the file has another suffix.
            UserError: the file cannot be made, or a folder is not empty.
        """
        if not (self.onnx or self.vnnlib or self.hub):
            raise click.UsageError("say what to write: --onnx FILE, --vnnlib FOLDER, --hub FOLDER")
        if self.onnx is not None and self.onnx.suffix != ".onnx":
            raise click.UsageError(f"--onnx writes a file that ends in .onnx, not {self.onnx}")
        check_new(self.onnx)
        for folder in filter(None, (self.vnnlib, self.hub)):
            new_folder(folder, folder)


@bundle(SavedModelOptions, "opening")
@bundle(ExportTargets, "targets")
def carry_out(
    model: Path,
    opening: SavedModelOptions,
    targets: ExportTargets,
    limit: int,
    timeout: int,
    license: str | None,
) -> None:
    targets.prepare()
    if targets.onnx or targets.vnnlib:
        # Only properties need epsilon_max, which the model may not know.
        epsilon_max = opening.epsilon_max if targets.vnnlib else 1.0
        saved = open_saved(model, replace(opening, epsilon_max=epsilon_max, device="cpu"))
        print_remarks(saved.data)
        content = _checked_onnx(saved)
        if targets.onnx is not None:
            write_atomic(targets.onnx, content)
            click.echo(f"the network is in {targets.onnx}")
        if targets.vnnlib is not None:
            _write_properties(targets.vnnlib, content, saved, limit, timeout)
    if targets.hub is not None:
        _write_repository(targets.hub, model, license)


def _checked_onnx(saved: Saved) -> bytes:
    """The model as an ONNX file, after its comparison with PyTorch."""
    test = saved.data.test
    images = as_pixels(test.images[torch.from_numpy(subset_indices(len(test), COMPARED))])
    content = to_onnx(saved.model)
    difference = check_onnx(content, saved.model, images)
    click.echo(
        f"onnxruntime and PyTorch differ by {difference:.2g} at most in the logits of"
        f" {counted(len(images), 'test image')}"
    )
    return content


def _write_properties(folder: Path, content: bytes, saved: Saved, limit: int, timeout: int) -> None:
    ball, test = saved.ball, saved.data.test
    indices = correct_images(saved.model, test, limit)
    clip = ball.bounds().clip
    texts = properties(test, indices, saved.model.classes, ball.epsilon_max, clip)
    write_benchmark(folder, content, texts, timeout)
    click.echo(
        f"{counted(len(indices), 'property')} for epsilon {as_text(ball.epsilon_max)} in {folder}"
    )


def _write_repository(folder: Path, run: Path, license: str | None) -> None:
    if not run.is_dir():
        raise click.UsageError(f"--hub takes a run folder, but {run} is not a folder")
    try:
        from ibpcore.hub import Pretrained
    except ImportError as error:
        raise UserError(str(error)) from None
    pretrained = Pretrained(run)
    pretrained.save_pretrained(folder, model_card_kwargs={"license": license})
    publish = f"hf upload USER/NAME {quote(str(folder))} ."
    click.echo(f"the repository is in {folder}; publish it with: {publish}")
