"""Checkpoints of other programs, made models of this one."""

from ibpcore.importing.architectures import ARCHITECTURES
from ibpcore.importing.models import Description, import_model
from ibpcore.importing.normalizations import DATASETS, SOURCES

__all__ = ["ARCHITECTURES", "DATASETS", "SOURCES", "Description", "import_model"]
