"""The files of a run folder that training writes, and reads when it is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ibpcore.data.images import Dataset
from ibpcore.errors import REFUSED, UserError, first_line
from ibpcore.io.files import write_atomic
from ibpcore.nn.checkpoint import MODEL, save_model
from ibpcore.training.config import TrainConfig
from ibpcore.training.selection import best_epoch, chosen_epoch
from ibpcore.training.state import TrainState, load_state, save_state, whole_history

CONFIG, METRICS, STATE = "config.json", "metrics.jsonl", "resume.pt"
BEST = "best.safetensors"
START = "start.safetensors"
"""The model that a run started from, if it was a saved one."""


def saved_state(run: Path) -> dict[str, Any] | None:
    """The saved state; None if the run was interrupted before there was one.

    Raises:
        UserError, OSError: see `ibpcore.training.state.load_state`.
    """
    begun = any((run / name).exists() for name in (STATE, MODEL, METRICS))
    return load_state(run / STATE) if begun else None


def saved_history(run: Path) -> list[dict[str, Any]]:
    """The rows of the epochs after which the run would be resumed; none if it was never begun.

    Raises:
        UserError: the state is missing or damaged.
        OSError: it exists but cannot be read.
    """
    state = saved_state(run)
    if state is None:
        return []
    try:
        if whole_history(state["history"]) != state["epoch"]:
            raise ValueError("its epoch is not that of its history")
    except REFUSED as error:
        raise UserError(
            f"the saved state does not fit its configuration: {first_line(error)}"
        ) from None
    return list(state["history"])


def prepare(run: Path, state: TrainState, config: TrainConfig, dataset: Dataset, data: str) -> None:
    """Makes the files of the folder agree with `state`, of a new or a resumed run.

    `data` is the fingerprint of the data set. Raises OSError if a file cannot be written.
    """
    if state.epoch > 0:
        _write_outputs(run, state, config, dataset)
        return
    write_config(run, config)
    save_state(run / STATE, state.to_dict(config, data))


def write_config(run: Path, config: TrainConfig) -> None:
    """Writes `config.json`.

    Raises:
        OSError: it cannot be written; an old file is unchanged.
    """
    write_atomic(run / CONFIG, (json.dumps(config.to_dict(), indent=2) + "\n").encode())


def write_epoch(
    run: Path, state: TrainState, config: TrainConfig, dataset: Dataset, data: str
) -> None:
    """Writes the state after an epoch, then the files that `prepare` makes of it.

    Raises OSError if a file cannot be written.
    """
    save_state(run / STATE, state.to_dict(config, data))
    _write_outputs(run, state, config, dataset)


def _write_outputs(run: Path, state: TrainState, config: TrainConfig, dataset: Dataset) -> None:
    """Writes models and metrics, functions of the state."""
    chosen, best = chosen_epoch(state.history, config), best_epoch(state.history)
    for name, epoch in ((MODEL, chosen), (BEST, best)):
        if epoch is None:
            continue
        with state.weights_after(epoch):
            save_model(
                state.delivered,
                run / name,
                training=config.to_dict(),
                epochs_trained=epoch,
                dataset_title=dataset.title,
                classes=dataset.classes,
            )
    lines = "".join(json.dumps(row) + "\n" for row in state.history)
    write_atomic(run / METRICS, lines.encode())
