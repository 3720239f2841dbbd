"""A second's test of an installation: does what matters most do what it should, here?"""

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
from ibpcore.nn.architecture import cnn7
from ibpcore.nn.checkpoint import load_model, save_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import make_config
from ibpcore.training.loop import train_step
from ibpcore.training.state import start_state

IMAGES, SAMPLES, RADIUS, EPSILON_MAX = 8, 64, 0.01, 1.0


def trains(device: torch.device) -> str:
    """A step of ACERT on the digits has a finite loss and moves the weights."""
    config = make_config("digits", "acert", width=2, hidden=8, epochs=1)
    dataset = load_dataset("digits", Request(limit_train=64, limit_test=1))
    state = start_state(config, dataset, device)
    before = next(state.model.parameters()).clone()
    images = dataset.train.to(device)
    batches = shuffled_batches(images, 32, seed=0, epoch=0, flip=False, padding=0)
    result = train_step(state, next(batches), 1.0, config)
    _demand(int(result.bad) == 0, "the loss is not finite")
    _demand(not torch.equal(before, next(state.model.parameters())), "no weight moved")
    return f"a step of ACERT, loss {float(result.loss) / result.samples:.2f}"


def bounds(device: torch.device) -> str:
    """Outputs of random points of a ball lie within the bounds of the ball."""
    model, images, _ = _subject(device)
    within = model(Interval.ball(images, RADIUS))
    points = _points(images, torch.full((IMAGES,), RADIUS, device=device))
    outputs = model(points).unflatten(0, (SAMPLES, IMAGES))
    slack = 1e-5 * (1 + within.rad)  # of float32, which these bounds do not cover
    good = (outputs >= within.lower - slack) & (outputs <= within.upper + slack)
    _demand(bool(good.all()), "a point is outside the bounds of its ball")
    return f"{SAMPLES * IMAGES} points within their bounds"


def certificates(device: torch.device) -> str:
    """Certified radii are proved, and no random point within them changes the answer."""
    model, images, labels = _subject(device)
    found = certified_radii(model, images, labels, EPSILON_MAX)
    proved = verified_radii(model, images, labels, found)
    _demand(bool((proved.radius > 0).all()), "a radius has no proof")
    _demand(bool((proved.radius <= found.radius).all()), "a proof made a radius larger")
    answers = model(_points(images, (1 - 1e-6) * proved.radius)).argmax(1)
    _demand(
        torch.equal(answers, labels.repeat(SAMPLES)),
        "a point within a certified radius is misclassified",
    )
    return f"{IMAGES} radii proved, mean {float(proved.radius.mean()):.4f}"


def files(device: torch.device) -> str:
    """A model is the same, bit by bit, after it was saved and loaded."""
    model, images, _ = _subject(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_model(model, path)
        again = load_model(path, device)
        size = path.stat().st_size
    _demand(torch.equal(model(images), again(images)), "a loaded model gives other logits")
    return f"a model saved and loaded, {size} bytes"


CHECKS: dict[str, Callable[[torch.device], str]] = {
    "training": trains,
    "bounds": bounds,
    "certificates": certificates,
    "files": files,
}
"""Each returns a remark, and raises an exception if what its docstring says is not so."""


@torch.no_grad()
def _subject(device: torch.device) -> tuple[Classifier, Tensor, Tensor]:
    """A network, digits, and its own answers as labels, so that all can be certified."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = cnn7((1, 8, 8), 10, width=4, hidden=16).to(device).eval()
    data = load_dataset("digits", Request(limit_train=1, limit_test=IMAGES))
    images = as_pixels(data.test.images).to(device)
    return model, images, model(images).argmax(1)


def _points(images: Tensor, radii: Tensor) -> Tensor:
    """(SAMPLES * B, C, H, W) random points of each image's ball, many of them on its sides."""
    generator = torch.Generator().manual_seed(1)
    noise = 3 * torch.rand((SAMPLES, *images.shape), generator=generator) - 1.5
    noise = noise.clamp(-1, 1).to(images.device)
    return (images + radii.to(images)[:, None, None, None] * noise).clamp(0, 1).flatten(0, 1)


def _demand(good: bool, otherwise: str) -> None:
    if not good:
        raise AssertionError(otherwise)
