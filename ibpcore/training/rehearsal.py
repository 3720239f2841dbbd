"""A rehearsal of a run on a few images: what would fail later fails before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from ibpcore.certification.certify import CertificationOptions, certify
from ibpcore.data.batches import as_pixels
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.errors import UserError, first_line, is_out_of_memory
from ibpcore.nn.checkpoint import check_saved
from ibpcore.nn.cnn7 import CNN7
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import NOTHING_HELD_OUT, TrainConfig
from ibpcore.training.easy import all_correct
from ibpcore.training.flat import separate
from ibpcore.training.loop import epoch_batches, run_epoch, train_step
from ibpcore.training.observations import inspected
from ibpcore.training.state import start_state, weights_kept

IMAGES, EPOCHS = 8, 4


def rehearse(config: TrainConfig, dataset: Dataset, start: Classifier | None = None) -> Classifier:
    """Does all that a run does with a network that is no CNN7 once, on the CPU, and writes nothing.

    These are a step at the start of the epsilon schedule, one at its end with every image
    classified correctly, the inspection if there is one, a model file, and certificates.
    A CNN7 is only built. Sets torch's global seed, as a run does.

    Args:
        dataset: from `ibpcore.experiments.run.dataset_of`.
        start: the model whose digest is `config.start`.

    Returns:
        the network of the run.

    Raises:
        UserError: one of them fails, see also `ibpcore.training.state.start_state`.
    """
    with _reported("initialised"):
        network = start_state(config, dataset, "cpu", start=start).model
    separate(network)
    if isinstance(network, CNN7):
        return network
    # The learning-rate schedule must not end before the last step.
    epochs = max(config.epochs, EPOCHS)
    small = replace(config, compile="off", batch_size=IMAGES, epochs=epochs, **NOTHING_HELD_OUT)
    few = torch.arange(IMAGES)
    train, test = (part[few[: len(part)]] for part in (dataset.train, dataset.test))
    few_images = replace(dataset, train=train, test=test, validation=None)
    state = start_state(small, few_images, "cpu", start=start)
    with weights_kept(state.model):
        with _reported("trained"):
            run_epoch(state, train, small, None)
            batch = next(epoch_batches(state, train, small))
            train_step(state, all_correct(state, batch), 1.0, small)
        model = state.model.eval()
        with _reported("saved"):
            check_saved(model)
        with _reported("certified"):
            options = CertificationOptions(config.epsilon_max, config.claim, config.bound_options)
            certify(model, _as_predicted(model, test), options)
        if config.inspect_every is not None:
            with _reported("inspected"):
                inspected(model, _as_predicted(model, train), small)
    separate(state.model)  # which may be `network`
    return network


@torch.no_grad()
def _as_predicted(model: Classifier, data: ImageSet) -> ImageSet:
    """The images with the predictions as labels, since misclassified ones need no bounds."""
    return ImageSet(data.images, model(as_pixels(data.images)).argmax(1))


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Any error inside becomes a UserError, unless memory is short."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        cause = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"the network cannot be {what}: {cause}") from None
