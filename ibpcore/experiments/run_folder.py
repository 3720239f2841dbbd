"""Files of a run folder, and whether it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import UserError
from ibpcore.io.files import read_json
from ibpcore.nn.checkpoint import MODEL
from ibpcore.training.config import TrainConfig
from ibpcore.training.run_files import CONFIG, METRICS, STATE

VALIDATION, CURVE = "validation.json", "certified_accuracy.png"
JOURNALS = {SUMMARY: "certificates.journal", VALIDATION: "validation.journal"}
"""Journal of the certificates that belong to a summary, until that is written."""


def is_begun(run: Path) -> bool:
    """Whether the folder contains a training state to resume."""
    return (run / STATE).exists()


def is_complete(run: Path, config: TrainConfig) -> bool:
    """Whether the folder contains all that `train_and_certify` writes with `config`.

    Raises:
        UserError: its configuration is damaged.
    """
    needed = [CONFIG, METRICS, MODEL, CERTIFICATES, SUMMARY]
    needed += [VALIDATION] * (config.validation > 0)
    whole = all((run / name).exists() for name in needed)
    cut_off = any((run / name).exists() for name in JOURNALS.values())
    return whole and not cut_off and saved_config(run) == config


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
