"""What the benchmarks share: contenders that take turns, medians, a table, a JSON file.

A drift of the machine's speed meets all contenders alike, since they alternate. A ratio is
one of medians; the spread is the middle half of the timings.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torchvision

from ibpcore_cli.decorators import options
from ibpcore_cli.options import chosen_device

Row = dict[str, Any]

common_options = options(
    click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write."),
    click.option("--quick", is_flag=True, help="A small case, to see that it works."),
    click.option(
        "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
    ),
    click.option(
        "--repeats", type=click.IntRange(min=1), default=9, show_default=True, help="Turns."
    ),
)


def where(device: str) -> torch.device:
    """The device that is measured."""
    return chosen_device(device)


def wait_for(device: torch.device) -> None:
    """Lets the device finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Wall times of each contender, which take turns.

    In each turn it runs twice, and the second time counts: by then memory and caches are
    its own, not those that another contender left, and kernels for its shapes are made.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            run()
            wait_for(device)
            started = time.perf_counter()
            run()
            wait_for(device)
            times[name].append(1e3 * (time.perf_counter() - started))
    return times


def rows(times: Mapping[str, list[float]], reference: str, **facts: Any) -> list[Row]:
    """One row a contender: its median, its spread, and its ratio to `reference`."""
    first = statistics.median(times[reference])
    result = []
    for name, values in times.items():
        median = statistics.median(values)
        low, high = np.quantile(values, [0.25, 0.75])
        result.append(
            {
                "contender": name,
                **facts,
                "median_ms": median,
                "low_ms": float(low),
                "high_ms": float(high),
                "ratio": median / first,
            }
        )
    return result


def hardware(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0].split(":", 1)[1].strip() if models else name
    facts = {"processor": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
    }


def report(name: str, table: list[Row], device: torch.device, json_file: Path | None) -> None:
    """Prints the rows under a head, and writes them where asked."""
    command = f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip()
    facts = {"hardware": hardware(device), "versions": versions(), "command": command}
    click.echo(
        "  ".join(
            f"{k}: {v}"
            for part in facts.values()
            if isinstance(part, dict)
            for k, v in part.items()
        )
    )
    click.echo(as_text(table))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**facts, "rows": table}, indent=2) + "\n")


def as_text(table: list[Row]) -> str:
    """Columns as wide as they need; a column for every key that some row has."""
    names = list(dict.fromkeys(name for row in table for name in row))
    cells = [names] + [[_cell(row.get(name)) for name in names] for row in table]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
