"""ibpcore: certified training and certified radii by interval bound propagation.

`import ibpcore` takes no time: the module of a name, and torch with it, is imported when the name
is used. A new name is entered in `__all__`, in the imports and in `_HOMES`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "Interval",
    "RadiusStatus",
    "UserError",
    "certified_margins",
    "certified_radii",
    "cnn7",
    "convert",
    "from_onnx",
    "load_model",
    "save_model",
    "verified_radii",
]

if TYPE_CHECKING:  # what type checkers, editors and the documentation read
    from ibpcore.bounds.interval import Interval
    from ibpcore.certification.margins import certified_margins
    from ibpcore.certification.radii import RadiusStatus, certified_radii
    from ibpcore.certification.soundness.verification import verified_radii
    from ibpcore.errors import UserError
    from ibpcore.interop.conversion import convert
    from ibpcore.interop.reading.onnx import from_onnx
    from ibpcore.nn.checkpoint import load_model, save_model
    from ibpcore.nn.cnn7 import cnn7

    __version__: str

_HOMES = {
    "Interval": "ibpcore.bounds.interval",
    "RadiusStatus": "ibpcore.certification.radii",
    "UserError": "ibpcore.errors",
    "certified_margins": "ibpcore.certification.margins",
    "certified_radii": "ibpcore.certification.radii",
    "cnn7": "ibpcore.nn.cnn7",
    "convert": "ibpcore.interop.conversion",
    "from_onnx": "ibpcore.interop.reading.onnx",
    "load_model": "ibpcore.nn.checkpoint",
    "save_model": "ibpcore.nn.checkpoint",
    "verified_radii": "ibpcore.certification.soundness.verification",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        value = import_module("importlib.metadata").version("ibpcore")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'ibpcore' has no attribute {name!r}")
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
