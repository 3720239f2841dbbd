"""Ranks: the processes that do one piece of work together, as `torchrun` starts them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.errors import UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""For a rank that says nothing. One that died is noticed at once: its connections close."""
LONG_PATIENCE = timedelta(days=30)
"""For ranks that still work on their own share."""


class LostRankError(UserError):
    """Another rank ended meanwhile."""


class FirstFailedError(UserError):
    """Rank 0 failed, and says why."""


class Ranks(NamedTuple):
    """Which of several processes this is; by default the only one.

    Attributes:
        rank: from 0; rank 0 alone writes files and speaks.
        size: how many there are.
        local: which one on its machine, the number of its CUDA device.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sharing(self, count: int) -> Ranks:
        """Who shares `count` samples: these, or where there are too few, each does all."""
        return self if count >= self.size else ALONE

    def share(self, count: int) -> slice:
        """Which of `count` samples are this rank's: contiguous, sizes alike."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


ALONE = Ranks()


def ranks_of_environment() -> Ranks:
    """What `torchrun` says in RANK, WORLD_SIZE and LOCAL_RANK; `ALONE` without it.

    Raises:
        UserError: they are no such numbers.
    """
    if "WORLD_SIZE" not in os.environ:
        return ALONE
    texts = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    if not all(text.isdecimal() for text in texts.values()):
        raise UserError(f"the environment describes no ranks: {texts}")
    found = Ranks(*map(int, texts.values()))
    if found.rank >= found.size:
        raise UserError(f"the environment describes no ranks: {texts}")
    return found


@contextmanager
def joined(ranks: Ranks, device: torch.device | str) -> Iterator[None]:
    """Lets the ranks speak with each other: by NCCL on CUDA, by gloo on the CPU.

    Raises:
        LostRankError: one of them ended meanwhile, or they do not find each other.
    """
    if ranks.size == 1:
        yield
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        with noticing_loss(ranks):
            dist.init_process_group(backend, timeout=PATIENCE)
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


LOST = (
    *("connection closed", "connection reset", "connection refused", "connection was"),
    *("broken pipe", "timed out", "timeout", "socket", "gloo", "nccl error", "tcpstore"),
)
"""One of these is in what torch raises; for many of its errors it has no class."""


@contextmanager
def noticing_loss(ranks: Ranks) -> Iterator[None]:
    """Makes a `LostRankError` of what torch raises where another rank ended."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if ranks.size == 1 or not _is_of_a_lost_rank(error):
            raise
        raise LostRankError(f"lost another of the {ranks.size} ranks, and stops") from None


def _is_of_a_lost_rank(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)


def told_by_first(ranks: Ranks, value: Any) -> Any:
    """The `value` that rank 0 has, a plain value, on every rank."""
    if ranks.size == 1:
        return value
    values = [value]
    with noticing_loss(ranks):
        dist.broadcast_object_list(values, src=0)
    return values[0]


def told_by_all(ranks: Ranks, value: T) -> list[T]:
    """The `value` that each rank has, in their order, once the last has come here."""
    if ranks.size == 1:
        return [value]
    wait_for_all(ranks)
    values: list[Any] = [None] * ranks.size
    with noticing_loss(ranks):
        dist.all_gather_object(values, value)
    return values


def by_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work()` gives on rank 0, a plain value, on every rank; its failure is that of all.

    Raises:
        FirstFailedError: on the other ranks, where rank 0 raises what `work` did.
    """
    value, failure = None, None
    if ranks.first:
        try:
            value = work()
        except Exception as error:
            failure = error
    wait_for_all(ranks)
    failed, value = told_by_first(ranks, (failure is not None, value))
    if failure is not None:
        raise failure
    if failed:
        raise FirstFailedError("rank 0 failed")
    return value


def after_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """What `work()` gives here, once it has gone well on rank 0, and then on all the others.

    Raises:
        FirstFailedError: see `by_first`.
    """
    mine: list[T] = []
    by_first(ranks, lambda: mine.append(work()))
    result = mine[0] if ranks.first else work()
    wait_for_all(ranks)
    return result


def wait_for_all(ranks: Ranks) -> None:
    """Returns once every rank has come here, by gloo however long that takes."""
    if ranks.size == 1:
        return
    with noticing_loss(ranks):
        if dist.get_backend() == dist.Backend.GLOO:
            dist.monitored_barrier(timeout=LONG_PATIENCE)
        else:
            dist.barrier()


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Summed.forward(ctx, grad)


def summed(x: Tensor, ranks: Ranks) -> Tensor:
    """The sum over the ranks of a tensor that each has; the same bits on all of them.

    Differentiable: each rank's gradient is that of the losses of all ranks together.
    """
    if ranks.size == 1:
        return x
    total: Tensor = _Summed.apply(x)
    return total


def gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """(size, ...) what each rank has, each of the same shape; differentiable as `summed`."""
    if ranks.size == 1:
        return x[None]
    others = [torch.zeros_like(x)] * ranks.size
    return summed(torch.stack([*others[: ranks.rank], x, *others[ranks.rank + 1 :]]), ranks)
