"""ibpcore: certified training and certified radii by interval bound propagation."""

from importlib.metadata import version

from ibpcore.bounds.interval import Interval
from ibpcore.certification.margins import certified_margins
from ibpcore.certification.radii import RadiusStatus, certified_radii
from ibpcore.certification.soundness.verification import verified_radii
from ibpcore.errors import UserError
from ibpcore.interop.conversion import convert
from ibpcore.nn.architecture import cnn7
from ibpcore.nn.checkpoint import load_model, save_model

__version__ = version("ibpcore")

__all__ = [
    "Interval",
    "RadiusStatus",
    "UserError",
    "certified_margins",
    "certified_radii",
    "cnn7",
    "convert",
    "load_model",
    "save_model",
    "verified_radii",
]
