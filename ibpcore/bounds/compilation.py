"""`torch.compile` for whole passes through a network."""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ibpcore.bounds.interval import Interval, outward
from ibpcore.errors import UserError


@cache
def compiled_pass(function: Callable[..., Tensor], cuda_graphs: bool) -> Callable[..., Tensor]:
    """`function`, a pass through a whole network, compiled for batches of two or more samples.

    Args:
        cuda_graphs: run it as CUDA graphs, one per batch size; only without gradient.
    """
    # It computes with numbers of the host, which would split the pass into several graphs.
    torch.compiler.assume_constant_result(outward)
    compiled = torch.compile(function, mode="reduce-overhead" if cuda_graphs else None)

    def run(*args: Any) -> Tensor:
        if any(isinstance(x, Tensor) and len(x) == 1 for x in args):
            return function(*args)  # sizes of 1 would be compiled apart, as constants
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        for batch in args:
            _mark_sizes(batch)
        with warnings.catch_warnings():
            # The compiler accesses the gradients of all inputs, leaf tensors or not.
            warnings.filterwarnings("ignore", message="The .grad attribute")
            result = compiled(*args)
        # The next run of the graph overwrites its result.
        return result.clone() if cuda_graphs else result

    return run


def _mark_sizes(batch: Any) -> None:
    """Has the numbers of samples and radii compiled as variables from the first call on.

    Otherwise there would be code for the first batch size and for all others, whose last digits
    may differ; and which of them a batch got would depend on those before, also in a resumed run.
    """
    if isinstance(batch, Interval):
        _mark_sizes(batch.mid)
        _mark_sizes(batch.rad)
    elif isinstance(batch, Tensor):
        # (B, C, H, W) images, (B,) labels and radii, (K, B) radii.
        for dim in range(batch.dim() if batch.dim() <= 2 else 1):
            torch._dynamo.maybe_mark_dynamic(batch, dim)


def check_compiler(device: torch.device) -> None:
    """Raises UserError unless passes can be compiled for `device`."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("compiling for CUDA needs Triton, which is not installed")
        return
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in compilers):
        raise UserError("compiling needs a C++ compiler, and none was found: install g++")
