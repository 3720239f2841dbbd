"""Commands that run in several processes: how these join, and how they end together."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click
import torch

from ibpcore import UserError
from ibpcore.distributed import LostRankError, Ranks, joined, ranks_of_environment
from ibpcore_cli.main import INTERRUPTED
from ibpcore_cli.resources import current_device


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
def resumable(command: str) -> Iterator[None]:
    """Names the `command` that resumes the work if it is interrupted or a rank is lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; resume with: {command}") from None
    except LostRankError as error:
        raise UserError(f"{error}; resume with: {command}") from None
