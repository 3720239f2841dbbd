"""Settings of float32 arithmetic: certificates use no TF32, bfloat16 or autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch


def _settings() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, exact value) of every switch that makes float32 products less precise."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later: one switch per operation
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        # Including recurrent kernels: torch refuses to read switches that disagree.
        owners = [backends.cuda.matmul, cudnn.conv, cudnn.rnn]
        owners += [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision() -> Iterator[None]:
    """A context with IEEE 754 matrix products and convolutions, and without autocast."""
    with ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_switched(_settings()))
        yield


def plain_convolutions() -> AbstractContextManager[None]:
    """A context without convolutions by Winograd or FFT, which cuDNN may choose."""
    return _switched([(torch.backends.cudnn, "enabled", False)])


def deterministic_convolutions() -> AbstractContextManager[None]:
    """Inside, cuDNN uses deterministic algorithms only; restores the former setting."""
    return _switched([(torch.backends.cudnn, "deterministic", True)])


def tf32_allowed(allowed: bool) -> AbstractContextManager[None]:
    """A context in which products on CUDA may, or may not, round their factors to TF32."""
    mkldnn, loose = torch.backends.mkldnn, {"ieee": "tf32", False: True}
    on_cpu = [getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn")]
    settings = [
        (owner, name, loose[exact] if allowed else exact)
        for owner, name, exact in _settings()
        if owner not in on_cpu
    ]
    return _switched(settings)


@contextmanager
def _switched(settings: list[tuple[Any, str, Any]]) -> Iterator[None]:
    before = [getattr(owner, name) for owner, name, _ in settings]
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        yield
    finally:
        for (owner, name, _), value in zip(settings, before, strict=True):
            setattr(owner, name, value)
