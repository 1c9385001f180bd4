"""A node's service that outlives the agent that started it, and is adopted by the next.

The folder of a service has four files:

- `lock`: the service holds it for its life, so that there is one service for a folder;
- `record.json`: process, ports and configuration of the service, written once it listens;
- `agent`: the id of the agent whose service it is. Its time of change is the last word of that
  agent; a service without a word for `orphan_s` ends itself;
- `log`: what the service has written.

The lock alone shows whether a service runs. The agent that came last owns the folder; an older one
that still runs, or runs again, changes nothing.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import psutil

from headrace import __version__
from headrace.core.errors import ConfigError
from headrace.core.private import private_folder

State = Literal["starting", "running", "ending", "ended", "failed", "replaced"]

_LOCK_TRIES, _LOCK_EVERY_S = 20, 0.05
_START_S = 60.0
_FIRST_DELAY_S, _LONGEST_DELAY_S = 1.0, 30.0
_LOG_TAIL = 2000


class Wanted(NamedTuple):
    """The configuration that a service is to have: digest of its file, version of Headrace."""

    digest: str
    version: str = __version__


class Record(msgspec.Struct, frozen=True):
    """A service that runs: its process, where it listens, and its configuration."""

    pid: int
    digest: str
    version: str
    url: str
    wire: str


class Kept(NamedTuple):
    """The state of a service. `reason` is why it has failed, or is not what was wanted."""

    state: State
    reason: str = ""
    record: Record | None = None


_REPLACED = Kept("replaced", "another agent has this machine's service")


def digest_of(file: Path) -> str:
    """Return the digest of a configuration file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror or error}.") from error


class Folder:
    """The files of a service."""

    def __init__(self, path: Path) -> None:
        self.path = private_folder(path)
        self.lock = path / "lock"
        self.agent = path / "agent"
        self.log = path / "log"
        self._record = path / "record.json"

    def is_locked(self) -> bool:
        """Whether a service runs."""
        number = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(number, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(number)
        return False

    def record(self) -> Record | None:
        """Return the record of the service that runs; None while it does not listen yet."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None

    def starting_pid(self) -> int:
        """Return the process that holds the lock, or 0."""
        text = self.lock.read_text(encoding="utf-8").strip()
        return int(text) if text.isdecimal() else 0

    def begin(self) -> int:
        """Take the lock for this process, and return its descriptor, which holds it.

        Raises:
            ConfigError: another service has it.
        """
        number = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        for _ in range(_LOCK_TRIES):
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                # An agent that looks whether it is taken holds it for a moment.
                time.sleep(_LOCK_EVERY_S)
                continue
            self._record.unlink(missing_ok=True)
            os.truncate(number, 0)
            os.pwrite(number, str(os.getpid()).encode(), 0)
            return number
        os.close(number)
        raise ConfigError(f"A service runs in {self.path} already, process {self.starting_pid()}.")

    def publish(self, record: Record) -> None:
        """Write the record of this process, which holds the lock."""
        self._write(self._record, msgspec.json.encode(record))

    def claim(self, agent: str) -> None:
        """Make an agent the owner."""
        self._write(self.agent, agent.encode())

    def word(self, agent: str) -> bool:
        """Let the service have a word of its agent; return whether that is the owner."""
        try:
            is_owner = self.agent.read_text(encoding="utf-8") == agent
            if is_owner:
                os.utime(self.agent)
        except FileNotFoundError:
            return False
        return is_owner

    def last_word(self) -> int:
        """Return a number that is another after each word of an agent."""
        try:
            return self.agent.stat().st_mtime_ns
        except FileNotFoundError:
            return 0

    def log_tail(self) -> str:
        """Return the last line that the service has written."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL))
                lines = log.read(_LOG_TAIL).decode(errors="replace").splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else ""

    def _write(self, path: Path, content: bytes) -> None:
        fresh = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
        fresh.write_bytes(content)
        fresh.replace(path)


class Orphan:
    """Whether a service has been without a word of an agent for `orphan_s`.

    Words are noticed by this process's own clock: that of the machine may jump.
    """

    def __init__(
        self, folder: Folder, orphan_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._folder = folder
        self._orphan_s = orphan_s
        self._clock = clock
        self._last, self._heard = folder.last_word(), clock()

    def check(self) -> bool:
        """Return whether the service is to end."""
        word, now = self._folder.last_word(), self._clock()
        if word != self._last:
            self._last, self._heard = word, now
        return now - self._heard > self._orphan_s


class Keeper:
    """An agent's view of the service of its machine. `step` is called about once a second.

    `start` starts a service, and returns its process id; `ending_s` is the time to end.
    """

    def __init__(
        self,
        folder: Folder,
        agent: str,
        start: Callable[[], int],
        ending_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._agent = agent
        self._start = start
        self._ending_s = ending_s
        self._clock = clock
        self._started = 0
        self._delay_s = _FIRST_DELAY_S
        self._not_before = float("-inf")
        self._since: dict[State, float] = {}
        folder.claim(agent)

    def step(self, wanted: Wanted | None) -> Kept:
        """Adopt, start, replace or end the service: None wants none. Blocking, but brief.

        A step does one thing: what it leads to is seen by a later one.
        """
        if not self._folder.word(self._agent):
            return _REPLACED
        kept = self._locked(wanted) if self._folder.is_locked() else self._unlocked(wanted)
        if kept.state not in self._since:
            self._since = {kept.state: self._clock()}
        return kept

    def hold(self, reason: str) -> Kept:
        """Leave the service as it is, for a reason why it cannot be as it is wanted."""
        if not self._folder.word(self._agent):
            return _REPLACED
        is_running = self._folder.is_locked()
        return Kept("failed", reason, self._folder.record() if is_running else None)

    def _locked(self, wanted: Wanted | None) -> Kept:
        record = self._folder.record()
        if record is None:
            if self._lasted("starting") > _START_S:
                _signal(self._folder.starting_pid(), signal.SIGKILL)
            return Kept("starting")
        if wanted is None or (record.digest, record.version) != wanted:
            return self._end(record)
        self._started, self._delay_s = 0, _FIRST_DELAY_S
        return Kept("running", "", record)

    def _unlocked(self, wanted: Wanted | None) -> Kept:
        if self._started and _runs(self._started):
            if self._lasted("starting") > _START_S:
                _signal(self._started, signal.SIGKILL)
            return Kept("starting")
        if wanted is None:
            return Kept("ended")
        now = self._clock()
        if self._started:
            self._started = 0
            self._not_before = now + self._delay_s
            self._delay_s = min(_LONGEST_DELAY_S, 2 * self._delay_s)
        if now < self._not_before:
            return Kept("failed", f"it has ended: {self._folder.log_tail()}")
        self._started = self._start()
        self._since = {}
        return Kept("starting")

    def _end(self, record: Record) -> Kept:
        """Let the service drain, and end it if that takes too long."""
        lasted_s = self._lasted("ending")
        if "ending" not in self._since:
            _signal(record.pid, signal.SIGTERM)
        elif lasted_s > self._ending_s:
            _signal(record.pid, signal.SIGKILL)
        return Kept("ending", "", record)

    def _lasted(self, state: State) -> float:
        return self._clock() - self._since.get(state, self._clock())


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    if pid > 0:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return
