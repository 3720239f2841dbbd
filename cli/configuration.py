"""Training configurations in files: TOML, or JSON such as the `config.json` of a run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ibpcore import UserError
from ibpcore.certification.formatting import exact_text
from ibpcore.errors import first_line
from ibpcore.training.config import (
    FORMER_SETTINGS,
    LEFT_OUT,
    RECORDED,
    SIZES,
    STARTED,
    TrainConfig,
    check_names,
    check_used,
    is_cnn7,
    make_config,
    value_in_file,
)

if sys.version_info >= (3, 11):
    import tomllib

LARGEST_FILE = 2**20
STEP_SIZES = (*SIZES, "model", "architecture", "start", "batch_size", "image_size")
BY_SIZES = {
    "threads": STEP_SIZES,
    "accumulate": STEP_SIZES,
    "compile": (*STEP_SIZES, "epochs", "limit_train", "validation", "train_bound"),
}
"""Settings that are chosen by others if they are left out, and what they then depend on."""


def configured(
    path: Path, dataset: str | None, method: str | None, given: dict[str, Any]
) -> TrainConfig:
    """The configuration in a file, with the settings that are given in its place.

    Settings of the file that differ from the presets are kept; the others follow the data
    set, the method and the epochs that are given. So with a run's `config.json`, which names
    every setting, the warm-up keeps its share of other epochs, and another method gets its
    own presets, and steps of another size get other numbers of threads and of parts. Whether
    to compile is chosen anew for another length of the run, too.

    Raises:
        UserError: see `read_settings`, or a setting in the file or given is not allowed.
        OSError: the file cannot be read.
    """
    settings = read_settings(path)
    own_dataset = settings.pop("dataset", dataset or "digits")
    own_method = settings.pop("method", method or "acert")
    try:
        preset = make_config(own_dataset, own_method).to_dict()
        if not is_cnn7(settings):
            # The config.json of a run names all settings, also those of a CNN7.
            settings = {n: v for n, v in settings.items() if n not in SIZES or v != preset[n]}
        own = make_config(own_dataset, own_method, **settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    changed = {name: v for name, v in own.to_dict().items() if v != preset[name]}
    if own.warmup == make_config(own_dataset, own_method, epochs=own.epochs).warmup:
        changed.pop("warmup", None)
    for name, sizes in BY_SIZES.items():
        if dataset not in (None, own_dataset) or not given.keys().isdisjoint((*sizes, "preset")):
            changed.pop(name, None)
    if given.get("start") is not None:  # instead of the network of the file
        changed = {name: v for name, v in changed.items() if name not in (*SIZES, *STARTED)}
    config = make_config(dataset or own_dataset, method or own_method, **{**changed, **given})
    try:
        check_used(changed, [config.method])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a file, by names of fields of `TrainConfig`; TOML unless it is *.json.

    Raises:
        UserError: it is damaged, or names unknown settings, or is TOML on Python 3.10.
        OSError: it cannot be read.
    """
    settings = read_values(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} describes no training: it holds no named settings")
    passed_over = (*FORMER_SETTINGS, *RECORDED)
    settings = {name: value for name, value in settings.items() if name not in passed_over}
    try:
        check_names(settings)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    found = {name: value_in_file(name, value) for name, value in settings.items()}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}


def read_values(path: Path) -> Any:
    """What is in a TOML file, or in a JSON file if it is called *.json.

    Raises:
        UserError: it is damaged or too large, or TOML on Python 3.10.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(LARGEST_FILE + 1)
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path} is too large for a configuration")
    kind = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = content.decode()
        if kind == "JSON":
            return json.loads(text)
        if sys.version_info >= (3, 11):
            return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not {kind}: {first_line(error)}") from None
    raise UserError(f"{path}: reading TOML takes Python 3.11; a file called *.json is read as JSON")


def to_toml(config: TrainConfig) -> str:
    """All settings, so that `read_settings` gives them back."""
    settings = {name: v for name, v in config.to_dict().items() if name not in RECORDED}
    epsilon_max = exact_text(config.epsilon_max)
    if "/" in epsilon_max:  # as it was typed; other radii are numbers
        settings["epsilon_max"] = epsilon_max
    return "".join(f"{name} = {_toml(value)}\n" for name, value in settings.items())


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # TOML writes strings, booleans and numbers as JSON does.
    return json.dumps(LEFT_OUT if value is None else value, ensure_ascii=False)
