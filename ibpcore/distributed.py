"""The processes (ranks) of a distributed job, as `torchrun` starts them, and their collectives."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ibpcore.errors import RankZeroFailedError, UserError

T = TypeVar("T")
PATIENCE = timedelta(minutes=10)
"""Timeout for a rank that does not respond. A dead one is detected at once: its sockets close."""
LONG_PATIENCE = timedelta(days=30)
"""Timeout at a barrier, for ranks that are still working on their own share."""
DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,4})?")
"""The names that `chosen_device` takes."""


class LostRankError(UserError):
    """Another rank terminated, or cannot be reached."""


class Ranks(NamedTuple):
    """The position of this process among those of the job; by default a single process.

    Attributes:
        rank: from 0; only rank 0 writes files and prints.
        size: number of processes.
        local: rank on this machine, the index of its CUDA device.
    """

    rank: int = 0
    size: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def sharing(self, count: int) -> Ranks:
        """The ranks that share `count` samples; with fewer samples than ranks, each handles all."""
        return self if count >= self.size else SINGLE_PROCESS

    def share(self, count: int) -> slice:
        """This rank's part of `count` samples: contiguous; the sizes differ by at most one."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


SINGLE_PROCESS = Ranks()


def ranks_of_environment() -> Ranks:
    """The ranks that `torchrun` sets in RANK, WORLD_SIZE and LOCAL_RANK, or `SINGLE_PROCESS`.

    Raises:
        UserError: these are not valid.
    """
    if "WORLD_SIZE" not in os.environ:
        return SINGLE_PROCESS
    texts = {name: os.environ.get(name, "0") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    valid = all(text.isdecimal() for text in texts.values())
    if not valid or int(texts["RANK"]) >= int(texts["WORLD_SIZE"]):
        raise UserError(f"invalid ranks in the environment: {texts}")
    return Ranks(*map(int, texts.values()))


@contextmanager
def joined(ranks: Ranks, device: torch.device | str) -> Iterator[None]:
    """Initialises the process group of the ranks: NCCL on CUDA, gloo on the CPU.

    Raises:
        LostRankError: one of them terminated, or they cannot connect.
    """
    if ranks.size == 1:
        yield
        return
    backend = "nccl" if torch.device(device).type == "cuda" else "gloo"
    try:
        with detecting_lost_rank(ranks):
            dist.init_process_group(backend, timeout=PATIENCE)
            yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


LOST = (
    *("connection closed", "connection reset", "connection refused", "connection was"),
    *("broken pipe", "timed out", "timeout", "socket", "gloo", "nccl error", "tcpstore"),
)
"""Parts of the messages by which a lost connection is recognised: torch raises RuntimeErrors."""


@contextmanager
def detecting_lost_rank(ranks: Ranks) -> Iterator[None]:
    """Turns the errors that torch raises when another rank is lost into `LostRankError`."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        lost = isinstance(error, dist.DistError) or any(word in str(error).lower() for word in LOST)
        if ranks.size == 1 or not lost:
            raise
        raise LostRankError(f"lost another of the {ranks.size} ranks") from None


def broadcast_object(ranks: Ranks, value: Any) -> Any:
    """The `value` of rank 0, a picklable object, on every rank."""
    if ranks.size == 1:
        return value
    values = [value]
    with detecting_lost_rank(ranks):
        dist.broadcast_object_list(values, src=0)
    return values[0]


def all_gather_object(ranks: Ranks, value: T) -> list[T]:
    """The values of all ranks, in rank order; waits until every rank has called this."""
    if ranks.size == 1:
        return [value]
    wait_for_all(ranks)
    values: list[Any] = [None] * ranks.size
    with detecting_lost_rank(ranks):
        dist.all_gather_object(values, value)
    return values


def run_on_rank_zero(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 only, and returns its result, a picklable object, on every rank.

    Raises:
        Exception: on rank 0, what `work` raised.
        RankZeroFailedError: on the other ranks, if `work` raised an exception.
    """
    value, failure = None, None
    if ranks.first:
        try:
            value = work()
        except Exception as error:
            failure = error
    wait_for_all(ranks)
    failed, value = broadcast_object(ranks, (failure is not None, value))
    if failure is not None:
        raise failure
    if failed:
        raise RankZeroFailedError("rank 0 failed")
    return value


def run_rank_zero_first(ranks: Ranks, work: Callable[[], T]) -> T:
    """Runs `work` on every rank, on rank 0 before the others; returns this rank's result.

    Raises:
        RankZeroFailedError: see `run_on_rank_zero`.
    """
    mine: list[T] = []
    run_on_rank_zero(ranks, lambda: mine.append(work()))
    result = mine[0] if ranks.first else work()
    wait_for_all(ranks)
    return result


def wait_for_all(ranks: Ranks) -> None:
    """A barrier; with gloo it waits for up to `LONG_PATIENCE`."""
    if ranks.size == 1:
        return
    with detecting_lost_rank(ranks):
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
    """The sum of `x` over the ranks, with identical bits on each of them.

    Differentiable: each rank receives the gradient of the sum of all ranks' losses.
    """
    if ranks.size == 1:
        return x
    return _Summed.apply(x)


def gathered(x: Tensor, ranks: Ranks) -> Tensor:
    """(size, ...) the tensors of all ranks, of equal shape; differentiable as `summed`."""
    if ranks.size == 1:
        return x[None]
    others = [torch.zeros_like(x)] * ranks.size
    return summed(torch.stack([*others[: ranks.rank], x, *others[ranks.rank + 1 :]]), ranks)


def chosen_device(name: str, ranks: Ranks = SINGLE_PROCESS) -> torch.device:
    """The device "auto", "cpu", "cuda" or "cuda:1"; each of several ranks gets one of its own.

    Raises:
        UserError: the name is another one, there is no such device, or there are fewer CUDA
            devices than ranks.
    """
    if not DEVICE.fullmatch(str(name)):
        raise UserError(f"device must be auto, cpu, cuda or cuda:1, but is {name!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and count == 0):
        return torch.device("cpu")
    if count == 0:
        raise UserError("there is no CUDA device: use the device cpu")
    if ranks.size > 1:
        if ranks.local >= count:
            raise UserError(
                f"more processes than CUDA devices ({count}): start fewer, or use the device cpu"
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
