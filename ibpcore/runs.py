"""A whole run and its folder: train, certify, write."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ibpcore.certification import (
    BATCH_SIZE,
    UNCHECKED,
    certify,
    summarize,
    write_certificates,
    write_summary,
)
from ibpcore.checkpoint import fingerprint
from ibpcore.config import STANDARD_RADII, TrainConfig
from ibpcore.data import Dataset, ImageSet, Request, load_dataset
from ibpcore.errors import UserError
from ibpcore.journals import Journal, check_settings
from ibpcore.loggers import UNLOGGED, Log
from ibpcore.networks import Classifier
from ibpcore.plots import figures_possible, write_curve
from ibpcore.radius import RootOptions
from ibpcore.ranks import ALONE, Ranks, by_first
from ibpcore.training import CONFIG, METRICS, MODEL, STATE, Progress, train

CERTIFICATES, SUMMARY, VALIDATION = "certificates.csv", "summary.json", "validation.json"
CURVE = "certified_accuracy.png"
JOURNALS = {SUMMARY: "certificates.journal", VALIDATION: "validation.journal"}
"""What is certified is recorded there until the summary is written."""

Advance = Callable[[int, str], None]
"""Is told the work done so far, and a remark."""
Watch = Callable[[str, int], AbstractContextManager[Advance | None]]
"""(label, length) -> what watches that much work, None where nobody does."""


def unwatched(label: str, length: int) -> AbstractContextManager[Advance | None]:
    """The `Watch` of nobody."""
    return nullcontext()


def dataset_of(config: TrainConfig, data_dir: Path, download: bool = False) -> Dataset:
    """The data set of a run, as much of it as `config` says, and split as it says.

    Raises:
        UserError: see `ibpcore.data.load_dataset`.
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
        UserError, OSError: see `ibpcore.training.train`.
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
    bounds: dict[str, Any] = {
        "epsilon_max": config.epsilon_max,
        "options": RootOptions(),
        "elide": config.elide,
        "clip": config.clip,
        "facts": facts,
        "watch": watch,
        "ranks": ranks,
    }
    if dataset.validation is not None:
        # They choose between settings, and prove nothing.
        target = run / VALIDATION
        _certified(model, dataset, dataset.validation, target, claim=UNCHECKED, **bounds)
    summary = certify_test_set(model, dataset, run, **bounds)
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


def certify_test_set(
    model: Classifier,
    dataset: Dataset,
    folder: Path,
    *,
    epsilon_max: float,
    options: RootOptions,
    elide: bool,
    clip: bool,
    facts: dict[str, Any],
    claim: str = "real",
    bound: str = "ibp",
    watch: Watch = unwatched,
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Certifies the test images; writes the table, the curve and the summary.

    Goes on where it was cut off, and does nothing where all is written already. Among
    ranks, the batches are dealt; rank 0 writes the files.

    Args:
        model: on the device to compute on.
        dataset: its test images are moved there.
        folder: gets the files; the curve only where matplotlib is. One that all ranks see.
        epsilon_max, options, elide, claim, bound: see `ibpcore.certification.certify`.
        clip: keep perturbed pixels in [0, 1].
        facts: `method`, and what else the summary shall say of the model.
        watch: is shown the work.
        ranks: among which it is shared, each with the same model and data.

    Returns:
        the summary.

    Raises:
        UserError: see `ibpcore.certification.certify`; or what the folder holds is of other
            settings.
        OSError: the folder cannot be written.
    """
    return _certified(
        model,
        dataset,
        dataset.test,
        folder / SUMMARY,
        folder / CERTIFICATES,
        epsilon_max=epsilon_max,
        options=options,
        elide=elide,
        clip=clip,
        facts=facts,
        claim=claim,
        bound=bound,
        watch=watch,
        ranks=ranks,
    )


def _certified(
    model: Classifier,
    dataset: Dataset,
    images: ImageSet,
    target: Path,
    table: Path | None = None,
    *,
    epsilon_max: float,
    options: RootOptions,
    elide: bool,
    clip: bool,
    facts: dict[str, Any],
    watch: Watch,
    claim: str,
    bound: str = "ibp",
    ranks: Ranks = ALONE,
) -> dict[str, Any]:
    """Certifies `images`, a part of `dataset`, into the summary `target`, and a table if asked."""
    settings = {
        "epsilon_max": epsilon_max,
        **asdict(options),
        "claim": claim,
        "bound": bound,
        "elide": elide,
        "clip": clip,
        "batch_size": BATCH_SIZE,
        "ibpcore": version("ibpcore"),
        "weights": fingerprint(model),
        "images": images.fingerprint(),
    }
    journal_path = target.with_name(JOURNALS[target.name])

    def complete() -> dict[str, Any] | None:
        if journal_path.exists() or not all(path.exists() for path in (target, table or target)):
            return None
        summary = read_json(target)
        check_settings(target, summary, settings)
        return dict(summary)

    if (summary := by_first(ranks, complete)) is not None:
        return summary
    journal = Journal(journal_path, settings, ranks)
    with watch("certifying", len(images)) as advance:
        certificates = certify(
            model.eval(),
            images.to(next(model.parameters()).device),
            epsilon_max,
            options,
            claim=claim,
            bound=bound,
            elide=elide,
            clip=(0.0, 1.0) if clip else None,
            journal=journal,
            ranks=ranks,
            report=None if advance is None else lambda done: advance(done, ""),
        )

    def written() -> dict[str, Any]:
        summary = summarize(certificates, epsilon_max, STANDARD_RADII[dataset.name])
        summary |= {"dataset": dataset.title, **facts, **settings}
        if table is not None:
            write_certificates(table, certificates, claim)
            if figures_possible():
                by = "" if bound == "ibp" else f", certified by {bound}"
                title = f"{facts['method']} on {dataset.title}{by}"
                write_curve(table.with_name(CURVE), certificates, epsilon_max, title)
        write_summary(target, summary)
        journal.remove()
        return summary

    return by_first(ranks, written)


def is_begun(run: Path) -> bool:
    """Whether there is something to resume."""
    return (run / STATE).exists()


def is_complete(run: Path, config: TrainConfig) -> bool:
    """Whether all was done and written that `train_and_certify` does with `config`."""
    needed = [CONFIG, METRICS, MODEL, CERTIFICATES, SUMMARY]
    needed += [VALIDATION] * (config.validation > 0)
    whole = all((run / name).exists() for name in needed)
    cut_off = any((run / name).exists() for name in JOURNALS.values())
    return whole and not cut_off and saved_config(run) == config


def saved_config(run: Path) -> TrainConfig:
    """The configuration in a run's folder.

    Raises:
        UserError: it is missing or damaged.
    """
    if not (run / CONFIG).exists():
        raise UserError(f"there is no run in {run}: {run / CONFIG} is missing")
    return config_from(read_json(run / CONFIG), run / CONFIG)


def config_from(values: Any, path: Path) -> TrainConfig:
    """The training configuration that `values`, read from `path`, describe.

    Raises:
        UserError: they describe none.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it describes no training")
    try:
        return TrainConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        UserError: it is missing, or not JSON.
        OSError: it is there, but cannot be read.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing, or no file")
    try:
        return json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: it is not JSON") from None
