"""What a run folder holds, and whether it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import UserError
from ibpcore.io.files import read_json
from ibpcore.training.config import TrainConfig
from ibpcore.training.loop import CONFIG, METRICS, MODEL, STATE

VALIDATION = "validation.json"


CURVE = "certified_accuracy.png"


JOURNALS = {SUMMARY: "certificates.journal", VALIDATION: "validation.journal"}
"""What is certified is recorded there until the summary is written."""


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
