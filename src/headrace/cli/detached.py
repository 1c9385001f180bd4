"""A node that an agent of Ray has started: its lock, its record, and its end without an agent."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

from headrace import __version__
from headrace.cli import terminal
from headrace.cluster.detached import Folder, Orphan, Record, digest_of
from headrace.config import Settings

_EVERY_S = 1.0


class Detached:
    """Holds the lock of a folder while the node runs.

    Raises:
        ConfigError: another service holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Folder(folder)
        self._lock = self._folder.begin()
        self._over = threading.Event()
        self._wire = ""
        self._digest = ""

    def __enter__(self) -> Detached:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the lock."""
        self._over.set()
        os.close(self._lock)

    def listen(self, settings: Settings, wire: socket.socket) -> socket.socket:
        """Note what is served, and end the node once it has been without an agent for long."""
        host, port = wire.getsockname()[:2]
        self._wire = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._digest = digest_of(settings.file) if settings.file else ""
        orphan = Orphan(self._folder, settings.config.cluster.orphan_s)
        # Not on the event loop: a node that does not respond ends too.
        threading.Thread(target=self._watch, args=(orphan,), daemon=True).start()
        return wire

    def publish(self, url: str) -> None:
        """Write the record: requests are accepted."""
        record = Record(os.getpid(), self._digest, __version__, url, self._wire)
        self._folder.publish(record)

    def _watch(self, orphan: Orphan) -> None:
        while not self._over.wait(_EVERY_S):
            if orphan.check():
                terminal.note("Nothing of Ray has been heard for orphan_s: this node ends.")
                os.kill(os.getpid(), signal.SIGTERM)
                return
