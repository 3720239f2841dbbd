"""A saved model, and the data set and settings that a command uses it with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

from ibpcore import UserError, load_model
from ibpcore.bounds.options import BoundOptions
from ibpcore.certification.certify import CertificationOptions
from ibpcore.certification.formatting import radius_text
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import current_device
from ibpcore.errors import printable
from ibpcore.experiments.data_folder import data_dir_for
from ibpcore.experiments.matching import check_match
from ibpcore.experiments.run_folder import config_from
from ibpcore.nn.checkpoint import model_file, read_facts
from ibpcore.nn.networks import Classifier
from ibpcore.roots import RootOptions
from ibpcore.training.config import TrainConfig
from ibpcore.training.presets import PRESETS


@dataclass(frozen=True)
class SavedModelOptions:
    """What a saved model is used with: the values of the options that are named like the fields.

    None stands for the setting that the model was trained with, or for what is known of the data
    set that it was imported with.
    """

    dataset: str | None = None
    data_dir: Path | None = None
    download: bool = False
    image_size: int | None = None
    limit_test: int | None = None
    epsilon_max: float | None = None
    elide: bool | None = None
    clip: bool | None = None
    device: str = "auto"
    threads: int | None = None


@dataclass(frozen=True)
class CertificateOptions:
    """How radii are bounded, and what is proved of them."""

    bound: str
    claim: str
    slope_steps: int
    inner_slopes: bool


class Ball(NamedTuple):
    """The perturbations that certificates cover, and how margins are taken over them.

    `epsilon_max` is the largest radius, in pixel units of [0, 1].
    """

    epsilon_max: float
    elide: bool
    clip: bool

    def bounds(self) -> BoundOptions:
        """How these balls are bounded."""
        return BoundOptions(elide=self.elide, clip=(0.0, 1.0) if self.clip else None)

    def certification(self, proof: CertificateOptions, roots: RootOptions) -> CertificationOptions:
        """How images are certified with these perturbations."""
        bounds = replace(
            self.bounds(),
            bound=proof.bound,
            slope_steps=proof.slope_steps,
            inner_slopes=proof.inner_slopes,
        )
        return CertificationOptions(self.epsilon_max, proof.claim, bounds, roots)


class ModelFile(NamedTuple):
    """A model as it was saved: in evaluation mode, on the CPU, with its metadata.

    `config` says how it was trained; it is None if that is unknown.
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

    @property
    def class_names(self) -> list[str]:
        """The names that the model was saved with; numbers if it has none that fit."""
        names, count = self.facts.get("classes"), self.network.classes
        if isinstance(names, list) and [type(name) for name in names] == [str] * count:
            return [printable(name) for name in names]
        return [str(label) for label in range(count)]

    @property
    def dataset(self) -> str | None:
        """The name of the data set that the model was trained on, or imported with."""
        if self.config is not None:
            return self.config.dataset
        imported = self.facts.get("imported")
        named = imported.get("dataset") if isinstance(imported, dict) else None
        return named if isinstance(named, str) and named in PRESETS else None

    def ball(self, opening: SavedModelOptions) -> Ball:
        """Each setting from the options, else as in training, else the preset or the default.

        Raises UserError if none gives epsilon_max.
        """
        usual = self.config or Ball(self._preset_radius(opening), elide=True, clip=True)
        return Ball(
            usual.epsilon_max if opening.epsilon_max is None else opening.epsilon_max,
            usual.elide if opening.elide is None else opening.elide,
            usual.clip if opening.clip is None else opening.clip,
        )

    def remarks(self, opening: SavedModelOptions) -> list[str]:
        """What was assumed because neither the model nor the options say it: lines to print."""
        if self.config is not None:
            return self._of_unfinished_run(self.config)
        if opening.epsilon_max is not None:
            return []
        radius, name = radius_text(self._preset_radius(opening)), opening.dataset or self.dataset
        return [f"epsilon_max {radius} is the preset of {name}; --epsilon-max gives another"]

    def _of_unfinished_run(self, config: TrainConfig) -> list[str]:
        """That training goes on after the epoch of these weights, if nothing else chose them."""
        epoch, run = self.facts.get("epochs_trained"), self.path.parent
        chosen = config.select_weights != "last" or config.patience is not None
        if chosen or not isinstance(epoch, int) or epoch >= config.epochs:
            return []
        return [
            f"the weights are those after epoch {epoch} of {config.epochs}; the run goes on with:"
            f" ibp train --resume {quote(str(run))}"
        ]

    def _preset_radius(self, opening: SavedModelOptions) -> float:
        """epsilon_max of the options, else of the preset of the data set.

        Raises UserError if there is neither.
        """
        if opening.epsilon_max is not None:
            return opening.epsilon_max
        dataset = opening.dataset or self.dataset
        if dataset is None:
            raise UserError(f"{self.path} does not say how it was trained: give --epsilon-max")
        return float(PRESETS[dataset]["epsilon_max"])


def read_model_file(model: Path) -> ModelFile:
    """The model in a file or a run folder; raises UserError if it is missing or damaged."""
    path = model_file(model)
    network, facts = load_model(path), read_facts(path)
    config = config_from(facts["training"], path) if "training" in facts else None
    return ModelFile(path, network, facts, config)


class Saved(NamedTuple):
    """A saved model in evaluation mode, on its device, and the data set to use it on.

    `path` is the model's file, `trained_on` the title of its own data set, `data_dir` the folder
    that the data set was read from.
    """

    path: Path
    model: Classifier
    method: str
    trained_on: str
    data: Dataset
    data_dir: Path
    ball: Ball


def open_saved(model: Path, opening: SavedModelOptions, *resumed: Path) -> Saved:
    """The model in a file or a run folder, with its data set.

    The data set is looked for where the options say, else where `resumed` folders or, for the
    data set that the model was trained on, its own folder remember it.

    Raises:
        UserError: the file or the data set is missing or damaged, they do not fit each
            other, or neither the file nor the options give data set and epsilon_max.
    """
    file = read_model_file(model)
    config, dataset = file.config, opening.dataset or file.dataset
    limit_test, image_size = opening.limit_test, opening.image_size
    if dataset is None:
        raise UserError(
            f"{file.path} does not say how it was trained: give --dataset and --epsilon-max"
        )
    if config is not None and dataset == config.dataset:
        limit_test = limit_test or config.limit_test
        image_size = image_size or config.image_size
        resumed = (*resumed, file.path.parent)
    device = current_device(opening.device)
    data_dir = data_dir_for(opening.data_dir, *resumed)
    request = Request(data_dir, opening.download, 1, limit_test, image_size)
    data = load_dataset(dataset, request)
    check_match(str(file.path), file.network, file.facts, data)
    data = replace(data, remarks=(*data.remarks, *file.remarks(opening)))
    network = file.network.to(device)
    ball = file.ball(opening)
    return Saved(file.path, network, file.method, file.trained_on, data, data_dir, ball)
