"""auto_LiRPA as a contender, if it is installed; it is no dependency."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ibpcore.nn import IntervalBatchNorm, IntervalConv2d, IntervalLinear, IntervalNormalize
from ibpcore.nn.networks import Classifier


def available() -> bool:
    return importlib.util.find_spec("auto_LiRPA") is not None


class _Normalize(nn.Module):
    mean: Tensor
    std: Tensor

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean.view(1, -1, 1, 1)) / self.std.view(1, -1, 1, 1)


def _twin(layer: nn.Module) -> nn.Module:
    if isinstance(layer, IntervalConv2d):
        return nn.Conv2d(
            layer.in_channels, layer.out_channels, 3, stride=layer.stride[0], padding=1
        )
    if isinstance(layer, IntervalLinear):
        return nn.Linear(layer.in_features, layer.out_features)
    if isinstance(layer, IntervalNormalize):
        return _Normalize(layer.mean, layer.std)
    if isinstance(layer, IntervalBatchNorm):
        return nn.BatchNorm1d(layer.num_features)
    return nn.Flatten() if "Flatten" in type(layer).__name__ else nn.ReLU()


def twin(model: Classifier) -> nn.Sequential:
    """The same network of plain torch layers, with copies of the weights."""
    layers = [_twin(layer) for layer in model]
    for i, layer in enumerate(model):
        if isinstance(layer, IntervalBatchNorm) and isinstance(model[i - 1], IntervalConv2d):
            layers[i] = nn.BatchNorm2d(layer.num_features)
    result = nn.Sequential(*layers)
    result.load_state_dict(model.state_dict())
    return result.train(model.training)


def _ball(images: Tensor, epsilons: Tensor, first: Callable[[Tensor], Tensor] = torch.clone) -> Any:
    """The images (B, C, H, W) in balls of (B,) radii within [0, 1], after the layer `first`."""
    from auto_LiRPA import BoundedTensor, PerturbationLpNorm

    epsilons = epsilons.view(-1, 1, 1, 1)
    lower, upper = (images - epsilons).clamp(min=0), (images + epsilons).clamp(max=1)
    ball = PerturbationLpNorm(norm=float("inf"), x_L=first(lower), x_U=first(upper))
    return BoundedTensor(first(images), ball)


def _differences(labels: Tensor, classes: int) -> Tensor:
    """(B, classes - 1, classes) rows e_y - e_i for i != y."""
    every = torch.eye(classes, device=labels.device)
    rows = every[labels][:, None] - every[None]
    others = torch.arange(classes, device=labels.device)[None] != labels[:, None]
    return rows[others].view(len(labels), classes - 1, classes)


class Lirpa:
    """A CNN7 in auto_LiRPA, bounded by IBP with its last layer merged into the margins.

    Args:
        model: in training or evaluation mode; the twin has the same mode.
        images: (B, C, H, W), an example of the batches that follow.
    """

    def __init__(self, model: Classifier, images: Tensor) -> None:
        from auto_LiRPA import BoundedModule

        self.model = twin(model).to(images.device)
        self.bounded: Any = BoundedModule(
            self.model, images.clone(), bound_opts={"relu": "adaptive"}, device=images.device
        )
        self.bounded.train(model.training)
        self.classes = model.classes

    def margins(self, images: Tensor, labels: Tensor, epsilons: Tensor) -> Tensor:
        """(B,) margins R at (B,) radii.

        The input is a new object each time: auto_LiRPA would return its stored bounds otherwise.
        """
        lower, _ = self.bounded.compute_bounds(
            x=(_ball(images, epsilons),),
            IBP=True,
            C=_differences(labels, self.classes),
            method=None,
            bound_upper=False,
        )
        return -lower.amin(1)

    def loss(self, images: Tensor, labels: Tensor, epsilons: Tensor) -> Tensor:
        """FastIBP's robust cross-entropy, with the batch statistics of a clean forward pass."""
        self.bounded(_ball(images, epsilons))
        lower, _ = self.bounded.compute_bounds(
            IBP=True, C=_differences(labels, self.classes), method=None, bound_upper=False
        )
        robust = torch.cat([torch.zeros_like(lower[:, :1]), -lower], 1)
        return F.cross_entropy(robust, torch.zeros_like(labels))


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class LirpaCrown:
    """A network in auto_LiRPA, bounded by its CROWN: backward for every layer before a ReLU.

    A normalisation at the front is applied to the boxes instead, as its users do; the patches of
    its convolutions do not support one. Images are bounded one by one, which is its fastest way
    on a CPU for all networks of `benchmarks.published`.

    Args:
        model: in evaluation mode; it is traced as it is.
        images: (B, C, H, W), examples.
    """

    def __init__(self, model: Classifier, images: Tensor) -> None:
        from auto_LiRPA import BoundedModule

        normalized = isinstance(model[0], IntervalNormalize)
        self.first: Callable[[Tensor], Tensor] = model[0] if normalized else torch.clone
        self.classes = model.classes
        rest = model[1:] if normalized else model
        with torch.no_grad(), _without_warnings():
            example = self.first(images[:1])
            self.bounded: Any = BoundedModule(rest, example, device=images.device)

    def margins(self, images: Tensor, labels: Tensor, epsilons: Tensor) -> Tensor:
        """(B,) margins R at (B,) radii."""
        each = zip(images.split(1), labels.split(1), epsilons.split(1), strict=True)
        with torch.no_grad(), _without_warnings():
            return torch.cat([self._margin(*one) for one in each])

    def _margin(self, image: Tensor, label: Tensor, epsilon: Tensor) -> Tensor:
        lower, _ = self.bounded.compute_bounds(
            x=(_ball(image, epsilon, self.first),),
            C=_differences(label, self.classes),
            method="CROWN",
            bound_upper=False,
        )
        return -lower.amin(1)
