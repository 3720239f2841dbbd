"""Control groups of Linux, by which containers and batch systems limit a process."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path

ROOT, GROUPS = Path("/"), "proc/self/cgroup"
HIERARCHIES = Path("sys/fs/cgroup")


def limiting_groups(controller: str, root: Path = ROOT) -> Iterator[Path]:
    """The folders of the groups whose limits apply to this process; some may not exist.

    Args:
        controller: "cpu" or "memory".
        root: the folder that holds `proc` and `sys`.
    """
    try:
        lines = (root / GROUPS).read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        # Hierarchies of version 2, alone or beside version 1, and of the controller in version 1.
        for mount in dict.fromkeys(("", "unified", controller, controllers)):
            # The limits of the groups around it apply too. In a container only the first of
            # them may exist: its own group, whatever the name outside.
            start = root / HIERARCHIES / mount
            yield from accumulate(Path(group).parts[1:], Path.joinpath, initial=start)
