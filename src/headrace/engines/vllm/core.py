"""Code that runs in vLLM's engine core: it ends with its client and reports its failure.

Without it, vLLM's core waits without end for a client that was killed, and holds the GPU, as a rank
does that waits for another one; and their errors are only in their log. The code gets there with
the executor's class, which the core unpickles and instantiates before it takes any memory.
"""

from __future__ import annotations

import contextlib
import copyreg
import logging
import multiprocessing
import os
import types
from abc import ABCMeta
from pathlib import Path
from typing import Any

from headrace.machine import die_with_parent

RANK_REPORT = "HEADRACE_VLLM_RANK_REPORT"
_LOST = "died unexpectedly"


class _Kind(ABCMeta):
    """Metaclass of tethered executors, whose pickles have the arguments of `tethered`."""

    arguments: tuple[type, str, int]


def tethered(base: type, report: str, owner: int | None = None) -> type:
    """Return a subclass of the executor `base` whose process ends with the process `owner`.

    By default that is this one. Exceptions that vLLM logs are written to the file `report`.
    """
    owner = owner or os.getpid()

    def fill(members: dict[str, Any]) -> None:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            _end_with(owner)
            logging.getLogger("vllm").addHandler(_Report(Path(report)))
            # Ranks are started with the environment of the core.
            os.environ[RANK_REPORT] = str(_rank_report(Path(report)))
            base.__init__(self, *args, **kwargs)

        members["__init__"] = init

    kind = types.new_class(base.__name__, (base,), {"metaclass": _Kind}, fill)
    assert isinstance(kind, _Kind), "its metaclass was given"
    kind.arguments = (base, report, owner)
    return kind


def _reduce(kind: _Kind) -> tuple[Any, tuple[type, str, int]]:
    return tethered, kind.arguments


copyreg.pickle(_Kind, _reduce)  # pyright: ignore[reportArgumentType]  # it takes classes of classes


class Rank:
    """A base of vLLM's worker classes; a rank imports its module before it takes a GPU."""


def tether_rank() -> None:
    """Make this process end with the core that has started it, and report its first exception."""
    core = multiprocessing.parent_process()
    if core is None or (report := os.environ.get(RANK_REPORT)) is None:
        return
    die_with_parent()
    if not core.is_alive():
        os._exit(1)
    logging.getLogger("vllm").addHandler(_Report(Path(report), first=True))


class _Report(logging.Handler):
    """Writes the last logged exception to a file; with `first`, the first one of several processes.

    The end of a rank is logged without an exception; it is the cause of what is logged later.
    """

    def __init__(self, path: Path, *, first: bool = False) -> None:
        super().__init__(logging.ERROR)
        self._path = path
        self._first = first

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's exception, if it has one."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            _write(self._path, f"{type(error).__name__}: {error}", first=self._first)
        elif _LOST in (message := record.getMessage()):
            _write(_rank_report(self._path), message, first=True)


def _rank_report(report: Path) -> Path:
    return report.with_name(f"{report.name}-rank")


def _write(path: Path, text: str, *, first: bool) -> None:
    with (
        contextlib.suppress(FileExistsError),
        path.open("x" if first else "w", encoding="utf-8") as file,
    ):
        file.write(text)


def reported(report: Path) -> str:
    """Return the error of a rank, else that of the core; empty while they live."""
    for path in (_rank_report(report), report):
        with contextlib.suppress(OSError):
            return path.read_text(encoding="utf-8")
    return ""


def _end_with(owner: int) -> None:
    if os.getpid() == owner:
        return
    die_with_parent()
    if os.getppid() != owner:
        os._exit(1)
