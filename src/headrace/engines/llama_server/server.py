"""The server's process: its start, its log, its end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence

from headrace.core import confine
from headrace.core.errors import GenerationFailed, HeadraceError, WorkerDied
from headrace.engines.llamacpp.link import Link, failure

_TETHER = "headrace.engines.llama_server.tether"
_LINES = 200
# What it logs, some time later, of the request by which its grammars are tried while it loads.
_OF_TRIAL = re.compile("llguidance is not enabled|failed to launch slot with task, id_task = 0$")
_POLL_S, _DYING_S = 0.02, 1.0


class Server(Link):
    """A running server, which only this process can use, and which ends with it.

    With `shows_log`, its errors are written to stderr; the last lines are kept for errors.

    Raises:
        LoadFailed, OutOfMemory: with the server's reason.
    """

    def __init__(self, command: Sequence[str], name: str) -> None:
        super().__init__("llama-server-")
        self._tail: deque[str] = deque(maxlen=_LINES)
        self._process: subprocess.Popen[bytes] | None = None
        self._is_ready = self.shows_log = False
        self._ended = threading.Event()
        arguments = [*command, "--host", self.address]
        thread = threading.Thread(target=self._keep, args=(arguments,), name=name, daemon=True)
        thread.start()
        try:
            self._wait(name)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int | None:
        """The id of the process, None before its start."""
        return self._process.pid if self._process else None

    def close(self) -> None:
        """End the process, wait for its end, and remove the private directory. Idempotent."""
        if self._process is not None:
            self._process.kill()
            self._ended.wait()
        super().close()

    def _keep(self, arguments: Sequence[str]) -> None:
        """Start the process and follow its log until it ends."""
        passed = {name: v for name, v in os.environ.items() if not name.startswith("LLAMA_ARG_")}
        inherited = () if self.folder_fd is None else (self.folder_fd,)
        try:
            with subprocess.Popen(  # noqa: S603 - an executable of the user
                [sys.executable, "-P", "-m", _TETHER, *self._limits(), "--", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=inherited,
                # Arguments of a process are visible to all users.
                env=passed | {"LLAMA_API_KEY": self.key},
            ) as self._process:
                assert self._process.stdout is not None, "it is a pipe"
                for line in self._process.stdout:
                    self._take(line.decode(errors="replace"))
        except OSError as error:
            self._tail.append(str(error))
        finally:
            self._ended.set()

    @staticmethod
    def _limits() -> list[str]:
        return [str(os.getpid()), *confine.program_folders]

    def _take(self, line: str) -> None:
        line = line.rstrip()
        self._tail.append(line)
        if self.shows_log and not _OF_TRIAL.search(line):
            sys.stderr.write(f"{line}\n")

    def _wait(self, name: str) -> None:
        """Wait until the server answers."""
        while not self._ended.wait(_POLL_S):
            try:
                self.ask("/health")
            except HeadraceError:
                # It listens after a moment, and loads the model then.
                continue
            self._is_ready = True
            return
        raise failure(name, self._log or f"the server ended with exit code {self._code}")

    @property
    def _code(self) -> int | None:
        return self._process.returncode if self._process else None

    @property
    def _log(self) -> str:
        return "\n".join(self._tail).strip()

    def _lost(self, reason: str) -> HeadraceError:
        if self._is_ready and self._ended.wait(_DYING_S):
            code = self._code or 0
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            return WorkerDied(f"llama-server {how}.", detail=self._log or reason)
        return GenerationFailed("llama-server does not answer.", detail=reason)
