"""Options of `ibp doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.value_types import DeviceType
from ibpcore_cli.work import call


@click.command("doctor", cls=GroupedCommand)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("data"),
    envvar="IBP_DATA_DIR",
    show_default=True,
    show_envvar=True,
    help="Folder in which to look for data sets.",
)
@click.option(
    "--device",
    type=DeviceType(),
    default="auto",
    show_default=True,
    help="Device of the self-test; auto takes CUDA if it is available.",
)
def doctor_command(**given: Any) -> None:
    """Check the installation: packages, device and data sets, and a self-test.

    The packages include those of the extras; the data sets are those in --data-dir. The
    self-test takes a second to train, bound, certify, and write and read files. The exit code
    is 1 if it fails; a missing package or data set is only reported.
    """
    call("doctor", given)
