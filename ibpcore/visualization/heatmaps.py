"""Heatmaps as coloured images, beside the images that they explain, captioned, and as PNG."""

from __future__ import annotations

import base64
import io
import textwrap

import torch
from torch import Tensor
from torchvision import utils  # which imports the parts of Pillow that draw
from torchvision.transforms import functional as transforms

from ibpcore.errors import printable
from ibpcore.inspection.heatmap import TINY

COLORS = ((0, 0, 4), (66, 10, 104), (147, 38, 103), (221, 81, 58), (252, 165, 10), (252, 255, 164))
"""From 0 to the maximum, evenly spaced and ever lighter: a few of matplotlib's map `inferno`."""
GAP, SIDE = 1, 256
"""Pixels of the image between it and its heatmap, and the approximate height of both together."""
FONT_SIZE, LINE, MARGIN, BAR = 14, 20, 8, 120
"""In pixels: of a caption, its lines and margins, and the length of the scale of colours."""
LEAST_WIDTH = 420
"""Pixels of a captioned picture: the scale and its words fit."""


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


def captioned(picture: Tensor, caption: str, largest: float) -> Tensor:
    """Adds below a picture its caption, and the scale of the colours of its heatmap.

    Args:
        picture: (3, H, W) uint8, made by `beside`.
        caption: plain text; what is not ASCII is escaped, since the font may lack it.
        largest: heat, which has the last colour.

    Returns:
        (3, H', W') uint8, higher and at least `LEAST_WIDTH` wide.
    """
    _, height, width = picture.shape
    font = utils.ImageFont.load_default(FONT_SIZE)
    wide = max(width, LEAST_WIDTH)
    text = printable(caption).encode("ascii", "backslashreplace").decode("ascii")
    lines = textwrap.wrap(text, int((wide - 2 * MARGIN) / font.getlength("n")))
    below = 2 * MARGIN + LINE * (len(lines) + 1)
    canvas = utils.Image.new("RGB", (wide, height + below), "white")
    canvas.paste(transforms.to_pil_image(picture.cpu()))
    draw = utils.ImageDraw.Draw(canvas)
    for number, line in enumerate(lines):
        draw.text((MARGIN, height + MARGIN + LINE * number), line, "black", font)
    top = height + MARGIN + LINE * len(lines)
    heat = torch.linspace(0, 1, BAR).expand(FONT_SIZE, BAR)
    left = MARGIN + round(font.getlength("0 "))
    draw.text((MARGIN, top), "0", "black", font)
    canvas.paste(transforms.to_pil_image(colored(heat)), (left, top))
    words = f"{largest:.4g}  slope of the margin in each pixel"
    draw.text((left + BAR + MARGIN, top), words, "black", font)
    return transforms.pil_to_tensor(canvas)


def png(image: Tensor) -> bytes:
    """Encodes an image (C, H, W) uint8 of one or three channels as PNG."""
    buffer = io.BytesIO()
    transforms.to_pil_image(image.cpu()).save(buffer, format="png")
    return buffer.getvalue()


def data_uri(image: Tensor) -> str:
    """Encodes an image as a `data:` address of a PNG, to embed it in a page."""
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()
