"""The folder that images were read from, remembered beside what was made of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ibpcore.choices import DATA_DIR_VARIABLE
from ibpcore.data.sources import usual_folder
from ibpcore.errors import UserError
from ibpcore.io.files import as_path, read_json, write_atomic

DATA, ENTRY = "data.json", "data_dir"
BUILT_IN = ("digits",)
"""Data sets that are read from no folder."""


def remember_data_dir(folder: Path, data_dir: Path, dataset: str) -> None:
    """Writes the absolute path of `data_dir` to `data.json` in `folder`, unless it is known there.

    Nothing is written for a data set that ships with the package.

    Raises:
        OSError: the file cannot be written.
    """
    content = json.dumps({ENTRY: os.path.abspath(data_dir)}, indent=2) + "\n"
    path = folder / DATA
    if dataset in BUILT_IN or (path.is_file() and path.read_text(errors="replace") == content):
        return
    write_atomic(path, content.encode())


def data_dir_for(given: str | Path | None, *folders: Path) -> Path:
    """`given`, else what the first of `folders` remembers, else IBP_DATA_DIR, else `data`.

    Raises:
        UserError: `given` is no path, the remembered folder is gone, or `data.json` is damaged.
    """
    if given is not None:
        return as_path(given, "the data sets")
    path = next((folder / DATA for folder in folders if (folder / DATA).exists()), None)
    if path is None:
        return usual_folder()
    values = read_json(path)
    name = values.get(ENTRY) if isinstance(values, dict) else None
    if not isinstance(name, str) or "\0" in name:
        raise UserError(f"{path} is damaged: it names no folder")
    if not Path(name).is_dir():
        if DATA_DIR_VARIABLE in os.environ:
            return usual_folder()
        raise UserError(
            f"the images were read from {name}, as {path} says, which is gone: give --data-dir"
        )
    return Path(name)
