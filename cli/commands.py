"""The commands, and how their failures look: one line and an exit code."""

from __future__ import annotations

import io
import os
import sys

import click
import torch

import ibpcore
from ibpcore import UserError
from ibpcore.ranks import ALONE, FirstFailedError, Ranks, ranks_of_environment
from ibpcore_cli.attack import attack
from ibpcore_cli.certify import certify
from ibpcore_cli.export import export
from ibpcore_cli.import_ import import_
from ibpcore_cli.inspect import inspect
from ibpcore_cli.report import make_report
from ibpcore_cli.sweep import sweep
from ibpcore_cli.train import train

BY_RANKS = ("train", "certify", "sweep")
"""What several processes can do together."""
OUT_OF_MEMORY = "the device is out of memory: try a smaller --batch-size or --width"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ibpcore.__version__, message="ibpcore %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train classifiers with a proof: for this image, no change of any pixel by at most
    epsilon can change the answer."""
    name = context.invoked_subcommand
    if name not in BY_RANKS and ranks_of_environment().size > 1:
        raise click.UsageError(f"ibp {name} is done by one process: start it without torchrun")


cli.add_command(train)
cli.add_command(certify)
cli.add_command(attack)
cli.add_command(sweep)
cli.add_command(make_report)
cli.add_command(inspect)
cli.add_command(export)
cli.add_command(import_)


def run() -> None:
    """Runs the command line and exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be such that they can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    ranks = ALONE
    try:
        ranks = ranks_of_environment()
        # Without standalone mode click returns the exit code of --help and --version.
        sys.exit(cli.main(sys.argv[1:] or ["--help"], standalone_mode=False) or 0)
    except click.ClickException as error:
        if isinstance(error, click.UsageError):
            _leave_to_first(ranks)
        _fail(error.format_message(), ranks, error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except FirstFailedError:
        _leave_to_first(ranks)
    except UserError as error:
        _fail(str(error), ranks)
    except (torch.OutOfMemoryError, MemoryError):
        _fail(OUT_OF_MEMORY, ranks)
    except RuntimeError as error:
        # On the CPU torch has no class of its own for it.
        if "can't allocate memory" not in str(error):
            raise
        _fail(OUT_OF_MEMORY, ranks)
    except BrokenPipeError:
        # The reader of a pipe went away; keep Python from complaining at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error), ranks)


def _leave_to_first(ranks: Ranks) -> None:
    """Rank 0 says what failed on all. No failure here: `torchrun` would end it before it does."""
    if not ranks.first:
        sys.exit(0)


def _fail(message: str, ranks: Ranks, code: int = 1) -> None:
    head = "Error: " if ranks.first else f"Error: rank {ranks.rank}: "
    click.echo(head + " ".join(message.split()), err=True)
    sys.exit(code)
