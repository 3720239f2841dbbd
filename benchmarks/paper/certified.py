"""Certified accuracy of a run by a tighter bound than that of its certificates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.paper.plan import CUSTOMARY, TIGHTER
from ibpcore import certified_margins
from ibpcore.bounds.epsilons import as_number
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import CERTIFICATES, read_certificates
from ibpcore.certification.certify import BATCH_SIZE
from ibpcore.certification.soundness.margins import sound_margins
from ibpcore.certification.soundness.network import SoundNetwork, sound_network
from ibpcore.data.batches import as_pixels, ordered_batches
from ibpcore.data.images import ImageSet
from ibpcore.experiments.results import Result
from ibpcore.experiments.run import dataset_of
from ibpcore.io.files import read_json, write_atomic
from ibpcore.nn.checkpoint import load_model

TIGHTER_RESULT = f"{TIGHTER}.json"
"""Within the folder of a run."""


def with_tighter(result: Result, data_dir: Path, device: str) -> Result:
    """The result with `TIGHTER` as a further measure, the fraction that this bound certifies.

    That is the fraction of all test images, at the customary radius of the data set, proved for
    the claim of the run. Computed once and kept in the folder of the run.

    Raises:
        UserError, OSError: a file of the run is missing or damaged.
    """
    path = result.run / TIGHTER_RESULT
    if not path.exists():
        test = dataset_of(result.config, data_dir).test.to(torch.device(device))
        found = {"certified": _certified(result, test), "radius": CUSTOMARY[result.config.dataset]}
        write_atomic(path, (json.dumps(found) + "\n").encode())
    return replace(result, measures=result.measures | {TIGHTER: read_json(path)["certified"]})


def _certified(result: Result, test: ImageSet) -> float:
    """That fraction; only what the certificates of the run leave open is bounded."""
    model = load_model(result.run).to(test.images.device)
    epsilon = as_number(CUSTOMARY[result.config.dataset])
    table = read_certificates(result.run / CERTIFICATES)
    certain = table.radius >= epsilon
    left = (~certain & (table.label == table.prediction)).nonzero()[:, 0].to(test.images.device)
    network = sound_network(model, result.config.claim)
    batches = ordered_batches(test[left], BATCH_SIZE)
    more = [
        _proved(model, network, as_pixels(images), labels.long(), epsilon)
        for images, labels, _ in batches
    ]
    return (int(certain.sum()) + sum(more)) / len(test)


def _proved(
    model: nn.Module, network: SoundNetwork, images: Tensor, labels: Tensor, epsilon: float
) -> int:
    """The number of images that `TIGHTER` certifies, and whose certificates are proved."""
    with torch.no_grad():
        good = certified_margins(model, images, labels, epsilon, bound=TIGHTER) < 0
        images, labels = images[good], labels[good]
        radii = images.new_full((len(images),), epsilon, dtype=torch.float64)
        return int((sound_margins(network, images, labels, radii, BoundOptions(TIGHTER)) < 0).sum())
