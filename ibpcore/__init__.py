"""ibpcore: certified training and certified radii by interval bound propagation."""

from ibpcore.checkpoint import load_model, save_model
from ibpcore.errors import UserError
from ibpcore.interval import Interval
from ibpcore.margins import certified_margins
from ibpcore.models import cnn7
from ibpcore.radius import RadiusStatus, certified_radii

__all__ = [
    "Interval",
    "RadiusStatus",
    "UserError",
    "certified_margins",
    "certified_radii",
    "cnn7",
    "load_model",
    "save_model",
]
