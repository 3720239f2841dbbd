"""Certificates of a whole data set, batch by batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ibpcore.bounds.checks import Clip, check_fit
from ibpcore.bounds.ibp import clean_margins
from ibpcore.bounds.registry import margins_by
from ibpcore.certification.certificates import UNCHECKED, Certificates, record, recorded
from ibpcore.certification.radii import RootOptions, check_epsilon_max, radii_by
from ibpcore.certification.soundness.network import sound_network
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet
from ibpcore.distributed import SINGLE_PROCESS, Ranks, all_gather_object
from ibpcore.io.journal import Journal
from ibpcore.nn.folding import fold
from ibpcore.precision import full_precision
from ibpcore.progress import Advance

BATCH_SIZE = 128
"""Samples bounded at a time; on the CPU the work then stays in cache."""


def certify(
    model: nn.Module,
    data: ImageSet,
    epsilon_max: float,
    options: RootOptions | None = None,
    *,
    claim: str = "real",
    bound: str = "ibp",
    elide: bool = True,
    clip: Clip = (0.0, 1.0),
    journal: Journal | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    advance: Advance | None = None,
) -> Certificates:
    """Certified radii of all images, in full precision.

    Batch by batch: what a journal has is not computed again, and the rest is what it would
    have been, whichever rank computes it.

    Args:
        model: interval layers in evaluation mode, on the device of `data`.
        data: images and labels.
        epsilon_max: largest radius asked for, in pixel units.
        options: how roots are found.
        claim: "unchecked" for what float32 passes said, or what the radii are to be proved
            for, a name in `ibpcore.certification.soundness.network.CLAIMS`.
        bound, elide, clip: see `ibpcore.certified_margins`.
        journal: gets the certificates of each batch; of the same model, data, settings, ranks.
        ranks: among which the batches are dealt; in the end all of them have all certificates.
        advance: reports the number of images done after each batch, assuming that the other
            ranks have done as many batches.

    Raises:
        UserError: the model does not take such images or has no rule for a layer, no proof
            covers it, there is no such bound or claim, `epsilon_max` is not above 0 and
            finite, or the journal is damaged.
        OSError: the journal cannot be written.
    """
    options = options or RootOptions()
    batches = torch.arange(len(data), device=data.images.device).split(BATCH_SIZE)
    sizes = {number: len(samples) for number, samples in enumerate(batches)}
    parts = {} if journal is None else recorded(journal, sizes)
    missing = [number for number in sizes if number not in parts]
    mine: dict[int, Certificates] = {}
    dtype = next(model.parameters()).dtype
    check_epsilon_max(epsilon_max, dtype)
    margins_by(bound)
    proof = None if claim == UNCHECKED else sound_network(model, claim)
    ball: dict[str, Any] = {"bound": bound, "elide": elide, "clip": clip}
    with torch.no_grad(), full_precision():
        network = fold(model)
        check_fit(network, as_pixels(data.images[:1]).to(dtype), data.labels)
        for number in missing[ranks.rank :: ranks.size]:
            samples = batches[number]
            images, labels = as_pixels(data.images[samples]).to(dtype), data.labels[samples]
            logits = network(images)
            at_zero = clean_margins(logits, labels)
            radii = radii_by(
                network,
                at_zero,
                images,
                labels,
                epsilon_max,
                options,
                **ball,
            )
            found = radii.radius
            if proof is not None:
                radii = verified_radii(proof, images, labels, radii, **ball)
            ends = radii.radius.double(), radii.upper.double()
            columns = (*ends, radii.status, found.double(), radii.evaluations)
            part = Certificates(*(t.cpu() for t in (labels, logits.argmax(1), *columns)))
            mine[number] = part
            if journal is not None:
                record(journal, number, part)
            if advance is not None:
                ahead = missing[len(mine) * ranks.size :]
                advance(len(data) - sum(sizes[other] for other in ahead), "")
    for theirs in all_gather_object(ranks, mine):
        parts |= theirs
    ordered = [parts[number] for number in sizes]
    return Certificates(*(torch.cat(column) for column in zip(*ordered, strict=True)))
