"""The cost of proving a bound, and how much smaller proved radii are.

Claims: a pass that accounts for every rounding takes at most four times as long as a plain
pass in float64; radii proved for `real` equal those of float32 bounds to one part in a
million. Times are those of one pass over 16 test images at half of epsilon_max, with the final
network of each data set, trained with ACERT; nine turns, on the device that `--device`
selects. Radii are those of up to 1,000 test images: `lost` is the relative decrease of their
sum, `shrunk` the share of the certified images whose radius decreases, `largest` the largest
relative decrease.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import click
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.networks import Stage, measure_all, network_options
from ibpcore.bounds.options import BoundOptions
from ibpcore.bounds.registry import BOUNDS
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import CLAIMS, sound_network
from ibpcore.data.batches import as_pixels
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision

IMAGES = 16
"""In a timed pass. Certificates are computed for all test images."""


def passes(stage: Stage, bound: str) -> dict[str, Callable[[], Tensor]]:
    """One pass at one radius: plain, and with a proof of each claim."""
    subject = stage.subject
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


def losses(stage: Stage, claim: str) -> dict[str, float]:
    """By how much the proof of a claim decreases the certified radii."""
    subject = stage.subject
    data, model = subject.data.test.to(subject.device), stage.state.model.eval()
    found = certify(model, data, CertificationOptions(subject.config.epsilon_max, claim=claim))
    some = found.unchecked > 0
    each = 1 - found.radius[some] / found.unchecked[some]
    return {
        "lost": 1 - float(found.radius.sum() / found.unchecked.sum()),
        "shrunk": float((each > 0).double().mean()),
        "largest": float(each.max()),
    }


def measure(stage: Stage, repeats: int) -> list[harness.Row]:
    """The rows of one network."""
    table = []
    for bound in BOUNDS:
        runs = passes(stage, bound)
        with torch.no_grad(), full_precision():
            times = harness.milliseconds(runs, repeats, stage.subject.device)
        table += harness.rows(times, "plain float64", bound=bound, **stage.facts)
    for claim in CLAIMS:
        lost = losses(stage, claim)
        for row in table:
            if (row["contender"], row["bound"]) == (f"proof of {claim}", "ibp"):
                row |= lost
    return table


@click.command()
@network_options
@harness.common_options
def main(**options: Any) -> None:
    """Compare passes with and without a proof; ratios are to a plain pass in float64."""
    measure_all("proofs", measure, ("end",), **options)


if __name__ == "__main__":
    main()
