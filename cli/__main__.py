"""`python -m ibpcore_cli`."""

from ibpcore_cli.main import main

main()
