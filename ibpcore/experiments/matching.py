"""Whether a data set has the images and the classes that a model was trained on."""

from __future__ import annotations

from typing import Any

from ibpcore.data.images import Dataset
from ibpcore.errors import UserError
from ibpcore.nn.networks import Classifier
from ibpcore.wording import counted


def check_match(name: str, network: Classifier, facts: dict[str, Any], data: Dataset) -> None:
    """Raises UserError if the data set has other images or classes than the model.

    A label is a position in the list of classes: with other classes it would name another one.

    Args:
        name: what the message calls the model.
        facts: what was saved with the model, see `ibpcore.nn.checkpoint.read_facts`.
        data: if it names no classes, its labels are taken for those of the model.
    """
    names = list(data.classes)
    count = len(names) if names else network.classes
    if (network.in_shape, network.classes) != (data.in_shape, count):
        raise UserError(
            f"{name} takes images {network.in_shape} of {counted(network.classes, 'class')}, but"
            f" {data.title} has {data.in_shape} of {count}"
        )
    if names and facts.get("classes", names) != names:
        raise UserError(f"{name} was trained on other classes than those of {data.title}")
