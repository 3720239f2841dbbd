"""Images of balls: random ones, corners, and those that a gradient points to."""

import torch


def points(images, radii, clip, rng):
    """(P, B, C, H, W) points of the balls: the centres, random ones, and corners."""
    radius = radii.view(-1, 1, 1, 1)
    directions = [torch.zeros_like(images)]
    for _ in range(8):
        noise = torch.rand(images.shape, generator=rng, dtype=images.dtype) * 2 - 1
        directions += [noise, noise.sign()]
    moved = images + radius * torch.stack(directions)
    return moved if clip is None else moved.clamp(*clip)


def worst_corners(network, images, labels, radii, clip):
    """(classes, B, C, H, W) corners that the gradient of f_i - f_y points to."""
    x = images.clone().requires_grad_()
    logits = network(x)
    true = logits.gather(1, labels[:, None])[:, 0]
    corners = []
    for i in range(logits.shape[1]):
        (slope,) = torch.autograd.grad((logits[:, i] - true).sum(), x, retain_graph=True)
        corners.append(images + radii.view(-1, 1, 1, 1) * slope.sign())
    moved = torch.stack(corners)
    return moved if clip is None else moved.clamp(*clip)
