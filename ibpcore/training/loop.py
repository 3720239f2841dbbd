"""The training loop: one for all methods, resumable after every epoch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore import distributed
from ibpcore.bounds.compilation import check_compiler
from ibpcore.certification.formatting import in_unit_of
from ibpcore.data.batches import Batch, batches_per_epoch, shuffled_batches
from ibpcore.data.images import Dataset, ImageSet
from ibpcore.distributed import SINGLE_PROCESS, Ranks, summed
from ibpcore.errors import UserError
from ibpcore.nn.checkpoint import save_model
from ibpcore.nn.networks import Classifier
from ibpcore.precision import deterministic_convolutions, tf32_allowed
from ibpcore.progress import Advance
from ibpcore.threads import computing_with
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import UNMONITORED, Monitor
from ibpcore.training.loss import StepLoss
from ibpcore.training.observations import inspected, measured, sample
from ibpcore.training.run_files import START, prepare, saved_state, write_epoch
from ibpcore.training.schedules import epsilon_share
from ibpcore.training.selection import VALIDATION, best_epoch, chosen_epoch, is_measured, is_over
from ibpcore.training.slopes import learn
from ibpcore.training.state import TrainState, copied_weights, start_state

REPORT_SECONDS = 0.5
"""Time between two progress reports."""


def train_model(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    monitor: Monitor = UNMONITORED,
    ranks: Ranks = SINGLE_PROCESS,
    start: Classifier | None = None,
) -> Classifier:
    """Trains a model and updates the run folder after every epoch.

    Sets torch's global seed. Computes with `config.threads` threads, and restores their number.

    The folder receives `config.json`, `metrics.jsonl` (a line for each epoch),
    `model.safetensors`, `best.safetensors` if held-out images are measured, and `resume.pt`.
    Each epoch is a function of the state before it, the configuration and its number: a
    resumed run ends with the same bits on the CPU.

    Args:
        dataset: its images are moved to `device`.
        run: an existing folder.
        resume: continue from `resume.pt` in `run`, or start anew if the run was interrupted
            before that was written.
        monitor: reports progress about twice a second and at the end of every epoch.
        ranks: the processes that train together, see `ibpcore.distributed.joined`, each with
            the same arguments. Only rank 0 needs and writes the folder. The weights are those
            of a single process up to rounding and to the random starts of attacks.
        start: the model whose digest is `config.start`; `start.safetensors` in the folder then
            keeps it for resuming.

    Returns:
        the model with the weights after `ibpcore.training.selection.chosen_epoch`.

    Raises:
        UserError: the data set or the saved state does not fit the configuration, the
            ranks have different data sets, or the loss is no longer finite; the last good
            epoch stays on disk.
        OSError: the run folder cannot be written.
    """
    if config.compile:
        check_compiler(torch.device(device))
    with (
        distributed.detecting_lost_rank(ranks),
        deterministic_convolutions(),
        computing_with(config.threads),
    ):
        state = start_state(config, dataset, device, ranks, start)
        data = dataset.fingerprint()
        if distributed.broadcast_object(ranks, data) != data:
            raise UserError(f"the data set has other images on rank {ranks.rank} than on rank 0")
        saved = distributed.run_on_rank_zero(ranks, lambda: saved_state(run) if resume else None)
        if saved is not None:
            state.load(saved, config, data)
        if ranks.first:
            if start is not None:
                save_model(start, run / START)
            prepare(run, state, config, dataset, data)
            for row in state.history:
                monitor.log.row(row)
        images = dataset.train.to(device)
        held_out = None if dataset.validation is None else sample(dataset.validation).to(device)
        steps = config.epochs * batches_per_epoch(len(images), config.batch_size)
        with monitor.watch("training", steps) as advance:
            while not is_over(state.history, config):
                with tf32_allowed(config.tf32):
                    state.history.append(run_epoch(state, images, config, advance))
                state.epoch += 1
                _observe(state, images, held_out, config)
                if ranks.first:
                    write_epoch(run, state, config, dataset, data)
                    monitor.log.row(state.history[-1])
        if chosen_epoch(state.history, config) != state.epoch:
            state.model.load_state_dict(state.best)
    return state.model


def _observe(
    state: TrainState, images: ImageSet, held_out: ImageSet | None, config: TrainConfig
) -> None:
    """Adds what is due after the last epoch to its row, and keeps its weights if they are best."""
    row = state.history[-1]
    if held_out is not None and is_measured(state.epoch, config):
        row[VALIDATION] = measured(state.model, held_out, config, state.ranks)
        if best_epoch(state.history) == state.epoch:
            state.best = copied_weights(state.model)
    inspecting = config.inspect_every is not None and state.epoch % config.inspect_every == 0
    if inspecting and state.ranks.first:
        row["inspection"] = inspected(state.model, images, config)


def run_epoch(
    state: TrainState, images: ImageSet, config: TrainConfig, advance: Advance | None
) -> dict[str, float]:
    """Trains for one epoch and returns its metrics.

    Raises:
        UserError: the loss or its gradient is not finite.
    """
    started = reported = time.monotonic()
    steps_per_epoch = batches_per_epoch(len(images), config.batch_size)
    first_step = state.epoch * steps_per_epoch
    # For dropout and attacks; different on each rank, since their samples differ.
    torch.manual_seed((config.seed * 1_000_003 + state.epoch) + (state.ranks.rank << 40))
    state.model.train()
    before = state.slopes.clone()
    totals = _Totals(images.images.device)
    for step, batch in enumerate(epoch_batches(state, images, config), first_step):
        share = epsilon_share(config.schedule, step, steps_per_epoch, config.warmup)
        learning_rate = float(state.optimizer.param_groups[0]["lr"])
        totals.add(train_step(state, batch, share, config))
        last = step + 1 == first_step + steps_per_epoch
        if advance is not None and (last or time.monotonic() - reported > REPORT_SECONDS):
            reported = time.monotonic()
            means = totals.means()
            _stop_unless_finite(totals, state, steps_per_epoch)
            advance(step + 1, [*_facts(state, means, share, config)])
    _stop_unless_finite(totals, state, steps_per_epoch)
    state.slopes = _merged_slopes(before, state.slopes, state.ranks)
    return {
        "epoch": state.epoch + 1,
        **totals.means(),
        "epsilon": share * config.epsilon_max,
        "learning_rate": learning_rate,
        "seconds": time.monotonic() - started,
    }


def epoch_batches(state: TrainState, images: ImageSet, config: TrainConfig) -> Iterator[Batch]:
    """This rank's shares of the batches of the epoch after `state`, shuffled and augmented."""
    return shuffled_batches(
        images,
        config.batch_size,
        seed=config.seed,
        epoch=state.epoch,
        flip=config.flip,
        padding=config.padding,
        ranks=state.ranks,
    )


def _facts(
    state: TrainState, means: dict[str, float], share: float, config: TrainConfig
) -> Iterator[str]:
    """What is reported of an epoch in progress, and of the last held-out images measured."""
    yield f"epoch {state.epoch + 1}/{config.epochs}"
    yield f"loss {means['loss']:.3f}"
    yield f"accuracy {100 * means['accuracy']:.1f} %"
    yield f"epsilon {in_unit_of(config.epsilon_max, share * config.epsilon_max)}"
    found = [row[VALIDATION] for row in state.history if VALIDATION in row]
    if found:
        yield f"validation {100 * found[-1]['accuracy']:.1f} %"
        yield f"ART {100 * found[-1]['art']:.1f} %"


def _merged_slopes(before: Tensor, slopes: Tensor, ranks: Ranks) -> Tensor:
    """(N,) the slopes of all ranks, each of which has updated those of its own samples."""
    if ranks.size == 1:
        return slopes
    changed = ~((slopes == before) | (slopes.isnan() & before.isnan()))
    values = torch.where(changed, slopes, 0.0)
    # The samples of a batch too small to be shared were updated by all ranks alike.
    values, count = summed(torch.stack([values, changed.to(values)]), ranks)
    return torch.where(count > 0, values / count, before)


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
        loss, correct, radius: sums of the losses, the correct predictions and the radii.
        bad: number of ranks on which the loss or its gradient is not finite.
        samples: size of the batch.
    """

    loss: Tensor
    correct: Tensor
    radius: Tensor
    bad: Tensor
    samples: int


def train_step(state: TrainState, batch: Batch, share: float, config: TrainConfig) -> StepResult:
    """One step of the optimiser: loss, gradient, update.

    Args:
        batch: this rank's share, of the data set for which the state was created.
        share: scheduled share of epsilon_max, in [0, 1].
    """
    ranks = state.ranks.sharing(len(batch.samples))
    expected = state.expected_slopes(batch.samples)
    found: StepLoss = state.loss(batch, expected, share, config, ranks)
    if config.adaptive:
        mine = ranks.share(len(batch.samples))
        known = (batch.samples[mine], expected.slopes[mine])
        learn(state.slopes, state.trend, *known, found.slopes, ranks)
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
    """Sums over the steps of an epoch, kept on the device until they are read."""

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
