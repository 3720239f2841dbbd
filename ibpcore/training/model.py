"""The network of a run: a CNN7, given layers, or the result of a function of the user."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from torch import nn

from ibpcore.certification.certificates import UNCHECKED
from ibpcore.data.images import Dataset
from ibpcore.errors import UserError, first_line
from ibpcore.interop.conversion import convert
from ibpcore.nn import IntervalDivide, IntervalNormalize, IntervalScale, IntervalSubtract
from ibpcore.nn.architectures import new_network
from ibpcore.nn.checkpoint import fingerprint
from ibpcore.nn.cnn7 import CNN7, cnn7
from ibpcore.nn.initialization import INITIALIZATIONS
from ibpcore.nn.layers import IntervalLayer
from ibpcore.nn.networks import Classifier, Network
from ibpcore.training.acceptance import check_layers, check_tensors
from ibpcore.training.config import DEFAULT_MODEL, TrainConfig
from ibpcore.wording import counted

NORMALISING = IntervalNormalize, IntervalScale, IntervalSubtract, IntervalDivide
"""Layers of which a normalisation consists: arithmetic with constants, but not clamps."""


def own_network(
    name: str,
    in_shape: tuple[int, int, int],
    classes: int,
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    claim: str = UNCHECKED,
) -> Classifier:
    """The result of `build(in_shape, classes)` in interval layers, after normalisation.

    No normalisation is added if the network begins with one, see `NORMALISING`.

    Args:
        name: `package.module:build`, in the current folder or on PYTHONPATH.
        in_shape: channels, height, width of an image.
        mean, std: normalisation of each channel in pixel units; empty for none.
        claim: what certificates are to prove of it.

    Raises:
        UserError: there is no such function, it fails, its result is not such a network, or
            the network cannot be trained, saved, or certified with this claim.
    """
    module_name, _, function = name.partition(":")
    with _importable_from_here():
        build = getattr(_imported(module_name), function, None)
        if not callable(build):
            raise UserError(f"the module {module_name} has no function {function}")
        try:
            module = build(in_shape, classes)
        except (Exception, SystemExit) as error:
            raise UserError(f"{name} failed: {_described(error)}") from None
    if not isinstance(module, nn.Module):
        raise UserError(f"{name} must return an nn.Module, not {type(module).__name__}")
    check_tensors(module)
    network = convert(module, in_shape)
    if network.classes != classes:
        raise UserError(
            f"{name} returns {counted(network.classes, 'logit')} for {counted(classes, 'class')}"
        )
    layers: list[IntervalLayer] = [*network]
    if mean and not isinstance(layers[0], NORMALISING):
        layers.insert(0, IntervalNormalize(mean, std))
    network = Network(layers, in_shape)
    check_layers(network, module, claim)
    return network


def named_function(build: Callable[..., Any]) -> str:
    """`package.module:build`, by which `own_network` finds the function `build`.

    Raises:
        UserError: it is not found by that name, such as a lambda or a function in a function.
    """
    module, name = getattr(build, "__module__", None), getattr(build, "__qualname__", "")
    if getattr(sys.modules.get(str(module)), name, None) is not build:
        raise UserError(f"model must be a function at the top of a module, but is {build!r}")
    return f"{module}:{name}"


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Inside, modules of the current folder can be imported, as with `python -m`."""
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and f"{name}.".startswith(f"{missing}."):
            where = f"in {os.getcwd()}, nor on PYTHONPATH"
            raise UserError(f"there is no module {missing} {where}") from None
        raise UserError(f"the module {name} cannot be imported: {_described(error)}") from None


def _described(error: BaseException) -> str:
    """Its type, first line and line of code."""
    text = f"{type(error).__name__}: {first_line(error)}"
    if isinstance(error, SyntaxError):
        return text  # contains the line already
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{text} ({os.path.basename(last.filename)}, line {last.lineno})"


def network_from(start: Classifier | None, config: TrainConfig, dataset: Dataset) -> Classifier:
    """A copy of the saved model, with its own normalisation, to be trained further.

    Raises:
        UserError: it is not the model of the configuration, takes other images or classes than
            those of the data set, or cannot be trained, or certified with the claim.
    """
    if start is None:
        raise UserError("the run starts from a saved model: give it with --from")
    if fingerprint(start) != config.start:
        raise UserError("the model to start from is another one than that of the configuration")
    if start.in_shape != dataset.in_shape or start.classes != len(dataset.classes):
        raise UserError(
            f"the model to start from takes images {start.in_shape} of {start.classes} classes, but"
            f" {dataset.title} has {dataset.in_shape} of {len(dataset.classes)}"
        )
    model = deepcopy(start)
    check_layers(model, start, config.claim)
    return model


def fresh_network(
    config: TrainConfig, dataset: Dataset, start: Classifier | None = None
) -> Classifier:
    """The network before its first step, a function of the configuration alone.

    Args:
        start: the model whose digest is `config.start`; it is copied.

    Raises:
        UserError: it cannot be built, see `own_network`, `new_network` and `network_from`.
    """
    torch.manual_seed(config.seed)
    if start is not None or config.start is not None:
        return network_from(start, config, dataset)
    shape, normalization = (dataset.in_shape, len(dataset.classes)), (dataset.mean, dataset.std)
    if config.model != DEFAULT_MODEL:
        model = own_network(config.model, *shape, *normalization, config.claim)
    elif config.architecture is not None:
        model = new_network(config.architecture, *shape, *normalization)
    else:
        model = cnn7(*shape, config.width, config.hidden, *normalization)
    # A CNN7 has the IBP initialisation already.
    if not isinstance(model, CNN7) or config.initialization != "ibp":
        INITIALIZATIONS[config.initialization](model)
    return model
