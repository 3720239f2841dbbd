"""Entry point of `ibp`."""

from __future__ import annotations

import sys

INTERRUPTED = 130
"""Exit code that a shell expects after Ctrl-C."""


def main() -> None:
    """Runs the command line and exits."""
    try:
        # Only now: torch takes seconds to import, and Ctrl-C may come meanwhile.
        from ibpcore_cli.commands import run

        run()
    except KeyboardInterrupt:
        print("Error: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
