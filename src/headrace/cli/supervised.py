"""What a supervisor such as systemd passes to a service, and is notified of.

systemd's `Type=notify`: datagrams to NOTIFY_SOCKET, signs of life for WATCHDOG_USEC, and sockets
that it has opened (LISTEN_FDS). Without these variables nothing is sent and no socket is passed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Mapping

from headrace.core.errors import ConfigError

_FIRST_SOCKET = 3


class Supervisor:
    """The supervisor that the environment names."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        path = environ.get("NOTIFY_SOCKET", "")
        # A name that begins with @ is of Linux' abstract namespace.
        self._address = f"\0{path[1:]}" if path.startswith("@") else path
        self._every_s = _interval_s(environ)

    def send(self, *lines: str) -> None:
        """Send lines such as `READY=1`; a message that cannot be sent is dropped."""
        if not self._address:
            return
        message = "\n".join(lines).encode()
        with (
            contextlib.suppress(OSError),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify,
        ):
            notify.setblocking(False)
            notify.sendto(message, self._address)

    async def watch(self) -> None:
        """Send signs of life while the event loop runs, if the supervisor expects them."""
        while self._every_s:
            self.send("WATCHDOG=1")
            await asyncio.sleep(self._every_s)


def _interval_s(environ: Mapping[str, str]) -> float:
    """Return half of the time within which a sign of life is expected, or 0 for none."""
    if not _is_own(environ.get("WATCHDOG_PID", "")):
        return 0.0
    with contextlib.suppress(ValueError):
        return max(0, int(environ.get("WATCHDOG_USEC", "0"))) / 2e6
    return 0.0


def _is_own(pid: str) -> bool:
    """Whether a variable is for this process and not for one that has started it."""
    return pid in {"", str(os.getpid())}


def passed_socket(environ: Mapping[str, str]) -> socket.socket | None:
    """Return the socket that the supervisor listens on for this process, if there is one.

    Raises:
        ConfigError: there are several, or it is none for TCP.
    """
    count = environ.get("LISTEN_FDS", "0")
    if count == "0" or environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    if count != "1":
        raise ConfigError(f"LISTEN_FDS: the supervisor passes {count} sockets; one is expected.")
    os.set_inheritable(_FIRST_SOCKET, False)
    try:
        listener = socket.socket(fileno=_FIRST_SOCKET)
    except OSError as error:
        raise ConfigError(f"LISTEN_FDS: {error.strerror or error}.") from error
    is_tcp = listener.family in {socket.AF_INET, socket.AF_INET6}
    if not is_tcp or listener.type != socket.SOCK_STREAM:
        listener.close()
        raise ConfigError("LISTEN_FDS: the socket is none for TCP.")
    return listener
