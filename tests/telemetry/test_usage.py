"""What was used is counted exactly, by several processes, whatever happens to the file."""

from __future__ import annotations

import json
import logging
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from headrace.core.errors import ConfigError
from headrace.core.metrics import DeviceUse, InferenceMetrics
from headrace.core.metrics import Usage as Tokens
from headrace.core.record import RequestRecord, UsageFilter
from headrace.telemetry import usage
from headrace.telemetry.usage import Amounts, Usage, read, total

NOON = 1_772_366_400.0  # 2026-03-01 12:00 UTC


def gpu(joules: float | None) -> DeviceUse:
    memory = {"total": 9, "used": 5, "worker_used": 3, "worker_mean": 2, "worker_peak": 3}
    return DeviceUse(name="cuda:0", joules=joules, **memory)


def record(
    *,
    at: float = NOON,
    tokens: tuple[int, int, int, int] = (7, 3, 5, 2),
    queue_ms: float | None = 10.0,
    devices: tuple[DeviceUse, ...] = (),
    **given: Any,
) -> RequestRecord:
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
    metrics = InferenceMetrics(
        started_at=at,
        queue_ms=queue_ms,
        load_ms=200.0,
        total_ms=1210.0,
        usage=Tokens(**dict(zip(names, tokens, strict=True))),
        devices=devices,
    )
    known: dict[str, Any] = {"operation": "chat", "model": "echo", "outcome": "ok"}
    return RequestRecord(id="i", trace_id="t", time=at, metrics=metrics, **{**known, **given})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "home" / usage.FILE


@contextmanager
def counting(path: Path, every_s: float = 0.02) -> Iterator[Usage]:
    made = Usage(path, every_s=every_s)
    try:
        yield made
    finally:
        made.close()


def until(true: Callable[[], object]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def written(path: Path) -> int:
    return total(read(path, ["day"])).requests


def test_the_sums_are_those_of_the_requests(path: Path) -> None:
    """By hand: tokens, outcomes, seconds of the engine, joules of all devices."""
    with counting(path) as sink:
        sink.record(record(devices=(gpu(1.5), gpu(2.0), gpu(None))))
        sink.record(record(outcome="error", error="WorkerDied"))
        sink.record(record(outcome="cancelled", tokens=(1, 0, 0, 0)))
        sink.record(record(outcome="refused", queue_ms=None, tokens=(0, 0, 0, 0)))
    (line,) = read(path, ["day", "model", "key", "operation"])
    assert line.group == {"day": "2026-03-01", "model": "echo", "key": "-", "operation": "chat"}
    assert line.amounts == Amounts(
        requests=4,
        failed=1,
        refused=1,
        cancelled=1,
        prompt_tokens=15,
        cached_tokens=6,
        completion_tokens=10,
        reasoning_tokens=4,
        seconds=3.0,
        joules=3.5,
    )


def test_groups_and_filters(path: Path) -> None:
    """By any of day, key, model, operation; the total is the same however it is told."""
    with counting(path) as sink:
        for model in ("a", "b"):
            for client in ("", "k1", "k2"):
                for day in range(3):
                    sink.record(record(model=model, client=client, at=NOON + 86400 * day))
        sink.record(record(model="a", operation="embeddings"))
    groups = (["day"], ["model"], ["key", "day"], ["operation", "model", "key", "day"])
    assert [len(read(path, by)) for by in groups] == [3, 2, 9, 19]
    assert {total(read(path, by)).requests for by in groups} == {19}
    assert [line.group["key"] for line in read(path, ["key"])] == ["-", "k1", "k2"]
    assert total(read(path, ["day"], UsageFilter(model="b"))).requests == 9
    assert total(read(path, ["day"], UsageFilter(key="-"))).requests == 7
    of_a_day = UsageFilter(since="2026-03-02", until="2026-03-02")
    assert total(read(path, ["model"], of_a_day)).requests == 6
    assert read(path, ["day"], UsageFilter(model="b' OR 1 --")) == ()


def test_a_day_begins_at_midnight_of_utc(path: Path) -> None:
    """It is that on which the request was received."""
    midnight = NOON + 43_200
    with counting(path) as sink:
        sink.record(record(at=midnight - 0.001))
        sink.record(record(at=midnight))
        sink.record(record(at=1_709_164_800.0))  # a leap day
    days = [line.group["day"] for line in read(path, ["day"])]
    assert days == ["2024-02-29", "2026-03-01", "2026-03-02"]


def test_joules_that_nobody_knows_are_none(path: Path) -> None:
    """They take nothing from those that are known, before or after."""
    for given in ((gpu(None),), (gpu(2.0),), (), (gpu(3.0),)):
        with counting(path) as sink:
            sink.record(record(devices=given))
            sink.record(record(model="unknown", devices=(gpu(None),)))
    known, unknown = read(path, ["model"])
    assert (known.amounts.joules, unknown.amounts.joules) == (5.0, None)


def test_names_that_are_not_served_make_no_rows(path: Path) -> None:
    """Anybody can ask for any name."""
    with counting(path) as sink:
        for number in range(50):
            asked = record(model=f"m{number}", outcome="refused", error="UnknownModel")
            sink.record(asked)
    (line,) = read(path, ["model"])
    assert (line.group["model"], line.amounts.refused) == ("_other", 50)


def test_it_is_written_soon_and_while_it_is_read(path: Path) -> None:
    """Nothing is counted twice; nobody else may read the files."""
    with counting(path) as sink:
        for number in range(1, 4):
            sink.record(record())
            until(lambda number=number: written(path) == number)
        with closing(sqlite3.connect(path)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT * FROM usage").fetchall()
            sink.record(record())
            until(lambda: written(path) == 4)
            modes = {one.name: one.stat().st_mode & 0o777 for one in path.parent.iterdir()}
            assert set(modes.values()) == {0o600}
            assert len(modes) == 3
    assert repr(sink) == f"<Usage {path}, well, 0 rows not written>"
    sink.close()


WRITER = """
import sys
from pathlib import Path
from tests.telemetry.test_usage import record
from headrace.telemetry.usage import Usage

path, name, many = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
sink = Usage(path, every_s=0.01)
done = 0
while done != many:
    for _ in range(50):
        sink.record(record(client=name))
        sink.record(record(client="both"))
    done += 1
    print(done, flush=True)
    sys.stdin.readline()
sink.close()
"""


def writer(path: Path, name: str, rounds: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(rounds)]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def never(done: int) -> bool:
    return False


def finish(process: subprocess.Popen[str], enough: Callable[[int], bool] = never) -> None:
    """Let it go on, until it has ended or done enough."""
    assert process.stdin
    assert process.stdout
    for line in process.stdout:
        process.stdin.write("\n")
        process.stdin.flush()
        if enough(int(line)):
            # It goes on by itself, and dies in the middle of its work.
            process.stdin.write("\n" * 10_000)
            process.stdin.flush()
            return


def test_several_processes_write_at_once_and_one_is_killed(path: Path) -> None:
    """All is counted; of the one that is killed all but its last moments, and nothing is broken."""
    whole = [writer(path, f"k{number}", 20) for number in range(3)]
    killed = writer(path, "dead", -1)
    threads = [threading.Thread(target=finish, args=(one,)) for one in whole]
    for thread in threads:
        thread.start()
    finish(killed, lambda done: done > 20 and bool(read(path, ["key"], UsageFilter(key="dead"))))
    killed.send_signal(signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert killed.stdout
    counted = 50 * (1 + max(map(int, killed.stdout.read().split()), default=10_000))
    for process in (killed, *whole):
        process.communicate()
    found = {line.group["key"]: line.amounts for line in read(path, ["key"])}
    assert [found[f"k{number}"].requests for number in range(3)] == [1000] * 3
    assert found["k0"].prompt_tokens == 7000
    assert found["k0"].seconds == pytest.approx(1000)
    assert 0 < found["dead"].requests <= counted
    assert found["both"].requests == 3000 + found["dead"].requests
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


def test_a_locked_file_is_waited_for(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One warning; what was counted is kept and written when it can be."""
    usage.add(path, {})
    with counting(path) as sink, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        began = time.monotonic()
        sink.record(record())
        assert time.monotonic() - began < 0.5
        until(lambda: "failing" in repr(sink))
        sink.record(record())
        other.execute("COMMIT")
        until(lambda: written(path) == 2)
        until(lambda: "well" in repr(sink))
    assert warned(caplog) == ["headrace.usage.not_written"]


def test_a_file_that_is_none_costs_nothing_else(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Corrupt: it stays as it is, one warning, and what was counted is written once it can be."""
    path.parent.mkdir()
    path.write_bytes(b"no database " * 1000)
    with counting(path) as sink:
        sink.record(record())
        until(lambda: "failing" in repr(sink))
        sink.record(record())
        with pytest.raises(ConfigError, match="not a database"):
            read(path, ["day"])
        assert path.read_bytes() == b"no database " * 1000
        path.unlink()
        until(lambda: written(path) == 2)
    assert warned(caplog) == ["headrace.usage.not_written"]


def test_a_place_that_cannot_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What is kept in memory is bounded; closing does not hang."""
    (tmp_path / "file").write_text("")
    sink = Usage(tmp_path / "file" / usage.FILE, every_s=0.01)
    for number in range(usage._MOST_ROWS + 500):
        sink.record(record(model=f"m{number}"))
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 5
    assert repr(sink).endswith(f"failing, {usage._MOST_ROWS} rows not written>")
    assert warned(caplog) == ["headrace.usage.not_written"]


FULL = """
import resource, sys
from pathlib import Path
from headrace.telemetry import usage

path = Path(sys.argv[1])
usage.add(path, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
many = {(day, "k" * 100, "m", "chat", "live"): usage.Amounts(requests=1) for day in range(5000)}
try:
    usage.add(path, many)
except Exception as error:
    print(type(error).__name__)
usage.add(path, dict(list(many.items())[:3]))
print(usage.total(usage.read(path, ["day"])).requests)
"""


def test_a_full_disk_leaves_what_was_there(path: Path) -> None:
    """All or nothing is added; and it goes on where there is room."""
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    kind, count = done.stdout.split()
    assert issubclass(getattr(sqlite3, kind), sqlite3.Error)
    assert count == "3"


def test_a_file_of_a_newer_version_is_left_alone(path: Path) -> None:
    usage.add(path, {})
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
    with pytest.raises(ConfigError, match="newer Headrace"):
        usage.add(path, {(1, "-", "m", "chat", "live"): Amounts(requests=1)})
    with pytest.raises(ConfigError, match="newer Headrace"):
        read(path, ["day"])


def test_requests_of_batches_are_counted_apart(path: Path) -> None:
    """Issue 14.6: by priority."""
    with counting(path) as sink:
        for is_batch in (True, False, True):
            sink.record(record(batch=is_batch))
    rows = {row.group["priority"]: row.amounts for row in read(path, ["priority"])}
    assert {name: amounts.requests for name, amounts in rows.items()} == {"batch": 2, "live": 1}
    assert written(path) == 3


OLD = """
CREATE TABLE usage (day TEXT NOT NULL, client TEXT NOT NULL, model TEXT NOT NULL,
operation TEXT NOT NULL, requests INTEGER NOT NULL, failed INTEGER NOT NULL,
refused INTEGER NOT NULL, cancelled INTEGER NOT NULL, prompt_tokens INTEGER NOT NULL,
cached_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
reasoning_tokens INTEGER NOT NULL, seconds REAL NOT NULL, joules REAL,
PRIMARY KEY (day, client, model, operation)) WITHOUT ROWID;
INSERT INTO usage VALUES ('2026-03-01', '-', 'echo', 'chat', 3, 1, 0, 0, 9, 0, 8, 0, 1.5, 2.5);
PRAGMA user_version = 1;
"""


def test_a_file_of_the_first_version(path: Path) -> None:
    """It is read as it is, and gets the priority when something is added; nothing is lost."""
    path.parent.mkdir()
    with closing(sqlite3.connect(path)) as database:
        database.executescript(OLD)
    (row,) = read(path, ["day", "priority"])
    assert row.group == {"day": "2026-03-01", "priority": "live"}
    assert (row.amounts.requests, row.amounts.joules) == (3, 2.5)
    with counting(path) as sink:
        sink.record(record(batch=True))
        sink.record(record())
    live, batch = sorted(
        read(path, ["priority"]), key=lambda row: row.amounts.requests, reverse=True
    )
    assert (live.group, live.amounts.requests, live.amounts.joules) == (
        {"priority": "live"},
        4,
        2.5,
    )
    assert (batch.group, batch.amounts.requests) == ({"priority": "batch"}, 1)


def test_nothing_is_there_yet(path: Path) -> None:
    """No file, or one that another process has only begun, is no failure."""
    assert read(path, ["day"]) == ()
    path.parent.mkdir()
    path.touch()
    assert read(path, ["day"]) == ()
    assert json.dumps(total(()).requests) == "0"


def test_it_does_not_work_without_requests(path: Path) -> None:
    """No file is made, and the thread waits."""
    with counting(path, every_s=0.001):
        time.sleep(0.05)
    assert not path.exists()
