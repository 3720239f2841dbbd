"""Entry point of `ibp`."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""Exit code that a shell expects after Ctrl-C."""


def main() -> None:
    """Runs the command line and exits."""
    try:
        # Imported here, so that Ctrl-C during the import is handled too.
        from ibpcore_cli.commands import run_commands

        run_commands()
    except KeyboardInterrupt:
        print("Error: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
