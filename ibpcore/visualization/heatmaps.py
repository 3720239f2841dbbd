"""Heatmaps as pictures: in colours, beside their images, as PNG."""

from __future__ import annotations

import base64
import io

import torch
from torch import Tensor
from torchvision.transforms import functional as transforms

from ibpcore.inspection.heatmap import TINY

COLORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""From nothing to the most, evenly spaced: those of the map `inferno`, ever lighter."""
GAP, SIDE = 1, 256
"""Between an image and its heatmap, in pixels of the image; and about how high both are drawn."""


def colored(heat: Tensor) -> Tensor:
    """(H, W) as (3, H, W) bytes: linear from 0, and what is below, to its largest."""
    colors = torch.tensor(COLORS, dtype=torch.float64)
    heat = heat.double().cpu().clamp(min=0)
    place = heat / heat.max().clamp(min=TINY) * (len(colors) - 1)
    index = place.long().clamp(max=len(colors) - 2)
    color = torch.lerp(colors[index], colors[index + 1], (place - index)[..., None])
    return color.round().byte().permute(2, 0, 1)


def beside(image: Tensor, heat: Tensor) -> Tensor:
    """An image (C, H, W) of bytes and its heatmap (H, W), enlarged: (3, about 256, ...) bytes."""
    picture = image.cpu().expand(3, -1, -1)
    gap = picture.new_full((3, picture.shape[1], GAP), 255)
    both = torch.cat([picture, gap, colored(heat)], 2)
    factor = max(1, round(SIDE / picture.shape[1]))
    return both.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def png(image: Tensor) -> bytes:
    """(C, H, W) bytes, one channel or three, as a PNG file."""
    buffer = io.BytesIO()
    transforms.to_pil_image(image.cpu()).save(buffer, format="png")
    return buffer.getvalue()


def data_uri(image: Tensor) -> str:
    """`png`, as an address that holds the file itself."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
