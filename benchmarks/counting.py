"""What a computation consists of: arithmetic, bytes moved, peak memory, operators, launches."""

from __future__ import annotations

import re
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.harness import wait_for

LAUNCH = re.compile(r"cu(da)?(Launch\w*Kernel|GraphLaunch)")
"""Calls of the CUDA runtime or driver by which the host starts a kernel, or a graph of kernels."""


class Counts(NamedTuple):
    """Floating point operations, bytes read and written, and the most bytes alive at a time."""

    operations: int
    moved: int
    peak: int


class _Tensors(TorchDispatchMode):
    """Tracks the storages that operations allocate, but not a kernel's own workspace."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = self.moved = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        before = {t.untyped_storage()._cdata for t in read}
        for tensor in read:
            self.known.add(tensor.untyped_storage()._cdata)
        new = [t for t in written if t.untyped_storage()._cdata not in before]
        if new:  # a view moves nothing
            self.moved += sum(t.nbytes for t in (*read, *written))
        for tensor in new:
            self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size


def counted(run: Callable[[], Any], device: torch.device) -> Counts:
    """The counts of `run`; on CUDA the peak is the allocator's, which includes workspaces."""
    with FlopCounterMode(display=False) as flops:
        run()
    with _Tensors() as tensors:
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
    """What a run costs besides arithmetic, as columns of a table: means of so many runs.

    `operators` are the `aten::` events of the profiler, nested ones included. On CUDA also
    `launches` of kernels, where a CUDA graph counts once, and `host_ms`, the median time in
    milliseconds until the host has enqueued everything, from an idle device.
    """
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
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
