"""A whole run and its folder: train, certify, write."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ibpcore.certification.certify import CertificationOptions
from ibpcore.data.images import Dataset
from ibpcore.data.sources import Request, load_dataset
from ibpcore.distributed import ALONE, Ranks, by_first
from ibpcore.experiments.test_set import certify_test_set, certify_validation_set
from ibpcore.progress import Advance, Watch, unwatched
from ibpcore.training.config import TrainConfig
from ibpcore.training.loggers import UNLOGGED, Log
from ibpcore.training.loop import METRICS, Progress, train


def dataset_of(config: TrainConfig, data_dir: Path, download: bool = False) -> Dataset:
    """The data set of a run, as much of it as `config` says, and split as it says.

    Raises:
        UserError: see `ibpcore.data.sources.load_dataset`.
    """
    request = Request(
        data_dir,
        download,
        config.limit_train,
        config.limit_test,
        config.image_size,
        config.validation,
    )
    return load_dataset(config.dataset, request)


def train_and_certify(
    config: TrainConfig,
    dataset: Dataset,
    run: Path,
    *,
    device: torch.device | str = "cpu",
    resume: bool = False,
    watch: Watch = unwatched,
    log: Log = UNLOGGED,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Trains, certifies the validation images if there are any, then the test images.

    Certificates are made to full precision, whatever training used. The summary is
    written last: where it is, and its journal is not, all else is.

    Args:
        config: how to train.
        dataset: from `dataset_of`.
        run: an existing folder, which gets all files of the run.
        device: where everything is computed.
        resume: go on from `resume.pt` in `run`.
        watch: is shown the training, then each certification.
        log: is told the metrics of each epoch, and the summary of the test images.
        ranks: the processes that do it together, each with the same arguments; the folder
            is one that all see. Rank 0 writes all but journals.

    Returns:
        the summary of the test images, as in `summary.json`.

    Raises:
        UserError, OSError: see `ibpcore.training.loop.train`.
    """
    with watch("training", config.epochs * 1000) as advance:
        report = None if advance is None else _training_report(config, advance)
        model = train(
            config, dataset, run, device=device, resume=resume, report=report, log=log, ranks=ranks
        )
    rows = by_first(ranks, lambda: list(map(json.loads, (run / METRICS).read_text().splitlines())))
    facts = {
        "method": config.method,
        "epochs": config.epochs,
        "training_seconds": sum(row["seconds"] for row in rows),
    }
    # To full precision, whatever training used.
    options = CertificationOptions(config.epsilon_max, bounds=config.bound_options)
    if dataset.validation is not None:
        certify_validation_set(model, dataset, run, options, facts=facts, watch=watch, ranks=ranks)
    summary = certify_test_set(model, dataset, run, options, facts=facts, watch=watch, ranks=ranks)
    log.summary(summary)
    return summary


def _training_report(config: TrainConfig, advance: Advance) -> Callable[[Progress], None]:
    def report(now: Progress) -> None:
        remark = (
            f"epoch {now.epoch}/{config.epochs}  loss {now.loss:.3f}"
            f"  epsilon {now.epsilon:.4g}  accuracy {100 * now.accuracy:.1f} %"
        )
        advance(now.step * config.epochs * 1000 // now.steps, remark)

    return report
