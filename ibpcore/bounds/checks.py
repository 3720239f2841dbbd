"""Checks that images, labels and logits form a batch that can be bounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ibpcore.bounds.interval import check_images, check_range
from ibpcore.bounds.options import Clip
from ibpcore.errors import UserError, first_line, is_out_of_memory


def check_batch(images: Any, labels: Any, clip: Clip) -> None:
    """Raises UserError unless `images` (B, ...) in pixel units and `labels` (B,) are valid."""
    check_images(images)
    if images.dim() < 2 or images.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"images must be float32 or float64, (B, C, H, W), but are {images.dtype}"
            f" of shape {tuple(images.shape)}"
        )
    check_labels(labels, images)
    check_range(images, clip)


def check_labels(labels: Any, images: Tensor) -> None:
    """Raises UserError unless `labels` are (B,) integers of at least 0, as the images (B, ...)."""
    check_label_shape(labels, images)
    # Not all unsigned types can be compared.
    if bool((labels.long() < 0).any()):
        raise UserError("labels must be class indices: integers from 0")


def check_label_shape(labels: Any, images: Tensor) -> None:
    """`check_labels` without the values, for which a GPU would make the host wait."""
    if not isinstance(labels, Tensor):
        raise UserError(f"labels must be a torch tensor, not {type(labels).__name__}")
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"labels must have shape ({len(images)},) like the images,"
            f" but have {tuple(labels.shape)}"
        )
    if labels.device != images.device or labels.layout is not torch.strided:
        raise UserError(
            f"labels must be a dense tensor on {images.device} like the images, but are"
            f" {labels.layout} on {labels.device}"
        )
    number = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not number:
        raise UserError("labels must be class indices: integers from 0")


def check_fit(network: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> None:
    """Raises UserError unless the network takes `images` (B, ...) and has logits for `labels`.

    Args:
        network: from images to logits.
    """
    try:
        logits = network(images[:1].detach())
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        if is_out_of_memory(error):
            raise
        raise UserError(
            f"the model does not take images of shape {tuple(images.shape[1:])},"
            f" {images.dtype}: {first_line(error)}"
        ) from None
    if logits.dim() != 2:
        raise UserError(f"logits must be (B, classes), but the model's have {logits.dim()} dims")
    if logits.shape[1] < 2:
        raise UserError("the model has logits of a single class: there is nothing to certify")
    indices = labels.long()
    if bool(((indices < 0) | (indices >= logits.shape[1])).any()):
        raise UserError(
            f"labels must be from 0 and below {logits.shape[1]}, the number of classes of the model"
        )
