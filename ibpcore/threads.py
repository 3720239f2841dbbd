"""Threads of torch on the CPU: how many a machine and a step allow, and contexts that set them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ibpcore.cgroups import ROOT, limiting_groups

WORK_PER_THREAD = 50_000_000
"""Multiplications of a pass below which another thread is not worth it: it saves less than a tenth
of the time on an idle processor, and on a busy one the other threads wait for it."""


def available_processors(root: Path = ROOT) -> int:
    """Number of processors that this process may use: its affinity mask and cgroup quotas.

    At least 1; fractions of a processor do not count. `root` holds `proc` and `sys`.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The processors that each cgroup of this process may use on average, where it is limited."""
    for group in limiting_groups("cpu", root):
        yield from _limit(group)


def _limit(group: Path) -> Iterator[float]:
    """The limit in the files of a cgroup of version 2 or 1, unless it has none."""
    try:
        if (group / "cpu.max").exists():
            quota, period = (group / "cpu.max").read_text().split()
        else:
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        if quota != "max" and int(quota) > 0:  # -1 for none
            yield int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return


def suitable_threads(work: float = float("inf")) -> int:
    """Number of threads for passes of `work` multiplications each; at least 1.

    At most as many as torch has now, by OMP_NUM_THREADS or `torch.set_num_threads`, and as there
    are processors to use; fewer where each would have less than `WORK_PER_THREAD` to do. It
    depends on sizes alone: measured times would differ from run to run, and with the number of
    threads the last digits of every sum.
    """
    return int(
        max(1, min(torch.get_num_threads(), available_processors(), work // WORK_PER_THREAD))
    )


@contextmanager
def computing_with(threads: int | None) -> Iterator[None]:
    """A context in which torch computes with so many threads; None leaves the number as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
