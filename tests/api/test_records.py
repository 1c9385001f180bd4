"""What a dashboard reads: the overview, its history, requests that have ended, and usage."""

from __future__ import annotations

from typing import Any

import httpx
import msgspec
import pytest
from msgspec.structs import replace
from tests.api.fakes import DEVICES, LOADED, METRICS, FakeAdmin, FakeBackend, FakeMonitor

from headrace import __version__
from headrace.api import overview as module
from headrace.api.app import create_app
from headrace.api.limits import ApiSettings
from headrace.api.overview import MAX_RUNNING, Overview
from headrace.api.records import MAX_SKIPPED, MAX_TRACES
from headrace.core.record import (
    Activity,
    Amounts,
    Content,
    History,
    RequestRecord,
    RunningRequest,
    SpanRecord,
    TraceFilter,
    UsageFilter,
    UsageRow,
)

STEP = SpanRecord(name="headrace.queue", span_id="a", parent_id="", start_ms=0, ms=2)


def record(number: int, **fields: Any) -> RequestRecord:
    whole = RequestRecord(
        id=f"{number:024}",
        trace_id="t",
        time=float(number),
        operation="chat",
        model="m",
        outcome="ok",
        metrics=METRICS,
        parameters={"seed": 1},
        spans=(STEP,),
        content=Content(input="secret", answered=("too",)),
    )
    return replace(whole, **fields)


class Busy(FakeMonitor):
    """Has more running requests than are shown."""

    def activity(self) -> Activity:
        one = RunningRequest(
            id="r", model="m", operation="chat", client="", since=1, phase="decode"
        )
        return Activity(running=(one,) * (MAX_RUNNING + 5))


def to(monitor: FakeMonitor | None, admin: FakeAdmin | None = None) -> httpx.AsyncClient:
    app = create_app(FakeBackend(), ApiSettings(), admin=admin or FakeAdmin(), observer=monitor)
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_the_overview_has_all_that_the_first_page_shows() -> None:
    """Issue 16.1: models, devices, running requests and rates in one answer, bounded."""
    async with to(Busy()) as http:
        shown = msgspec.json.decode((await http.get("/admin/overview")).content, type=Overview)
    devices = tuple(replace(device, free=0) for device in DEVICES)  # in steps of 128 MiB
    assert (shown.version, shown.models[0], shown.devices) == (__version__, LOADED, devices)
    assert (len(shown.running), shown.running_count) == (MAX_RUNNING, MAX_RUNNING + 5)
    async with to(None) as http:
        bare = (await http.get("/admin/overview")).json()
    assert (bare["running"], bare["rates"]) == ([], [])


async def test_a_poll_costs_nothing_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Issue 16, must show 2: one status for all tabs within a second, and a 304 without news."""
    admin, now, reads = FakeAdmin(), 100.0, 0
    status = admin.status

    def counted() -> Any:
        nonlocal reads
        reads += 1
        return status()

    monkeypatch.setattr(admin, "status", counted)
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    async with to(FakeMonitor(), admin) as http:
        answers = [await http.get("/admin/overview") for _ in range(20)]
        assert reads == 1
        tag = answers[0].headers["etag"]
        assert {answer.headers["etag"] for answer in answers} == {tag}
        now += 2
        same = await http.get("/admin/overview", headers={"if-none-match": tag})
        admin.models = admin.models[:1]
        now += 2
        other = await http.get("/admin/overview", headers={"if-none-match": tag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", tag)
    assert (other.status_code, len(other.json()["models"])) == (200, 1)


@pytest.mark.parametrize("change", ["load", "unload", "restart", "pin", "update"])
async def test_the_overview_after_a_change_is_new(
    monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Issue 16.1: what was changed is shown at once, though an overview is kept for a second."""
    admin = FakeAdmin()
    monkeypatch.setattr(module.time, "monotonic", lambda: 100.0)
    body: dict[str, Any] = {"model": "m"}
    if change == "update":
        body["settings"] = {"keep_alive": "5m"}
    async with to(FakeMonitor(), admin) as http:
        before = (await http.get("/admin/overview")).json()
        admin.models = [replace(model, pinned=not model.pinned) for model in admin.models]
        (await http.post(f"/admin/models/{change}", json=body)).raise_for_status()
        after = (await http.get("/admin/overview")).json()
    assert [m["pinned"] for m in after["models"]] != [m["pinned"] for m in before["models"]]


async def test_history_and_store() -> None:
    """Issue 16.1: samples for charts, and the models on the disk."""
    async with to(FakeMonitor()) as http:
        history = msgspec.json.decode((await http.get("/admin/history")).content, type=History)
        stored = (await http.get("/admin/store")).json()
    assert history == FakeMonitor().history()
    assert stored["data"] == [
        {"name": "smol", "reference": "index:smol", "size": 7, "added": 3, "revision": None}
    ]


async def test_traces_are_listed_by_filters_and_pages() -> None:
    """Issue 16.1: the trace list with filters; neither steps nor content are in it."""
    monitor = FakeMonitor(*(record(n, outcome="error" if n % 2 else "ok") for n in range(6)))
    async with to(monitor) as http:
        first = (await http.get("/admin/traces?outcome=error&limit=2")).json()
        second = (await http.get("/admin/traces?outcome=error&limit=2&skip=2")).json()
        filters = {
            "model": "m",
            "since": 1.5,
            "until": 4,
            "slower_than_ms": 2,
            "client": "",
            "outcome": "ok",
        }
        await http.get("/admin/traces", params=filters)
    assert ([one["time"] for one in first["data"]], first["has_more"]) == ([1, 3], True)
    assert ([one["time"] for one in second["data"]], second["has_more"]) == ([5], False)
    assert all({"spans", "content", "parameters"}.isdisjoint(one) for one in first["data"])
    wanted = TraceFilter(model="m", outcome="ok", since=1.5, until=4, slower_than_ms=2)
    assert monitor.noted[-1] == (wanted, 0, 51)


async def test_one_trace_has_everything() -> None:
    """Issue 16.1: a waterfall of one request, and its content if it is kept."""
    async with to(FakeMonitor(record(1))) as http:
        answer = await http.get(f"/admin/traces/{1:024}")
        missing = await http.get("/admin/traces/none")
    assert msgspec.json.decode(answer.content, type=RequestRecord) == record(1)
    assert missing.status_code == 404
    assert missing.json()["error"] == {
        "message": "No such request.",
        "type": "invalid_request_error",
        "param": "id",
        "code": "request_not_found",
    }


async def test_usage_is_grouped_and_summed() -> None:
    """Issue 16.1: by day, key, model, with joules where they are known."""
    rows = [
        UsageRow(group={"day": "2026-01-01"}, amounts=Amounts(requests=2, joules=1.5)),
        UsageRow(group={"day": "2026-01-02"}, amounts=Amounts(requests=3)),
    ]
    monitor = FakeMonitor(used=rows)
    async with to(monitor) as http:
        report = (await http.get("/admin/usage?by=day,key&since=2026-01-01&model=m")).json()
        default = (await http.get("/admin/usage")).json()
    assert (report["by"], report["total"]["requests"]) == (["day", "key"], 5)
    assert report["total"]["joules"] == 1.5
    assert report["rows"][0]["group"] == {"day": "2026-01-01"}
    assert monitor.noted[0] == (("day", "key"), UsageFilter(since="2026-01-01", model="m"))
    assert default["by"] == ["day", "model"]


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("traces?limit=0", "limit"),
        (f"traces?limit={MAX_TRACES + 1}", "limit"),
        ("traces?skip=-1", "skip"),
        (f"traces?skip={MAX_SKIPPED + 1}", "skip"),
        ("traces?outcome=bad", "outcome"),
        ("traces?since=yesterday", "since"),
        ("traces?modle=m", "modle"),
        ("traces?model=a&model=b", "model"),
        ("usage?by=", "by"),
        ("usage?by=day,day", "by"),
        ("usage?by=week", "by"),
        ("usage?since=1.1.2026", "since"),
        ("usage?until=2026-1-1", "until"),
    ],
)
async def test_wrong_parameters_are_named(path: str, param: str) -> None:
    """Issue 16.1: 400 with the parameter to change; nothing is read."""
    monitor = FakeMonitor()
    async with to(monitor) as http:
        answer = await http.get(f"/admin/{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert monitor.noted == []


@pytest.mark.parametrize("path", ["history", "traces", "traces/x", "usage", "activity"])
async def test_without_an_observer_it_is_refused(path: str) -> None:
    async with to(None) as http:
        answer = await http.get(f"/admin/{path}")
    assert answer.status_code == 400
    assert "does not observe" in answer.json()["error"]["message"]
