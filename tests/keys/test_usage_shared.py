"""Usage of several services in one PostgreSQL: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest
from tests.keys.postgres import Postgres

from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.record import RequestRecord, UsageFilter
from headrace.telemetry import usage_shared
from headrace.telemetry.usage_shared import SharedUsage, read_usage

pytestmark = pytest.mark.postgres
RECORD = RequestRecord(
    id="r",
    trace_id="",
    time=86400.0,
    operation="chat",
    model="m",
    client="laptop",
    outcome="ok",
    metrics=InferenceMetrics(started_at=0, usage=Usage(prompt_tokens=3, completion_tokens=4)),
)


def total(url: str, home: Path, **wanted: str) -> int:
    rows = read_usage(url, home, ("day", "key"), UsageFilter(**wanted))
    assert all(row.group == {"day": "1970-01-02", "key": "laptop"} for row in rows)
    return sum(row.amounts.completion_tokens for row in rows)


def left(home: Path) -> list[Path]:
    return list((home / usage_shared.FOLDER).glob("*.json"))


def test_that_no_usage_is_lost(server: Postgres, tmp_path: Path) -> None:
    """Issue 16, shown 5: two services, the database gone and back, a service that is killed."""
    url = server.new()
    first = SharedUsage(url, tmp_path / "a")
    second = SharedUsage(url, tmp_path / "b")
    for usage in (first, second):
        usage.record(RECORD)
        usage.close()
    assert total(url, tmp_path) == 8
    assert total(url, tmp_path, key="other", since="1970-01-01") == 0
    server.stop()
    try:
        usage = SharedUsage(url, tmp_path / "a")
        usage.record(RECORD)
        usage.close()
        assert len(left(tmp_path / "a")) == 1, "as after a crash, it is on the disk"
    finally:
        server.start()
    # The file of a write whose answer was lost: it is not added twice.
    (path,) = left(tmp_path / "a")
    content = path.read_bytes()
    assert msgspec.json.decode(content)[0][:2] == ["1970-01-02", "laptop"]
    usage = SharedUsage(url, tmp_path / "a")
    end = time.monotonic() + 20
    while left(tmp_path / "a") and time.monotonic() < end:
        time.sleep(0.02)
    assert total(url, tmp_path) == 12
    path.write_bytes(content)
    usage.close()
    assert left(tmp_path / "a") == []
    assert total(url, tmp_path, model="m", until="1970-01-02") == 12
