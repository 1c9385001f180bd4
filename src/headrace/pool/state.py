"""The state file: changes that an operator made to models, kept between runs of a service."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from headrace.core.errors import ConfigError
from headrace.core.private import private_folder, write_atomically

_log = logging.getLogger("headrace.pool")


class Remembered(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The changes to one model.

    `reference` is set if the model is not in the configuration. `changes` are the changed
    settings. `loaded` is whether it was last loaded or unloaded; None if neither.
    """

    reference: str | None = None
    changes: dict[str, Any] = {}
    loaded: bool | None = None

    def merged(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        """Return the changes with new ones; a table of adapters replaces single ones."""
        replaced = "adapters" in changes
        left = {
            key: value
            for key, value in self.changes.items()
            if not (replaced and key.startswith("adapters."))
        }
        return {**left, **changes}


class _Document(msgspec.Struct, frozen=True):
    models: dict[str, Remembered]
    version: Literal[1] = 1


class StateFile:
    """The state file of one service, locked while it is open; without a path, in memory only.

    If it cannot be written, a warning is logged and the changes are not kept.

    Raises:
        ConfigError: another service uses the file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._models: dict[str, Remembered] = {}
        self._written: dict[str, Remembered] | None = None
        self._lock = -1 if path is None else _locked(path)
        if self._lock < 0:
            self.path = None
        if self.path is not None:
            self._models = self._written = _read(self.path)

    def __repr__(self) -> str:
        """Describe the path."""
        return f"<StateFile {self.path}>"

    def read(self) -> dict[str, Remembered]:
        """Return the changes by model name."""
        return dict(self._models)

    def write(self, models: Mapping[str, Remembered]) -> None:
        """Replace all changes atomically; blocks until they are on the disk."""
        self._models = dict(models)
        if self.path is None or self._models == self._written:
            return
        try:
            data = msgspec.json.encode(_Document(self._models), order="sorted")
            write_atomically(self.path, data)
            self._written = self._models
        except OSError as error:
            _log.warning("Changes to models are not kept: %s: %s", self.path, error.strerror)

    def close(self) -> None:
        """Unlock the file. Idempotent."""
        if self._lock >= 0:
            os.close(self._lock)
        self._lock, self.path = -1, None


def _locked(path: Path) -> int:
    """Return a descriptor that holds the lock; -1 if it cannot be made."""
    # Not the file itself, which is replaced at each write.
    beside = path.with_name(f"{path.name}.lock")
    descriptor = -1
    try:
        private_folder(path.parent)
        descriptor = os.open(beside, os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise ConfigError(
                f"Another service keeps its state in {path}; give this one another port, or a "
                "file of its own with `server.state`.",
                param="state",
            ) from None
        _log.warning("Changes to models will not be kept: %s: %s", beside, error.strerror)
        return -1
    return descriptor


def _read(path: Path) -> dict[str, Remembered]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Document).models
    except FileNotFoundError:
        return {}
    except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
        aside = path.with_name(f"{path.name}.damaged")
        _log.warning("%s is damaged (%s); it is kept as %s", path, error, aside.name)
        try:
            path.replace(aside)
        except OSError as again:
            _log.warning("%s cannot be moved: %s", path, again.strerror)
        return {}
