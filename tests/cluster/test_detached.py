"""Services that outlive their agents: adopted, replaced and ended; each is a process of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from headrace.cluster.detached import Folder, Keeper, Kept, Orphan, Record, Wanted, digest_of
from headrace.core.errors import ConfigError

NEW, OLD = Wanted("new"), Wanted("old")
# What `headrace cluster node --record` does, without the time to import it.
SERVICE = """
import fcntl, json, os, sys, signal
folder, digest, version = sys.argv[1:]
lock = os.open(folder + "/lock", os.O_RDWR | os.O_CREAT)
fcntl.flock(lock, fcntl.LOCK_EX)
if os.path.exists(folder + "/record.json"): os.unlink(folder + "/record.json")
os.truncate(lock, 0)
os.write(lock, str(os.getpid()).encode())
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
record = {"pid": os.getpid(), "digest": digest, "version": version}
record |= {"url": "http://x", "wire": "10.0.0.1:5"}
open(folder + "/new", "w").write(json.dumps(record))
os.rename(folder + "/new", folder + "/record.json")
signal.pause()
"""
SECOND = """
import sys
from pathlib import Path
from headrace.cluster.detached import Folder
Folder(Path(sys.argv[1])).begin()
"""


class Machine:
    """The folder of a machine, and the processes that its agents have started."""

    def __init__(self, folder: Path) -> None:
        self.folder = Folder(folder)
        self.digest = "new"
        self.code = SERVICE
        self.flags: tuple[str, ...] = ("-I", "-S")
        self.now = 0.0
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self) -> int:
        words = [str(self.folder.path), self.digest, NEW.version]
        with self.folder.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, *self.flags, "-c", self.code, *words], stderr=log
            )
        self.started.append(process)
        return process.pid

    def keeper(self, name: str, ending_s: float = 30.0) -> Keeper:
        return Keeper(self.folder, name, self.start, ending_s, lambda: self.now)

    def until(self, keeper: Keeper, state: str, wanted: Wanted | None = NEW) -> Kept:
        """Step until a state is reached; time goes on by a second with each."""
        end = time.monotonic() + 30
        while (kept := keeper.step(wanted)).state != state:
            assert time.monotonic() < end, kept
            for process in self.started:
                process.poll()
            time.sleep(0.01)
        return kept


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "service")
    yield made
    for process in made.started:
        process.kill()
        process.wait()


def test_the_next_agent_adopts_the_service(machine: Machine) -> None:
    """Issue 15.3: started once; adopted by the next agent, which is then its only owner."""
    first = machine.keeper("first")
    record = machine.until(first, "running").record
    assert record is not None
    assert (record.pid, record.wire) == (machine.started[0].pid, "10.0.0.1:5")
    second = machine.keeper("second")
    assert second.step(NEW) == Kept("running", "", record)
    # The first goes on after it was stopped: it changes nothing, whatever it wants.
    assert first.step(OLD).state == "replaced"
    assert first.step(None).state == "replaced"
    assert first.hold("x").state == "replaced"
    assert second.step(NEW) == Kept("running", "", record)
    assert len(machine.started) == 1


def test_a_service_that_dies_is_started_again(machine: Machine) -> None:
    """Issue 15.3: at first after a second, then later and later, with what it has written."""
    keeper = machine.keeper("agent")
    machine.until(keeper, "running")
    machine.started[0].kill()
    machine.started[0].wait()
    machine.code = "raise SystemExit('error: no such model')"
    machine.until(keeper, "failed")
    kept = keeper.step(NEW)
    assert kept == Kept("failed", "it has ended: error: no such model")
    before = len(machine.started)
    machine.now += 0.9
    keeper.step(NEW)
    assert len(machine.started) == before
    machine.now += 0.2
    keeper.step(NEW)
    assert len(machine.started) == before + 1
    machine.until(keeper, "failed")
    machine.now += 1.5
    assert keeper.step(NEW).state == "failed"
    machine.code = SERVICE
    machine.now += 1.0
    machine.until(keeper, "running")


def test_another_configuration_replaces_the_service(machine: Machine) -> None:
    """Issue 15.3: it drains first; a service that does not end is ended."""
    keeper = machine.keeper("first")
    machine.until(keeper, "running")
    machine.digest = "old"
    record = machine.until(keeper, "running", OLD).record
    assert record is not None
    assert record.digest == "old"
    assert machine.started[0].wait(10) == 0
    # One that stands still gets the signal, and `ending_s`.
    os.kill(record.pid, signal.SIGSTOP)
    assert keeper.step(None).state == "ending"
    machine.now += 31
    machine.until(keeper, "ended", None)
    assert machine.started[1].wait(10) == -signal.SIGKILL
    assert keeper.step(None).state == "ended"


def test_what_cannot_be_replaced_is_left_running(machine: Machine) -> None:
    """Issue 15.3: where the new file has not been copied, the node goes on with the old one."""
    keeper = machine.keeper("agent")
    record = machine.until(keeper, "running").record
    assert keeper.hold("another file") == Kept("failed", "another file", record)
    assert psutil.pid_exists(machine.started[0].pid)


def test_one_service_for_a_folder(machine: Machine) -> None:
    """Two services would book the same memory twice: the second does not start."""
    machine.until(machine.keeper("agent"), "running")
    with pytest.raises(ConfigError, match=f"already, process {machine.started[0].pid}"):
        Folder(machine.folder.path).begin()
    machine.code, machine.flags = SECOND, ()
    machine.start()
    assert machine.started[1].wait(30) == 1
    assert b"already" in machine.folder.log.read_bytes()


def test_a_service_that_never_listens_is_ended(machine: Machine) -> None:
    """Whether or not it was this agent that has started it."""
    machine.code = SERVICE.replace("os.rename", "signal.pause()  #")
    first = machine.keeper("first")
    first.step(NEW)
    end = time.monotonic() + 30
    while not machine.folder.is_locked() or not machine.folder.starting_pid():
        assert time.monotonic() < end
        time.sleep(0.01)
    second = machine.keeper("second")
    assert second.step(NEW).state == "starting"
    machine.code = SERVICE
    machine.now += 61
    second.step(NEW)
    assert machine.started[0].wait(10) == -signal.SIGKILL
    machine.until(second, "running")


def test_an_orphan(tmp_path: Path) -> None:
    """Issue 15.3: without a word for `orphan_s` it ends; the machine's time does not matter."""
    folder, now = Folder(tmp_path / "s"), [0.0]
    folder.claim("agent")
    orphan = Orphan(folder, 10.0, lambda: now[0])
    for second in range(30):
        now[0] = second
        assert folder.word("agent")
        # The clock of the machine jumps by a day, back and forth.
        os.utime(folder.agent, (second, 1e9 + 86400 * (second % 2) + second))
        assert not orphan.check()
    now[0] += 10.1
    folder.word("another")
    assert orphan.check()
    folder.claim("another")
    assert not orphan.check()


def test_the_digest(tmp_path: Path) -> None:
    """Issue 15.3: of what the file has; a file that is missing is named."""
    file = tmp_path / "headrace.toml"
    with pytest.raises(ConfigError, match=r"headrace\.toml: No such file"):
        digest_of(file)
    file.write_text("a = 1")
    first = digest_of(file)
    file.write_text("a = 2")
    assert digest_of(file) != first


def test_a_record_that_is_damaged(tmp_path: Path) -> None:
    """A torn or foreign file is none, as that of a service that does not listen yet."""
    folder = Folder(tmp_path / "s")
    assert folder.record() is None
    for content in (b"", b"{", b"[]", b'{"pid": "x"}'):
        (folder.path / "record.json").write_bytes(content)
        assert folder.record() is None
    record = Record(1, "d", "v", "http://x", "x:1")
    folder.publish(record)
    assert folder.record() == record
