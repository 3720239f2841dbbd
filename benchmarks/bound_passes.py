"""Margins at K radii of B samples: one fused pass against one pass for each radius.

Claims: the fused pass is faster where a single pass does not fill the machine, and about as
fast elsewhere; its memory stays within its budget for every K. Three input sizes, an untrained
CNN7 in evaluation mode (its weights do not matter here), random images; nine turns, on the
device that `--device` selects. `of_product` is the rate of floating point operations (matrix
products and convolutions only) as a share of that of a large matrix product on the same
machine, `of_copy` the rate of bytes read and written as a share of that of a large copy.
"""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

import click
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.counting import counted
from ibpcore import cnn7
from ibpcore.bounds.chunking import default_budget
from ibpcore.bounds.ibp import margins
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision
from ibpcore_cli.resources import chosen_device

INPUTS = {"28x28x1": (1, 28, 28), "32x32x3": (3, 32, 32), "64x64x3": (3, 64, 64)}


class Case(NamedTuple):
    """An input size (a key of `INPUTS`), a CNN7, and how many samples and radii it bounds."""

    input: str
    width: int
    hidden: int
    batch: int
    radii: int


def ceilings(device: torch.device, quick: bool) -> tuple[float, float]:
    """Operations per second of a large matrix product, bytes per second of a large copy."""
    size = 512 if quick else 2048 if device.type == "cpu" else 8192
    a, b = torch.rand(2, size, size, device=device).unbind()
    source = torch.rand((4 if quick else 64) * 2**20, device=device)
    target = torch.empty_like(source)
    times = harness.milliseconds(
        {"product": lambda: a @ b, "copy": lambda: target.copy_(source)}, 5, device
    )
    product, copy = (statistics.median(times[name]) / 1e3 for name in ("product", "copy"))
    return 2 * size**3 / product, 2 * source.nbytes / copy


def fused(network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    return margins(network, images, labels, radii, BoundOptions())


def one_by_one(network: FoldedNetwork, images: Tensor, labels: Tensor, radii: Tensor) -> Tensor:
    return torch.stack([margins(network, images, labels, row, BoundOptions()) for row in radii])


@torch.no_grad()
def measure(
    case: Case, repeats: int, device: torch.device, most: tuple[float, float]
) -> list[harness.Row]:
    """The two rows of a case.

    Args:
        most: see `ceilings`.
    """
    torch.manual_seed(0)
    in_shape, batch = INPUTS[case.input], case.batch
    network = fold(cnn7(in_shape, 10, case.width, case.hidden).to(device).eval())
    images = torch.rand(batch, *in_shape, device=device)
    labels = torch.arange(batch, device=device) % 10
    epsilons = torch.linspace(0.001, 0.1, case.radii, device=device)[:, None].expand(-1, batch)
    given = (network, images, labels, epsilons.contiguous())
    runs = {"fused": partial(fused, *given), "one by one": partial(one_by_one, *given)}
    results = [run() for run in runs.values()]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    table = harness.rows(
        harness.milliseconds(runs, repeats, device),
        "one by one",
        dataset="random images",
        stage="untrained",
        input=case.input,
        width=case.width,
        batch=batch,
        radii=case.radii,
    )
    for row in table:
        found = counted(runs[row["contender"]], device)
        seconds = row["median_ms"] / 1e3
        row["peak_mib"] = found.peak / 2**20
        row["of_product"] = found.operations / seconds / most[0]
        row["of_copy"] = found.moved / seconds / most[1]
    budget = 1.1 * default_budget(device)
    if table[0]["peak_mib"] * 2**20 > budget:
        raise click.ClickException(f"{table[0]} takes more than its budget of {budget:.0f} bytes")
    return table


@click.command()
@harness.common_options
@click.option("--width", default=16, show_default=True, help="Width of the CNN7.")
@click.option("--hidden", default=128, show_default=True, help="Neurons of its hidden layer.")
@click.option(
    "--input",
    "chosen",
    multiple=True,
    type=click.Choice(list(INPUTS)),
    help="Input size; may be repeated. Default: all.",
)
def main(
    json_file: Path | None,
    quick: bool,
    device: str,
    repeats: int,
    width: int,
    hidden: int,
    chosen: tuple[str, ...],
) -> None:
    """Compare one fused pass with one pass for each radius; ratios are to the latter."""
    on = chosen_device(device)
    batches, counts, inputs = [1, 8, 32, 128, 256], [1, 2, 4, 8, 16], list(chosen or INPUTS)
    if quick:
        batches, counts, inputs = [1, 8], [1, 4], inputs[:1]
        width, hidden, repeats = 4, 16, 2
    with full_precision():
        most = ceilings(on, quick)
        click.echo(f"ceilings: {most[0] / 1e9:.0f} GFLOP/s, {most[1] / 1e9:.1f} GB/s")
        table = [
            row
            for name in inputs
            for batch in batches
            for radii in counts
            for row in measure(Case(name, width, hidden, batch, radii), repeats, on, most)
        ]
    harness.report("bound_passes", table, on, json_file)


if __name__ == "__main__":
    main()
