"""This checkout against another one, given by its path: training steps, or a whole `ibp train`.

    python -m benchmarks.against ../before --dataset digits --threads 1
    python -m benchmarks.against ../before --whole --repeats 5

Each checkout has a process of its own. Both take steps of the same batches, with the same network
(trained by this checkout with ACERT and loaded by both) at the end of the schedule; they take
turns, so that a drift of the machine's speed affects both alike. `ratio` is that of the medians,
this checkout's to the other's; `low` and `high` are the quartiles of the ratios of single turns.
With `--whole`, the time is that of the process `ibp train` without options.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import harness
from benchmarks.networks import Stage, measure_all, network_options

THIS = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("worker.py")
CONTENDERS: dict[str, dict[str, Any]] = {
    "standard": {"method": "standard"},
    "fastibp": {"method": "fastibp"},
    "acert": {"method": "acert"},
    "acert exact": {"method": "acert", "xtol": 1e-6, "max_iterations": 100},
}
SAME = ("width", "hidden", "batch_size", "epsilon_max")
"""Settings of the network that all contenders take over."""
Timer = Callable[[], float]


@contextmanager
def environment(checkout: Path) -> Iterator[dict[str, str]]:
    """Variables of a process that imports the packages of a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "ibpcore_cli").symlink_to(checkout / "cli")
        yield {**os.environ, "PYTHONPATH": os.pathsep.join([folder, str(checkout)])}


@contextmanager
def stepping(checkout: Path, file: Path) -> Iterator[dict[str, Timer]]:
    """A function for each contender, which has a worker of the checkout take its next steps.

    Raises:
        click.ClickException: the worker failed, or imported another `ibpcore`.
    """
    with (
        environment(checkout) as variables,
        subprocess.Popen(
            [sys.executable, str(WORKER), str(file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=variables,
        ) as process,
    ):

        def answer() -> str:
            if line := process.stdout.readline():  # type: ignore[union-attr]
                return line.strip()
            raise click.ClickException(f"the worker of {checkout} failed, see above")

        def ask(name: str) -> float:
            print(name, file=process.stdin, flush=True)
            return float(answer())

        found = Path(answer())
        if not found.is_relative_to(checkout):
            raise click.ClickException(f"{found} is not the ibpcore of {checkout}")
        yield {name: partial(ask, name) for name in CONTENDERS}


def compared(this: dict[str, Timer], other: dict[str, Timer], repeats: int) -> list[harness.Row]:
    """A row for each contender; the checkouts take turns."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in this}
    for _ in range(repeats):
        for name, timer in this.items():
            times[name].append((other[name](), timer()))
    return [row(name, values) for name, values in times.items()]


def row(name: str, times: list[tuple[float, float]]) -> harness.Row:
    """Of the milliseconds of the other checkout and of this one, in each turn."""
    before, after = map(statistics.median, zip(*times, strict=True))
    low, high = np.quantile([mine / theirs for theirs, mine in times], [0.25, 0.75])
    facts = {"contender": name, "other_ms": before, "this_ms": after}
    return {**facts, "ratio": after / before, "low": float(low), "high": float(high)}


def saved(stage: Stage, file: Path) -> None:
    """Writes what a worker needs; for any version of the library, hence only plain values."""
    subject, state = stage.subject, stage.state
    data = subject.data
    given = {
        "dataset": data.name,
        "classes": data.classes,
        "mean": data.mean,
        "std": data.std,
        "images": data.train.images,
        "labels": data.train.labels,
        "model": state.model.state_dict(),
        "slopes": state.slopes * state.trend[0].exp(),
        "deviation": state.trend[1],
        "device": str(subject.device),
        "threads": torch.get_num_threads(),
        "settings": {name: getattr(subject.config, name) for name in SAME},
        "contenders": CONTENDERS,
    }
    torch.save(given, file)


def measure(stage: Stage, repeats: int, other: Path) -> list[harness.Row]:
    """The rows of one network."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.pt"
        saved(stage, file)
        with stepping(THIS, file) as mine, stepping(other, file) as theirs:
            table = compared(mine, theirs, repeats)
    facts = {**stage.facts, "batch": stage.subject.config.batch_size}
    return [{"contender": found.pop("contender"), **facts, **found} for found in table]


def whole(other: Path, repeats: int) -> list[harness.Row]:
    """The row of `ibp train`."""

    def timed(variables: dict[str, str]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "ibpcore_cli", "train"]
            started = time.perf_counter()
            subprocess.run(command, cwd=folder, env=variables, check=True, capture_output=True)
            return 1e3 * (time.perf_counter() - started)

    with environment(THIS) as mine, environment(other) as theirs:
        return [row("ibp train", [(timed(theirs), timed(mine)) for _ in range(repeats)])]


@click.command()
@click.argument("other", type=click.Path(path_type=Path))
@network_options
@harness.common_options
@click.option("--whole", "is_whole", is_flag=True, help="Time `ibp train` instead of steps.")
def main(other: Path, is_whole: bool, **options: Any) -> None:
    """Compare this checkout with OTHER, the folder of another one."""
    other = other.resolve()
    if is_whole:
        table = whole(other, options["repeats"])
        harness.report("against", table, torch.device("cpu"), options["json_file"])
    else:
        measure_all("against", partial(measure, other=other), ("end",), **options)


if __name__ == "__main__":
    main()
