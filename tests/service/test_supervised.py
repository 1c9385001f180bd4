"""A service under a supervisor: readiness, signs of life, its end, a socket that was passed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from tests.service.serving import Service

WATCHDOG_S = 0.4


@contextmanager
def supervised(*command: str, home: Path, **variables: str) -> Iterator[Service]:
    """Run a command that serves, with variables of a supervisor."""
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"HEADRACE_HOME": str(home)} | variables,
        close_fds=False,
    )
    service = Service(process)
    try:
        yield service
    finally:
        process.kill()
        process.wait()
        service.close()


def test_the_supervisor_is_notified(tmp_path: Path) -> None:
    """Issue 15.5: READY=1 when it answers, WATCHDOG=1 while its loop runs, then STOPPING=1."""
    path = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(path))
        notify.settimeout(60)

        def until(line: str) -> list[str]:
            lines: list[str] = []
            while line not in lines:
                lines += notify.recv(4096).decode().splitlines()
            return lines

        variables = {"NOTIFY_SOCKET": str(path), "WATCHDOG_USEC": str(round(WATCHDOG_S * 1e6))}
        command = (sys.executable, "-m", "headrace", "serve", "echo", "--port", "0")
        with supervised(*command, home=tmp_path, **variables) as service:
            assert "STOPPING=1" not in until("READY=1")
            service.wait_until_it_listens()
            assert httpx.get(f"{service.url}/health/live").status_code == 200
            until("STATUS=Ready")
            for _ in range(3):
                until("WATCHDOG=1")
            service.process.send_signal(signal.SIGTERM)
            until("STOPPING=1")
            assert service.process.wait(60) == 0


def passing(listener: socket.socket, *flags: str) -> tuple[str, ...]:
    """Return a command that serves on a socket which it gets as file 3, as from systemd."""
    script = f"exec 3<&{listener.fileno()}; export LISTEN_PID=$$; exec "
    serve = f"{sys.executable} -m headrace serve echo {' '.join(flags)}"
    return "bash", "-c", script + serve


def test_it_serves_on_a_socket_that_it_is_passed(tmp_path: Path) -> None:
    """Issue 15.5: requests that come before the service has started are answered."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.set_inheritable(True)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        command = passing(listener, "--port", "1")
        with supervised(*command, home=tmp_path, LISTEN_FDS="1") as service:
            assert httpx.get(f"{url}/health/live", timeout=60).status_code == 200
            service.wait_until_it_listens()
            assert service.url == url


@pytest.mark.parametrize(
    ("host", "count", "error"),
    [("0.0.0.0", "1", "no API key is set"), ("127.0.0.1", "2", "passes 2 sockets")],
)
def test_a_socket_that_is_refused(tmp_path: Path, host: str, count: str, error: str) -> None:
    """Issue 15.5: a socket beyond loopback needs a key, whoever has opened it."""
    with socket.create_server((host, 0)) as listener:
        listener.set_inheritable(True)
        with supervised(*passing(listener), home=tmp_path, LISTEN_FDS=count) as service:
            assert service.process.wait(60) == 2
            service.close()
            assert error in service.log
