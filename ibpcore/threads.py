"""Threads of torch on the CPU: how many a machine and a step allow, and contexts that set them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import torch

WORK_PER_THREAD = 50_000_000
"""Multiplications of a pass below which another thread is not worth it: it saves less than a tenth
of the time on an idle processor, and on a busy one the other threads wait for it."""
ROOT, GROUPS = Path("/"), "proc/self/cgroup"
MOUNTS = (
    "sys/fs/cgroup",
    "sys/fs/cgroup/unified",
    "sys/fs/cgroup/cpu",
    "sys/fs/cgroup/cpu,cpuacct",
)
"""Where the hierarchies of cgroups are, of version 2 and of the controller cpu of version 1."""


def available_processors(root: Path = ROOT) -> int:
    """Number of processors that this process may use: its affinity mask and cgroup quotas.

    At least 1; fractions of a processor do not count. `root` holds `proc` and `sys`.
    """
    allowed = getattr(os, "sched_getaffinity", None)  # Linux only
    count = len(allowed(0)) if allowed else os.cpu_count() or 1
    return max(1, min([count, *(int(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The processors that each cgroup of this process may use on average, where it is limited."""
    try:
        lines = (root / GROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for mount in MOUNTS:
            # The limits of the groups around it apply too. In a container only the first of
            # them may exist: its own group, whatever the name outside.
            for place in accumulate(Path(group).parts[1:], Path.joinpath, initial=root / mount):
                yield from _limit(place)


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
