"""Which float32 arithmetic is used: certificates know no TF32, bfloat16 or autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


def _settings() -> list[tuple[Any, str, Any]]:
    """(owner, attribute, exact value) of every switch that loosens float32 products."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):  # torch 2.9 and later: one switch an operation
        cudnn, mkldnn = backends.cudnn, backends.mkldnn
        # The recurrent kernels too: torch refuses to read switches that disagree.
        owners = [backends.cuda.matmul, cudnn.conv, cudnn.rnn]
        owners += [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
        return [(owner, "fp32_precision", "ieee") for owner in owners]
    return [(backends.cuda.matmul, "allow_tf32", False), (backends.cudnn, "allow_tf32", False)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, matrix products and convolutions are IEEE ones; then as before."""
    with ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(_switched(_settings()))
        yield


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """Inside, no convolution by Winograd or FFT, which cuDNN may choose; then as before."""
    with _switched([(torch.backends.cudnn, "enabled", False)]):
        yield


@contextmanager
def deterministic_convolutions() -> Iterator[None]:
    """Inside, cuDNN uses deterministic algorithms only; restores the former setting."""
    with _switched([(torch.backends.cudnn, "deterministic", True)]):
        yield


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Inside, products on CUDA may round their factors to TF32, or may not; then as before."""
    loose = {"ieee": "tf32", False: True}
    settings = [
        (owner, name, loose[exact] if allowed else exact)
        for owner, name, exact in _settings()
        if owner not in _cpu_owners()
    ]
    with _switched(settings):
        yield


def _cpu_owners() -> list[Any]:
    mkldnn: Any = torch.backends.mkldnn
    return [getattr(mkldnn, name, None) for name in ("matmul", "conv", "rnn")]


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
