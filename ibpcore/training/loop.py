"""The training loop: one for all methods, resumable after every epoch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ibpcore.bounds.compilation import check_compiler
from ibpcore.data.batches import Batch, as_pixels, batches_per_epoch, shuffled_batches
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.distributed import ALONE, Ranks, by_first, noticing_loss, summed, told_by_first
from ibpcore.errors import UserError
from ibpcore.inspection.report import inspect_assumptions
from ibpcore.io.files import write_atomic
from ibpcore.nn.checkpoint import save_model
from ibpcore.nn.networks import Classifier
from ibpcore.precision import tf32_allowed
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import UNLOGGED, Log
from ibpcore.training.loss import StepLoss, step_loss
from ibpcore.training.schedules import epsilon_share
from ibpcore.training.state import TrainState, load_state, save_state, start_state

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


def train(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    report: Report | None = None,
    log: Log = UNLOGGED,
    ranks: Ranks = ALONE,
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
        log: is told each epoch's metrics, once they are on disk.
        ranks: the processes that train together, `ibpcore.distributed.joined`, each with the same
            arguments. The first alone needs and writes the folder. The weights are those of
            a single process but for rounding, and for random starts of attacks.

    Raises:
        UserError: the data set or the saved state does not fit the configuration, the
            ranks have different data sets, or the loss is no longer finite; the last good
            epoch stays on disk.
        OSError: the run folder cannot be written.
    """
    if config.compile:
        check_compiler(torch.device(device))
    torch.backends.cudnn.deterministic = True
    with noticing_loss(ranks):
        state = start_state(config, dataset, device, ranks)
        data = dataset.fingerprint()
        if told_by_first(ranks, data) != data:
            raise UserError(f"rank {ranks.rank} has other images of the data set than rank 0")
        if (saved := by_first(ranks, lambda: _saved(run) if resume else None)) is not None:
            state.load(saved, config, data)
        if ranks.first:
            _begin(run, state, config, dataset, data)
            for row in state.history:
                log.row(row)
        images = dataset.train.to(device)
        while state.epoch < config.epochs:
            with tf32_allowed(config.tf32):
                state.history.append(run_epoch(state, images, config, report))
            state.epoch += 1
            if ranks.first:
                _end_epoch(run, state, images, config, dataset, data)
                log.row(state.history[-1])
    return state.model


def _saved(run: Path) -> dict[str, Any] | None:
    """The state to go on from; None where a run was cut off before there was one."""
    begun = any((run / name).exists() for name in (STATE, MODEL, METRICS))
    return load_state(run / STATE) if begun else None


def _begin(run: Path, state: TrainState, config: TrainConfig, dataset: Dataset, data: str) -> None:
    """Brings the folder to where `state` is, at the start or when it goes on."""
    if state.epoch == 0:
        write_atomic(run / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())
        save_state(run / STATE, state.to_dict(config, data))
    _write_outputs(run, state, config, dataset)


def _end_epoch(
    run: Path,
    state: TrainState,
    images: ImageSet,
    config: TrainConfig,
    dataset: Dataset,
    data: str,
) -> None:
    """Inspects the model if it is time to, and saves all."""
    if config.inspect_every is not None and state.epoch % config.inspect_every == 0:
        state.history[-1]["inspection"] = _inspected(state.model, images, config)
    save_state(run / STATE, state.to_dict(config, data))
    _write_outputs(run, state, config, dataset)


def _inspected(model: Classifier, images: ImageSet, config: TrainConfig) -> dict[str, Any]:
    """What `inspect_assumptions` says of the model and some training images, always the same."""
    index = torch.linspace(0, len(images) - 1, min(len(images), INSPECTED)).round().long()
    some = images.images[index.to(images.images.device)]
    labels = images.labels[index.to(images.labels.device)]
    assumptions = inspect_assumptions(
        model,
        as_pixels(some),
        labels,
        config.epsilon_max,
        points=INSPECTED_RADII,
        bounds=config.bound_options,
    )
    return assumptions.summary()


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
    # Dropout, attacks; of its own on each rank, since each has other samples.
    torch.manual_seed((config.seed * 1_000_003 + state.epoch) + (state.ranks.rank << 40))
    state.model.train()
    before = state.slopes.clone()
    batches = shuffled_batches(
        images,
        config.batch_size,
        seed=config.seed,
        epoch=state.epoch,
        flip=config.flip,
        padding=config.padding,
        ranks=state.ranks,
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
    state.slopes = _everybodys(before, state.slopes, state.ranks)
    return {
        "epoch": state.epoch + 1,
        **totals.means(),
        "epsilon": share * config.epsilon_max,
        "learning_rate": learning_rate,
        "seconds": time.monotonic() - started,
    }


def _everybodys(before: Tensor, slopes: Tensor, ranks: Ranks) -> Tensor:
    """(N,) slopes on every rank, where each has changed those of its own samples."""
    if ranks.size == 1:
        return slopes
    changed = ~((slopes == before) | (slopes.isnan() & before.isnan()))
    values = torch.where(changed, slopes, 0.0)
    # One whose batch was too small to be shared was changed by all ranks alike.
    values, times = summed(torch.stack([values, changed.to(values)]), ranks)
    return torch.where(times > 0, values / times, before)


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
        loss, correct, radius: of losses, correct answers, radii.
        bad: ranks on which loss or gradient is not finite.
        samples: of the batch.
    """

    loss: Tensor
    correct: Tensor
    radius: Tensor
    bad: Tensor
    samples: int


def train_step(state: TrainState, batch: Batch, share: float, config: TrainConfig) -> StepResult:
    """One step of the optimiser: clean pass, radii, interval pass, loss, update.

    Args:
        batch: this rank's part, of the data set that the state was started for.
        share: scheduled share of epsilon_max, in [0, 1].
    """
    ranks = state.ranks.sharing(len(batch.samples))
    found: StepLoss = state.forward(
        lambda: step_loss(state.model, batch, state.slopes, share, config, ranks)
    )
    state.slopes[batch.samples[ranks.share(len(batch.samples))]] = found.slopes
    state.optimizer.zero_grad()
    found.loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.gradient_clip)
    state.optimizer.step()
    state.scheduler.step()
    broken = ~(found.value.isfinite() & norm.isfinite())
    sums = (found.value * len(batch.labels), found.correct, found.radii, broken)
    loss, correct, radius, bad = summed(torch.stack([x.float() for x in sums]), ranks)
    return StepResult(loss, correct, radius, bad, len(batch.samples))


class _Totals:
    """Sums over the steps of an epoch, on the device until somebody looks."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, device=device, dtype=torch.float32)
        self.samples = 0
        self.steps = 0
        self.bad_step = torch.full((), -1, device=device, dtype=torch.int64)

    def add(self, result: StepResult) -> None:
        self.sums += torch.stack([result.loss, result.correct, result.radius])
        first = (self.bad_step < 0) & (result.bad > 0)
        self.bad_step = torch.where(first, self.steps, self.bad_step)
        self.samples += result.samples
        self.steps += 1

    def first_bad_step(self) -> int | None:
        bad = int(self.bad_step)
        return bad if bad >= 0 else None

    def means(self) -> dict[str, float]:
        values = (self.sums / max(self.samples, 1)).tolist()
        return dict(zip(("loss", "accuracy", "mean_radius"), values, strict=True))
