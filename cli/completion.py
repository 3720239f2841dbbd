"""`ibp completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ibpcore_cli.commands import COMPLETE, cli

SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
def completion_command(shell: str) -> None:
    """Print the script by which a shell completes `ibp` commands.

    \b
    bash, in ~/.bashrc:   eval "$(ibp completion bash)"
    zsh, in ~/.zshrc:     eval "$(ibp completion zsh)"
    fish, once:           ibp completion fish > ~/.config/fish/completions/ibp.fish
    """
    completer = get_completion_class(shell)
    assert completer is not None  # click supports all of SHELLS
    click.echo(completer(cli, {}, "ibp", COMPLETE).source())
