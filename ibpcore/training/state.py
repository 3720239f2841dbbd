"""The state of a run between two epochs: how it starts, is saved and is restored."""

from __future__ import annotations

import contextlib
import io
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from ibpcore.bounds.network import split
from ibpcore.data.batches import batches_per_epoch
from ibpcore.data.images import Dataset
from ibpcore.distributed import SINGLE_PROCESS, Ranks
from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.io.files import write_atomic
from ibpcore.io.torch_files import read_torch_file
from ibpcore.nn.constants import IntervalNormalize
from ibpcore.nn.folding import fold
from ibpcore.nn.networks import Classifier, modes_kept
from ibpcore.training.config import TrainConfig
from ibpcore.training.flat import flattened, joined_state
from ibpcore.training.loss import TrainingLoss
from ibpcore.training.model import fresh_network
from ibpcore.training.presets import SPLIT
from ibpcore.training.schedules import LEARNING_RATES
from ibpcore.training.selection import VALIDATION, best_epoch
from ibpcore.training.slopes import ExpectedSlopes, expected_slopes, first_trend
from ibpcore.wording import counted

BETA1 = 0.9
"""Decay of AdamW's mean gradient; OneCycle changes it over the run."""
Weights = dict[str, Tensor]
"""The parameters and buffers of a model, by name."""


@dataclass
class TrainState:
    """The state of a run between two epochs.

    Attributes:
        slopes: (N,) of each training image's margin, relative to their scale, see
            `ibpcore.training.slopes`.
        trend: (2,) the logarithm of that scale, and the slopes' deviation.
        average: the mean of the weights over the last steps; None if the run has none.
        epoch: number of epochs completed.
        history: the metrics of each of them.
        best: the weights to deliver after `ibpcore.training.selection.best_epoch`; empty if
            there are none.
        ranks: the processes that train together.
        loss: a `TrainingLoss` of the model, whose gradients are averaged over the ranks.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    slopes: Tensor
    average: AveragedModel | None = None
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: Weights = field(default_factory=dict)
    ranks: Ranks = SINGLE_PROCESS
    trend: Tensor = field(init=False)
    loss: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.trend = first_trend(self.slopes)
        self.loss = TrainingLoss(self.model)
        if self.ranks.size > 1:
            # For weights with one input channel, strides that differ only formally.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            self.loss = DistributedDataParallel(self.loss)

    @property
    def delivered(self) -> Classifier:
        """The model that the run delivers: the mean over steps, once there is one."""
        if self.average is None or int(self.average.n_averaged) == 0:
            return self.model
        return cast(Classifier, self.average.module)

    def expected_slopes(self, samples: Tensor) -> ExpectedSlopes:
        """Those of the training images `samples`, (n,)."""
        return expected_slopes(self.slopes, self.trend, samples)

    @contextlib.contextmanager
    def weights_after(self, epoch: int) -> Iterator[None]:
        """Gives `delivered` the weights after `epoch`, the last or the best one, for a while."""
        if epoch == self.epoch:
            yield
            return
        with weights_kept(self.delivered):
            self.delivered.load_state_dict(self.best)
            yield

    def to_dict(self, config: TrainConfig, data: str) -> dict[str, Any]:
        """The values that `load` restores; `data` is the fingerprint of the data set."""
        return {
            "config": config.to_dict(),
            "data": data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "slopes": self.slopes,
            "trend": self.trend,
            "average": None if self.average is None else self.average.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
        }

    def load(self, saved: dict[str, Any], config: TrainConfig, data: str) -> None:
        """Restores the values of `to_dict`.

        They may be of a run of another number of epochs: the learning rate then goes through its
        schedule anew, over the epochs that are left.

        Raises:
            UserError: they are damaged, or belong to another configuration or data set.
        """
        try:
            before = TrainConfig.from_dict(saved["config"]).to_dict()
            epochs = before.pop("epochs")
            before.pop("extended_at")
            changed = [k for k, v in config.to_dict().items() if before.get(k, v) != v]
            if saved["data"] != data:
                changed.append("the images of the data set")
            elif not self._normalises_as(saved["model"]):  # the fingerprint leaves it out
                changed.append("mean and std of the data set")
            if changed:
                raise UserError(f"{', '.join(changed)} changed since the run began")
            self.best = {}
            if saved.get("best"):  # older files have none
                self._load_weights(saved["best"], self.model)
                self.best = copied_weights(self.model)
            self._load_weights(saved["model"], self.model)
            self._load_optimizer(saved["optimizer"])
            if saved["slopes"].shape != self.slopes.shape:
                raise ValueError("slopes of another number of images")
            self.slopes.copy_(saved["slopes"])
            if "trend" in saved:  # older files have none
                self.trend.copy_(saved["trend"])
            self.epoch, self.history = whole_history(saved["history"]), saved["history"]
            if self.epoch != saved["epoch"] or self.epoch > config.epochs:
                raise ValueError(
                    f"epoch {saved['epoch']} of {config.epochs} has a history of {self.epoch}"
                )
            if bool(self.best) != (best_epoch(self.history) is not None):
                raise ValueError("the best weights and their measures do not belong together")
            left = config.epochs - self.epoch
            if epochs == config.epochs or left == 0:
                self.scheduler.load_state_dict(saved["scheduler"])
                if self.average is not None:
                    self._load_weights(saved["average"], self.average)
            else:
                steps_per_epoch = batches_per_epoch(len(self.slopes), config.batch_size)
                self.scheduler = learning_rates(self.optimizer, config, left, steps_per_epoch)
        except REFUSED as error:
            raise UserError(
                f"the saved state does not fit its configuration: {first_line(error)}"
            ) from None

    def _normalises_as(self, weights: Weights) -> bool:
        """Whether the model's normalisations are those of `weights`, of the same network."""
        return all(
            torch.equal(value.cpu(), weights[f"{name}.{key}"].cpu())
            for name, layer in self.model.named_modules()
            if isinstance(layer, IntervalNormalize)
            for key, value in layer.state_dict().items()
        )

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Gives the optimiser this state; a malformed one raises an error of any type."""
        here = [p for group in self.optimizer.param_groups for p in group["params"]]
        shapes = [entry["exp_avg"].shape for entry in state["state"].values()]
        if shapes and shapes != [p.shape for p in here]:
            state = joined_state(state, self.model)
        self.optimizer.load_state_dict(state)

    def _load_weights(self, weights: Weights, model: nn.Module) -> None:
        """Gives the model these weights; malformed ones raise an error of any type."""
        model.load_state_dict(weights)
        if not all(bool(x.isfinite().all()) for x in model.state_dict().values()):
            raise ValueError("a weight is not finite")


def copied_weights(model: nn.Module) -> Weights:
    """A copy of the parameters and buffers, by name."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Restores all weights at the end: a function may return the same module at every call."""
    before = copied_weights(model)
    try:
        yield
    finally:
        model.load_state_dict(before)
        model.zero_grad(set_to_none=False)


def whole_history(rows: Any) -> int:
    """Number of epochs in the rows of metrics; malformed rows raise an error of any type."""
    if not isinstance(rows, list):
        raise TypeError("its history is not a list")
    json.dumps(rows)  # checks that it can be written
    if any(row["epoch"] != number for number, row in enumerate(rows, 1)):
        raise ValueError("its history lacks epochs")
    nested = ("inspection", VALIDATION)
    numbers = [x for row in rows for name, x in row.items() if name not in nested]
    if any(type(x) not in (int, float) or not math.isfinite(x) for x in numbers):
        raise ValueError("its history holds what is no number")
    if any(row["seconds"] < 0 for row in rows):
        raise ValueError("its history holds negative seconds")
    measures = [row[VALIDATION] for row in rows if VALIDATION in row]
    if not all(0 <= one[name] <= 1 for one in measures for name in ("accuracy", "acr", "art")):
        raise ValueError("its history holds a measure that is no fraction")
    return len(rows)


def start_state(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device | str,
    ranks: Ranks = SINGLE_PROCESS,
    start: Classifier | None = None,
) -> TrainState:
    """The state before the first step, a function of the configuration alone.

    `start` is the model whose digest is `config.start`.

    Raises:
        UserError: the data set is too small for one batch, or not split as configured; or the
            network has too few layers for the method.
    """
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    if held_out != config.validation:
        raise UserError(
            f"{counted(held_out, 'image')} held out, but validation is {config.validation}"
        )
    steps_per_epoch = batches_per_epoch(len(dataset.train), config.batch_size)
    if steps_per_epoch == 0:
        raise UserError(
            f"{counted(len(dataset.train), 'training image')} cannot be trained on: two are needed"
        )
    model = fresh_network(config, dataset, start).to(device)
    if config.method in SPLIT:
        with modes_kept(model):
            split(fold(model.eval()), config.classifier_size)  # raises if it is too large
    # Copied before the parameters of the model become views of one tensor.
    average = AveragedModel(model) if config.average_last > 0 else None
    optimizer = torch.optim.AdamW(
        flattened(model),
        lr=config.learning_rate,
        betas=(BETA1, config.beta2),
        weight_decay=config.weight_decay,
        fused=True,
    )
    scheduler = learning_rates(optimizer, config, config.epochs, steps_per_epoch)
    slopes = torch.full((len(dataset.train),), torch.nan, device=device)
    return TrainState(model, optimizer, scheduler, slopes, average, ranks=ranks)


def learning_rates(
    optimizer: torch.optim.Optimizer, config: TrainConfig, epochs: int, steps_per_epoch: int
) -> LRScheduler:
    """The schedule of the learning rate over so many epochs, at its start."""
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate
    return LEARNING_RATES[config.learning_rate_schedule](
        optimizer,
        config.learning_rate,
        config.learning_rate_drops,
        epochs,
        steps_per_epoch,
    )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes the state of a run, `TrainState.to_dict`."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """Reads a file that `save_state` wrote.

    Raises:
        UserError: the file is missing or damaged.
        OSError: it exists but cannot be read.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"there is nothing to resume: {path} is missing") from None
    state = None
    with contextlib.suppress(UserError):
        state = read_torch_file(content, other=_refused)
    if not isinstance(state, dict):
        raise UserError(f"{path} is damaged: it does not hold the state of a run")
    return state


def _refused(kind: str) -> None:
    raise ValueError(f"the state of a run holds no {kind}")
