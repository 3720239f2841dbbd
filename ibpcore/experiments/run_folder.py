"""Files of a run folder, and whether it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ibpcore.certification.certificates import CERTIFICATES, SUMMARY
from ibpcore.errors import UserError
from ibpcore.experiments.data_folder import DATA
from ibpcore.io.files import read_json
from ibpcore.nn.checkpoint import load_model
from ibpcore.nn.networks import Classifier
from ibpcore.training.config import TrainConfig
from ibpcore.training.loop import CONFIG, METRICS, MODEL, START, STATE
from ibpcore.training.state import load_state

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
        UserError: its configuration or its summary is damaged.
    """
    needed = [CONFIG, METRICS, MODEL, CERTIFICATES, SUMMARY]
    needed += [VALIDATION] * (config.validation > 0)
    whole = all((run / name).exists() for name in needed)
    cut_off = any((run / name).exists() for name in JOURNALS.values())
    if not whole or cut_off or saved_config(run) != config:
        return False
    # The results may still be those of another number, see `ibpcore.experiments.extension`.
    summary = read_json(run / SUMMARY)
    return not isinstance(summary, dict) or summary.get("epochs") in (None, config.epochs)


def epochs_trained(run: Path) -> int:
    """The number of epochs after which the run would be resumed; 0 if it was never begun.

    Raises:
        UserError: its state is missing or damaged.
    """
    if not any((run / name).exists() for name in (STATE, MODEL, METRICS)):
        return 0
    epoch = load_state(run / STATE).get("epoch")
    if type(epoch) is not int or epoch < 0:
        reason = "its epoch is no number of epochs"
        raise UserError(f"the saved state does not fit its configuration: {reason}")
    return epoch


def saved_config(run: Path) -> TrainConfig:
    """Reads the training configuration from a run folder.

    Raises:
        UserError: it is missing or damaged, see also `read_json`.
    """
    if not (run / CONFIG).exists():
        raise UserError(f"there is no run in {run}: {run / CONFIG} is missing")
    return config_from(read_json(run / CONFIG), run / CONFIG)


def starting_model(run: Path, config: TrainConfig) -> Classifier | None:
    """The saved model that the run started from; None if it began with a new network.

    Raises:
        UserError: its file is missing or damaged.
    """
    return None if config.start is None else load_model(run / START)


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
