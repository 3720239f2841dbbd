"""Images per second whose exact certified radius is computed.

Claim: certification costs far less than root finding that bounds all samples in every
iteration, because only correctly classified samples are bounded, only undecided ones are
bracketed, and batch norm is folded once for the whole set. Measured on up to 1,000 test images
and the final network of each data set, trained with ACERT; nine turns, on the device that
`--device` selects. If auto_LiRPA can be imported, Brent's method over its bounds of all
samples is a contender. `radius_error` is the mean |radius - radius of `brentq`| as a share of
epsilon_max, `operators` the number of operators dispatched for the first batch of
images, see `benchmarks.counting.overhead`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import harness, lirpa
from benchmarks.counting import overhead
from benchmarks.networks import Stage, measure_all, network_options
from benchmarks.training_step import lirpa_radii
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.certify import BATCH_SIZE, CertificationOptions, certify
from ibpcore.certification.radii import RootOptions
from ibpcore.certification.soundness.network import CLAIMS
from ibpcore.data.batches import ordered_batches
from ibpcore.data.images import ImageSet

OPTIONS = {
    "brentq": RootOptions(),
    "bisect": RootOptions(solver="bisect"),
    "fused 8": RootOptions(solver="fused"),
    "fused 2": RootOptions(solver="fused", candidates=2),
}


def over_lirpa(stage: Stage, data: ImageSet, epsilon: float) -> Callable[[], Tensor]:
    """Brent's method over auto_LiRPA's bounds, in batches, up to 100 iterations."""
    model = stage.state.model.eval()
    nets: dict[int, lirpa.Lirpa] = {}

    def run() -> Tensor:
        found = []
        for images, labels, _ in ordered_batches(data, BATCH_SIZE):
            if len(labels) not in nets:
                nets[len(labels)] = lirpa.Lirpa(model, images)
            found.append(lirpa_radii(nets[len(labels)], images, labels, epsilon, 100))
        return torch.cat(found).cpu()

    return run


def contenders(stage: Stage, data: ImageSet) -> dict[str, Callable[[], Tensor]]:
    """A function for each contender, which computes the radii of these images."""
    model, epsilon = stage.state.model.eval(), stage.subject.config.epsilon_max

    def ours(options: RootOptions, claim: str = UNCHECKED) -> Callable[[], Tensor]:
        return lambda: (
            certify(model, data, CertificationOptions(epsilon, claim=claim, roots=options)).radius
        )

    runs = {name: ours(options) for name, options in OPTIONS.items()}
    runs |= {f"brentq, {claim} proved": ours(RootOptions(), claim) for claim in CLAIMS}
    if lirpa.available():
        runs["auto_LiRPA brentq"] = over_lirpa(stage, data, epsilon)
    return runs


def measure(stage: Stage, repeats: int) -> list[harness.Row]:
    """The rows of one network."""
    subject = stage.subject
    data, epsilon = subject.data.test.to(subject.device), subject.config.epsilon_max
    runs = contenders(stage, data)
    of_batch = contenders(stage, ImageSet(data.images[:BATCH_SIZE], data.labels[:BATCH_SIZE]))
    radii = {name: run() for name, run in runs.items()}
    errors = {
        name: float((r - radii["brentq"]).abs().mean()) / epsilon for name, r in radii.items()
    }
    for name, error in errors.items():
        if error > 1e-3:
            raise click.ClickException(f"{name} disagrees with brentq by {error:.2g}")
    table = harness.rows(
        harness.milliseconds(runs, repeats, subject.device),
        "auto_LiRPA brentq" if "auto_LiRPA brentq" in runs else "brentq",
        **stage.facts,
        images=len(data),
    )
    for row in table:
        row["images_per_second"] = len(data) / (row["median_ms"] / 1e3)
        row["radius_error"] = errors[row["contender"]]
        row |= overhead(of_batch[row["contender"]], subject.device, runs=1)
    return table


@click.command()
@network_options
@harness.common_options
def main(**options: Any) -> None:
    """Compare ways to exact radii; ratios are to auto_LiRPA's time if it can be imported."""
    measure_all("certify_throughput", measure, ("end",), **options)


if __name__ == "__main__":
    main()
