"""Other numbers of epochs for a run that has begun: more than it was planned with, or fewer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import UserError
from ibpcore.experiments.run_folder import (
    CURVE,
    JOURNALS,
    VALIDATION,
    epochs_trained,
    saved_config,
)
from ibpcore.io.files import write_atomic
from ibpcore.io.journal import journal_files
from ibpcore.io.locks import LOCK, remove_temporaries
from ibpcore.training.config import TrainConfig
from ibpcore.training.loop import write_config


def with_epochs(run: Path, epochs: int) -> TrainConfig:
    """The configuration of a run with another number of epochs; nothing is written.

    The epsilon schedule keeps its epochs.

    Raises:
        UserError: the run has trained more epochs, or its warm-up has more.
    """
    config, trained = saved_config(run), epochs_trained(run)
    if epochs < trained:
        raise UserError(f"epochs must be at least {trained}, since {run} has trained so many")
    if epochs < config.warmup[1]:
        last = config.warmup[1]
        raise UserError(f"epochs must be at least {last}, where the warm-up of {run} ends")
    return replace(config, epochs=epochs)


def extend(run: Path, config: TrainConfig) -> Path | None:
    """Makes a run, whose lock this process holds, one of `config`, which is from `with_epochs`.

    If its training had ended, its files are first copied into the folder `epoch-N` in it, which
    is a run folder itself; this is returned. If this process is killed, the run is either as it
    was, or one of `config` that can be resumed.

    Raises:
        OSError: a file cannot be written; the run is as it was.
    """
    before, trained = saved_config(run), epochs_trained(run)
    if config == before:
        return None
    kept = run / f"epoch-{trained}" if trained == before.epochs else None
    if kept is not None:
        kept.mkdir(exist_ok=True)
        remove_temporaries(kept)
        for path in sorted(run.iterdir()):
            if path.is_file() and path.name != LOCK:
                write_atomic(kept / path.name, path.read_bytes())
    write_config(run, config)
    return kept


def discard_outdated(run: Path, config: TrainConfig) -> None:
    """Removes results of fewer epochs than `config` has, of which `extend` has kept copies.

    While training goes on there are no others.
    """
    if not epochs_trained(run) < config.epochs:
        return
    for name in (SUMMARY, VALIDATION, CERTIFICATES, CURVE):
        (run / name).unlink(missing_ok=True)
    for journal in JOURNALS.values():
        for path in journal_files(run / journal):
            path.unlink(missing_ok=True)
