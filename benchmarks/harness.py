"""Shared by the benchmarks: timing of contenders in turns, medians, the table, the JSON file.

Contenders alternate, so that a drift of the machine's speed affects all of them alike. There
are nine turns unless `--repeats` says otherwise. Every report names the processor, the GPU if
one was used, and the versions. A ratio is one of medians; `low_ms` and `high_ms` are the
quartiles.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
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
from ibpcore_cli.options.shared import device_option

Row = dict[str, Any]

report_options = options(
    click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write."),
    click.option("--quick", is_flag=True, help="Run a small case, to check that it works."),
    device_option,
)
common_options = options(
    report_options,
    click.option(
        "--repeats",
        type=click.IntRange(min=1),
        default=9,
        show_default=True,
        help="Timings of each contender.",
    ),
)
data_dir_option = click.option(
    "--data-dir",
    default="data",
    envvar="IBP_DATA_DIR",
    show_default=True,
    help="Folder of the data sets.",
)


def wait_for(device: torch.device) -> None:
    """Waits until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(
    contenders: Mapping[str, Callable[[], Any]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Wall times of each contender, `repeats` of them; the contenders take turns.

    In each turn a contender runs twice and the second run counts: the first one fills the
    caches and the memory pool, and builds the kernels for its shapes.
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
    """One row for each contender: median, quartiles, and ratio to `reference`.

    Args:
        times: in milliseconds, for each contender.
        reference: the contender that ratios are to.
        facts: further columns, the same in all rows.
    """
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
    """Processor, cores and threads; the GPU if `device` is one."""
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
    """Prints hardware, versions and rows; writes them to a file if one is given."""
    facts = {**hardware(device), **versions()}
    click.echo("  ".join(f"{k}: {v}" for k, v in facts.items()))
    click.echo(as_text(table))
    save(name, table, device, json_file)


def save(name: str, table: list[Row], device: torch.device, json_file: Path | None) -> None:
    """Writes hardware, versions, command and rows to a file if one is given."""
    if json_file is None:
        return
    command = f"python -m benchmarks.{name} {shlex.join(sys.argv[1:])}".strip()
    facts = {"hardware": hardware(device), "versions": versions(), "command": command}
    json_file.parent.mkdir(parents=True, exist_ok=True)
    json_file.write_text(json.dumps({**facts, "rows": table}, indent=2) + "\n")


def as_text(table: list[Row]) -> str:
    """A table with a column for every key that occurs in a row."""
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
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
    return str(value)
