"""Data sets by name, and device-resident batches of them."""

from ibpcore.data.batches import (
    Batch,
    as_pixels,
    batches_per_epoch,
    ordered_batches,
    shuffled_batches,
)
from ibpcore.data.images import Dataset, ImageSet, hold_out
from ibpcore.data.sources import DATASETS, Request, load_dataset

__all__ = [
    "DATASETS",
    "Batch",
    "Dataset",
    "ImageSet",
    "Request",
    "as_pixels",
    "batches_per_epoch",
    "hold_out",
    "load_dataset",
    "ordered_batches",
    "shuffled_batches",
]
