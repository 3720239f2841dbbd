"""`ibpcore.train` and `ibpcore.resume`: runs as `ibp train` makes them, from Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import SUMMARY, Certificates
from ibpcore.data.arrays import OWN
from ibpcore.data.images import Dataset
from ibpcore.distributed import chosen_device
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import data_dir_for, remember_data_dir
from ibpcore.experiments.evaluation import Evaluation, read_evaluation
from ibpcore.experiments.extension import extend, with_epochs
from ibpcore.experiments.given import Data, as_dataset, check_callback, plain, split_as, whole
from ibpcore.experiments.opening import opened_run
from ibpcore.experiments.run import dataset_of, train_and_certify
from ibpcore.experiments.run_folder import is_complete, metrics_of, saved_config, starting_model
from ibpcore.io.files import as_path
from ibpcore.io.locks import held
from ibpcore.nn.checkpoint import fingerprint, load_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig, check_used, make_config
from ibpcore.training.loggers import UNLOGGED, Monitor
from ibpcore.training.model import named_function
from ibpcore.training.run_files import saved_history

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
    start: str | Path | None = None,
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
            (N, C, H, W) or (N, H, W), bytes or floats in [0, 1] that are bytes divided by 255, and
            labels (N,), both tensors or arrays.
        method: a training method, such as "acert" or "fastibp".
        epochs: passes over the training images; None for the preset of the data set.
        test: images and labels to test with. Without them a fifth of your images is held out,
            always the same ones.
        classes: names of the classes of your images; numbers if left out.
        start: a model file or run folder whose network and weights to start from.
        out: run folder to make; None for runs/DATASET-METHOD, numbered where that exists. Images
            of your own are the data set "own".
        on_epoch: called after each epoch with its row of `metrics.jsonl`.
        device: "auto" for CUDA if there is any, "cpu", "cuda" or "cuda:1".
        data_dir: folder of the named data sets; None for IBP_DATA_DIR, or else `data`.
        download: fetch a named data set that is missing.
        settings: those of `ibp train` by name, such as `epsilon_max="8/255"`, `width=16` or
            `model=build`, a function as that of `--model`. What is left out is the preset.

    Raises:
        UserError: a setting is unknown or has a wrong value, the data do not fit, the folder
            exists and is not empty, or the loss is no longer finite.
        OSError: the folder cannot be written.
    """
    check_callback(on_epoch, "on_epoch")
    if "dataset" in settings:
        raise UserError("dataset is the first argument, which is called data")
    given = as_dataset(data, test, classes)
    name = given if isinstance(given, str) else given.name
    values = {key: plain(value) for key, value in settings.items()}
    if epochs is not None:
        values["epochs"] = plain(epochs)
    if callable(values.get("model")):
        values["model"] = named_function(values["model"])
    if isinstance(given, Dataset) and given.validation is not None:
        values.setdefault("validation", len(given.validation))
    network = None if start is None else load_model(start)
    if network is not None:
        values["start"] = fingerprint(network)
    config = make_config(name, method, **values)
    check_used(values, [method])
    images = data_dir_for(data_dir)
    dataset = (
        dataset_of(config, images, download) if isinstance(given, str) else split_as(config, given)
    )
    folder = None if out is None else as_path(out, "a run folder")
    trained_on = chosen_device(device)
    with opened_run(config, dataset, trained_on, network, out=folder) as (config, made):
        if isinstance(given, str):
            remember_data_dir(made, images, config.dataset)
        _complete(config, dataset, network, made, on_epoch, device, resume=False)
    return load_run(made, chosen_device(device))


def resume(
    run: str | Path,
    data: Data | None = None,
    *,
    epochs: int | None = None,
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
        epochs: train so many in all, more than the run was planned with or fewer, as
            `ibp train --resume` does with `--epochs`; None for its own number.
        test, classes, device, data_dir: see `train`.
        on_epoch: see `train`; called with the rows of earlier epochs first.

    Raises:
        UserError: there is no run, a file of it is damaged, or the data are others; see `train`.
        OSError: the folder cannot be written.
    """
    check_callback(on_epoch, "on_epoch")
    folder = as_path(run, "a run folder")
    saved_config(folder)  # refuses a folder without a run before it is held, and thereby made
    with held(folder):
        config = saved_config(folder)
        if epochs is not None:
            config = with_epochs(config, whole(epochs, "epochs"), saved_history(folder))
        # Images that are given are compared with those of the run.
        if data is not None or not is_complete(folder, config):
            if data is None and config.dataset == OWN:
                raise UserError(f"the run {folder} had images of your own: give them again as data")
            given = as_dataset(config.dataset if data is None else data, test, classes)
            if isinstance(given, str):
                dataset = dataset_of(config, data_dir_for(data_dir, folder))
            else:
                dataset = split_as(config, given)
            network = starting_model(folder, config)
            with opened_run(config, dataset, chosen_device(device), network, resume=folder):
                extend(folder, config)
                _complete(config, dataset, network, folder, on_epoch, device, resume=True)
    return load_run(folder, chosen_device(device))


def _complete(
    config: TrainConfig,
    dataset: Dataset,
    network: Classifier | None,
    folder: Path,
    on_epoch: OnEpoch | None,
    device: str,
    *,
    resume: bool,
) -> None:
    """Trains and certifies in an opened folder; an interruption names what goes on."""
    log = UNLOGGED if on_epoch is None else UNLOGGED._replace(row=on_epoch)
    try:
        train_and_certify(
            config,
            dataset,
            folder,
            device=chosen_device(device),
            resume=resume,
            monitor=Monitor(log=log),
            start=network,
        )
    except KeyboardInterrupt:
        message = f"stopped; go on with: ibpcore.resume({str(folder)!r})"
        raise KeyboardInterrupt(message) from None


def load_run(run: str | Path, device: Any = "cpu") -> Run:
    """Reads a complete run from its folder.

    Args:
        run: a folder that `train` or `ibp train` made.
        device: to load the model to.

    Raises:
        UserError: there is no run, it is not complete, a file is damaged, or the certificates are
            of other weights.
    """
    folder = as_path(run, "a run folder")
    config = saved_config(folder)
    if not is_complete(folder, config):
        advice = f"ibpcore.resume({str(folder)!r}) goes on"
        raise UserError(f"the run {folder} is not complete: {advice}")
    model = load_model(folder, device)
    evaluation = read_evaluation(folder)
    if evaluation.summary.get("weights") != fingerprint(model):
        raise UserError(f"{folder / SUMMARY} is not of the model beside it")
    return Run(folder, config, model, metrics_of(folder), evaluation)
