"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run `headrace` and exit with its code."""
    from headrace.cli.app import run

    sys.exit(run(sys.argv[1:]))
