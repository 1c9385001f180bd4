"""What is found again, while it is being written."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from tests.telemetry.test_trace_file import write
from tests.telemetry.traced import NOW, metrics, record

from headrace.core.errors import ConfigError, InvalidRequest
from headrace.core.record import TraceFilter
from headrace.telemetry import trace_read
from headrace.telemetry.trace_file import renamed_files
from headrace.telemetry.trace_read import (
    ModelStats,
    Percentiles,
    find,
    records,
    stats,
)


def test_that_nothing_is_found_where_nothing_is(tmp_path: Path) -> None:
    assert list(records(tmp_path / "none")) == []
    (tmp_path / "requests.jsonl").touch()
    (tmp_path / "requests-mine.jsonl").write_text("{}")
    assert list(records(tmp_path)) == []
    assert stats([]) == []
    with pytest.raises(ConfigError, match=r"requests\.jsonl cannot be read: Not a directory"):
        next(records(tmp_path / "requests.jsonl"))


def test_that_the_newest_come_first(tmp_path: Path) -> None:
    write(tmp_path, *map(record, range(100)), limit=1 << 20)
    write(tmp_path, *map(record, range(100, 150)), limit=1 << 19)
    assert len(renamed_files(tmp_path)) > 1
    assert [one.id for one in records(tmp_path)] == [record(n).id for n in range(149, -1, -1)]


def test_that_a_file_is_read_once_that_is_renamed_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, *map(record, range(10)))

    def renamed(folder: Path) -> list[Path]:
        (folder / "requests.jsonl").rename(folder / "requests-1.jsonl")
        return renamed_files(folder)

    monkeypatch.setattr(trace_read, "renamed_files", renamed)
    assert [one.id for one in records(tmp_path)] == [record(n).id for n in range(9, -1, -1)]


OTHERS = {"model": "big", "outcome": "error", "client": "77aa"}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (TraceFilter(), {1, 2, 3, 4, 5}),
        (TraceFilter(since=NOW + 4), {4, 5}),
        (TraceFilter(until=NOW + 2), {1, 2}),
        (TraceFilter(since=NOW + 2, until=NOW + 4), {2, 3, 4}),
        (TraceFilter(model="big"), {2}),
        (TraceFilter(model="bi"), set()),
        (TraceFilter(outcome="error"), {2}),
        (TraceFilter(outcome="cancelled"), set()),
        (TraceFilter(slower_than_ms=300), {4, 5}),
        (TraceFilter(client="77"), {2}),
        (TraceFilter(client="aa"), set()),
        (TraceFilter(client="5e", since=NOW + 3, slower_than_ms=450), {5}),
    ],
)
def test_that_filters_choose(tmp_path: Path, wanted: TraceFilter, found: set[int]) -> None:
    """T4: by time, model, status, slowness and key."""
    write(tmp_path, *(record(n, **OTHERS if n == 2 else {}) for n in range(1, 6)))
    assert {round(one.time - NOW) for one in records(tmp_path, wanted)} == found


def test_that_a_request_is_found_by_its_names(tmp_path: Path) -> None:
    """T4: by id, as the client was told it, or by how the id or the trace's begins."""
    id, trace_id = "ab" * 12, "12" * 16
    one = record(1, id=id, trace_id=trace_id)
    second = record(2, id=f"{id}.1", trace_id="34" * 16)
    write(tmp_path, one, second, *(record(n) for n in range(3, 60)))
    names = (id, f"chatcmpl-{id}", "1212", trace_id)
    assert [find(tmp_path, name).id for name in names] == [id] * 4
    assert find(tmp_path, f"{id}.1").id == second.id
    with pytest.raises(InvalidRequest, match=rf"2 requests begin with 'abab': {id}.1, {id}$"):
        find(tmp_path, "abab")
    # What stands elsewhere in a record is no name of it.
    for other in ("small", "queue", "zz"):
        with pytest.raises(InvalidRequest, match="No trace"):
            find(tmp_path, other)


def test_that_little_is_held_in_memory(tmp_path: Path) -> None:
    """A file of megabytes is read for its last lines, and all of it, in a few pages of heap."""
    write(tmp_path, *map(record, range(3000)), limit=64 << 20)
    size = (tmp_path / "requests.jsonl").stat().st_size
    assert size > 4_000_000
    tracemalloc.start()
    try:
        assert next(records(tmp_path)).id == record(2999).id
        first = tracemalloc.get_traced_memory()[1]
        assert sum(1 for _ in records(tmp_path)) == 3000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert max(first, peak) < 200_000


def test_the_percentiles_by_model(tmp_path: Path) -> None:
    """T4: by nearest rank; of the total only what went well counts."""
    refused = metrics(
        time_to_first_token_ms=None,
        time_per_output_token_ms=None,
        decode_tokens_per_second=None,
        queue_ms=None,
        total_ms=0.3,
    )
    write(
        tmp_path,
        *map(record, range(1, 101)),
        record(101, outcome="refused", metrics=refused),
        record(1, model="big", outcome="cancelled"),
    )
    big, small = stats(records(tmp_path))
    assert big.figures.keys() == {
        "queue_ms",
        "time_to_first_token_ms",
        "time_per_output_token_ms",
        "tokens_per_second",
    }
    assert small == ModelStats(
        model="small",
        requests=101,
        outcomes={"ok": 100, "refused": 1},
        prompt_tokens=101 * 12,
        completion_tokens=101 * 45,
        figures=small.figures,
    )
    assert small.figures["time_to_first_token_ms"] == Percentiles(
        count=100, p50=500.0, p90=900.0, p99=990.0
    )
    assert small.figures["total_ms"] == Percentiles(count=100, p50=5e3, p90=9e3, p99=9.9e3)
    assert small.figures["tokens_per_second"].p50 == pytest.approx(500 / 51)
