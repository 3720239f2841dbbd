"""Commands that run in several processes: how these join, and how they end together."""

from __future__ import annotations

import errno
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from ibpcore import UserError
from ibpcore.distributed import LostRankError, Ranks, current_device, joined, ranks_of_environment
from ibpcore_cli.main import INTERRUPTED

DISK_FAILURES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""Errors of a disk that is full, read-only or broken, after which work can be resumed."""


class Stopped(click.ClickException):
    """Ctrl-C, with the exit code that shells expect for it."""

    exit_code = INTERRUPTED


@contextmanager
def working_ranks(device: str, *, tensors: bool = False) -> Iterator[tuple[Ranks, torch.device]]:
    """Joins this process with others that `torchrun` started; yields the ranks and its device.

    With `tensors` the ranks can exchange tensors on their devices.

    Raises:
        UserError: see `chosen_device`, `ibpcore.distributed.joined`.
    """
    ranks = ranks_of_environment()
    if ranks.size > 1 and ":" in device:
        raise click.UsageError(
            f"each process takes a device of its own: --device cuda, not {device}"
        )
    where = current_device(device, ranks)
    before = signal.getsignal(signal.SIGTERM)
    if ranks.size > 1:  # torchrun sends it when another rank is lost
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        with joined(ranks, where if tensors else "cpu"):
            yield ranks, where
    finally:
        if ranks.size > 1:
            signal.signal(signal.SIGTERM, before)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def resumable(command: str, begun: Path) -> Iterator[None]:
    """Names the `command` that resumes the work if it is stopped, a rank is lost or the disk fails.

    Before the file `begun` exists there is nothing to resume.
    """

    def further() -> str:
        return f"resume with: {command}" if begun.exists() else "run the same command again"

    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {further()}") from None
    except LostRankError as error:
        raise UserError(f"{error}; {further()}") from None
    except OSError as error:
        if error.errno not in DISK_FAILURES:
            raise
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        raise UserError(f"{reason}; once that is mended, {further()}") from None
