"""What `ibp import` does."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import click

from ibpcore import save_model
from ibpcore.certification.formatting import radius_text
from ibpcore.interop.importing.models import Description, import_model
from ibpcore.nn.cnn7 import CNN7
from ibpcore.training.presets import PRESETS
from ibpcore.wording import counted
from ibpcore_cli.decorators import bundle
from ibpcore_cli.resources import check_new


@bundle(Description, "description")
def carry_out(checkpoint: Path, description: Description, out: Path) -> None:
    check_new(out)
    model, facts = import_model(checkpoint, description)
    save_model(model, out, **facts)
    imported = facts["imported"]
    shape = " x ".join(map(str, model.in_shape))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    click.echo(f"{checkpoint}\n")
    for name, value in {
        "sha256": imported["sha256"],
        "model": "CNN7" if isinstance(model, CNN7) else f"{imported['architecture']}, as layers",
        "order": "as stored" if imported["order"] == "file" else "by number",
        "images": f"{shape}, {counted(model.classes, 'class')}",
        "mean": ", ".join(f"{number:.6g}" for number in imported["mean"]) or "none",
        "std": ", ".join(f"{number:.6g}" for number in imported["std"]) or "none",
        "parameters": f"{parameters:,}",
    }.items():
        click.echo(f"  {name:<12}{value}")
    dataset = imported["dataset"]
    radius = radius_text(PRESETS[dataset]["epsilon_max"]) if dataset else "..."
    what = "" if dataset else " --dataset ..."
    click.echo(f"\nin {out}: ibp certify {quote(str(out))}{what} --epsilon-max {radius}")
