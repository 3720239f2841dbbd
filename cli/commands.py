"""The commands, and how their failures look: one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

BY_RANKS = ("train", "certify", "sweep")
"""What several processes can do together."""
OUT_OF_MEMORY = "the device is out of memory: try a smaller --batch-size or --width"
COMPLETE = "_IBP_COMPLETE"
"""The variable by which a shell asks for completions."""
BROKEN = (ImportError, OSError)
"""What the import of a package raises that is missing or broken."""


class Place(NamedTuple):
    """Where a command is, and the first sentence of its help."""

    module: str
    name: str
    summary: str


COMMANDS = {
    "attack": Place(
        "attack",
        "attack",
        "Attack certificates: try to prove them wrong, and bound the true radii from above.",
    ),
    "certify": Place(
        "certify",
        "certify",
        "Give every test image its certified radius, or every image of one's own.",
    ),
    "completion": Place("completion", "completion", "Print what makes a shell complete `ibp`."),
    "doctor": Place("doctor", "doctor", "Say what is installed and found, and try it out."),
    "export": Place(
        "export", "export", "Write a model, and what is to be verified of it, for other tools."
    ),
    "import": Place(
        "import_",
        "import_",
        "Make a model for all other commands of a checkpoint of another program.",
    ),
    "inspect": Place(
        "inspect", "inspect", "Measure whether the ground is firm that the theory stands on."
    ),
    "report": Place("report", "make_report", "Compare runs: the paper's tables and figures."),
    "sweep": Place("sweep", "sweep", "Train and certify a grid of runs: methods, kappas, seeds."),
    "train": Place(
        "train", "train", "Train a classifier, certify the test set, and write a run folder."
    ),
}


class Commands(click.Group):
    """The group of `COMMANDS`; a command is imported when it is called.

    They need torch, which takes seconds to import; help and completion need not wait.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            place = COMMANDS[cmd_name]
            try:
                module = import_module(f"ibpcore_cli.{place.module}")
            except BROKEN as error:
                raise click.ClickException(f"{error}; see: ibp doctor") from None
            self.add_command(getattr(module, place.name))
        return self.commands.get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.summary) for name, place in COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=place.summary)
            for name, place in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """The versions that a report of a bug should name."""
    if not value or ctx.resilient_parsing:
        return
    from ibpcore_cli.versions import versions

    try:
        lines = versions()
    except BROKEN as error:
        raise click.ClickException(f"{error}; see: ibp doctor") from None
    click.echo("\n".join(lines))
    ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of ibpcore, Python, torch and CUDA, and the device; and exit.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Train classifiers with a proof: for this image, no change of any pixel by at most
    epsilon can change the answer."""
    name = context.invoked_subcommand
    if name not in BY_RANKS and _ranks()[1] > 1:
        raise click.UsageError(f"ibp {name} is done by one process: start it without torchrun")


def load_all() -> dict[str, click.Command]:
    """Every command by its name, imported."""
    ctx = click.Context(cli)
    return {name: command for name in COMMANDS if (command := cli.get_command(ctx, name))}


def run() -> None:
    """Runs the command line and exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be such that they can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    rank = 0
    try:
        rank, _ = _ranks()
        # Without standalone mode click returns the exit code of --help and --version.
        arguments = sys.argv[1:] or ["--help"]
        sys.exit(cli.main(arguments, complete_var=COMPLETE, standalone_mode=False) or 0)
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            _leave_to_first(rank)
        _fail(error.format_message(), rank, error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except (ValueError, RuntimeError, MemoryError) as error:
        _fail(_explained(error, rank), rank)
    except BrokenPipeError:
        # The reader of a pipe went away; keep Python from complaining at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), rank)


def _ranks() -> tuple[int, int]:
    """Which of how many processes this is, of those that `torchrun` started."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    from ibpcore.distributed import ranks_of_environment

    ranks = ranks_of_environment()
    return ranks.rank, ranks.size


def _explained(error: Exception, rank: int) -> str:
    """One line for what a person can mend; any other error is raised again."""
    import torch

    from ibpcore import UserError
    from ibpcore.distributed import RankZeroFailedError

    if isinstance(error, RankZeroFailedError):
        _leave_to_first(rank)
    if isinstance(error, UserError):
        return str(error)
    # On the CPU torch has no class of its own for it.
    full = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if full or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    raise error


def _leave_to_first(rank: int) -> None:
    """Rank 0 says what failed on all. No failure here: `torchrun` would end it before it does."""
    if rank != 0:
        sys.exit(0)


def _fail(message: str, rank: int, code: int = 1) -> None:
    head = f"Error: rank {rank}: " if rank else "Error: "
    click.echo(head + " ".join(message.split()), err=True)
    sys.exit(code)
