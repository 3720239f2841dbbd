"""Files of a run folder, and whether it is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import REFUSED, UserError
from ibpcore.experiments.data_folder import DATA
from ibpcore.io.files import read_json
from ibpcore.nn.checkpoint import MODEL, load_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig
from ibpcore.training.run_files import CONFIG, METRICS, START, STATE
from ibpcore.training.selection import is_over
from ibpcore.training.state import whole_history

VALIDATION, CURVE = "validation.json", "certified_accuracy.png"
JOURNALS = {SUMMARY: "certificates.journal", VALIDATION: "validation.journal"}
"""Journal of the certificates that belong to a summary, until that is written."""


BEGUN = (DATA, START)
"""Files that may be there before `config.json` is, if the run was killed just then."""


def is_begun(run: Path) -> bool:
    """Whether the folder contains a training state to resume."""
    return (run / STATE).exists()


def is_complete(run: Path, config: TrainConfig) -> bool:
    """Whether the folder contains all that `train_and_certify` writes with `config`.

    Raises:
        UserError: its configuration or its metrics are damaged.
    """
    needed = [CONFIG, METRICS, MODEL, CERTIFICATES, SUMMARY]
    needed += [VALIDATION] * (config.validation > 0)
    whole = all((run / name).exists() for name in needed)
    cut_off = any((run / name).exists() for name in JOURNALS.values())
    if not whole or cut_off or saved_config(run) != config:
        return False
    # The files may still be those of fewer epochs, see `ibpcore.experiments.extension`.
    return is_over(metrics_of(run), config)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`.

    Raises:
        UserError: it is missing or damaged.
    """
    path = run / METRICS
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        whole_history(rows)
    except REFUSED:
        raise UserError(f"{path} is damaged: it does not hold the metrics of a run") from None
    return rows


def starting_model(run: Path, config: TrainConfig) -> Classifier | None:
    """The saved model that the run started from; None if it began with a new network.

    Raises:
        UserError: its file is missing or damaged.
    """
    return None if config.start is None else load_model(run / START)


def saved_config(run: Path) -> TrainConfig:
    """Reads the training configuration from a run folder.

    Raises:
        UserError: it is missing or damaged, see also `read_json`.
    """
    if not (run / CONFIG).exists():
        raise UserError(f"there is no run in {run}: {run / CONFIG} is missing")
    return config_from(read_json(run / CONFIG), run / CONFIG)


def config_from(values: Any, path: Path) -> TrainConfig:
    """The training configuration in `values`, which were read from `path`.

    Raises:
        UserError: they are not a valid configuration.
    """
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it is not a training configuration")
    try:
        return TrainConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
