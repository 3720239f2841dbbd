"""ibpcore: certified training and certified radii by interval bound propagation."""

from importlib.metadata import version

from ibpcore.bounds.interval import Interval
from ibpcore.certification.margins import certified_margins
from ibpcore.certification.radii import RadiusStatus, certified_radii
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.errors import UserError
from ibpcore.interop.conversion import convert
from ibpcore.interop.reading.onnx import from_onnx
from ibpcore.nn.checkpoint import load_model, save_model
from ibpcore.nn.cnn7 import cnn7

__version__ = version("ibpcore")

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
