"""What `ibp completion` does."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ibpcore_cli.commands import COMPLETE, cli


def carry_out(shell: str) -> None:
    completer = get_completion_class(shell)
    assert completer is not None  # click supports all of SHELLS
    click.echo(completer(cli, {}, "ibp", COMPLETE).source())
