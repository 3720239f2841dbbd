"""What commands work with: the folder of data sets, the device, threads, output folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import click
import torch

from ibpcore.certification.certify import BATCH_SIZE
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.io.locks import LOCK, held
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import multiplications
from ibpcore.threads import computing_with, suitable_threads


@dataclass(frozen=True)
class DataSource:
    """Where data sets are, and whether missing ones are downloaded."""

    data_dir: Path
    download: bool


def typed(name: str) -> bool:
    """Whether the parameter of that name stands in the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


def data_dir_hint(data_dir: Path) -> str:
    """` --data-dir DIR` for the end of a suggested command; empty if it was not typed."""
    return f" --data-dir {quote(str(data_dir))}" if typed("data_dir") else ""


def chosen_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """The device for the value of `--device`; each rank on a machine gets one of its own.

    Raises:
        UsageError: a CUDA device is named by its number for several ranks.
        UserError: there is no such device, or there are fewer CUDA devices than ranks.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError("there is no CUDA device: use --device cpu")
    if ranks.size > 1:
        if ":" in name:
            raise click.UsageError(
                f"each process takes a device of its own: --device cuda, not {name}"
            )
        if ranks.local >= count:
            raise UserError(
                f"more processes than CUDA devices ({count}): start fewer, or use --device cpu"
            )
        return torch.device("cuda", ranks.local)
    device = torch.device("cuda" if name == "auto" else name)
    if device.index is not None and device.index >= count:
        raise UserError(f"there is no device {name}: the last one is cuda:{count - 1}")
    return device


def current_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """`chosen_device`, made torch's current one if it is one of several."""
    device = chosen_device(name, ranks)
    if device.index is not None:
        torch.cuda.set_device(device)
    return device


def compute_with(
    threads: int | None, network: Classifier, images: int, ranks: Ranks = SINGLE_PROCESS
) -> int:
    """Computes with so many threads until the command ends, and returns their number.

    None stands for `suitable_threads`, the same on all ranks, for passes of so many `images`,
    or of a batch if that has fewer.
    """
    if threads is None:
        work = min(images, BATCH_SIZE) * multiplications(network)
        threads = run_on_rank_zero(ranks, lambda: suitable_threads(work))
    click.get_current_context().with_resource(computing_with(threads))
    return threads


def hold(folder: Path) -> Path:
    """Holds the lock of `folder` until the command ends; see `ibpcore.io.locks.held`."""
    return click.get_current_context().with_resource(held(folder))


def new_folder(asked: Path | None, default: Path) -> Path:
    """Makes and locks the folder `asked`; if None, `default`, numbered where that exists.

    Raises:
        UserError: the folder exists and is not empty, is in use, or cannot be made.
    """
    folder, number = asked or default, 2
    while asked is None and folder.exists():
        folder, number = default.with_name(f"{default.name}-{number}"), number + 1
    if any(path.name != LOCK for path in hold(folder).iterdir()):
        raise UserError(f"the output folder {folder} already exists and is not empty")
    return folder


def check_new(file: Path | None) -> None:
    """Raises UserError if `file` exists or its folder does not; None is fine."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"the output file {file} already exists")
    if not file.parent.is_dir():
        raise UserError(f"cannot make {file}: there is no folder {file.parent}")
