"""ibpcore: certified training and certified radii by interval bound propagation."""

from importlib.metadata import version

from ibpcore.bounds import certified_margins
from ibpcore.checkpoint import load_model, save_model
from ibpcore.convert import convert
from ibpcore.errors import UserError
from ibpcore.interval import Interval
from ibpcore.models import cnn7
from ibpcore.radius import RadiusStatus, certified_radii
from ibpcore.soundness import verified_radii

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
