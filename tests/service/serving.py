"""Runs `headrace serve` as a user would, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

import httpx
import psutil
from tests.conftest import MODEL_HOME


class Service:
    """A running service: its URL, its process, what it has written to stderr and stdout."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.url = ""
        self._follow = [
            threading.Thread(target=self._read, args=(stream,), daemon=True)
            for stream in (process.stdout, process.stderr)
        ]
        for thread in self._follow:
            thread.start()

    def _read(self, stream: Iterator[str]) -> None:
        for line in stream:
            self.lines.append(line)

    @property
    def log(self) -> str:
        return "".join(self.lines)

    def wait_until_it_listens(self, within_s: float = 120) -> None:
        end = time.monotonic() + within_s
        while time.monotonic() < end and self.process.poll() is None:
            if found := re.search(r"on (http://\S+)", self.log):
                self.url = found[1]
                return
            time.sleep(0.02)
        raise AssertionError(f"it does not listen:\n{self.log}")

    def wait_until_ready(self, within_s: float = 120) -> None:
        end = time.monotonic() + within_s
        with httpx.Client(base_url=self.url) as client:
            while (left := end - time.monotonic()) > 0 and self.process.poll() is None:
                # A service that gets no time on a busy machine answers late.
                with suppress(httpx.TimeoutException):
                    if client.get("/health/ready", timeout=left).status_code == 200:
                        return
                time.sleep(0.02)
        raise AssertionError(f"it is not ready:\n{self.log}")

    def children(self) -> list[psutil.Process]:
        """All processes that it has started, with those that they have started."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def workers(self) -> list[psutil.Process]:
        """The processes of models, without those that render and compile for them."""
        return psutil.Process(self.process.pid).children()

    def close(self) -> None:
        for thread in self._follow:
            thread.join(5)
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def served(
    *arguments: str,
    ready: bool = True,
    environment: dict[str, str] | None = None,
    port: int = 0,
    command: Sequence[str] = ("serve",),
) -> Iterator[Service]:
    """Serve on a free port unless told otherwise; the models are those of the test home.

    `environment` is given as settings, without the prefix HEADRACE_.
    """
    more = {"HOME": str(MODEL_HOME)} | (environment or {})
    process = subprocess.Popen(
        [sys.executable, "-m", "headrace", *command, *arguments, "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=os.environ | {f"HEADRACE_{key}": value for key, value in more.items()},
    )
    service = Service(process)
    try:
        service.wait_until_it_listens()
        if ready:
            service.wait_until_ready()
        yield service
    finally:
        left = service.children() if process.poll() is None else []
        process.kill()
        process.wait()
        service.close()
        for child in left:
            if child.is_running():
                child.kill()
