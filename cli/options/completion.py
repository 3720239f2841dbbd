"""Options of `ibp completion`."""

from __future__ import annotations

from typing import Any

import click

from ibpcore_cli.decorators import GroupedCommand
from ibpcore_cli.work import call

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", cls=GroupedCommand)
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(**given: Any) -> None:
    """Print the script by which a shell completes `ibp` commands.

    \b
    bash, in ~/.bashrc:   eval "$(ibp completion bash)"
    zsh, in ~/.zshrc:     eval "$(ibp completion zsh)"
    fish, once:           ibp completion fish > ~/.config/fish/completions/ibp.fish
    """
    call("completion", given)
