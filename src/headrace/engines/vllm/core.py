"""Code that runs in vLLM's engine core: it ends with its client and reports its failure.

Without it, vLLM's core waits without end for a client that was killed, and holds the GPU; and its
errors are only in its log. The code gets there with the executor's class, which the core unpickles
and instantiates before it takes any memory.
"""

from __future__ import annotations

import copyreg
import logging
import os
import types
from abc import ABCMeta
from pathlib import Path
from typing import Any

from headrace.machine import die_with_parent


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
            base.__init__(self, *args, **kwargs)

        members["__init__"] = init

    kind = types.new_class(base.__name__, (base,), {"metaclass": _Kind}, fill)
    assert isinstance(kind, _Kind), "its metaclass was given"
    kind.arguments = (base, report, owner)
    return kind


def _reduce(kind: _Kind) -> tuple[Any, tuple[type, str, int]]:
    return tethered, kind.arguments


copyreg.pickle(_Kind, _reduce)  # pyright: ignore[reportArgumentType]  # it takes classes of classes


class _Report(logging.Handler):
    """Writes the last logged exception to a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record's exception, if it has one."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._path.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _end_with(owner: int) -> None:
    if os.getpid() == owner:
        return
    die_with_parent()
    if os.getppid() != owner:
        os._exit(1)
