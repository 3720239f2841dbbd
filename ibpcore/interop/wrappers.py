"""Modules that pass their arguments on to another one: `nn.DataParallel`, `torch.compile`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from ibpcore.errors import UserError


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all wrappers; `module` itself if it is none.

    Raises:
        UserError: a wrapper has forward hooks.
    """
    inner = _wrapped_by(module)
    while inner is not None:
        if module._forward_hooks or module._forward_pre_hooks:
            raise UserError(
                f"the wrapper {type(module).__name__} has forward hooks, which bounds would ignore"
            )
        module, inner = inner, _wrapped_by(inner)
    return module


def _wrapped_by(module: nn.Module) -> nn.Module | None:
    if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return module.module
    original = vars(module).get("_modules", {}).get("_orig_mod")  # of torch.compile
    return original if isinstance(original, nn.Module) else None


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, so that its calls do not run its `forward`."""
    return getattr(module, "_compiled_call_impl", None) is not None


def eagerly(module: nn.Module) -> AbstractContextManager[object]:
    """A context in which no part of `module` is compiled, which may take minutes."""
    parts = module.modules()
    if any(is_compiled(part) or unwrapped(part) is not part for part in parts):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()
