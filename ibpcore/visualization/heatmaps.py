"""Heatmaps as coloured images, beside the images that they explain, and as PNG."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor
from torchvision.transforms import functional as transforms

from ibpcore.inspection.heatmap import TINY

COLORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""From 0 to the maximum, evenly spaced and ever lighter: a few of matplotlib's map `inferno`."""
GAP, SIDE = 1, 256
"""Pixels of the image between it and its heatmap, and the approximate height of both together."""


def colored(heat: Tensor) -> Tensor:
    """Colours a heatmap, (H, W) to (3, H, W) uint8, linearly from 0 or less to its maximum."""
    colors = torch.tensor(COLORS, dtype=torch.float64)
    heat = heat.double().cpu().clamp(min=0)
    place = heat / heat.max().clamp(min=TINY) * (len(colors) - 1)
    index = place.long().clamp(max=len(colors) - 2)
    color = torch.lerp(colors[index], colors[index + 1], (place - index)[..., None])
    return color.round().byte().permute(2, 0, 1)


def beside(image: Tensor, heat: Tensor) -> Tensor:
    """Joins an image (C, H, W) uint8 and its heatmap (H, W), enlarged to (3, about 256, ...)."""
    picture = image.cpu().expand(3, -1, -1)
    gap = picture.new_full((3, picture.shape[1], GAP), 255)
    both = torch.cat([picture, gap, colored(heat)], 2)
    factor = max(1, round(SIDE / picture.shape[1]))
    return both.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def png(image: Tensor) -> bytes:
    """Encodes an image (C, H, W) uint8 of one or three channels as PNG."""
    buffer = io.BytesIO()
    transforms.to_pil_image(image.cpu()).save(buffer, format="png")
    return buffer.getvalue()


def data_uri(image: Tensor) -> str:
    """Encodes an image as a `data:` address of a PNG, to embed it in a page."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
