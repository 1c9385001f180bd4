"""Records which source files run and how async generators are stacked; see house.py.

Copied as `sitecustomize.py` into a directory of PYTHONPATH, it is loaded by every Python process
that a service starts. The file named by PYTHON_HOUSE_PROBE holds one byte: 0 while nothing is
recorded, otherwise the number of a window. Each process appends lines to a file of
its own beside it.
"""

from __future__ import annotations

import inspect
import mmap
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

MARK = f"{os.sep}headrace{os.sep}"
"""What the path of every source file of Headrace contains."""

STREAMING = 255
"""The window in which stacked generators are counted instead of files."""


def stacked(frame: FrameType | None) -> list[str]:
    """Return the async generators of Headrace that run in this thread, the outermost first."""
    names: list[str] = []
    while frame is not None:
        code = frame.f_code
        if code.co_flags & inspect.CO_ASYNC_GENERATOR and MARK in code.co_filename:
            names.append(f"{Path(code.co_filename).stem}.{code.co_qualname}")
        frame = frame.f_back
    return names[::-1]


def recorder(window: Callable[[], int], write: Callable[[str], object]) -> Any:
    """Return a profile function that writes each finding once in a window."""
    written: set[tuple[int, str]] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or MARK not in name or not (number := window()):
            return
        finding = " > ".join(stacked(frame)) if number == STREAMING else name.rpartition(MARK)[2]
        if finding and (number, finding) not in written:
            written.add((number, finding))
            write(f"{number}\t{finding}\n")

    return profile


def install(switch: str) -> None:
    """Record in all threads of this process."""
    with open(switch, "rb") as file:  # noqa: PTH123 - every process pays for what it imports
        state = mmap.mmap(file.fileno(), 1, access=mmap.ACCESS_READ)
    findings = open(f"{switch}.{os.getpid()}", "a", buffering=1)  # noqa: PTH123, SIM115
    profile = recorder(lambda: state[0], findings.write)
    threading.setprofile(profile)
    sys.setprofile(profile)


if "PYTHON_HOUSE_PROBE" in os.environ:
    install(os.environ["PYTHON_HOUSE_PROBE"])
