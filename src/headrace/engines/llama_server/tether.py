"""Become a program that ends with the process that started it, and is confined.

    python -P -m headrace.engines.llama_server.tether PARENT [FOLDER ...] -- PROGRAM [ARGUMENT ...]

PARENT is the process to end with (Linux; strictly, the thread of it that started this). With
folders, the program changes files nowhere else and has no TCP.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from headrace.core import confine
from headrace.machine import die_with_parent


def main(arguments: list[str]) -> None:
    """Replace this process by the program."""
    limits, command = arguments[: arguments.index("--")], arguments[arguments.index("--") + 1 :]
    parent, *folders = limits
    die_with_parent()
    if os.getppid() != int(parent):
        return
    if folders:
        try:
            confine.restrict(map(Path, folders))
        except OSError as error:
            sys.stderr.write(f"It is not confined: {error}\n")
    try:
        os.execv(command[0], command)  # noqa: S606 - an executable of the user
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
