"""The memory of a training step, from its sizes, and how many parts of a batch fit into it."""

from __future__ import annotations

import copy
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ibpcore.cgroups import ROOT, limiting_groups
from ibpcore.data.batches import Batch
from ibpcore.distributed import SINGLE_PROCESS
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import activations
from ibpcore.training.config import TrainConfig
from ibpcore.training.loss import TrainingLoss
from ibpcore.training.presets import IBP_ALONE, NOT_MEANS
from ibpcore.training.slopes import NONE

USABLE = 0.8
"""Share of the available memory that a step may take by its estimate, which leaves out what
convolutions need while they run, gaps between tensors, and the search for radii."""
LARGE, COPIES = 512, 16
"""Multiples of the numbers that a clean pass computes, and of the weights, that no step keeps. A
step is not estimated where they fit: that takes longer than a step on the digits."""
WORTHWHILE = 0.9
"""Twice as many parts are not worth their time if they take more than this share of the memory."""
MEMINFO, AVAILABLE = "proc/meminfo", re.compile(r"MemAvailable:\s*(\d+) kB")
CACHED = re.compile(r"^(?:total_)?inactive_file (\d+)$", re.MULTILINE)


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of the tensors that operators allocate while it is entered.

    Attributes:
        alive: bytes allocated and not yet freed.
        peak: the largest value of `alive` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tensors_in((args, kwargs))}
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in given and key not in self._known:
                weakref.finalize(storage, self.freed, key, size)
                self.allocated(key, size)
        return result

    def allocated(self, key: int, size: int) -> None:
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

    def freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def step_memory(config: TrainConfig, network: Classifier) -> int:
    """Bytes of the tensors of a step, see `step_without_numbers`, in which all images are bounded.

    Weights, gradients and the state of the optimiser are included, the data set is not.

    Raises:
        RuntimeError: what is executed depends on numbers, as in bounds by CROWN.
    """
    with TensorMemory() as found:
        step_without_numbers(config, network)
    return found.peak + optimizer_memory(config, network)


def optimizer_memory(config: TrainConfig, network: Classifier) -> int:
    """Bytes of what is kept from step to step: AdamW's two means, and averaged weights."""
    return (2 + (config.average_last > 0)) * _weights(network)


def step_without_numbers(config: TrainConfig, network: Classifier) -> None:
    """Loss and gradient of a batch in the warm-up, on torch's device `meta`.

    There only sizes count, so it takes no memory, and a time that does not depend on them.

    Raises:
        RuntimeError: what is executed depends on numbers, as in bounds by CROWN.
    """
    # Radii of one's own depend on numbers. At the end of training they bound every image, too.
    method = "fastibp" if config.method in IBP_ALONE else config.method
    config = replace(config, method=method, adaptive=False, random_radii=False, compile="off")
    model = copy.deepcopy(network).to("meta").train()
    count = torch.empty(config.batch_size, dtype=torch.int64, device="meta")
    images = torch.empty(config.batch_size, *network.in_shape, device="meta")
    loss, batch = TrainingLoss(model), Batch(images, count, count)
    loss(batch, NONE, 0.5, config, SINGLE_PROCESS).loss.backward()


def _weights(network: Classifier) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def suitable_parts(config: TrainConfig, network: Classifier, available: float) -> int:
    """The least power of 2 of parts (`accumulate`) by which a step fits the available bytes.

    If none does, that from which on more parts save little: the clean pass is not split. It is 1
    for a loss that is no mean over samples, and where the memory of a step is not known.
    """
    usable, numbers = USABLE * available, config.batch_size * activations(network)
    if LARGE * 4 * numbers + COPIES * _weights(network) <= usable:
        return 1
    most = 1 if config.method in NOT_MEANS else config.batch_size
    parts = 1
    try:
        needed = step_memory(replace(config, accumulate=1), network)
        while needed > usable and 2 * parts <= most:
            less = step_memory(replace(config, accumulate=2 * parts), network)
            if less > WORTHWHILE * needed:
                break
            parts, needed = 2 * parts, less
    except RuntimeError:
        return 1
    return parts


def available_memory(device: torch.device, root: Path = ROOT) -> float:
    """Bytes that this process may still allocate on a device; infinite if the system says nothing.

    On the CPU it is what is free or easily made free, in the machine and in the cgroups of the
    process. `root` holds `proc` and `sys`.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([*_free(root), *_within_groups(root)], default=float("inf"))


def _free(root: Path) -> Iterator[float]:
    try:
        found = AVAILABLE.search((root / MEMINFO).read_text())
    except OSError:
        return
    if found is not None:
        yield 1024 * int(found[1])


def _within_groups(root: Path) -> Iterator[float]:
    """What each cgroup of this process leaves; files in the cache make way for it."""
    for group in limiting_groups("memory", root):
        new = (group / "memory.max").exists()
        most, used = ("max", "current") if new else ("limit_in_bytes", "usage_in_bytes")
        try:
            limit = (group / f"memory.{most}").read_text().strip()
            if limit != "max":
                taken = int((group / f"memory.{used}").read_text())
                cached = CACHED.findall((group / "memory.stat").read_text())
                yield int(limit) - taken + max(map(int, cached), default=0)
        except (OSError, ValueError):
            continue
