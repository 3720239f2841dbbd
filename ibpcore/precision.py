"""Settings of float32 arithmetic: certificates use no TF32, bfloat16 or autocast.

Autocast belongs to a thread, the other switches to the whole process. The first context that
needs one sets it, and the last one to leave restores it, in whatever threads and order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache, wraps
from threading import Lock
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")
AUTOCAST_DEVICES = ("cuda", "cpu")
_LOCK = Lock()


class _Switch:
    """A setting of the process, which contexts in several threads may request.

    Args:
        exchange: sets a value and returns the former one.
        exact: the value that applies while any context requests it.
    """

    def __init__(self, exchange: Callable[[Any], Any], exact: Any) -> None:
        self._exchange, self.exact = exchange, exact
        self._before: Any = None
        self._requested: list[Any] = []

    @contextmanager
    def held(self, value: Any) -> Iterator[None]:
        """Inside, the setting has this value, or the exact one if another context needs it."""
        with _LOCK:
            requested = [*self._requested, value]
            former = self._exchange(self._chosen(requested))
            self._before = self._before if self._requested else former
            self._requested = requested
        try:
            yield
        finally:
            with _LOCK:
                self._requested.remove(value)
                self._exchange(self._chosen(self._requested or [self._before]))

    def _chosen(self, requested: Sequence[Any]) -> Any:
        return self.exact if self.exact in requested else requested[-1]


def _attribute(owner: Any, name: str, exact: Any) -> _Switch:
    def exchange(value: Any) -> Any:
        former = getattr(owner, name)
        setattr(owner, name, value)
        return former

    return _Switch(exchange, exact)


@cache
def _products(device: str) -> list[_Switch]:
    """Every switch that makes float32 products on "cuda" or "cpu" less precise."""
    backends: Any = torch.backends
    cudnn, mkldnn, matmul = backends.cudnn, backends.mkldnn, backends.cuda.matmul
    per_operation = hasattr(cudnn, "conv")  # torch 2.9 and later
    if not per_operation:
        owners = [matmul, cudnn] if device == "cuda" else []
        return [_attribute(owner, "allow_tf32", False) for owner in owners]
    # Including recurrent kernels: torch refuses to read switches that disagree.
    on_cuda, on_cpu = [matmul, cudnn.conv, cudnn.rnn], [mkldnn.matmul, mkldnn.conv, mkldnn.rnn]
    owners = on_cuda if device == "cuda" else on_cpu
    return [_attribute(owner, "fp32_precision", "ieee") for owner in owners]


_CUDNN = _attribute(torch.backends.cudnn, "enabled", False)
_DETERMINISTIC = _attribute(torch.backends.cudnn, "deterministic", True)
_NNPACK = _Switch(lambda enabled: torch.backends.nnpack.set_flags(enabled)[0], False)


@contextmanager
def full_precision() -> Iterator[None]:
    """A context with IEEE 754 matrix products and convolutions, and without autocast."""
    with ExitStack() as stack:
        for device in AUTOCAST_DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
            _hold(stack, _products(device))
        yield


def autocast_devices() -> list[str]:
    """The types of devices on which autocast is active."""
    return [device for device in AUTOCAST_DEVICES if torch.is_autocast_enabled(device)]


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """`function`, a bound pass, computed in the types of its arguments."""

    @wraps(function)
    def computed(*args: P.args, **kwargs: P.kwargs) -> T:
        active = autocast_devices()
        if not active:
            return function(*args, **kwargs)
        with ExitStack() as stack:
            for device in active:
                stack.enter_context(torch.autocast(device, enabled=False))
            return function(*args, **kwargs)

    return computed


@contextmanager
def plain_convolutions() -> Iterator[None]:
    """A context without convolutions by Winograd or FFT, which cuDNN and NNPACK may choose."""
    with ExitStack() as stack:
        _hold(stack, [_CUDNN, _NNPACK])
        yield


def deterministic_convolutions() -> AbstractContextManager[None]:
    """Inside, cuDNN uses deterministic algorithms only; restores the former setting."""
    return _DETERMINISTIC.held(True)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """A context in which products on CUDA may, or may not, round their factors to TF32.

    While another thread certifies, they may not.
    """
    loose = {"ieee": "tf32", False: True}
    with ExitStack() as stack:
        for switch in _products("cuda"):
            stack.enter_context(switch.held(loose[switch.exact] if allowed else switch.exact))
        yield


def _hold(stack: ExitStack, switches: Sequence[_Switch]) -> None:
    """Requests the exact value of each switch until the stack is closed."""
    for switch in switches:
        stack.enter_context(switch.held(switch.exact))
