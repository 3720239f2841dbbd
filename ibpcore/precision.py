"""Full float arithmetic for certificates: no TF32, no bfloat16 kernels, no autocast."""

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
    settings = _settings()
    before = [getattr(owner, name) for owner, name, _ in settings]
    with ExitStack() as stack:
        for device in ("cuda", "cpu"):
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for owner, name, exact in settings:
                setattr(owner, name, exact)
            yield
        finally:
            for (owner, name, _), value in zip(settings, before, strict=True):
                setattr(owner, name, value)
