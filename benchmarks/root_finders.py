"""Root finders on the margins of trained networks: bound passes a sample, and time.

Claims: all find the same radii; Brent's method needs the fewest bounds on a machine where
a bound pass costs in proportion to its samples; `fused` needs the fewest passes; `tracked`
saves the first ones. Each solves for the samples of one batch that are classified correctly
and not certified at epsilon_max, to full precision. SciPy's `elementwise.find_root` and its
`brentq`, one sample at a time, solve the same margins. `bounds` and `passes` are means of
margins evaluated for a sample, after R(0) and R(epsilon_max), and the number of bound
passes, one after the other. The radius error is the mean of |root - exact root| over these
samples, as a share of epsilon_max.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.networks import Stage, Subject, network_options, subjects
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
        at_zero, at_max: R at both ends, (n,).
        guess: (n,) radii by what training remembered of these images.
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
def problem(subject: Subject, stage: Stage, samples: int) -> Problem:
    """The open ones of the first training images, by their batch's statistics."""
    images, labels, index = next(ordered_batches(subject.data.train.to(subject.device), samples))
    logits, network = clean_pass(stage.state.model.train(), images, track=False)
    at_zero = clean_margins(logits, labels)
    ceiling = torch.full_like(at_zero, stage.share * subject.config.epsilon_max)
    at_max = margins(network, images, labels, ceiling, BoundOptions())
    rows = ((at_zero < 0) & (at_max >= 0)).nonzero().squeeze(1)
    slopes = stage.state.slopes[index]
    slopes = torch.where(slopes.isnan(), slopes.nanmedian(), slopes)
    guess = torch.minimum(-at_zero / slopes, ceiling)
    parts = (images, labels, at_zero, at_max, ceiling, guess)
    return Problem(network, *(part[rows] for part in parts))


class Solved(NamedTuple):
    """Roots, (n,), and what they cost."""

    root: Tensor
    bounds: int
    passes: int


def ours(solver: Solver, given: Problem) -> Solved:
    """One of the engine's solvers, R(epsilon_max) being known."""
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
    """`scipy.optimize.brentq` for each sample, both ends evaluated by it."""
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
    """`scipy.optimize.elementwise.find_root` (Chandrupatla), both ends evaluated by it."""
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
def measure(subject: Subject, stage: Stage, samples: int, repeats: int) -> list[harness.Row]:
    """The rows of one network."""
    given = problem(subject, stage, samples)
    if len(given.labels) == 0:
        click.echo(f"{subject.data.title}, {stage.name}: every sample is decided", err=True)
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
        harness.milliseconds(runs, repeats, subject.device),
        "brentq",
        dataset=subject.data.title,
        stage=stage.name,
        width=subject.config.width,
        open=len(given.labels),
    )
    for row in table:
        result = solved[row["contender"]]
        row["bounds"] = result.bounds / len(given.labels)
        row["passes"] = result.passes
        row["radius_error"] = float(((result.root - exact).abs() / given.ceiling).mean())
    return table


@click.command()
@network_options
@harness.common_options
@click.option("--samples", default=256, show_default=True, help="Images in the batch.")
def main(
    json_file: Path | None, quick: bool, device: str, repeats: int, samples: int, **networks: Any
) -> None:
    """Compare root finders; ratios are to brentq."""
    on = harness.where(device)
    table = [
        row
        for subject in subjects(**networks, device=on, quick=quick)
        for stage in subject.stages()
        for row in measure(subject, stage, 32 if quick else samples, 2 if quick else repeats)
    ]
    harness.report("root_finders", table, on, json_file)


if __name__ == "__main__":
    main()
