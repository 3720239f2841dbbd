"""Versions of the installation, and the device that it runs on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version


def version_lines() -> list[str]:
    """Versions of ibpcore, Python, torch and the CUDA that torch was built for; the device."""
    import torch

    cuda = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return [
        f"ibpcore {version('ibpcore')}",
        f"Python {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch {torch.__version__}, {cuda}",
        f"device: {device_line()}",
    ]


def device_line() -> str:
    """The device that `--device auto` takes; for the CPU with the threads for large steps."""
    import torch

    from ibpcore.threads import available_processors, suitable_threads

    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return f"cuda, {device.name}, {device.total_memory / 2**30:.0f} GiB"
    processors = f"{available_processors()} of {os.cpu_count()}"
    return f"cpu, threads: {suitable_threads()}, processors to use: {processors}"
