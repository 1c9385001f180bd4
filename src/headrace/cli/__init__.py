"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import gc
import sys


def main() -> None:
    """Run `headrace` and exit with its code."""
    # Imports leave no garbage, and looking for it took 14 % of a start. `Common.settings` goes on.
    gc.disable()
    from headrace.cli import streams
    from headrace.cli.app import run

    streams.prepare()
    sys.exit(run([streams.text(argument) for argument in sys.argv[1:]]))
