"""What runs in vLLM's engine core: it ends with its client and reports why it failed.

vLLM's core waits for ever for a client that was killed, and holds the GPU as long. And what it
fails with it writes to its log alone. It is reached through the executor's class, which it gets
pickled and makes before it takes any memory.
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
    """Class of such classes; a pickle holds what they are made of."""

    made_of: tuple[type, str, int]


def tethered(base: type, report: str, owner: int | None = None) -> type:
    """Return the executor's class `base`, whose process ends with process `owner`, which is us.

    What vLLM logs with an exception is written to the file `report`.
    """
    owner = owner or os.getpid()

    def fill(members: dict[str, Any]) -> None:
        def begin(self: Any, *given: Any, **named: Any) -> None:
            _end_with(owner)
            logging.getLogger("vllm").addHandler(_Report(Path(report)))
            base.__init__(self, *given, **named)

        members["__init__"] = begin

    kind = types.new_class(base.__name__, (base,), {"metaclass": _Kind}, fill)
    assert isinstance(kind, _Kind), "its metaclass was given"
    kind.made_of = (base, report, owner)
    return kind


def _made_of(kind: _Kind) -> tuple[Any, tuple[type, str, int]]:
    return tethered, kind.made_of


copyreg.pickle(_Kind, _made_of)  # pyright: ignore[reportArgumentType]  # it takes classes of classes


class _Report(logging.Handler):
    """Writes down the last exception that was logged."""

    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        """Write, where there is an exception."""
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            self._path.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")


def _end_with(owner: int) -> None:
    if os.getpid() == owner:
        return
    die_with_parent()
    if os.getppid() != owner:
        os._exit(1)
