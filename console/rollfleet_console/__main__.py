"""``python -m rollfleet_console``: the same as the command ``rollfleet``."""

from rollfleet_console.cli import main

main()
