"""Batches on which every image is bounded, whatever the model has learnt: for trials of a step."""

from __future__ import annotations

import torch

from ibpcore.data.batches import Batch
from ibpcore.nn.folding import clean_pass
from ibpcore.training.state import TrainState


def all_correct(state: TrainState, batch: Batch) -> Batch:
    """The batch, labelled with the predictions of the model."""
    with torch.no_grad():
        logits, _ = clean_pass(state.model, batch.images, track=False)
    return batch._replace(labels=logits.argmax(1))
