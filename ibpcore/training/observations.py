"""What is observed of a model after an epoch, without an effect on its training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ibpcore.bounds.epsilons import rounded_up
from ibpcore.certification import metrics
from ibpcore.certification.certificates import UNCHECKED
from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import ImageSet, subset_indices
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.inspection.report import inspect_assumptions
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig

MEASURED = 1000
"""Number of held-out images measured, if there are more."""
INSPECTED, INSPECTED_RADII = 64, 33
"""Number of training images inspected, and of radii at which their margins are evaluated."""


def sample(held_out: ImageSet) -> ImageSet:
    """The held-out images that are measured, the same every time."""
    return held_out[torch.from_numpy(subset_indices(len(held_out), MEASURED))]


def measured(
    model: Classifier,
    images: ImageSet,
    config: TrainConfig,
    ranks: Ranks = SINGLE_PROCESS,
    at: Sequence[str] = (),
) -> dict[str, Any]:
    """Accuracy, ACR and ART of the model, fractions, and the number of images.

    With radii to measure `at`, such as "8/255", also `certified_accuracy` by radius.

    The radii are those of the bounds that the run is certified with, up to the final
    epsilon_max, and unproved.

    Args:
        images: on the device of the model.
        ranks: the processes that share the images; each returns the measures of all.
    """
    options = CertificationOptions(config.epsilon_max, UNCHECKED, config.bound_options)
    found = certify(model.eval(), images, options, ranks=ranks)
    accuracy = float((found.prediction == found.label).double().mean())
    acr = metrics.acr(found.radius, config.epsilon_max)
    art = metrics.art(accuracy, acr)
    values = {"accuracy": accuracy, "acr": acr, "art": art, "images": len(images)}
    if not at:
        return values
    shares = {text: metrics.certified_accuracy(found.radius, rounded_up(text)) for text in at}
    return {**values, "certified_accuracy": shares}


def inspected(model: Classifier, images: ImageSet, config: TrainConfig) -> dict[str, Any]:
    """The `inspect_assumptions` summary of the model on a fixed subset of training images."""
    index = torch.linspace(0, len(images) - 1, min(len(images), INSPECTED)).round().long()
    some, bounds = images[index.to(images.images.device)], config.bound_options
    pixels, limit = as_pixels(some.images), config.epsilon_max
    return inspect_assumptions(
        model, pixels, some.labels, limit, points=INSPECTED_RADII, bounds=bounds
    ).summary()
