"""`torch.compile` for kernels and for whole passes."""

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

from ibpcore.errors import UserError


@cache
def compiled_kernel(kernel: Callable[..., Any]) -> Callable[..., Any]:
    made = torch.compile(kernel, dynamic=True)
    # Detached, since the compiler looks at the gradients of what it is given.
    return lambda *tensors: made(*(tensor.detach() for tensor in tensors))


@cache
def compiled_pass(function: Callable[..., Tensor], cuda_graphs: bool) -> Callable[..., Tensor]:
    """`function`, which makes a tensor by way of a whole network, compiled.

    First for the batch size at hand; once another one is met, for any.

    Args:
        cuda_graphs: run it as CUDA graphs, one a batch size. It must have no gradient then.
    """
    made = torch.compile(function, mode="reduce-overhead" if cuda_graphs else None)

    def run(*args: Any) -> Tensor:
        if cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        with warnings.catch_warnings():
            # The compiler looks at the gradients of what it is given, weights or not.
            warnings.filterwarnings("ignore", message="The .grad attribute")
            result = made(*args)
        # The next run of a graph overwrites what this one gives.
        return result.clone() if cuda_graphs else result

    return run


def check_compiler(device: torch.device) -> None:
    """Raises UserError unless `compiled` kernels can be made for `device`."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise UserError("compiling for CUDA needs Triton, which is not installed")
        return
    compilers = (os.environ.get("CXX", ""), "g++", "clang++", "cl")
    if not any(name and shutil.which(name) for name in compilers):
        raise UserError("compiling needs a C++ compiler, and none was found: install g++")
