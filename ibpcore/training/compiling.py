"""Whether a run compiles its passes: a rule from sizes, and a trial before the first step.

Compiling fuses the maps between affine layers, so that a step has fewer operators to launch. It
costs time for each layer once.

On CPUs no run is compiled without being asked. On MNIST and CIFAR-10 at width 16, compiled steps
took 1.19 times as long with FastIBP, and 0.98 to 1.00 times with ACERT, on an AMD EPYC with torch
2.14 (`benchmarks.training_step --compile`); with other processors and versions they were faster.
"""

from __future__ import annotations

import warnings
from dataclasses import replace

import torch

from ibpcore.bounds.compilation import check_compiler
from ibpcore.data.batches import Batch, batches_per_epoch
from ibpcore.distributed import SINGLE_PROCESS
from ibpcore.errors import UserError, first_line, is_out_of_memory
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import nonlinear_inputs
from ibpcore.precision import tf32_allowed
from ibpcore.training.config import TrainConfig
from ibpcore.training.easy import all_correct
from ibpcore.training.loss import TrainingLoss
from ibpcore.training.presets import SPLIT
from ibpcore.training.state import TrainState, weights_kept

SECONDS_A_LAYER = 10.0
"""Time to compile the passes, for each nonlinear layer: a CNN7, which has 6, took a minute on a
processor of 2025."""
SAVED_ON_CUDA = 2e-3
"""Seconds saved in a step on CUDA, where launches take the time: an estimate, never measured."""
MARGIN = 3
"""How many times the time to compile is to be saved."""
WITHOUT = ("standard", "crown-ibp", *SPLIT)
"""Methods without compiled passes, or with attacks that take longer than these."""


def is_worthwhile(steps: int, layers: int, saved: float) -> bool:
    """Whether a run saves enough by compiling.

    Args:
        steps: of the optimiser.
        layers: nonlinear ones.
        saved: seconds in each step.
    """
    return steps * saved > MARGIN * SECONDS_A_LAYER * layers


def with_compile(
    config: TrainConfig, network: Classifier, images: int, device: torch.device
) -> TrainConfig:
    """The configuration with `compile` on or off, chosen by sizes if it is "auto".

    A long run that could have been compiled, but for lack of a compiler, is a warning.

    Args:
        network: of the run, or of the same sizes.
        images: number of training images.

    Raises:
        UserError: `compile` is "on", and there is no compiler.
    """
    if config.compile == "on":
        check_compiler(device)
    if config.compile != "auto":
        return config
    chosen = "on" if is_long_enough(config, network, images, device) else "off"
    if chosen == "on":
        try:
            check_compiler(device)
        except UserError as error:
            warnings.warn(f"this run is not compiled, though it is long: {error}", stacklevel=2)
            chosen = "off"
    return replace(config, compile=chosen)


def is_long_enough(
    config: TrainConfig, network: Classifier, images: int, device: torch.device
) -> bool:
    """Whether a run on `device` gains by compiling, by its sizes; see `with_compile`."""
    if device.type == "cpu" or config.method in WITHOUT or config.train_bound != "ibp":
        return False
    steps = config.epochs * batches_per_epoch(images, config.batch_size)
    return is_worthwhile(steps, len(nonlinear_inputs(network)), SAVED_ON_CUDA)


def compiles(state: TrainState, batch: Batch, config: TrainConfig) -> bool:
    """Tries the passes of a run, compiled; if one fails, the reason is a warning.

    Before the first step this loses nothing: the code is kept, and the state is not changed.

    Args:
        batch: any images of the data set.
    """
    loss = TrainingLoss(state.model.train())
    try:
        check_compiler(batch.images.device)
        with weights_kept(state.model), tf32_allowed(config.tf32):
            for share in (0.5, 1.0):  # with the regularisers of the warm-up, and without
                easy = all_correct(state, batch)
                expected = state.expected_slopes(batch.samples)
                loss(easy, expected, share, config, SINGLE_PROCESS).loss.backward()
    except Exception as error:
        if is_out_of_memory(error):
            raise
        warnings.warn(f"training goes on without compiling: {first_line(error)}", stacklevel=2)
        return False
    return True
