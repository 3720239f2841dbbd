"""Training methods by name. To add one, write a module here and add a line below and a preset."""

from ibpcore.training.methods.base import CleanBatch, Method, MethodLoss
from ibpcore.training.methods.cc_ibp import cc_ibp_loss
from ibpcore.training.methods.crown_ibp import crown_ibp_loss
from ibpcore.training.methods.exp_ibp import exp_ibp_loss
from ibpcore.training.methods.ibp import ibp_loss
from ibpcore.training.methods.mtl_ibp import mtl_ibp_loss
from ibpcore.training.methods.sabr import sabr_loss
from ibpcore.training.methods.standard import standard_loss
from ibpcore.training.methods.taps import staps_loss, taps_loss

METHODS: dict[str, Method] = {
    "standard": standard_loss,
    "ibp": ibp_loss,
    "fastibp": ibp_loss,
    "acert": ibp_loss,
    "random-ibp": ibp_loss,
    "crown-ibp": crown_ibp_loss,
    "sabr": sabr_loss,
    "mtl-ibp": mtl_ibp_loss,
    "cc-ibp": cc_ibp_loss,
    "exp-ibp": exp_ibp_loss,
    "taps": taps_loss,
    "staps": staps_loss,
}

__all__ = ["METHODS", "CleanBatch", "Method", "MethodLoss"]
