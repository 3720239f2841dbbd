"""`ibpcore.train` and `ibpcore.resume`: runs as `ibp train` makes them, from Python."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import Certificates
from ibpcore.data.arrays import OWN
from ibpcore.data.images import Dataset
from ibpcore.distributed import chosen_device
from ibpcore.errors import UserError
from ibpcore.experiments.evaluation import Evaluation, read_evaluation
from ibpcore.experiments.given import Data, as_dataset, data_folder, plain, split_as
from ibpcore.experiments.opening import opened_run
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_complete, saved_config
from ibpcore.io.files import as_path
from ibpcore.nn.checkpoint import load_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig, make_config, unused
from ibpcore.training.loggers import UNLOGGED, Monitor
from ibpcore.training.model import named_function
from ibpcore.training.run_files import METRICS

OnEpoch = Callable[[dict[str, Any]], None]
"""Called after each epoch with its row of `metrics.jsonl`."""


@dataclass(frozen=True, eq=False)
class Run:
    """A complete run, as `ibpcore.train`, `ibpcore.load_run` and `ibp train` leave it.

    Attributes:
        folder: the run folder, which holds all of the following.
        config: the settings.
        model: the trained network, in evaluation mode.
        history: the rows of `metrics.jsonl`, one an epoch: `epoch`, `loss`, `accuracy` (a
            fraction), `mean_radius` and `epsilon` (in pixel units), `learning_rate`, `seconds`; and
            `validation`, the measures of held-out images, where they were taken.
        evaluation: the certificates of the test images.
    """

    folder: Path
    config: TrainConfig
    model: Classifier
    history: list[dict[str, Any]]
    evaluation: Evaluation

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return self.evaluation.summary

    @property
    def certificates(self) -> Certificates:
        """The certificates of the test images, each entry (N,)."""
        return self.evaluation.certificates

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, epochs={len(self.history)}, {self.evaluation})"


def train(
    data: Data,
    method: str = "acert",
    *,
    epochs: int | None = None,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    out: str | Path | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
    download: bool = False,
    **settings: Any,
) -> Run:
    """Trains a classifier and certifies its test images, as `ibp train` does, and prints nothing.

    Sets torch's global seed. If it is interrupted, `ibpcore.resume` goes on.

    Args:
        data: a name, such as "mnist"; a `Dataset`; or `(images, labels)` of your own: images
            (N, C, H, W) or (N, H, W), bytes or floats in [0, 1] that are multiples of 1/255, and
            labels (N,), both tensors or arrays.
        method: a training method, such as "acert" or "fastibp".
        epochs: passes over the training images; None for the preset of the data set.
        test: images and labels to test with. Without them a fifth of your images is held out,
            always the same ones.
        classes: names of the classes of your images; numbers if left out.
        out: run folder to make; None for runs/DATASET-METHOD, numbered where that exists. Images
            of your own are the data set "own".
        on_epoch: called after each epoch with its row of `metrics.jsonl`.
        device: "auto" for CUDA if there is any, "cpu" or "cuda".
        data_dir: folder of the named data sets; None for IBP_DATA_DIR, or else `data`.
        download: fetch a named data set that is missing.
        settings: those of `ibp train` by name, such as `epsilon_max="8/255"`, `width=16` or
            `model=build`, a function as that of `--model`. What is left out is the preset.

    Raises:
        UserError: a setting is unknown or has a wrong value, the data do not fit, the folder
            exists and is not empty, or the loss is no longer finite.
        OSError: the folder cannot be written.
    """
    given = as_dataset(data, test, classes)
    name = given if isinstance(given, str) else given.name
    values = {key: plain(value) for key, value in settings.items()}
    if epochs is not None:
        values["epochs"] = plain(epochs)
    if callable(values.get("model")):
        values["model"] = named_function(values["model"])
    if isinstance(given, Dataset) and given.validation is not None:
        values.setdefault("validation", len(given.validation))
    config = make_config(name, method, **values)
    for setting, reason in unused(values, method):
        raise UserError(f"{setting} {reason}")
    if isinstance(given, str):
        dataset = dataset_of(config, data_folder(data_dir), download)
    else:
        dataset = split_as(config, given)
    folder = None if out is None else as_path(out, "a run folder")
    return _completed(config, dataset, on_epoch, device, out=folder)


def resume(
    run: str | Path,
    data: Data | None = None,
    *,
    test: tuple[Any, Any] | None = None,
    classes: Sequence[str] | None = None,
    on_epoch: OnEpoch | None = None,
    device: str = "auto",
    data_dir: str | Path | None = None,
) -> Run:
    """Goes on with a run that was interrupted, with its own settings; reads one that is complete.

    Args:
        run: the run folder.
        data: needed only where the run was given a data set in memory: the same one again.
        test, classes, device, data_dir: see `train`.
        on_epoch: see `train`; called with the rows of earlier epochs first.

    Raises:
        UserError: there is no run, a file of it is damaged, or the data are others; see `train`.
        OSError: the folder cannot be written.
    """
    folder = as_path(run, "a run folder")
    config = saved_config(folder)
    if data is None and config.dataset == OWN:
        raise UserError(f"the run {folder} had images of your own: give them again as data")
    given = as_dataset(config.dataset if data is None else data, test, classes)
    if isinstance(given, str):
        dataset = dataset_of(config, data_folder(data_dir))
    else:
        dataset = split_as(config, given)
    return _completed(config, dataset, on_epoch, device, resume=folder)


def _completed(
    config: TrainConfig,
    dataset: Dataset,
    on_epoch: OnEpoch | None,
    device: str,
    *,
    out: Path | None = None,
    resume: Path | None = None,
) -> Run:
    """The run, trained and certified in a new folder, or in that of `resume`."""
    where = chosen_device(device)
    log = UNLOGGED if on_epoch is None else UNLOGGED._replace(row=on_epoch)
    again, monitor = resume is not None, Monitor(log=log)
    with opened_run(config, dataset, out=out, resume=resume) as (config, folder):
        try:
            train_and_certify(config, dataset, folder, device=where, resume=again, monitor=monitor)
        except KeyboardInterrupt:
            message = f"stopped; go on with: ibpcore.resume({str(folder)!r})"
            raise KeyboardInterrupt(message) from None
    return load_run(folder, where)


def load_run(run: str | Path, device: Any = "cpu") -> Run:
    """Reads a complete run from its folder.

    Args:
        run: a folder that `train` or `ibp train` made.
        device: to load the model to.

    Raises:
        UserError: there is no run, it is not complete, or a file is damaged.
    """
    folder = as_path(run, "a run folder")
    config = saved_config(folder)
    if not is_complete(folder, config):
        advice = f"ibpcore.resume({str(folder)!r}) goes on"
        raise UserError(f"the run {folder} is not complete: {advice}")
    model = load_model(folder, device)
    try:
        history = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    except (OSError, ValueError):
        raise UserError(f"{folder / METRICS} is missing or damaged") from None
    return Run(folder, config, model, history, read_evaluation(folder))
