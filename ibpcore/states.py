"""A run between two epochs: how it begins, what is saved of it, and how it goes on."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ibpcore.building import DEFAULT_MODEL, own_network
from ibpcore.checkpoint import REFUSED
from ibpcore.config import TrainConfig
from ibpcore.data import Dataset, batches_per_epoch
from ibpcore.errors import UserError, first_line
from ibpcore.initialization import INITIALIZATIONS
from ibpcore.losses import StepLoss
from ibpcore.models import cnn7
from ibpcore.networks import Classifier
from ibpcore.ranks import ALONE, Ranks
from ibpcore.schedules import LEARNING_RATES

Forward = Callable[[Callable[[], StepLoss]], StepLoss]


def _called(function: Callable[[], StepLoss]) -> StepLoss:
    return function()


class _Called(nn.Module):
    """`_called` as a module with the parameters of a model, as DistributedDataParallel needs it.

    Without the buffers: they come from sums over all ranks, the same bits on each.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = nn.ParameterList(model.parameters())

    def forward(self, function: Callable[[], StepLoss]) -> StepLoss:
        return function()


def _forward(model: nn.Module, ranks: Ranks) -> Forward:
    if ranks.size == 1:
        return _called
    # Of weights of one input channel torch gives gradients whose strides differ on paper only.
    warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return DistributedDataParallel(_Called(model))


@dataclass
class TrainState:
    """A run between two epochs.

    Attributes:
        slopes: what was learnt of each training image's margin, see
            `ibpcore.methods.base.MethodLoss`.
        epoch: epochs finished.
        history: one row of metrics for each of them.
        ranks: the processes that train it together.
        forward: calls the function that makes the loss, so that its gradients become the
            mean over the ranks.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    slopes: Tensor
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    ranks: Ranks = ALONE
    forward: Forward = _called

    def to_dict(self, config: TrainConfig, data: str) -> dict[str, Any]:
        """What `load` needs; `data` is the fingerprint of the data set."""
        return {
            "config": config.to_dict(),
            "data": data,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "slopes": self.slopes,
            "epoch": self.epoch,
            "history": self.history,
        }

    def load(self, saved: dict[str, Any], config: TrainConfig, data: str) -> None:
        """Goes on from what `to_dict` gave.

        Raises:
            UserError: it is damaged, or belongs to another configuration or data set.
        """
        try:
            before = TrainConfig.from_dict(saved["config"]).to_dict()
            changed = [k for k, v in config.to_dict().items() if before[k] != v]
            if saved["data"] != data:
                changed.append("the images of the data set")
            if changed:
                raise UserError(f"{', '.join(changed)} changed since the run began")
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scheduler.load_state_dict(saved["scheduler"])
            if saved["slopes"].shape != self.slopes.shape:
                raise ValueError("slopes of another number of images")
            self.slopes.copy_(saved["slopes"])
            self.epoch, self.history = _whole_history(saved["history"]), saved["history"]
            if self.epoch != saved["epoch"]:
                raise ValueError(f"epoch {saved['epoch']} has a history of {self.epoch}")
        except REFUSED as error:
            raise UserError(
                f"the saved state does not fit its configuration: {first_line(error)}"
            ) from None


def _whole_history(rows: Any) -> int:
    """Epochs in the rows of metrics; raises whatever rows raise that are none."""
    if not isinstance(rows, list):
        raise TypeError("its history is no list")
    json.dumps([float(row["seconds"]) for row in rows] + rows)  # as it will be written
    if any(row["epoch"] != number for number, row in enumerate(rows, 1)):
        raise ValueError("its history leaves epochs out")
    return len(rows)


def fresh_network(config: TrainConfig, dataset: Dataset) -> Classifier:
    """The network before its first step, a function of the configuration alone.

    Raises:
        UserError: it cannot be made, see `ibpcore.building.own_network`.
    """
    torch.manual_seed(config.seed)
    shape, normalization = (dataset.in_shape, len(dataset.classes)), (dataset.mean, dataset.std)
    if config.model != DEFAULT_MODEL:
        model = own_network(config.model, *shape, *normalization)
    else:
        model = cnn7(*shape, config.width, config.hidden, *normalization)
    if (
        config.model != DEFAULT_MODEL or config.initialization != "ibp"
    ):  # with which `cnn7` makes it
        INITIALIZATIONS[config.initialization](model)
    return model


def start_state(
    config: TrainConfig, dataset: Dataset, device: torch.device | str, ranks: Ranks = ALONE
) -> TrainState:
    """Freshly initialised, a function of the configuration alone.

    Raises:
        UserError: the data set is too small for one batch, or not split as configured.
    """
    held_out = 0 if dataset.validation is None else len(dataset.validation)
    if held_out != config.validation:
        raise UserError(f"{held_out} images are held out, but validation is {config.validation}")
    steps_per_epoch = batches_per_epoch(len(dataset.train), config.batch_size)
    if steps_per_epoch == 0:
        raise UserError(f"{len(dataset.train)} training images are too few to train on")
    model = fresh_network(config, dataset).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate, fused=True)
    scheduler = LEARNING_RATES[config.learning_rate_schedule](
        optimizer, config.learning_rate, config.epochs, steps_per_epoch
    )
    slopes = torch.full((len(dataset.train),), torch.nan, device=device)
    return TrainState(
        model, optimizer, scheduler, slopes, ranks=ranks, forward=_forward(model, ranks)
    )
