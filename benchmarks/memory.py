"""Memory of a training step, by what it is for: an account of the paper's largest preset.

The sizes of all tensors of a step with every image bounded are added up at its peak, in the
warm-up and after it, whole and with its bounds in parts (`--accumulate`). The step is executed
without numbers (`ibpcore.training.memory`), so it takes neither the memory nor the time of a real
one. A process takes more: the images of the data set, about 0.3 GiB for torch, and gaps between
tensors.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import click
import torch

from benchmarks.harness import Row, report
from ibpcore.nn.cnn7 import cnn7
from ibpcore.training.config import TrainConfig, make_config
from ibpcore.training.memory import TensorMemory, optimizer_memory, step_without_numbers
from ibpcore_cli.decorators import options

GIB = 2**30
IMAGES = {"digits": (1, 8, 8, 10), "mnist": (1, 28, 28, 10), "cifar10": (3, 32, 32, 10)}
IMAGES |= {"tinyimagenet": (3, 64, 64, 200)}
"""Channels, height, width and classes."""
PARTS = {
    "layer_sums": "regularisers",
    "clean_pass": "clean pass",
    "robust_logits": "interval pass",
    "backward": "backward pass",
}
"""What a tensor is for, by the innermost of these functions that made it."""
OTHER = "weights, loss"


class Account(TensorMemory):
    """The bytes at the peak, by what they are for."""

    def __init__(self) -> None:
        super().__init__()
        self.at_peak: Counter[str] = Counter()
        self._alive: Counter[str] = Counter()
        self._parts: dict[int, str] = {}

    def allocated(self, key: int, size: int) -> None:
        part = self._parts[key] = _part()
        self._alive[part] += size
        before = self.peak
        super().allocated(key, size)
        if self.peak > before:
            self.at_peak = self._alive.copy()

    def freed(self, key: int, size: int) -> None:
        self._alive[self._parts.pop(key)] -= size
        super().freed(key, size)


def _part() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_code.co_name in PARTS:
            return PARTS[frame.f_code.co_name]
        frame = frame.f_back
    return OTHER


def account(config: TrainConfig) -> dict[str, float]:
    """GiB at the peak of a step, by what they are for, and their sum."""
    channels, height, width, classes = IMAGES[config.dataset]
    with torch.device("meta"):
        network = cnn7((channels, height, width), classes, config.width, config.hidden)
    with Account() as found:
        step_without_numbers(config, network)
    found.at_peak["optimiser"] = optimizer_memory(config, network)
    columns = {name: found.at_peak[name] / GIB for name in (*PARTS.values(), OTHER, "optimiser")}
    return {**columns, "total": sum(columns.values())}


def rows(config: TrainConfig) -> list[Row]:
    """A row for each method, in the warm-up and after it, whole and in parts."""
    table = []
    for method in ("standard", "fastibp"):
        kappa = 1.0 if method == "standard" else 0.0
        for stage, regularizer in (("warm-up", config.regularizer), ("after", 0.0)):
            for parts in (1, 4, 16):
                changed = replace(
                    config, method=method, kappa=kappa, regularizer=regularizer, accumulate=parts
                )
                if method == "standard" and (parts > 1 or stage == "warm-up"):
                    continue  # it has neither bounds nor regularisers
                facts = {"method": method, "stage": stage, "accumulate": parts}
                table.append({**facts, **account(changed)})
    return table


@click.command()
@options(
    click.option("--dataset", type=click.Choice([*IMAGES]), default="tinyimagenet"),
    click.option("--json", "json_file", type=click.Path(path_type=Path), help="File to write."),
)
def main(dataset: str, json_file: Path | None) -> None:
    """Memory of a training step with a data set's preset, in GiB; that of ACERT is FastIBP's."""
    report("memory", rows(make_config(dataset, "fastibp")), torch.device("cpu"), json_file)


if __name__ == "__main__":
    main()
