"""Images a second to exact certified radii.

Claims: certifying costs far less than the same root finding over bounds of all samples in
each iteration, because only correct samples are bounded, only undecided ones bracketed, and
batch norm is folded once for the whole set. Networks trained with ACERT on real data; test
images that training never saw. Where auto_LiRPA can be imported, Brent's method over its
bounds, all samples in each iteration, takes part. The radius error is the mean of the
differences to `brentq`'s, as a share of epsilon_max.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import harness, lirpa
from benchmarks.networks import Stage, Subject, network_options, subjects
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
    """Brent's method to full precision over auto_LiRPA, batch by batch."""
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


def measure(subject: Subject, stage: Stage, repeats: int) -> list[harness.Row]:
    """The rows of one network."""
    data = subject.data.test.to(subject.device)
    epsilon = subject.config.epsilon_max
    model = stage.state.model.eval()

    def ours(options: RootOptions, claim: str = UNCHECKED) -> Callable[[], Tensor]:
        return lambda: (
            certify(model, data, CertificationOptions(epsilon, claim=claim, roots=options)).radius
        )

    runs = {name: ours(options) for name, options in OPTIONS.items()}
    runs |= {f"brentq, {claim} proved": ours(RootOptions(), claim) for claim in CLAIMS}
    if lirpa.available():
        runs["auto_LiRPA brentq"] = over_lirpa(stage, data, epsilon)
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
        dataset=subject.data.title,
        stage=stage.name,
        width=subject.config.width,
        images=len(data),
    )
    for row in table:
        row["images_per_second"] = len(data) / (row["median_ms"] / 1e3)
        row["radius_error"] = errors[row["contender"]]
    return table


@click.command()
@network_options
@harness.common_options
def main(json_file: Path | None, quick: bool, device: str, repeats: int, **networks: Any) -> None:
    """Compare ways to exact radii; ratios are to auto_LiRPA's where it is there."""
    on = harness.where(device)
    table = [
        row
        for subject in subjects(**networks, device=on, quick=quick)
        for stage in subject.stages()
        if stage.name == "end"
        for row in measure(subject, stage, 2 if quick else repeats)
    ]
    harness.report("certify_throughput", table, on, json_file)


if __name__ == "__main__":
    main()
