"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `headrace` and exit with its code."""
    from headrace.cli import streams
    from headrace.cli.app import run

    streams.prepare()
    sys.exit(run([streams.text(argument) for argument in sys.argv[1:]]))
