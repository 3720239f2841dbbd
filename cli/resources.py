"""What commands work with: the folder of data sets, the device, threads, output folders."""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import click

from ibpcore.certification.certify import BATCH_SIZE
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.errors import UserError
from ibpcore.io.locks import held, held_anew
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import multiplications
from ibpcore.threads import computing_with, suitable_threads


@dataclass(frozen=True)
class DataSource:
    """Where data sets are, and whether missing ones are downloaded.

    Without a folder it is the one that the run or sweep remembers, or else `data`.
    """

    download: bool
    data_dir: Path | None = None


def typed(name: str) -> bool:
    """Whether the parameter of that name stands in the command line."""
    source = click.get_current_context().get_parameter_source(name)
    return source is click.core.ParameterSource.COMMANDLINE


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


def new_folder(asked: Path | None, default: Path, begun: Container[str] = ()) -> Path:
    """Makes and holds a folder until the command ends; see `ibpcore.io.locks.held_anew`."""
    return click.get_current_context().with_resource(held_anew(asked, default, begun))


def check_new(file: Path | None) -> None:
    """Raises UserError if `file` exists or cannot be written; None is fine."""
    if file is None:
        return
    if file.exists():
        raise UserError(f"the output file {file} already exists")
    check_writable(file)


def check_writable(file: Path) -> None:
    """Raises UserError unless `file` can be written, now rather than after the work."""
    if file.is_dir():
        raise UserError(f"cannot write {file}: it is a folder")
    if not file.parent.is_dir():
        raise UserError(f"cannot make {file}: there is no folder {file.parent}")
    if not os.access(file.parent, os.W_OK):
        raise UserError(f"cannot make {file}: the folder {file.parent} is read-only")
