"""The cost of a training: steps, memory and time, estimated from a few steps."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from ibpcore.data.batches import Batch, batches_per_epoch
from ibpcore.data.images import Dataset
from ibpcore.nn.networks import Classifier
from ibpcore.precision import tf32_allowed
from ibpcore.threads import computing_with
from ibpcore.training.config import TrainConfig
from ibpcore.training.easy import all_correct
from ibpcore.training.loop import epoch_batches, train_step
from ibpcore.training.state import TrainState, start_state

TIMED, SECONDS = 4, 5.0
"""Limits of each phase: number of steps that are timed, and time after which none is started."""
STATUS = Path("/proc/self/status")


class Cost(NamedTuple):
    """The cost of a training.

    Attributes:
        parameters: number of trained parameters.
        steps_per_epoch, steps: numbers of optimiser steps.
        memory: peak memory in bytes: on CUDA that of the tensors on the device, on the CPU
            that of the whole process; None if the system does not report it.
        seconds: estimate for the whole training, without certification.
        timed: number of steps that the estimate is based on.
    """

    parameters: int
    steps_per_epoch: int
    steps: int
    memory: int | None
    seconds: float
    timed: int


def estimate_cost(
    config: TrainConfig, dataset: Dataset, device: torch.device, start: Classifier | None = None
) -> Cost:
    """Executes a few steps as if every image were classified correctly.

    Their cost is that of steps at the end of training: a misclassified image needs no
    bounds. They are not compiled. Nothing is written.

    Args:
        dataset: from `ibpcore.experiments.run.dataset_of`.
        start: the model whose digest is `config.start`.

    Raises:
        UserError: see `ibpcore.training.state.start_state`.
    """
    # More epochs, so that the learning-rate schedule does not end before the last timed step.
    plain = replace(config, compile="off", epochs=max(config.epochs, 3 * TIMED))
    state = start_state(plain, dataset, device, start=start)
    state.model.train()
    images = dataset.train.to(device)
    batch = next(epoch_batches(state, images, config))
    with tf32_allowed(config.tf32), computing_with(config.threads):
        rising, risen = (_timed(state, batch, share, plain) for share in (0.5, 1.0))
    steps_per_epoch = batches_per_epoch(len(images), config.batch_size)
    warmup = config.warmup[1]
    return Cost(
        sum(p.numel() for p in state.model.parameters()),
        steps_per_epoch,
        config.epochs * steps_per_epoch,
        _peak_memory(device),
        steps_per_epoch * (warmup * median(rising) + (config.epochs - warmup) * median(risen)),
        len(rising) + len(risen),
    )


def _timed(state: TrainState, batch: Batch, share: float, config: TrainConfig) -> list[float]:
    """Seconds of each of a few steps, after one that is not counted."""
    seconds = list[float]()
    for _ in range(1 + TIMED):
        easy = all_correct(state, batch)
        _wait_for(batch.images.device)
        begun = time.perf_counter()
        train_step(state, easy, share, config)
        _wait_for(batch.images.device)
        seconds.append(time.perf_counter() - begun)
        if len(seconds) > 1 and sum(seconds) > SECONDS:
            break
    return seconds[1:]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    found = re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text()) if STATUS.exists() else None
    return 1024 * int(found[1]) if found else None
