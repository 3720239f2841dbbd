"""Operators of a training step with each default configuration: the counts that a test holds.

Counted on the digits with their preset (CNN7 of width 16, hidden 128, batches of 32 images), at the
end of the schedule of epsilon, by one thread on the CPU; see `benchmarks.counting.overhead`. A
count is exact, whatever else the machine does, and differs little between versions of torch and
between processors, whose rounding may cost a root finder a pass more. It is the mean of eight
batches, since the passes of a root finder depend on their images.

The network is trained for two epochs with a tenth of the preset's epsilon_max. That takes seconds
and leaves the root finders about as much work as the 30 epochs of the preset do: most samples are
certified or nearly so, and their slopes have settled.

`python -m benchmarks.operators --json benchmarks/results/operators.json` renews the committed
counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import click
import torch

from benchmarks import harness
from benchmarks.counting import overhead
from benchmarks.networks import Subject
from benchmarks.training_step import steps, training_batches
from ibpcore.data.sources import Request, load_dataset
from ibpcore.threads import computing_with
from ibpcore.training.config import make_config

BATCHES = 8
SETTINGS = {"epsilon_max": 0.01, "epochs": 2}
CONFIGS = {
    "standard": make_config("digits", "standard", **SETTINGS),
    "fastibp": make_config("digits", "fastibp", **SETTINGS),
    "acert": make_config("digits", "acert", **SETTINGS),
    "acert exact": make_config("digits", "acert", **SETTINGS, xtol=1e-6, max_iterations=100),
}


def table() -> list[harness.Row]:
    """The rows: operators of a step with each of `CONFIGS`."""
    device = torch.device("cpu")
    data = load_dataset("digits", Request(Path()))
    with tempfile.TemporaryDirectory() as cache, computing_with(1):
        subject = Subject(data, CONFIGS["acert"], Path(cache), device)
        (stage,) = subject.stages(("end",))
        runs = steps(stage, training_batches(subject, BATCHES), CONFIGS, in_a_row=1)
        return [{"contender": name, **overhead(run, device, BATCHES)} for name, run in runs.items()]


@click.command()
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write.")
def main(json_file: Path | None) -> None:
    """Count the operators of a step on the digits."""
    with computing_with(1):
        harness.report("operators", table(), torch.device("cpu"), json_file)


if __name__ == "__main__":
    main()
