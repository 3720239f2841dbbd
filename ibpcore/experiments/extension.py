"""Other numbers of epochs for a run that has begun: more than it was planned with, or fewer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import UserError
from ibpcore.experiments.run_folder import (
    CURVE,
    JOURNALS,
    VALIDATION,
    saved_config,
)
from ibpcore.io.files import write_atomic
from ibpcore.io.journal import journal_files
from ibpcore.io.locks import LOCK, remove_temporaries
from ibpcore.training.config import TrainConfig
from ibpcore.training.run_files import saved_history, write_config
from ibpcore.training.selection import is_over


def with_epochs(config: TrainConfig, epochs: int, history: Sequence[dict[str, Any]]) -> TrainConfig:
    """`config` with another number of epochs, of a run with that `history`.

    The epsilon schedule keeps its epochs; the learning rate begins its schedule anew, which
    `extended_at` records.

    Raises:
        UserError: the run has trained more epochs, its warm-up has more, or its patience is
            exhausted.
    """
    trained = len(history)
    if epochs < trained:
        raise UserError(f"epochs must be at least {trained}, since so many are trained already")
    if epochs < config.warmup[1]:
        raise UserError(f"epochs must be at least {config.warmup[1]}, where the warm-up ends")
    if epochs == config.epochs:
        return config
    extended_at = (*config.extended_at, trained) if trained else ()
    other = replace(config, epochs=epochs, extended_at=tuple(dict.fromkeys(extended_at)))
    if epochs > config.epochs and is_over(history, other):
        raise UserError(
            f"epochs must be at most {config.epochs}: the patience of the run ended after epoch"
            f" {trained}"
        )
    return other


def extend(run: Path, config: TrainConfig) -> Path | None:
    """Makes a run, whose lock this process holds, one of `config`, which is from `with_epochs`.

    If its training had ended, its files are first copied into the folder `epoch-N` in it, which
    is a run folder itself; this is returned. If this process is killed, the run is either as it
    was, or one of `config` that can be resumed.

    Raises:
        OSError: a file cannot be written; the run is as it was.
    """
    before, history = saved_config(run), saved_history(run)
    if config == before:
        return None
    kept = run / f"epoch-{len(history)}" if is_over(history, before) else None
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
    if is_over(saved_history(run), config):
        return
    for name in (SUMMARY, VALIDATION, CERTIFICATES, CURVE):
        (run / name).unlink(missing_ok=True)
    for journal in JOURNALS.values():
        for path in journal_files(run / journal):
            path.unlink(missing_ok=True)
