"""What it costs to prove a bound, and what the proof loses.

Claims: a pass with every rounding accounted for takes at most four times as long as a plain
pass in float64, and `real` radii are those of float32 bounds to one part in a million.
Networks trained with ACERT on real data; test images that training never saw, at half of
epsilon_max. `lost` is the share of all radii together that a proof takes away, `shrunk` of
images with a smaller radius, `largest` the largest share of a radius.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.networks import Stage, Subject, network_options, subjects
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.data.batches import as_pixels
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision

IMAGES = 16
"""Of a pass; certificates are made of all."""


def passes(subject: Subject, stage: Stage, bound: str) -> dict[str, Callable[[], Tensor]]:
    """One pass at one radius, plain and proved."""
    data, model = subject.data.test.to(subject.device), stage.state.model.eval()
    images, labels = as_pixels(data.images[:IMAGES]), data.labels[:IMAGES].long()
    epsilons = torch.full((len(images),), subject.config.epsilon_max / 2, device=images.device)
    doubled = fold(copy.deepcopy(model).double())
    plain, options = BOUNDS[bound].margins, BoundOptions(bound)
    runs: dict[str, Callable[[], Tensor]] = {
        "plain float64": lambda: plain(doubled, images.double(), labels, epsilons.double(), options)
    }
    single = fold(model)
    runs["plain float32"] = lambda: plain(single, images, labels, epsilons, options)
    for claim in CLAIMS:
        network = sound_network(model, claim)
        proof = partial(sound_margins, network, images, labels, epsilons, options)
        runs[f"proof of {claim}"] = proof
    return runs


def losses(subject: Subject, stage: Stage, claim: str) -> dict[str, float]:
    """What the proofs of a claim take away from the certified radii."""
    data, model = subject.data.test.to(subject.device), stage.state.model.eval()
    found = certify(model, data, CertificationOptions(subject.config.epsilon_max, claim=claim))
    some = found.unchecked > 0
    each = 1 - found.radius[some] / found.unchecked[some]
    return {
        "lost": 1 - float(found.radius.sum() / found.unchecked.sum()),
        "shrunk": float((each > 0).double().mean()),
        "largest": float(each.max()),
    }


def measure(subject: Subject, stage: Stage, repeats: int) -> list[harness.Row]:
    """The rows of one network."""
    table = []
    facts = {
        "dataset": subject.data.title,
        "stage": stage.name,
        "width": subject.config.width,
    }
    for bound in BOUNDS:
        runs = passes(subject, stage, bound)
        with torch.no_grad(), full_precision():
            times = harness.milliseconds(runs, repeats, subject.device)
        table += harness.rows(times, "plain float64", bound=bound, **facts)
    for claim in CLAIMS:
        lost = losses(subject, stage, claim)
        for row in table:
            if (row["contender"], row["bound"]) == (f"proof of {claim}", "ibp"):
                row |= lost
    return table


@click.command()
@network_options
@harness.common_options
def main(json_file: Path | None, quick: bool, device: str, repeats: int, **networks: Any) -> None:
    """Compare passes with and without proof; ratios are to a plain pass in float64."""
    on = harness.where(device)
    table = [
        row
        for subject in subjects(**networks, device=on, quick=quick)
        for stage in subject.stages()
        if stage.name == "end"
        for row in measure(subject, stage, 2 if quick else repeats)
    ]
    harness.report("proofs", table, on, json_file)


if __name__ == "__main__":
    main()
