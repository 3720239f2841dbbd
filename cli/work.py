"""The work of a command, which is imported, and torch with it, when the command runs."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import click

from ibpcore.errors import printable
from ibpcore_cli.progress import clear_progress

BROKEN = (ImportError, OSError)
"""What importing a missing or broken package raises."""


def call(module: str, given: dict[str, Any]) -> None:
    """Calls `carry_out` of `ibpcore_cli.MODULE` with the values of a command's options.

    If torch is imported by then, it computes with the processors that it may use, until the
    command ends.

    Raises:
        ClickException: a package cannot be imported.
    """
    try:
        carry_out = import_module(f"ibpcore_cli.{module}").carry_out
    except BROKEN as error:
        raise click.ClickException(f"{error}; see: ibp doctor") from None
    if "torch" in sys.modules:
        from ibpcore.threads import computing_with, suitable_threads

        click.get_current_context().with_resource(computing_with(suitable_threads()))
    with warnings.catch_warnings():
        warnings.showwarning = _print_warning  # a line that says no more than what is wrong
        carry_out(**given)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    clear_progress()
    click.echo(f"Warning: {printable(str(message))}", err=True)
