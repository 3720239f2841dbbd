"""The command line in this process, held to its promises."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any
from unittest import mock

from ibpcore_cli.main import main

ERRORS = ("strict", "backslashreplace")


def run_ibp(argv: list[str]) -> str:
    """Runs `ibp ARGV`; stdout accepts UTF-8 only, as a terminal does.

    Returns:
        the error message; empty if there is none.

    Raises:
        AssertionError: the exit code is not 0, 1 or 2, or the error message not one line.
    """
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=e) for e in ERRORS)
    with (
        mock.patch.object(sys, "argv", ["ibp", *argv]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
    err.seek(0)
    said = err.read()
    assert code in (0, 1, 2), f"exit code {code}: {argv}"
    if not code:
        return ""
    assert said.startswith("Error: "), f"{said}: {argv}"
    assert len(said.splitlines()) == 1, f"{said}: {argv}"
    return said.strip()
