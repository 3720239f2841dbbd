"""Training with several processes: measured time of a step, estimated efficiency of many GPUs.

Measured: steps of FastIBP and ACERT on one global batch of 128 images, at the start of a run
but with epsilon as in the middle of the warm-up, by the processes that `torchrun` starts (one
process without it); the median of nine steps after two that do not count, on the device that
`--device` selects:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m benchmarks.scaling

Estimated, not measured: the efficiency t / (t + c), where t is the time of a step on one GPU
with a batch of its own, and c the time of communication. No overlap with computation is
assumed (DistributedDataParallel hides most of c), so this is a lower limit. c is the ring
all-reduce of the gradient, 2 (N - 1) / N bytes / bandwidth, and one latency for each small
sum: two for each batch norm (forward and backward), two for the regularisers, one for the
metrics.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import nn

from benchmarks.harness import Row, common_options, data_dir_option, report, wait_for
from ibpcore import cnn7
from ibpcore.data.batches import shuffled_batches
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import Ranks
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.state import start_state
from ibpcore_cli.decorators import options
from ibpcore_cli.distributed import working_ranks

SHARE = 0.5
"""Of epsilon_max, as in the middle of the warm-up, where a step needs all of its parts."""


class Link(NamedTuple):
    """A connection between GPUs.

    Attributes:
        bandwidth: published bytes per second of each GPU in each direction.
        latency: assumed seconds for the sum of a few numbers over all GPUs.
    """

    bandwidth: float
    latency: float


LINKS: dict[int, dict[str, Link]] = {
    8: {"NVLink 4 (900 GB/s both ways)": Link(450e9, 20e-6)},
    64: {
        "InfiniBand NDR (400 Gb/s a GPU)": Link(50e9, 60e-6),
        "Ethernet (100 Gb/s for 8 GPUs)": Link(12.5e9 / 8, 150e-6),
    },
}


def gradient_bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def small_sums(model: nn.Module) -> int:
    """Number of small sums over the ranks in a step with regularisers."""
    return 2 * sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) + 3


def expected(step: float, model: nn.Module, gpus: int, link: Link) -> float:
    """Efficiency of `gpus`, each with a batch that takes one GPU `step` seconds."""
    reduce = 2 * (gpus - 1) / gpus * gradient_bytes(model) / link.bandwidth
    return step / (step + reduce + small_sums(model) * link.latency)


def expectations(steps: list[float]) -> list[Row]:
    """Rows for a CNN7 of width 64 on CIFAR-10, whose step takes one GPU `steps` milliseconds."""
    with torch.device("meta"):
        model = cnn7((3, 32, 32), 10)
    return [
        {
            "contender": link_name,
            "gpus": gpus,
            "step_ms": step,
            "gradient_MB": gradient_bytes(model) / 1e6,
            "small_sums": small_sums(model),
            "efficiency": expected(step / 1e3, model, gpus, link),
        }
        for gpus, links in LINKS.items()
        for link_name, link in links.items()
        for step in steps
    ]


def measured(
    method: str, ranks: Ranks, device: torch.device, data_dir: str, quick: bool, repeats: int
) -> Row:
    """The row of a method: the median step of a global batch of 128 images."""
    size, small = (16, {"width": 2, "hidden": 8}) if quick else (128, {"width": 16, "hidden": 128})
    name = "digits" if quick else "cifar10"
    config = make_config(name, method, batch_size=size, **small)
    data = load_dataset(name, Request(Path(data_dir), limit_train=size, limit_test=2))
    state = start_state(config, data, device, ranks)
    state.model.train()
    images = data.train.to(device)
    (batch,) = shuffled_batches(images, size, seed=0, epoch=0, flip=False, padding=0, ranks=ranks)
    times = []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        train_step(state, batch, SHARE, config)
        wait_for(device)
        times.append(1e3 * (time.perf_counter() - started))
    kept = times[2:]  # the first two build kernels and fill the memory pool
    return {
        "contender": method,
        "ranks": ranks.size,
        "images_a_rank": len(batch.labels),
        "median_ms": statistics.median(kept),
        "low_ms": min(kept),
        "high_ms": max(kept),
    }


@click.command()
@common_options
@options(
    data_dir_option,
    click.option(
        "--step-ms",
        "steps",
        type=float,
        multiple=True,
        default=(20.0, 70.0, 220.0),
        show_default=True,
        help="Time of a step on one GPU, for the estimate; may be repeated. The default is that"
        " of FastIBP, ACERT and exact ACERT in the paper's Table 6.",
    ),
)
def main(
    json_file: Path | None,
    quick: bool,
    device: str,
    repeats: int,
    data_dir: str,
    steps: tuple[float, ...],
) -> None:
    """Measure steps of several processes, and estimate the efficiency of many GPUs."""
    with working_ranks(device, tensors=True) as (ranks, where):
        table = [
            measured(method, ranks, where, data_dir, quick, 2 if quick else repeats)
            for method in ("fastibp", "acert")
        ]
    if ranks.first:
        report("scaling", table + expectations(list(steps)), where, json_file)


if __name__ == "__main__":
    main()
