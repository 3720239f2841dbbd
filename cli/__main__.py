"""`python -m ibpcore_cli`, which is how torchrun starts commands."""

import os
import sys

from ibpcore_cli.main import main

try:
    main()
except SystemExit as end:
    if "WORLD_SIZE" not in os.environ:
        raise
    # Threads that gloo leaves behind may abort the shutdown of the interpreter, and with it the
    # exit code. All files are closed by now.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.code if isinstance(end.code, int) else 0)
