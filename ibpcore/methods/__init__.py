"""Training methods by name. To add one: a file here, one line below, a preset."""

from ibpcore.methods.acert import acert
from ibpcore.methods.base import CleanBatch, Method, MethodLoss
from ibpcore.methods.fastibp import fastibp
from ibpcore.methods.standard import standard

METHODS: dict[str, Method] = {"standard": standard, "fastibp": fastibp, "acert": acert}

__all__ = ["METHODS", "CleanBatch", "Method", "MethodLoss"]
