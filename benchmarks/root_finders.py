"""Root finders on the margins of trained networks: time, and number of bound passes.

Claims: all find the same radii; Brent's method evaluates the fewest margins, which counts
where a pass costs in proportion to its samples; `fused` needs the fewest passes; `tracked`
saves the first ones. Each solves for the open samples of one training batch (classified
correctly and not certified at the scheduled epsilon_max) to the paper's tolerances, at the
start, the middle and the end of training with ACERT; nine turns, on the device that
`--device` selects. SciPy's `elementwise.find_root`, and its `brentq` one sample at a time,
solve the same margins. `bounds` is the mean number of margins evaluated for a sample, and
`passes` the number of successive bound passes, both after R(0) and R(epsilon_max).
`radius_error` is the mean |root - exact root| as a share of epsilon_max, `operators` the number of
operators dispatched in a solution, see `benchmarks.counting.overhead`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.counting import overhead
from benchmarks.networks import Stage, measure_all, network_options
from ibpcore.bounds.ibp import clean_margins, margins
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.data.batches import ordered_batches
from ibpcore.nn.folding import clean_pass
from ibpcore.roots import Bisection, Brent, Multipoint, Solver, WarmStart

TOLERANCES = {"xtol": 1e-6, "rtol": 1e-4}
XTOL, RTOL = TOLERANCES["xtol"], TOLERANCES["rtol"]


class Problem(NamedTuple):
    """The open samples of a batch.

    Attributes:
        network: folded, with the statistics of the batch.
        images, labels: (n, C, H, W) and (n,).
        at_zero, at_max: (n,) R at 0 and at `ceiling`.
        ceiling: (n,) the scheduled epsilon_max.
        guess: (n,) radii predicted from the slopes that training stored for these images.
    """

    network: FoldedNetwork
    images: Tensor
    labels: Tensor
    at_zero: Tensor
    at_max: Tensor
    ceiling: Tensor
    guess: Tensor

    def margin(self, x: Tensor, lanes: Tensor) -> Tensor:
        return margins(self.network, self.images[lanes], self.labels[lanes], x, BoundOptions())


@torch.no_grad()
def problem(stage: Stage, samples: int) -> Problem:
    """The open ones among the first training images, with the statistics of their batch."""
    data = stage.subject.data.train.to(stage.subject.device)
    images, labels, index = next(ordered_batches(data, samples))
    logits, network = clean_pass(stage.state.model.train(), images, track=False)
    at_zero = clean_margins(logits, labels)
    ceiling = torch.full_like(at_zero, stage.epsilon)
    at_max = margins(network, images, labels, ceiling, BoundOptions())
    rows = ((at_zero < 0) & (at_max >= 0)).nonzero().squeeze(1)
    slopes = stage.state.slopes[index]
    slopes = torch.where(slopes.isnan(), slopes.nanmedian(), slopes)
    guess = torch.minimum(-at_zero / slopes, ceiling)
    parts = (images, labels, at_zero, at_max, ceiling, guess)
    return Problem(network, *(part[rows] for part in parts))


class Solved(NamedTuple):
    """Roots, (n,), the number of margins evaluated for them, and the number of passes."""

    root: Tensor
    bounds: int
    passes: int


def ours(solver: Solver, given: Problem) -> Solved:
    """One of `ibpcore.roots`, given R at both ends."""
    count = [0, 0]

    def margin(x: Tensor, lanes: Tensor) -> Tensor:
        count[0] += x.numel()
        count[1] += 1
        return given.margin(x, lanes)

    ends = torch.zeros_like(given.ceiling), given.ceiling
    values = given.at_zero, given.at_max
    roots = solver(margin, *ends, values=values, guess=given.guess)
    return Solved(roots.root, *count)


def scipy_one_by_one(given: Problem) -> Solved:
    """`scipy.optimize.brentq` for each sample; it evaluates both ends itself."""
    from scipy.optimize import brentq as scipy_brentq

    roots, calls = [], 0
    for i in range(len(given.labels)):
        lane = torch.tensor([i], device=given.labels.device)

        def margin(x: float, lane: Tensor = lane) -> float:
            return float(given.margin(given.ceiling.new_tensor([x]), lane))

        root, info = scipy_brentq(
            margin, 0.0, float(given.ceiling[i]), full_output=True, **TOLERANCES
        )
        roots.append(root)
        calls += info.function_calls - 2
    return Solved(given.ceiling.new_tensor(roots), calls, calls)


def scipy_elementwise(given: Problem) -> Solved:
    """`scipy.optimize.elementwise.find_root` (Chandrupatla); it evaluates both ends itself."""
    from scipy.optimize.elementwise import find_root

    count = [0, 0]

    def margin(x: np.ndarray, lanes: np.ndarray) -> np.ndarray:
        count[0] += x.size
        count[1] += 1
        index = torch.from_numpy(lanes.astype(np.int64)).to(given.labels.device)
        found = given.margin(torch.from_numpy(x).to(given.ceiling), index)
        return found.double().cpu().numpy()

    lanes = np.arange(len(given.labels))
    ends = np.zeros(len(lanes)), given.ceiling.double().cpu().numpy()
    result = find_root(margin, ends, args=(lanes,), tolerances={"xatol": XTOL, "xrtol": RTOL})
    root = torch.from_numpy(result.x).to(given.ceiling)
    return Solved(root, count[0] - 2 * len(lanes), count[1] - 2)


def contenders(given: Problem) -> dict[str, Callable[[], Solved]]:
    """A function for each root finder, which solves the problem."""
    solvers: dict[str, Solver] = {
        "brentq": Brent(XTOL, RTOL),
        "bisect": Bisection(XTOL, RTOL),
        **{f"fused {k}": Multipoint(XTOL, RTOL, candidates=k) for k in (2, 4, 8)},
        "tracked": WarmStart(XTOL, RTOL),
    }
    found: dict[str, Callable[[], Solved]] = {
        name: partial(ours, solver, given) for name, solver in solvers.items()
    }
    found["SciPy brentq, one by one"] = partial(scipy_one_by_one, given)
    found["SciPy find_root"] = partial(scipy_elementwise, given)
    return found


@torch.no_grad()
def measure(stage: Stage, repeats: int, samples: int) -> list[harness.Row]:
    """The rows of one network, for a batch of `samples` images."""
    given = problem(stage, samples)
    if len(given.labels) == 0:
        click.echo(f"{stage.subject.data.title}, {stage.name}: every sample is decided", err=True)
        return []
    ends = torch.zeros_like(given.ceiling), given.ceiling
    exact = Brent(xtol=1e-8, rtol=1e-6)(
        given.margin, *ends, values=(given.at_zero, given.at_max)
    ).root
    runs = contenders(given)
    solved = {name: run() for name, run in runs.items()}
    for name, result in solved.items():
        error = float((result.root - exact).abs().mean()) / float(given.ceiling[0])
        if error > 1e-4:
            raise click.ClickException(f"{name} misses the roots by {error:.2g} of epsilon")
    table = harness.rows(
        harness.milliseconds(runs, repeats, stage.subject.device),
        "brentq",
        **stage.facts,
        open=len(given.labels),
    )
    for row in table:
        result = solved[row["contender"]]
        row["bounds"] = result.bounds / len(given.labels)
        row["passes"] = result.passes
        row["radius_error"] = float(((result.root - exact).abs() / given.ceiling).mean())
        row |= overhead(runs[row["contender"]], stage.subject.device, runs=1)
    return table


@click.command()
@network_options
@harness.common_options
@click.option("--samples", default=256, show_default=True, help="Images in the batch.")
def main(samples: int, quick: bool, **options: Any) -> None:
    """Compare root finders; ratios are to brentq."""
    measure_rows = partial(measure, samples=16 if quick else samples)
    measure_all("root_finders", measure_rows, quick=quick, **options)


if __name__ == "__main__":
    main()
