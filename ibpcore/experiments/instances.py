"""A benchmark folder as VNN-COMP has them: all its instances, verified one after another."""

from __future__ import annotations

import csv
import io
import math
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from ibpcore.errors import UserError, first_line, printable
from ibpcore.experiments.verification import RESULTS, VerificationOptions, verify
from ibpcore.io.compressed import plain_or_packed
from ibpcore.io.files import write_csv
from ibpcore.io.journal import check_settings
from ibpcore.progress import Watch, unwatched

ERROR = "error"
COLUMNS = ("onnx", "vnnlib", "timeout", "bound", "claim", "result", "seconds", "reason")
"""`reason` is what decided, what was left open, or what went wrong."""

Names = tuple[str, str]
"""ONNX and VNN-LIB file of an instance, relative to the folder of `instances.csv`."""
Row = dict[str, str]
"""A row of the results, by `COLUMNS`."""


def read_instances(path: Path) -> dict[Names, float]:
    """The instances in a file without a header, each with its seconds.

    Raises:
        UserError: it is missing or damaged, has no rows, or an instance twice.
        OSError: it cannot be read.
    """
    found: dict[Names, float] = {}
    for number, cells in enumerate(_cells(path), 1):
        try:
            onnx, vnnlib, seconds = (cell.strip() for cell in cells)
            timeout = float(seconds)
        except ValueError:
            timeout = math.nan
        if not (0 < timeout < math.inf and onnx and vnnlib):
            raise UserError(f"{path}: row {number} is not: ONNX file, VNN-LIB file, seconds")
        if found.setdefault((onnx, vnnlib), timeout) != timeout:
            raise UserError(f"{path}: row {number} repeats an instance with other seconds")
    if not found:
        raise UserError(f"{path} has no rows")
    return found


def read_results(path: Path) -> dict[Names, Row]:
    """The rows that `verify_instances` wrote; none if there is no file.

    Raises:
        UserError: it is no such file.
        OSError: it cannot be read.
    """
    if not path.exists():
        return {}
    header, *rows = _cells(path) or [[]]
    if tuple(header) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
        raise UserError(f"{path} holds something else than results: it is not overwritten")
    return {(row[0], row[1]): dict(zip(COLUMNS, row, strict=True)) for row in rows}


def _cells(path: Path) -> list[list[str]]:
    """The rows of a CSV file that are not empty."""
    if not path.is_file():
        raise UserError(f"{path} is missing, or not a file")
    try:
        text = io.StringIO(path.read_bytes().decode(), newline="")
        return [row for row in csv.reader(text, strict=True) if row]
    except (UnicodeDecodeError, csv.Error):
        raise UserError(f"{path} is damaged: it is not a CSV file") from None


def verify_instances(
    instances: Path,
    out: Path,
    options: VerificationOptions,
    device: torch.device | str = "cpu",
    watch: Watch = unwatched,
) -> list[Row]:
    """Verifies all instances of a benchmark; `out` always has the rows that are done.

    Instances that it already has are not verified again, unless they failed.

    Args:
        instances: see `read_instances`. Where a file exists only with `.gz` behind its name, that
            one is read.
        out: CSV file with `COLUMNS`, in an existing folder.
        options: a timeout replaces those of the instances.
        watch: reports the number of instances done.

    Returns:
        the rows of these instances.

    Raises:
        UserError: a file is damaged, or rows of `out` have other settings.
        OSError: a file cannot be read or written.
    """
    todo, rows = read_instances(instances), read_results(out)
    plans = {
        names: replace(options, timeout=options.timeout or seconds)
        for names, seconds in todo.items()
    }
    for names, plan in plans.items():
        if names in rows:
            check_settings(out, rows[names], _settings(plan))
    with watch("verifying", len(plans)) as advance:
        for done, (names, plan) in enumerate(plans.items(), 1):
            if names not in rows or rows[names]["result"] == ERROR:
                rows[names] = _row(instances.parent, names, plan, device)
                write_csv(out, COLUMNS, rows.values())
            if advance is not None:
                advance(done, tally(rows[names] for names in [*plans][:done]))
    return [rows[names] for names in plans]


def tally(rows: Iterable[Row]) -> list[str]:
    """How many rows have each result that occurs, such as "12 unsat" and "3 sat"."""
    counts = Counter(row["result"] for row in rows)
    return [f"{counts[name]} {name}" for name in (*RESULTS, ERROR) if counts[name]]


def _settings(options: VerificationOptions) -> Row:
    return {
        "timeout": repr(float(options.timeout or math.inf)),
        "bound": options.bound,
        "claim": options.claim,
    }


def _row(
    folder: Path, names: Names, options: VerificationOptions, device: torch.device | str
) -> Row:
    start = time.monotonic()
    onnx, vnnlib = (plain_or_packed(folder / name) for name in names)
    try:
        verdict = verify(onnx, vnnlib, options, device)
        result, reason = verdict.result, verdict.reason
    except Exception as error:  # whatever it is, the other instances go on
        result, reason = ERROR, printable(first_line(error))
    seconds = f"{time.monotonic() - start:.3f}"
    found = {"result": result, "seconds": seconds, "reason": reason}
    return {"onnx": names[0], "vnnlib": names[1], **_settings(options), **found}
