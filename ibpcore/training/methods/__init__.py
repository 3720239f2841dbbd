"""Training methods by name. To add one: a file here, one line below, a preset."""

from ibpcore.training.methods.base import CleanBatch, Method, MethodLoss
from ibpcore.training.methods.cc_ibp import cc_ibp
from ibpcore.training.methods.crown_ibp import crown_ibp
from ibpcore.training.methods.exp_ibp import exp_ibp
from ibpcore.training.methods.ibp import ibp
from ibpcore.training.methods.mtl_ibp import mtl_ibp
from ibpcore.training.methods.sabr import sabr
from ibpcore.training.methods.standard import standard

METHODS: dict[str, Method] = {
    "standard": standard,
    "ibp": ibp,
    "fastibp": ibp,
    "acert": ibp,
    "crown-ibp": crown_ibp,
    "sabr": sabr,
    "mtl-ibp": mtl_ibp,
    "cc-ibp": cc_ibp,
    "exp-ibp": exp_ibp,
}

__all__ = ["METHODS", "CleanBatch", "Method", "MethodLoss"]
