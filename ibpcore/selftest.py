"""Self-test of an installation, in about a second: training, bounds, certificates and files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval
from ibpcore.certification.radii import certified_radii
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.data.batches import as_pixels, shuffled_batches
from ibpcore.data.sources import Request, load_dataset
from ibpcore.nn.checkpoint import load_model, save_model
from ibpcore.nn.cnn7 import cnn7
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.state import start_state

IMAGES, POINTS_PER_BALL, RADIUS, EPSILON_MAX = 8, 64, 0.01, 1.0


def check_training(device: torch.device) -> str:
    """A step of ACERT on the digits has a finite loss and changes the weights."""
    config = make_config("digits", "acert", width=2, hidden=8, epochs=1)
    dataset = load_dataset("digits", Request(limit_train=64, limit_test=1))
    state = start_state(config, dataset, device)
    before = next(state.model.parameters()).clone()
    images = dataset.train.to(device)
    batches = shuffled_batches(images, 32, seed=0, epoch=0, flip=False, padding=0)
    result = train_step(state, next(batches), 1.0, config)
    _demand(bool(torch.stack([*result.sums]).isfinite().all()), "the loss is not finite")
    _demand(not torch.equal(before, next(state.model.parameters())), "no weight changed")
    return f"a step of ACERT, loss {float(result.sums[0]):.2f}"


def check_bounds(device: torch.device) -> str:
    """The outputs of random points of a ball lie within the bounds of the ball."""
    model, images, _ = _subject(device)
    within = model(Interval.ball(images, RADIUS))
    points = _random_points(images, torch.full((IMAGES,), RADIUS, device=device))
    outputs = model(points).unflatten(0, (POINTS_PER_BALL, IMAGES))
    slack = 1e-5 * (1 + within.rad)  # for rounding, which these bounds do not cover
    good = (outputs >= within.lower - slack) & (outputs <= within.upper + slack)
    _demand(bool(good.all()), "a point is outside the bounds of its ball")
    return f"{POINTS_PER_BALL * IMAGES} points within their bounds"


def check_certificates(device: torch.device) -> str:
    """Certified radii are proved, and no random point within them is misclassified."""
    model, images, labels = _subject(device)
    found = certified_radii(model, images, labels, EPSILON_MAX)
    proved = verified_radii(model, images, labels, found)
    _demand(bool((proved.radius > 0).all()), "a radius has no proof")
    _demand(bool((proved.radius <= found.radius).all()), "a proof made a radius larger")
    points = _random_points(images, (1 - 1e-6) * proved.radius)
    right = torch.equal(model(points).argmax(1), labels.repeat(POINTS_PER_BALL))
    _demand(right, "a point within a certified radius is misclassified")
    return f"{IMAGES} radii proved, mean {float(proved.radius.mean()):.4f}"


def check_files(device: torch.device) -> str:
    """A model gives the same logits, bit by bit, after it was saved and loaded."""
    model, images, _ = _subject(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, path)
        again = load_model(path, device)
        size = path.stat().st_size
    _demand(torch.equal(model(images), again(images)), "a loaded model gives other logits")
    return f"a model saved and loaded, {size} bytes"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "training": check_training,
    "bounds": check_bounds,
    "certificates": check_certificates,
    "files": check_files,
}
"""Each returns a remark, or raises an exception if the statement of its docstring is false."""


@torch.no_grad()
def _subject(device: torch.device) -> tuple[Classifier, Tensor, Tensor]:
    """A network, digits, and its predictions as labels, so that all can be certified."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = cnn7((1, 8, 8), 10, width=4, hidden=16).to(device).eval()
    data = load_dataset("digits", Request(limit_train=1, limit_test=IMAGES))
    images = as_pixels(data.test.images).to(device)
    return model, images, model(images).argmax(1)


def _random_points(images: Tensor, radii: Tensor) -> Tensor:
    """Random points in the balls around (B, C, H, W) images, many of them on the surface.

    Returns:
        (POINTS_PER_BALL * B, C, H, W)
    """
    generator = torch.Generator().manual_seed(1)
    noise = 3 * torch.rand((POINTS_PER_BALL, *images.shape), generator=generator) - 1.5
    noise = noise.clamp(-1, 1).to(images.device)
    return (images + radii.to(images)[:, None, None, None] * noise).clamp(0, 1).flatten(0, 1)


def _demand(holds: bool, otherwise: str) -> None:
    if not holds:
        raise AssertionError(otherwise)
