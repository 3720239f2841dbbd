"""A saved model with the data set and the ball that it was trained for, or that are asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ibpcore import UserError, load_model
from ibpcore.bounds.options import BoundOptions
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.experiments.run_folder import config_from
from ibpcore.nn.checkpoint import read_facts
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig
from ibpcore.training.loop import MODEL
from ibpcore_cli.options import chosen_device


class Opened(NamedTuple):
    """A model as it was saved.

    Attributes:
        path: of the file.
        network: in evaluation mode, on the CPU.
        facts: what it was saved with.
        config: how it was trained, None where that is not known.
    """

    path: Path
    network: Classifier
    facts: dict[str, Any]
    config: TrainConfig | None

    @property
    def method(self) -> str:
        return self.config.method if self.config else "unknown method"

    @property
    def trained_on(self) -> str:
        title = self.facts.get("dataset_title")
        return title if isinstance(title, str) else "unknown data"


def open_model(model: Path) -> Opened:
    """The model in a file or a run folder.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = model / MODEL if model.is_dir() else model
    network, facts = load_model(path), read_facts(path)
    config = config_from(facts["training"], path) if "training" in facts else None
    return Opened(path, network, facts, config)


class Saved(NamedTuple):
    """What a command does its work on.

    Attributes:
        path: of the model's file.
        model: in evaluation mode, on the device.
        method: that trained it, or that none is known.
        trained_on: the title of a data set, likewise.
        data: with as many test images as asked for.
        epsilon_max, elide, clip: as asked for, else as in training, else the defaults.
    """

    path: Path
    model: Classifier
    method: str
    trained_on: str
    data: Dataset
    epsilon_max: float
    elide: bool
    clip: bool

    def bounds(self, bound: str = "ibp") -> BoundOptions:
        """How balls are bounded by the bound of that name."""
        return BoundOptions(bound, self.elide, (0.0, 1.0) if self.clip else None)


def open_saved(
    model: Path,
    *,
    dataset: str | None,
    data_dir: Path,
    download: bool,
    image_size: int | None,
    limit_test: int | None,
    epsilon_max: float | None,
    device: str,
    elide: bool | None,
    clip: bool | None,
) -> Saved:
    """The model in a file or a run folder; what is None is as it was in training.

    Raises:
        UserError: the file or the data set is missing or damaged, both do not fit, or the
            file does not say how the model was trained, and the options do not either.
    """
    opened = open_model(model)
    path, network, facts, config = opened
    if config is None and (dataset is None or epsilon_max is None):
        raise UserError(f"{path} does not say how it was trained: give --dataset and --epsilon-max")
    if config is not None and dataset in (None, config.dataset):
        dataset = config.dataset
        limit_test = limit_test or config.limit_test
        image_size = image_size or config.image_size
    where = chosen_device(device)
    data = load_dataset(str(dataset), Request(data_dir, download, 1, limit_test, image_size))
    _check_fit(network, facts, data, path)
    return Saved(
        path,
        network.to(where),
        opened.method,
        opened.trained_on,
        data,
        **ball_of(config, epsilon_max, elide, clip),
    )


def ball_of(
    config: TrainConfig | None, epsilon_max: float | None, elide: bool | None, clip: bool | None
) -> dict[str, Any]:
    """`epsilon_max`, `elide`, `clip`: as asked for, else as in training, else the defaults."""
    asked = {"epsilon_max": epsilon_max, "elide": elide, "clip": clip}
    usual = {"elide": True, "clip": True}
    if config is not None:
        usual = {name: getattr(config, name) for name in asked}
    return usual | {name: value for name, value in asked.items() if value is not None}


def _check_fit(network: Classifier, facts: dict[str, Any], data: Dataset, path: Path) -> None:
    if network.in_shape != data.in_shape or network.classes != len(data.classes):
        raise UserError(
            f"{path} takes images {network.in_shape} of {network.classes} classes, but"
            f" {data.title} has {data.in_shape} of {len(data.classes)}"
        )
    classes = facts.get("classes", list(data.classes))
    if classes != list(data.classes):
        raise UserError(f"{path} was trained on other classes than those of {data.title}")
