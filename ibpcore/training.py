"""The training loop: one for all methods, resumable after every epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.building import CNN7, own_network
from ibpcore.checkpoint import REFUSED, load_state, save_model, save_state, write_atomic
from ibpcore.config import TrainConfig
from ibpcore.data import (
    Batch,
    Dataset,
    ImageSet,
    as_pixels,
    batches_per_epoch,
    shuffled_batches,
)
from ibpcore.errors import UserError, first_line
from ibpcore.folding import clean_pass, compiled
from ibpcore.initialization import INITIALIZATIONS
from ibpcore.inspection import inspect_ground
from ibpcore.kernels import check_compiler
from ibpcore.methods import METHODS, CleanBatch
from ibpcore.models import cnn7
from ibpcore.networks import Classifier
from ibpcore.precision import tf32_allowed
from ibpcore.regularizers import l1_norm, warmup_regularizer
from ibpcore.schedules import LEARNING_RATES, epsilon_share
from ibpcore.steps import Relu, Step

CONFIG, METRICS, MODEL, STATE = "config.json", "metrics.jsonl", "model.safetensors", "resume.pt"
REPORT_SECONDS = 0.5
INSPECTED, INSPECTED_RADII = 64, 33
"""Training images that are inspected, and radii at which their margins are."""


class Progress(NamedTuple):
    """How a run stands, for whoever watches.

    Attributes:
        step, steps: steps done, and of the whole run.
        epoch: from 1.
        loss, accuracy: means over the epoch so far.
        epsilon: scheduled epsilon_max, in pixel units.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float
    epsilon: float


Report = Callable[[Progress], None]


@dataclass
class TrainState:
    """A run between two epochs.

    Attributes:
        slopes: what was learnt of each training image's margin, see
            `ibpcore.methods.base.MethodLoss`.
        epoch: epochs finished.
        history: one row of metrics for each of them.
    """

    model: Classifier
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    slopes: Tensor
    epoch: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)

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
    if config.model != CNN7:
        model = own_network(config.model, *shape, *normalization)
    else:
        model = cnn7(*shape, config.width, config.hidden, *normalization)
    if config.model != CNN7 or config.initialization != "ibp":  # with which `cnn7` makes it
        INITIALIZATIONS[config.initialization](model)
    return model


def start_state(config: TrainConfig, dataset: Dataset, device: torch.device | str) -> TrainState:
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
    return TrainState(model, optimizer, scheduler, slopes)


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    report: Report | None = None,
) -> Classifier:
    """Trains a model and keeps the run folder up to date after every epoch.

    Sets torch's global seed, and cuDNN to deterministic kernels.

    The folder gets `config.json`, `metrics.jsonl` (a line an epoch), `model.safetensors`
    and `resume.pt`. Each epoch is a function of the state before it, the configuration
    and the epoch's number: a resumed run ends with the same bits on the CPU.

    Args:
        config: how to train.
        dataset: its images are moved to `device`.
        run: an existing folder.
        device: where everything is computed.
        resume: go on from `resume.pt` in `run`; where it was cut off before that was
            written, from the start.
        report: is told how things stand, about twice a second and after every epoch.

    Raises:
        UserError: the data set or the saved state does not fit the configuration, or the
            loss is no longer finite; the last good epoch stays on disk.
        OSError: the run folder cannot be written.
    """
    if config.compile:
        check_compiler(torch.device(device))
    torch.backends.cudnn.deterministic = True
    state = start_state(config, dataset, device)
    data = dataset.fingerprint()
    if resume and any((run / name).exists() for name in (STATE, MODEL, METRICS)):
        state.load(load_state(run / STATE), config, data)
        _write_outputs(run, state, config, dataset)
    else:
        write_atomic(run / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
        save_state(run / STATE, state.to_dict(config, data))
    images = dataset.train.to(device)
    while state.epoch < config.epochs:
        with tf32_allowed(config.tf32):
            state.history.append(run_epoch(state, images, config, report))
        state.epoch += 1
        if config.inspect_every is not None and state.epoch % config.inspect_every == 0:
            state.history[-1]["inspection"] = _inspected(state.model, images, config)
        save_state(run / STATE, state.to_dict(config, data))
        _write_outputs(run, state, config, dataset)
    return state.model


def _inspected(model: Classifier, images: ImageSet, config: TrainConfig) -> dict[str, Any]:
    """What `inspect_ground` says of the model and some training images, always the same."""
    index = torch.linspace(0, len(images) - 1, min(len(images), INSPECTED)).round().long()
    some = images.images[index.to(images.images.device)]
    labels = images.labels[index.to(images.labels.device)]
    ground = inspect_ground(
        model,
        as_pixels(some),
        labels,
        config.epsilon_max,
        points=INSPECTED_RADII,
        elide=config.elide,
        clip=config.clip_range,
    )
    return ground.summary()


def _write_outputs(run: Path, state: TrainState, config: TrainConfig, dataset: Dataset) -> None:
    """Model and metrics, from the state that was saved first: a resume makes them again."""
    if state.epoch == 0:
        return
    save_model(
        state.model,
        run / MODEL,
        training=config.to_dict(),
        epochs_trained=state.epoch,
        dataset_title=dataset.title,
        classes=dataset.classes,
    )
    lines = "".join(json.dumps(row) + "\n" for row in state.history)
    write_atomic(run / METRICS, lines.encode())


def run_epoch(
    state: TrainState, images: ImageSet, config: TrainConfig, report: Report | None
) -> dict[str, float]:
    """One epoch of training; its metrics.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    started = reported = time.monotonic()
    steps_per_epoch = batches_per_epoch(len(images), config.batch_size)
    first_step = state.epoch * steps_per_epoch
    torch.manual_seed(config.seed * 1_000_003 + state.epoch)  # dropout, attacks
    state.model.train()
    batches = shuffled_batches(
        images,
        config.batch_size,
        seed=config.seed,
        epoch=state.epoch,
        flip=config.flip,
        padding=config.padding,
    )
    totals = _Totals(images.images.device)
    for step, batch in enumerate(batches, first_step):
        share = epsilon_share(config.schedule, step, steps_per_epoch, config.warmup)
        learning_rate = float(state.optimizer.param_groups[0]["lr"])
        totals.add(train_step(state, batch, share, config))
        last = step + 1 == first_step + steps_per_epoch
        if report is not None and (last or time.monotonic() - reported > REPORT_SECONDS):
            reported = time.monotonic()
            means = totals.means()
            _stop_unless_finite(totals, state, steps_per_epoch)
            report(
                Progress(
                    step + 1,
                    config.epochs * steps_per_epoch,
                    state.epoch + 1,
                    means["loss"],
                    means["accuracy"],
                    share * config.epsilon_max,
                )
            )
    _stop_unless_finite(totals, state, steps_per_epoch)
    return {
        "epoch": state.epoch + 1,
        **totals.means(),
        "epsilon": share * config.epsilon_max,
        "learning_rate": learning_rate,
        "seconds": time.monotonic() - started,
    }


def _stop_unless_finite(totals: _Totals, state: TrainState, steps_per_epoch: int) -> None:
    bad = totals.first_bad_step()
    if bad is not None:
        kept = f"the weights after epoch {state.epoch} are kept" if state.epoch else "none is kept"
        raise UserError(
            f"the loss is not finite at step {bad + 1} of {steps_per_epoch} in epoch"
            f" {state.epoch + 1}; {kept}; try a smaller learning rate"
        )


class StepResult(NamedTuple):
    """Sums over one batch, scalars on the device.

    Attributes:
        finite: loss and gradient are finite.
    """

    loss: Tensor
    correct: Tensor
    radius: Tensor
    samples: int
    finite: Tensor


def train_step(state: TrainState, batch: Batch, share: float, config: TrainConfig) -> StepResult:
    """One step of the optimiser: clean pass, radii, interval pass, loss, update.

    Args:
        batch: of the data set that the state was started for.
        share: scheduled share of epsilon_max, in [0, 1].
    """
    images, labels, samples = batch
    weight = config.regularizer * (1 - share)
    relu_inputs: list[Tensor] | None = [] if weight > 0 else None

    def observe(step: Step, x: Tensor) -> None:
        if isinstance(step, Relu) and relu_inputs is not None:
            relu_inputs.append(x)

    logits, network = clean_pass(state.model, images, observe=observe)
    if config.compile:
        network = compiled(network)
    result = METHODS[config.method](
        CleanBatch(network, logits, images, labels, state.slopes[samples], relu_inputs),
        share * config.epsilon_max,
        config,
    )
    state.slopes[samples] = result.slopes
    loss = result.loss
    if result.activations is not None:
        loss = loss + weight * warmup_regularizer(result.activations)
    if config.l1 > 0:
        loss = loss + config.l1 * l1_norm(state.model)
    state.optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    state.optimizer.step()
    state.scheduler.step()
    loss = loss.detach()
    return StepResult(
        loss * len(labels),
        (logits.detach().argmax(1) == labels).sum(),
        result.radii.sum(),
        len(labels),
        loss.isfinite() & norm.isfinite(),
    )


class _Totals:
    """Sums over the steps of an epoch, on the device until somebody looks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device, dtype=torch.float32)
        self.samples = 0
        self.steps = 0
        self.bad_step = torch.full((), -1, device=device, dtype=torch.int64)

    def add(self, result: StepResult) -> None:
        self.sums += torch.stack([result.loss, result.correct.float(), result.radius])
        first = (self.bad_step < 0) & ~result.finite
        self.bad_step = torch.where(first, self.steps, self.bad_step)
        self.samples += result.samples
        self.steps += 1

    def first_bad_step(self) -> int | None:
        bad = int(self.bad_step)
        return bad if bad >= 0 else None

    def means(self) -> dict[str, float]:
        values = (self.sums / max(self.samples, 1)).tolist()
        return dict(zip(("loss", "accuracy", "mean_radius"), values, strict=True))
