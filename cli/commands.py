"""The commands, and how their failures look: one line and an exit code."""

from __future__ import annotations

import io
import os
import sys

import click
import torch

import ibpcore
from ibpcore import UserError
from ibpcore_cli.attack import attack
from ibpcore_cli.certify import certify
from ibpcore_cli.import_ import import_
from ibpcore_cli.inspect import inspect
from ibpcore_cli.report import make_report
from ibpcore_cli.sweep import sweep
from ibpcore_cli.train import train

OUT_OF_MEMORY = "the device is out of memory: try a smaller --batch-size or --width"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(ibpcore.__version__, message="ibpcore %(version)s")
def cli() -> None:
    """Train classifiers with a proof: for this image, no change of any pixel by at most
    epsilon can change the answer."""


cli.add_command(train)
cli.add_command(certify)
cli.add_command(attack)
cli.add_command(sweep)
cli.add_command(make_report)
cli.add_command(inspect)
cli.add_command(import_)


def run() -> None:
    """Runs the command line and exits."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files need not be such that they can be printed.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        # Without standalone mode click returns the exit code of --help and --version.
        sys.exit(cli.main(sys.argv[1:] or ["--help"], standalone_mode=False) or 0)
    except click.ClickException as error:
        _fail(error.format_message(), error.exit_code)
    except click.Abort:
        raise KeyboardInterrupt from None
    except UserError as error:
        _fail(str(error))
    except (torch.OutOfMemoryError, MemoryError):
        _fail(OUT_OF_MEMORY)
    except RuntimeError as error:
        # On the CPU torch has no class of its own for it.
        if "can't allocate memory" not in str(error):
            raise
        _fail(OUT_OF_MEMORY)
    except BrokenPipeError:
        # The reader of a pipe went away; keep Python from complaining at shutdown.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _fail(message: str, code: int = 1) -> None:
    click.echo("Error: " + " ".join(message.split()), err=True)
    sys.exit(code)
