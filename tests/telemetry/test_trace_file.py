"""What is written of requests: whole lines, by several processes, never more than the limit."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import ROOT
from tests.telemetry.traced import NOW, record

from headrace.core.record import Content, RequestRecord
from headrace.telemetry import trace_file
from headrace.telemetry.trace_file import CURRENT, TraceFile, renamed_files
from headrace.telemetry.trace_read import records

BEGIN = """
import logging, sys
from pathlib import Path
from tests.telemetry.traced import record
from headrace.telemetry import trace_file
from headrace.telemetry.trace_file import TraceFile
logging.basicConfig(format="%(message)s")
folder = Path(sys.argv[1])
"""
WRITER = """
traces = TraceFile(folder, int(sys.argv[2]))
for number in range(2000):
    traces.record(record(number, client=sys.argv[3]))
traces.close(60)
assert not traces.dropped
"""
FULL_DISK = """
import resource, time
trace_file._AGAIN_S = 0.05
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
traces = TraceFile(folder, 1 << 20)
for number in range(30):
    traces.record(record(number))
file, end = folder / "requests.jsonl", time.monotonic() + 20
while not (file.exists() and file.stat().st_size == 10_000) and time.monotonic() < end:
    time.sleep(0.05)
time.sleep(0.2)
print(file.stat().st_size)
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
traces.record(record(30))
traces.close(30)
"""


def start(program: str, *arguments: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + program, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def files(folder: Path) -> list[Path]:
    """All of them, oldest first."""
    return [*renamed_files(folder), folder / CURRENT]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def numbers(folder: Path) -> list[int]:
    """The requests that are kept, oldest first."""
    return [round(one.metrics.started_at - NOW) for one in records(folder)][::-1]


def until(told: Callable[[], object], within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while not told():
        assert time.monotonic() < end
        time.sleep(0.01)


def write(folder: Path, *given: RequestRecord, limit: int = 1 << 20) -> None:
    traces = TraceFile(folder, limit)
    for one in given:
        traces.record(one)
    traces.close(30)


def test_that_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """T4: figures, parameters, outcome, spans; readable by nobody else."""
    whole = record(3, content=Content(input="why", answered=("because\n",)), error="X", message="m")
    folder = tmp_path / "home" / "traces"
    write(folder, record(2), whole)
    newest, before = records(folder)
    assert before == record(2)
    parameters = {**whole.parameters, "stop": ["\n\n"]}
    assert newest == record(3, content=whole.content, error="X", message="m", parameters=parameters)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / CURRENT).stat().st_mode) == 0o600


@pytest.mark.parametrize("limit", [64 << 20, 1 << 20], ids=["all", "rotated"])
def test_that_several_processes_lose_nothing(tmp_path: Path, limit: int) -> None:
    """T4: four write while they rotate; each line is whole, and only the oldest are gone."""
    writers = [start(WRITER, tmp_path, limit, name) for name in "abcd"]
    for writer in writers:
        assert writer.communicate(timeout=60) == ("", "")
    found: dict[str, list[int]] = {name: [] for name in "abcd"}
    for path in files(tmp_path):
        for line in filter(None, path.read_bytes().split(b"\n")):
            body = json.loads(line)
            found[body["client"]].append(round(body["metrics"]["started_at"] - NOW))
    for kept in found.values():
        first = kept[0] if kept else 2000
        assert kept == list(range(first, 2000))
    if limit > 16 << 20:
        assert [len(kept) for kept in found.values()] == [2000] * 4
        assert len(files(tmp_path)) > 1
    else:
        # Each of the others may have written once to what had just been renamed.
        assert limit // 2 < size(tmp_path) < limit + 3 * limit // 8
        assert sum(map(len, found.values())) < 8000
        # Two that find a file full do not rename its successor too.
        assert min(path.stat().st_size for path in renamed_files(tmp_path)) > 0.9 * limit / 8


def test_that_the_limit_is_kept(tmp_path: Path) -> None:
    """T4: an eighth of it in each file; what is kept is the newest, and none is missing."""
    limit = 1 << 16
    write(tmp_path, *map(record, range(300)), limit=limit)
    assert limit // 2 < size(tmp_path) <= limit
    assert max(path.stat().st_size for path in files(tmp_path)) <= limit // 8
    kept = numbers(tmp_path)
    assert kept == list(range(kept[0], 300))
    # Started again with less, it keeps less.
    write(tmp_path, *map(record, range(300, 320)), limit=limit // 2)
    assert size(tmp_path) <= limit // 2


def test_that_a_torn_line_takes_no_other_with_it(tmp_path: Path) -> None:
    write(tmp_path, record(1))
    with (tmp_path / CURRENT).open("ab") as file:
        file.write(b'{"id":"half of')
    assert numbers(tmp_path) == [1]
    write(tmp_path, record(2), record(3))
    assert numbers(tmp_path) == [1, 2, 3]


def test_that_a_full_disk_is_told_once_and_made_up_for(tmp_path: Path) -> None:
    """T4: nothing that still waits is lost, and nothing is there twice."""
    process = start(FULL_DISK, tmp_path)
    out, err = process.communicate(timeout=60)
    assert int(out) == 10_000
    assert err.count("cannot be written") == 1
    assert len(err.splitlines()) == 1, err
    assert numbers(tmp_path) == list(range(31))


def test_that_a_folder_that_is_none_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trace_file, "_AGAIN_S", 0.02)
    folder = tmp_path / "traces"
    folder.write_text("in the way")
    traces = TraceFile(folder, 1 << 20)
    for number in range(200):
        traces.record(record(number))

    def told() -> list[str]:
        return [one.getMessage() for one in caplog.records if one.name.startswith("headrace")]

    until(told)
    time.sleep(0.1)
    assert len(told()) == 1
    folder.unlink()
    until(lambda: (folder / CURRENT).exists() and len(numbers(folder)) == 200)
    traces.close()
    assert numbers(folder) == list(range(200))
    assert traces.dropped == 0


def test_that_a_disk_that_hangs_holds_nobody_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What comes then is dropped, counted and told once; the end waits no longer than it is told.

    A pipe that nobody reads takes some bytes, and then lets its writer wait for ever.
    """
    os.mkfifo(tmp_path / CURRENT)
    traces = TraceFile(tmp_path, 64 << 20)
    for number in range(6000):
        traces.record(record(number))
    assert 6000 - 4096 - 500 < traces.dropped < 6000 - 4096 + 1
    dropped = traces.dropped
    traces.record(record(1, content=Content(input="large")))
    assert traces.dropped == dropped + 1
    begun = time.monotonic()
    traces.close(0.1)
    assert time.monotonic() - begun < 5
    assert len(caplog.messages) == 1
    file = os.open(tmp_path / CURRENT, os.O_RDONLY | os.O_NONBLOCK)
    while traces._thread.is_alive():
        try:
            os.read(file, 1 << 20)
        except BlockingIOError:
            time.sleep(0.001)
    os.close(file)


def test_that_what_cannot_be_written_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What JSON cannot say, and what is longer than a file may become."""
    caplog.set_level(logging.WARNING)
    torn = record(1, content=Content(input="\ud800"))
    long = record(2, content=Content(input="x" * 9000))
    hopeless = record(3, model="\ud800")
    write(tmp_path, torn, long, hopeless, record(4), limit=1 << 16)
    found = list(records(tmp_path))[::-1]
    assert [one.id for one in found] == [torn.id, long.id, record(4).id]
    assert [one.content for one in found] == [None] * 3
    assert found[0].metrics == torn.metrics
    assert len(caplog.messages) == 1
