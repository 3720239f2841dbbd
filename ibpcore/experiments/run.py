"""A complete run and its folder: train, certify, write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ibpcore.certification.certify import CertificationOptions
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import SINGLE_PROCESS, Ranks, run_on_rank_zero
from ibpcore.experiments.extension import discard_outdated
from ibpcore.experiments.run_folder import metrics_of
from ibpcore.experiments.test_set import certify_test_set, certify_validation_set
from ibpcore.nn.networks import Classifier
from ibpcore.threads import computing_with
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import UNMONITORED, Monitor
from ibpcore.training.loop import train_model
from ibpcore.training.selection import chosen_epoch


def dataset_of(config: TrainConfig, data_dir: Path, download: bool = False) -> Dataset:
    """The data set of a run, limited and split as `config` says.

    Raises:
        UserError: see `ibpcore.data.sources.load_dataset`.
    """
    limits = config.limit_train, config.limit_test, config.image_size
    return load_dataset(config.dataset, Request(data_dir, download, *limits, config.validation))


def train_and_certify(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    monitor: Monitor = UNMONITORED,
    ranks: Ranks = SINGLE_PROCESS,
    start: Classifier | None = None,
) -> dict[str, Any]:
    """Trains, certifies the validation images if there are any, then the test images.

    Certificates have full precision, whatever training used. The summary is written last:
    if it exists and its journal does not, everything else exists too.

    Args:
        dataset: from `dataset_of`.
        run: an existing folder, which receives all files of the run.
        device: where everything is computed.
        resume: continue from `resume.pt` in `run`.
        monitor: reports the progress of the training, then of each certification; logs the
            metrics of each epoch and the summary of the test images.
        ranks: the processes that share the work, each with the same arguments and access to
            the folder. Rank 0 writes all files but journals.
        start: see `ibpcore.training.loop.train_model`.

    Returns:
        the summary of the test images, as in `summary.json`.

    Raises:
        UserError, OSError: see `ibpcore.training.loop.train_model`.
    """
    if resume:
        run_on_rank_zero(ranks, lambda: discard_outdated(run, config))
    given: dict[str, Any] = {"resume": resume, "monitor": monitor, "ranks": ranks, "start": start}
    model = train_model(config, dataset, run, device=device, **given)
    rows = run_on_rank_zero(ranks, lambda: metrics_of(run))
    facts = {
        "method": config.method,
        "epochs": len(rows),
        "weights_of_epoch": chosen_epoch(rows, config),
        "training_seconds": sum(row["seconds"] for row in rows),
    }
    options = CertificationOptions(config.epsilon_max, config.claim, config.bound_options)
    given = {"facts": facts, "watch": monitor.watch, "ranks": ranks}
    with computing_with(config.threads):
        if dataset.validation is not None:
            certify_validation_set(model, dataset, run, options, **given)
        summary = certify_test_set(model, dataset, run, options, **given)
    monitor.log.summary(summary)
    return summary
