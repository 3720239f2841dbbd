"""The training loop: one for all methods, resumable after every epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ibpcore import distributed
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
from ibpcore.training.compiling import compiles
from ibpcore.training.config import TrainConfig
from ibpcore.training.demands import NO_DEMANDS, Demands
from ibpcore.training.flat import check_joined, clip_gradients, separate
from ibpcore.training.loggers import UNMONITORED, Monitor
from ibpcore.training.loss import StepLoss
from ibpcore.training.observations import inspected, measured, sample
from ibpcore.training.run_files import START, prepare, saved_state, write_epoch
from ibpcore.training.schedules import epsilon_share
from ibpcore.training.selection import VALIDATION, best_epoch, chosen_epoch, is_measured, is_over
from ibpcore.training.slopes import NONE, learn
from ibpcore.training.state import TrainState, copied_weights, start_state
from ibpcore.training.statistics import set_precise_statistics

REPORT_SECONDS = 0.5
"""Time between two progress reports."""


class DivergedError(UserError):
    """The loss or its gradient is not finite."""


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
    demands: Demands = NO_DEMANDS,
) -> Classifier:
    """Trains a model and updates the run folder after every epoch.

    Sets torch's global seed. Computes with `config.threads` threads, and restores their number.

    Passes are compiled if `config.compile` is "on" and `ibpcore.training.compiling.compiles`.

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
        demands: of a search; they change no weights, but may end the run early.

    Returns:
        the model with the weights after `ibpcore.training.selection.chosen_epoch`.

    Raises:
        DivergedError: the loss is no longer finite; the last good epoch stays on disk.
        UserError: the data set or the saved state does not fit the configuration, or the
            ranks have different data sets.
        OSError: the run folder cannot be written.
    """
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
        stepping = config
        if config.compile == "on":
            batch = next(epoch_batches(state, images, config))
            stepping = replace(config, compile="on" if compiles(state, batch, config) else "off")
        held_out = None if dataset.validation is None else sample(dataset.validation).to(device)
        if config.extended_at[-1:] == (config.epochs,) == (state.epoch,):
            # The run was ended early: this epoch was not the last one when it was trained.
            _observe(state, images, held_out, config, demands)
            if ranks.first:
                write_epoch(run, state, config, dataset, data)
        steps = config.epochs * batches_per_epoch(len(images), config.batch_size)
        with monitor.watch("training", steps) as advance:
            while not (is_over(state.history, config) or demands.hopeless(state.history)):
                with tf32_allowed(config.tf32):
                    state.history.append(run_epoch(state, images, stepping, advance))
                state.epoch += 1
                _observe(state, images, held_out, config, demands)
                if ranks.first:
                    write_epoch(run, state, config, dataset, data)
                    monitor.log.row(state.history[-1])
        if chosen_epoch(state.history, config) != state.epoch:
            state.delivered.load_state_dict(state.best)
    separate(state.delivered)
    return state.delivered


def _observe(
    state: TrainState,
    images: ImageSet,
    held_out: ImageSet | None,
    config: TrainConfig,
    demands: Demands,
) -> None:
    """Adds what is due after the last epoch to its row, and keeps its weights if they are best."""
    row, model = state.history[-1], state.delivered
    precise = config.precise_batch_norm or model is not state.model
    if precise and (is_measured(state.epoch, config) or state.epoch == config.epochs):
        set_precise_statistics(model, images, config.batch_size)
    if held_out is not None and is_measured(state.epoch, config):
        row[VALIDATION] = measured(model, held_out, config, state.ranks, demands.radii)
        if best_epoch(state.history) == state.epoch:
            state.best = copied_weights(model)
    inspecting = config.inspect_every is not None and state.epoch % config.inspect_every == 0
    if inspecting and state.ranks.first:
        row["inspection"] = inspected(model, images, config)


def run_epoch(
    state: TrainState, images: ImageSet, config: TrainConfig, advance: Advance | None
) -> dict[str, float]:
    """Trains for one epoch and returns its metrics.

    Raises:
        DivergedError: the loss or its gradient is not finite.
    """
    started = reported = time.monotonic()
    steps_per_epoch = batches_per_epoch(len(images), config.batch_size)
    first_step = state.epoch * steps_per_epoch
    # For dropout and attacks; different on each rank, since their samples differ.
    torch.manual_seed((config.seed * 1_000_003 + state.epoch) + (state.ranks.rank << 40))
    state.model.train()
    check_joined(state.optimizer, state.model)
    before = state.slopes.clone()
    averaged_from = (1 - config.average_last) * config.epochs * steps_per_epoch
    totals = _Totals()
    for step, batch in enumerate(epoch_batches(state, images, config), first_step):
        share = epsilon_share(config.schedule, step, steps_per_epoch, config.warmup)
        learning_rate = float(state.optimizer.param_groups[0]["lr"])
        totals.add(train_step(state, batch, share, config))
        if state.average is not None and step >= averaged_from:
            state.average.update_parameters(state.model)
        last = step + 1 == first_step + steps_per_epoch
        if advance is not None and (last or time.monotonic() - reported > REPORT_SECONDS):
            reported = time.monotonic()
            _read(totals, state, steps_per_epoch)
            advance(step + 1, [*_facts(state, totals.means(), share, config)])
    _read(totals, state, steps_per_epoch)
    state.slopes = _merged_slopes(before, state.slopes, state.ranks)
    return {
        "epoch": state.epoch + 1,
        **totals.means(),
        "epsilon": share * config.train_epsilon,
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
    yield f"epsilon {in_unit_of(config.epsilon_max, share * config.train_epsilon)}"
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


def _read(totals: _Totals, state: TrainState, steps_per_epoch: int) -> None:
    """Reads the totals; raises DivergedError if a step was not finite."""
    totals.read()
    bad = totals.bad_step
    if bad is not None:
        kept = f"the weights after epoch {state.epoch} are kept" if state.epoch else "none is kept"
        raise DivergedError(
            f"the loss is not finite at step {bad + 1} of {steps_per_epoch} in epoch"
            f" {state.epoch + 1}; {kept}; try a smaller learning rate"
        )


class StepResult(NamedTuple):
    """What a step of the optimiser found.

    Attributes:
        sums: four scalars on the device, over the ranks: of the losses, which are means over the
            batch, the correct predictions, the radii, and the norms of the gradient.
        ranks: number of ranks that shared the batch.
        samples: size of the batch.
    """

    sums: Sequence[Tensor]
    ranks: int
    samples: int


def train_step(state: TrainState, batch: Batch, share: float, config: TrainConfig) -> StepResult:
    """One step of the optimiser: loss, gradient, update.

    Args:
        batch: this rank's share, of the data set for which the state was created.
        share: scheduled share of the largest epsilon, in [0, 1].
    """
    ranks = state.ranks.sharing(len(batch.samples))
    (group,) = state.optimizer.param_groups
    parameters = group["params"]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.zero_()  # the model's gradients are views of it
    expected = state.expected_slopes(batch.samples) if config.adaptive else NONE
    found: StepLoss = state.loss(batch, expected, share, config, ranks)
    if config.adaptive:
        samples, slopes = batch.samples, expected.slopes
        if ranks.size > 1:
            mine = ranks.share(len(samples))
            samples, slopes = samples[mine], slopes[mine]
        learn(state.slopes, state.trend, samples, slopes, found.slopes, ranks)
    found.loss.backward()
    norm = clip_gradients(parameters, config.gradient_clip)
    state.optimizer.step()
    state.scheduler.step()
    sums: Sequence[Tensor] = (found.loss.detach(), found.correct, found.radii, norm)
    if ranks.size > 1:
        sums = summed(torch.stack([*sums]), ranks).unbind()
    return StepResult(sums, ranks.size, len(batch.samples))


class _Totals:
    """Sums over the steps of an epoch; those of the last steps are on the device until `read`."""

    def __init__(self) -> None:
        self.unread: list[StepResult] = []
        self.loss = self.correct = self.radius = 0.0
        self.samples = self.steps = 0
        self.bad_step: int | None = None

    def add(self, result: StepResult) -> None:
        self.unread.append(result)

    def read(self) -> None:
        """Waits for the device, if anything is unread."""
        if not self.unread:
            return
        parts = [part for result in self.unread for part in result.sums]
        rows = torch.stack(parts).view(len(self.unread), -1).tolist()
        for result, (loss, correct, radius, norm) in zip(self.unread, rows, strict=True):
            if self.bad_step is None and not (math.isfinite(loss) and math.isfinite(norm)):
                self.bad_step = self.steps
            self.steps += 1
            self.samples += result.samples
            self.loss += loss / result.ranks * result.samples
            self.correct += correct
            self.radius += radius
        self.unread.clear()

    def means(self) -> dict[str, float]:
        """Of the samples whose steps were read."""
        sums = {"loss": self.loss, "accuracy": self.correct, "mean_radius": self.radius}
        return {name: total / self.samples for name, total in sums.items()}
