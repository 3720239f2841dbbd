"""The start of a run: what would fail later is rehearsed, and its folder is made and locked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ibpcore.data.images import Dataset
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero, run_rank_zero_first
from ibpcore.experiments.run_folder import BEGUN
from ibpcore.io.locks import held_anew
from ibpcore.nn.networks import Classifier
from ibpcore.nn.work import multiplications
from ibpcore.threads import suitable_threads
from ibpcore.training.compiling import with_compile
from ibpcore.training.config import TrainConfig
from ibpcore.training.memory import available_memory, suitable_parts
from ibpcore.training.presets import NOT_MEANS
from ibpcore.training.rehearsal import rehearse
from ibpcore.training.run_files import saved_state
from ibpcore.training.state import start_state

CHOSEN_BY_SIZES = ("threads", "accumulate", "compile")
"""The settings that `settled` chooses if they are left out."""

RUNS = Path("runs")
"""The folder in which run folders are made that are not named."""


@contextmanager
def opened_run(
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    start: Classifier | None = None,
    *,
    out: Path | None = None,
    resume: Path | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Iterator[tuple[TrainConfig, Path]]:
    """Rehearses a run; makes and holds the folder of a new one, checks the state of a resumed one.

    Args:
        config: of the run; of a resumed one as its folder says.
        dataset: from `ibpcore.experiments.run.dataset_of`.
        device: on which it trains.
        start: see `ibpcore.training.loop.train_model`.
        out: the folder to make; None for runs/DATASET-METHOD, numbered if that exists.
        resume: the folder of a run to resume, which rank 0 holds.
        ranks: the processes that train together; rank 0 holds the folder.

    Yields:
        the configuration, `settled`, and the folder.

    Raises:
        UserError: the rehearsal fails; `compile` is "on", and there is no compiler; the folder is
            in use, not empty, or cannot be made; the saved state is damaged, or of another
            configuration or data set.
    """
    network = run_rank_zero_first(ranks, lambda: rehearse(config, dataset, start))
    if resume is not None:
        run_on_rank_zero(ranks, lambda: _check_state(resume, config, dataset, start))
        yield config, resume
        return
    config = run_on_rank_zero(ranks, lambda: settled(config, network, dataset, device, ranks))
    default = RUNS / f"{config.dataset}-{config.method}"
    with ExitStack() as stack:
        folder = held_anew(out, default, BEGUN)
        yield config, run_on_rank_zero(ranks, lambda: stack.enter_context(folder))


def _check_state(
    run: Path, config: TrainConfig, dataset: Dataset, start: Classifier | None
) -> None:
    """Raises UserError if training cannot go on from the saved state, before the run is changed.

    Without a saved state it starts anew, and there is nothing to lose.
    """
    saved = saved_state(run)
    if saved is not None:
        state = start_state(config, dataset, "cpu", start=start)
        state.load(saved, config, dataset.fingerprint())


def settled(
    config: TrainConfig,
    network: Classifier,
    dataset: Dataset,
    device: torch.device,
    ranks: Ranks = SINGLE_PROCESS,
) -> TrainConfig:
    """The configuration with what is chosen by sizes if it was left out: `CHOSEN_BY_SIZES`.

    Args:
        network: that of the run, or one of the same sizes.

    Raises:
        UserError: see `ibpcore.training.compiling.with_compile`.
    """
    if config.threads is None:
        work = config.batch_size / ranks.size * multiplications(network)
        config = replace(config, threads=suitable_threads(work))
    if config.accumulate is None:
        parts = _suitable_parts(config, network, dataset, device, ranks=ranks)
        config = replace(config, accumulate=parts)
    return with_compile(config, network, len(dataset.train), device)


def settled_together(
    usual: TrainConfig,
    largest: Sequence[TrainConfig],
    dataset: Dataset,
    device: torch.device,
    jobs: int,
) -> dict[str, Any]:
    """What `settled` chooses for all runs of a sweep or a search, which share it.

    The parts are those of the run that needs most, or 1 if a method's batches cannot be split.

    Args:
        usual: the run whose size decides about threads and compiling.
        largest: a run of each method with the largest batches, to be rehearsed.
        jobs: how many runs share the memory.

    Raises:
        UserError: a rehearsal fails, or see `settled`.
    """
    networks = [rehearse(run, dataset) for run in largest]
    if usual.accumulate is None:
        parts = 1
        if not any(run.method in NOT_MEANS for run in largest):
            of_each = zip(largest, networks, strict=True)
            parts = max(_suitable_parts(*run, dataset, device, jobs) for run in of_each)
        usual = replace(usual, accumulate=parts)
    found = settled(usual, networks[0], dataset, device)
    return {name: getattr(found, name) for name in CHOSEN_BY_SIZES}


def _suitable_parts(
    config: TrainConfig,
    network: Classifier,
    dataset: Dataset,
    device: torch.device,
    jobs: int = 1,
    ranks: Ranks = SINGLE_PROCESS,
) -> int:
    """The number of parts of a batch for which a step fits its share of the memory."""
    available = available_memory(device) / jobs
    if device.type == "cuda":
        available -= dataset.train.images.nbytes  # each rank copies them to its device
    else:
        available /= ranks.size
    share = replace(config, batch_size=max(2, -(-config.batch_size // ranks.size)))
    return suitable_parts(share, network, available)
