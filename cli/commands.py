"""The group of commands, and how they fail: with one line and an exit code."""

from __future__ import annotations

import io
import os
import sys
from importlib import import_module
from keyword import iskeyword

import click
from click.shell_completion import CompletionItem

from ibpcore_cli.suggestions import unknown_command
from ibpcore_cli.work import BROKEN

BY_RANKS = ("train", "certify", "sweep")
"""Commands that can run in several processes together."""
OUT_OF_MEMORY = "the device is out of memory: try a smaller --batch-size or --width"
COMPLETE = "_IBP_COMPLETE"
"""Environment variable through which a shell asks for completions."""

COMMANDS = {
    "attack": "Attack certificates to refute them, and bound the true radii from above.",
    "certify": "Certify the test images of a data set: find the certified radius of each.",
    "completion": "Print the script by which a shell completes `ibp` commands.",
    "doctor": "Check the installation: packages, device and data sets, and a self-test.",
    "export": "Export a model to ONNX, VNN-LIB or the Hugging Face Hub.",
    "import": "Import a network that another program trained.",
    "inspect": "Check whether the assumptions of the theory hold for a model.",
    "predict": "Classify your own images, and certify each prediction.",
    "report": "Compare runs in the tables and figures of the paper.",
    "search": "Search for the settings with the best trade-offs between two measures.",
    "sweep": "Train and certify a grid of runs over methods, kappas and seeds.",
    "train": "Train a classifier, certify its test set, and write a run folder.",
    "verify": "Verify a VNN-LIB property of a network in an ONNX file, as VNN-COMP asks for it.",
}
"""The first sentence of the help of each command, by its name."""


class Commands(click.Group):
    """The group of `COMMANDS`; the options of each are imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*COMMANDS, *self.commands})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS and cmd_name not in self.commands:
            name = f"{cmd_name}_" if iskeyword(cmd_name) else cmd_name
            module = import_module(f"ibpcore_cli.options.{name}")
            self.add_command(getattr(module, f"{cmd_name}_command"))
        return self.commands.get(cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        option = args[0].startswith("-")
        if args[0] not in COMMANDS and not option and not ctx.resilient_parsing:
            ctx.fail(unknown_command(args[0], COMMANDS))
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*COMMANDS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        found = [
            CompletionItem(name, help=summary)
            for name, summary in COMMANDS.items()
            if name.startswith(incomplete)
        ]
        return found + click.Command.shell_complete(self, ctx, incomplete)


def show_version(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Prints the versions that a bug report should name, and exits."""
    if not value or ctx.resilient_parsing:
        return
    from ibpcore_cli.versions import version_lines

    try:
        lines = version_lines()
    except BROKEN as error:
        raise click.ClickException(f"{error}; see: ibp doctor") from None
    click.echo("\n".join(lines))
    ctx.exit()


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "-V",
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=show_version,
    help="Show the versions of ibpcore, Python, torch and CUDA and the device, and exit.",
)
@click.pass_context
def cli(context: click.Context) -> None:
    """Train image classifiers whose predictions can be certified: no change of any pixel by at
    most epsilon changes the prediction."""
    name = context.invoked_subcommand
    if name not in BY_RANKS and _ranks()[1] > 1:
        raise click.UsageError(f"ibp {name} runs in a single process: start it without torchrun")


def load_all() -> dict[str, click.Command]:
    """Every command by its name, imported."""
    ctx = click.Context(cli)
    return {name: command for name in COMMANDS if (command := cli.get_command(ctx, name))}


def run_commands() -> None:
    """Runs the command line and exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The names of files may hold bytes that cannot be printed.
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
    """The rank of this process, and the number of processes that `torchrun` started."""
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    from ibpcore.distributed import ranks_of_environment

    ranks = ranks_of_environment()
    return ranks.rank, ranks.size


def _explained(error: Exception, rank: int) -> str:
    """One line for an error that the user can fix; any other error is raised again."""
    from ibpcore.errors import RankZeroFailedError, UserError, is_out_of_memory

    if isinstance(error, RankZeroFailedError):
        _leave_to_first(rank)
    if isinstance(error, UserError):
        return str(error)
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    raise error


def _leave_to_first(rank: int) -> None:
    """Exits quietly on all ranks but 0, which reports an error that all have.

    The exit code is 0: at another one `torchrun` would end rank 0 before it reports.
    """
    if rank != 0:
        sys.exit(0)


def _fail(message: str, rank: int, code: int = 1) -> None:
    head = f"Error: rank {rank}: " if rank else "Error: "
    click.echo(head + " ".join(message.split()), err=True)
    sys.exit(code)
