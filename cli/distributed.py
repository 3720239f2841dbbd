"""Commands of several processes: how they join, and how they end together."""

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
from ibpcore_cli.options import chosen_device


class Stopped(click.ClickException):
    """Ctrl-C, with the exit code that a shell expects of it."""

    exit_code = INTERRUPTED


@contextmanager
def working_ranks(device: str, *, tensors: bool = False) -> Iterator[tuple[Ranks, torch.device]]:
    """Joins this process with the others that `torchrun` started, if it did.

    Args:
        device: as `--device` says.
        tensors: they will exchange tensors of that device, and not only words.

    Yields:
        the ranks, and the device of this one.

    Raises:
        UserError: see `chosen_device`, `ibpcore.distributed.joined`.
    """
    ranks = ranks_of_environment()
    where = chosen_device(device, ranks)
    if where.index is not None:
        torch.cuda.set_device(where)
    before = signal.getsignal(signal.SIGTERM)
    if ranks.size > 1:  # so does torchrun end the others when one is lost
        signal.signal(signal.SIGTERM, _stop)
    try:
        with joined(ranks, where if tensors else "cpu"):
            yield ranks, where
    finally:
        if ranks.size > 1:
            signal.signal(signal.SIGTERM, before)


def _stop(*_: Any) -> None:
    raise KeyboardInterrupt


@contextmanager
def going_on(command: str) -> Iterator[None]:
    """Says by which `command` to go on, where the work was stopped or a rank was lost."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; go on with: {command}") from None
    except LostRankError as error:
        raise UserError(f"{error}; go on with: {command}") from None
