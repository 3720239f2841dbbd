"""Certificates of a whole data set, batch by batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ibpcore.bounds.checks import check_fit
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.ladder import rungs
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certificates import UNCHECKED, Certificates, record, recorded
from ibpcore.certification.radii import CleanSamples, Climbed, check_epsilon_max, find_radii
from ibpcore.certification.soundness.network import SoundNetwork, sound_network
from ibpcore.certification.soundness.verification import prove_radii
from ibpcore.certification.summary import left_open
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.distributed import SINGLE_PROCESS, Ranks, all_gather_object
from ibpcore.io.journal import Journal
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import weight_like
from ibpcore.precision import full_precision
from ibpcore.progress import Advance
from ibpcore.roots import RootOptions

BATCH_SIZE = 128
"""Samples bounded at a time; small enough to stay in a CPU's cache."""


SEARCH = ("slope_steps", "inner_slopes")
"""The options of a search for slopes."""


@dataclass(frozen=True)
class CertificationOptions:
    """What is certified for every image, and how.

    Attributes:
        epsilon_max: largest radius to certify, in pixel units.
        claim: "unchecked" for the result of float32 passes, or the claim to prove, a name
            in `ibpcore.certification.soundness.network.CLAIMS`.
        bounds, roots: how margins are bounded, and how radii are searched for.
        batch_size: samples bounded at a time.
    """

    epsilon_max: float
    claim: str = "real"
    bounds: BoundOptions = field(default_factory=BoundOptions)
    roots: RootOptions = field(default_factory=RootOptions)
    batch_size: int = BATCH_SIZE

    def record(self) -> dict[str, Any]:
        """The options as JSON values, for journals and summaries."""
        searched = "alpha-crown" in rungs(self.bounds.bound)
        return {
            "epsilon_max": self.epsilon_max,
            **asdict(self.roots),
            "claim": self.claim,
            "bound": self.bounds.bound,
            **({name: getattr(self.bounds, name) for name in SEARCH} if searched else {}),
            "elide": self.bounds.elide,
            "clip": self.bounds.clip is not None,
            "batch_size": self.batch_size,
        }


def certify(
    model: nn.Module,
    data: ImageSet,
    options: CertificationOptions,
    *,
    journal: Journal | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    advance: Advance | None = None,
    climbed: Climbed | None = None,
) -> Certificates:
    """Certifies all images of a data set batch by batch, in full precision.

    Batches in the journal are not computed again. The results depend neither on that nor on
    the rank that computes a batch.

    Args:
        model: interval layers in evaluation mode, on the device of `data`.
        journal: records each batch's certificates; of the same model, data, options and ranks.
        ranks: the processes that share the batches; each of them returns all certificates.
        advance: called at the start and after each batch with the number of images done, where
            the other ranks are assumed to be as far, and how many of this rank's images are
            certified and open.
        climbed: called after each batch and rung of this rank, see `find_radii`.

    Raises:
        UserError: the model does not accept such images, a layer has no interval rule, no
            proof covers the model, there is no such bound or claim, `epsilon_max` is not
            above 0 and finite, or the journal is damaged or was removed meanwhile.
        OSError: the journal cannot be written.
    """
    batches = torch.arange(len(data), device=data.images.device).split(options.batch_size)
    sizes = {number: len(samples) for number, samples in enumerate(batches)}
    parts: dict[int, Certificates] = {}
    mine: dict[int, Certificates] = {}
    dtype = weight_like(model).dtype
    check_epsilon_max(options.epsilon_max, dtype)
    rungs(options.bounds.bound)
    proof = None if options.claim == UNCHECKED else sound_network(model, options.claim)
    with torch.no_grad(), full_precision():
        network = fold(model)
        some = as_pixels(data.images[:1]).to(dtype)
        check_fit(network, some, data.labels)
        if journal is not None:
            labels = dict(enumerate(data.labels.split(options.batch_size)))
            classes = network(some).shape[1]
            parts = recorded(journal, labels, classes, options.epsilon_max, dtype)
        counts = Counter[str]()
        for part in parts.values():
            counts.update(_standing(part, options.epsilon_max))
        missing = [number for number in sizes if number not in parts]

        def report() -> None:
            if advance is not None:
                ahead = missing[len(mine) * ranks.size :]
                facts = [f"{counts[standing]} {standing}" for standing in ("certified", "open")]
                advance(len(data) - sum(sizes[other] for other in ahead), facts)

        report()
        for number in missing[ranks.rank :: ranks.size]:
            samples = data[batches[number]]
            images = as_pixels(samples.images).to(dtype)
            mine[number] = _certified(network, proof, images, samples.labels, options, climbed)
            if journal is not None:
                record(journal, number, mine[number])
            counts.update(_standing(mine[number], options.epsilon_max))
            report()
    for theirs in all_gather_object(ranks, mine):
        parts |= theirs
    ordered = [parts[number] for number in sizes]
    return Certificates(*(torch.cat(column) for column in zip(*ordered, strict=True)))


def _certified(
    network: FoldedNetwork,
    proof: SoundNetwork | None,
    images: Tensor,
    labels: Tensor,
    options: CertificationOptions,
    climbed: Climbed | None,
) -> Certificates:
    """The certificates of a batch, on the CPU."""
    logits = network(images)
    samples = CleanSamples(images, labels, clean_margins(logits, labels))
    radii = find_radii(
        network, samples, options.epsilon_max, options.roots, options.bounds, climbed
    )
    found = radii.radius
    if proof is not None:
        radii = prove_radii(proof, images, labels, radii, options.bounds)
    ends = radii.radius.double(), radii.upper.double()
    columns = (labels, logits.argmax(1), *ends, radii.status, found.double(), *radii[4:])
    return Certificates(*(column.cpu() for column in columns))


def _standing(part: Certificates, epsilon_max: float) -> dict[str, int]:
    """How many images of a batch are certified at epsilon_max, and how many are open."""
    return {
        "certified": int((part.radius.double() >= epsilon_max).sum()),
        "open": int(left_open(*part[:3], epsilon_max).sum()),
    }
