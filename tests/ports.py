"""Ports of the loopback address for servers that have to know theirs before they start."""

from __future__ import annotations

import itertools
import os
import socket

_FIRST, _EACH = 12_000, 2_000
_counter = itertools.count(os.getpid())


def free_port() -> int:
    """Return a port that nobody listens on: another for each call, and for each process of a run.

    The system itself gives out higher ones, so that none of its can be this one meanwhile.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for number in itertools.islice(_counter, _EACH):
        port = _FIRST + worker % 10 * _EACH + number % _EACH
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                listener.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no port is free")
