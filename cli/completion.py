"""`ibp completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from ibpcore_cli.commands import COMPLETE, cli

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print what makes a shell complete `ibp`.

    \b
    bash, in ~/.bashrc:   eval "$(ibp completion bash)"
    zsh, in ~/.zshrc:     eval "$(ibp completion zsh)"
    fish, once:           ibp completion fish > ~/.config/fish/completions/ibp.fish
    """
    made = get_completion_class(shell)
    assert made is not None  # click has all of SHELLS
    click.echo(made(cli, {}, "ibp", COMPLETE).source())
