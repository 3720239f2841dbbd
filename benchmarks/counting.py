"""What a computation consists of: arithmetic, bytes moved, peak memory, operators, launches."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import wait_for
from ibpcore.training.memory import TensorMemory, tensors_in

LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel|GraphLaunch)")
"""Calls of the CUDA runtime or driver by which the host starts a kernel, or a graph of kernels."""


class Counts(NamedTuple):
    """Floating point operations, bytes read and written, and the most bytes alive at a time."""

    operations: int
    moved: int
    peak: int


class _Moved(TensorMemory):
    """Counts the bytes that operations read and write, too, but not in a kernel's workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        read, written = [*tensors_in((args, kwargs))], [*tensors_in(result)]
        before = {t.untyped_storage()._cdata for t in read}
        if any(t.untyped_storage()._cdata not in before for t in written):  # a view moves nothing
            self.moved += sum(t.nbytes for t in (*read, *written))
        return result


def counted(run: Callable[[], Any], device: torch.device) -> Counts:
    """The counts of `run`; on CUDA the peak is the allocator's, which includes workspaces."""
    with FlopCounterMode(display=False) as flops:
        run()
    with _Moved() as tensors:
        run()
    peak = tensors.peak
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    return Counts(flops.get_total_flops(), tensors.moved, peak)


def overhead(run: Callable[[], Any], device: torch.device, runs: int = 4) -> dict[str, float]:
    """What a run costs besides arithmetic, as columns of a table: means of so many runs, after a
    first one, which measures sizes.

    `operators` are the `aten::` events of the profiler, nested ones included. On CUDA also
    `launches` of kernels, where a CUDA graph counts once, and `host_ms`, the median time in
    milliseconds until the host has enqueued everything, from an idle device.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    run()
    with profile(activities=activities) as profiler:
        for _ in range(runs):
            run()
        wait_for(device)
    names = [event.name for event in profiler.events()]
    columns = {"operators": sum(name.startswith("aten::") for name in names) / runs}
    if on_cuda:
        columns["launches"] = sum(bool(LAUNCH.match(name)) for name in names) / runs
        columns["host_ms"] = statistics.median(_host_ms(run, device) for _ in range(runs))
    return columns


def _host_ms(run: Callable[[], Any], device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - started)
