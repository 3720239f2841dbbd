"""Checks that images, labels and logits form a batch that can be bounded."""

from __future__ import annotations

import torch
from torch import Tensor

from ibpcore.bounds.interval import check_range
from ibpcore.bounds.network import FoldedNetwork
from ibpcore.bounds.options import Clip
from ibpcore.errors import UserError, first_line


def check_batch(images: Tensor, labels: Tensor, clip: Clip) -> None:
    """Raises UserError unless `images` (B, ...) in pixel units and `labels` (B,) are valid."""
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor)):
        raise UserError("images and labels must be torch tensors")
    if images.dim() < 2 or images.dtype not in (torch.float32, torch.float64):
        raise UserError(
            f"images must be float32 or float64, (B, C, H, W), but are {images.dtype}"
            f" of shape {tuple(images.shape)}"
        )
    if labels.shape != images.shape[:1]:
        raise UserError(
            f"labels must have shape ({len(images)},) like the images,"
            f" but have {tuple(labels.shape)}"
        )
    if labels.is_floating_point() or labels.dtype == torch.bool or bool((labels < 0).any()):
        raise UserError("labels must be class indices: integers from 0")
    check_range(images, clip)


def check_fit(network: FoldedNetwork, images: Tensor, labels: Tensor) -> None:
    """Raises UserError unless the network takes `images` (B, ...) and has logits for `labels`."""
    try:
        logits = network(images[:1].detach())
    except RuntimeError as error:
        raise UserError(
            f"the model does not take images of shape {tuple(images.shape[1:])},"
            f" {images.dtype}: {first_line(error)}"
        ) from None
    if logits.dim() != 2:
        raise UserError(f"logits must be (B, classes), but the model's have {logits.dim()} dims")
    if logits.shape[1] < 2:
        raise UserError("the model has logits of a single class: there is nothing to certify")
    if bool((labels >= logits.shape[1]).any()):
        raise UserError(
            f"labels must be below {logits.shape[1]}, the number of classes of the model"
        )
