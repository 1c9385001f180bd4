"""must-show 2: a real collector gets the spans; one that is dead, slow or hung harms nobody."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.sdk.trace.export import SpanExportResult
from tests.conftest import ROOT
from tests.telemetry.collector import Collector, collector
from tests.telemetry.watched import Scripted, Told, ask, parent

from headrace.telemetry import otel

REQUESTS = 64


@contextmanager
def served(home: Path, url: str, protocol: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`headrace serve echo` that tells a collector."""
    environment = {
        **os.environ,
        "HEADRACE_HOME": str(home),
        "OTEL_EXPORTER_OTLP_ENDPOINT": url,
        "OTEL_EXPORTER_OTLP_PROTOCOL": protocol,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "headrace", "serve", "echo", "--port", "0", "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        try:
            assert process.stdout is not None
            at = json.loads(process.stdout.readline())["url"]
            end = time.monotonic() + 60
            while httpx.get(f"{at}/health/ready").status_code != 200:
                assert time.monotonic() < end
                time.sleep(0.05)
            yield at, process
        finally:
            process.kill()


async def send(url: str, count: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:

        async def one(number: int) -> None:
            answer = await client.post(
                "/v1/completions",
                json={"model": "echo", "prompt": "abc", "max_tokens": 3},
                headers={"traceparent": parent(number)},
            )
            assert answer.status_code == 200

        await asyncio.gather(*map(one, range(1, count + 1)))


def stopped(process: subprocess.Popen[str]) -> float:
    """Stop the service, and return how many seconds that took."""
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    return time.monotonic() - began


@pytest.mark.parametrize("protocol", ["http/protobuf", "grpc"])
def test_a_collector_gets_every_span(tmp_path: Path, protocol: str) -> None:
    """T1, T2: of 64 requests at once, by the standard variables, and all that waited at the end."""
    with collector(protocol.partition("/")[0]) as running:
        with served(tmp_path, running.url, protocol) as (url, process):
            asyncio.run(send(url, REQUESTS))
            stopped(process)
        got = _all(running, REQUESTS)
    roots = {one["trace_id"]: one for one in got if one["name"] == "text_completion echo"}
    assert len(roots) == REQUESTS
    for number in range(1, REQUESTS + 1):
        assert roots[f"{number:032x}"]["parent_id"] == f"{number:016x}"
        below = [one for one in got if one["trace_id"] == f"{number:032x}"]
        ids = {one["span_id"] for one in below}
        assert len(ids) == len(below) >= 3
        assert sum(one["parent_id"] not in ids for one in below) == 1
    assert {one["service"] for one in got} == {"headrace"}
    assert sum(one["name"] == "headrace.worker.start" for one in got) == 1
    assert not any(one["failed"] for one in got)


def _all(running: Collector, roots: int) -> list[dict[str, Any]]:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        got = list(running.spans)
        if sum(one["name"] == "text_completion echo" for one in got) >= roots:
            return got
        time.sleep(0.05)
    raise AssertionError("not all spans have come")


@contextmanager
def _dead() -> Iterator[str]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("mode", "protocol"), [("dead", "http/protobuf"), ("hung", "http/protobuf"), ("hung", "grpc")]
)
def test_a_collector_that_does_not_answer_holds_up_no_exit(
    tmp_path: Path, protocol: str, mode: str
) -> None:
    """T2: it costs two seconds at most, beside what the end takes anyhow."""
    with (
        _dead() if mode == "dead" else _hung(protocol) as url,
        served(tmp_path, url, protocol) as (at, process),
    ):
        asyncio.run(send(at, 8))
        assert stopped(process) < 8


def test_that_spans_are_lost_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    """T2: of a collector that refuses, and of one that comes back; and none is held for longer."""

    class Refusing:
        takes = False

        def __init__(self) -> None:
            self.shutdown = lambda: None

        def export(self, spans: list[Any]) -> Any:
            logging.getLogger("opentelemetry.exporter.otlp").error("Failed: 503.")
            return SpanExportResult.SUCCESS if Refusing.takes else SpanExportResult.FAILURE

    exporter = otel._Exporter("http://collector:4318", Refusing())
    theirs = logging.getLogger("opentelemetry.exporter")
    try:
        for count in (2, 3):
            batch = [object()] * count
            assert exporter.export(batch) is SpanExportResult.FAILURE
            assert batch == []
        Refusing.takes = True
        exporter.export([object()])
        exporter.export([object()])
    finally:
        theirs.setLevel(logging.NOTSET)
    assert caplog.messages == [
        "Failed: 503.",
        "http://collector:4318 does not accept spans: they are lost. This is logged once.",
        "http://collector:4318 accepts spans again; 5 were lost.",
        "Failed: 503.",
    ]


@contextmanager
def _hung(protocol: str) -> Iterator[str]:
    with collector(protocol.partition("/")[0], "hung") as running:
        yield running.url


@pytest.mark.parametrize("mode", ["dead", "slow", "hung"])
def test_a_bad_collector_costs_a_bounded_amount_and_no_time(mode: str) -> None:
    """T2: ten times as many spans as are kept, and the requests take as long as without."""
    with _dead() if mode == "dead" else _running(mode) as url:
        # In a process of its own: the exporter's thread goes on trying for a while.
        subprocess.run(
            [sys.executable, "-m", "tests.telemetry.test_export"],
            env=os.environ | {"OTEL_EXPORTER_OTLP_ENDPOINT": url},
            cwd=ROOT,
            check=True,
            timeout=100,
        )


@contextmanager
def _running(mode: str) -> Iterator[str]:
    with collector("http", mode) as running:
        yield running.url


async def _measure() -> None:
    plain, told = Told(otel=False), Told(otel=False)
    told.tracing = otel.configure("1")
    assert told.tracing.exporter is not None
    backends = [plain.observe(Scripted()), told.observe(Scripted())]
    times: list[list[float]] = [[], []]
    process, before = psutil.Process(), 0
    for turn in range(4000):
        if turn == 2000:
            before = process.memory_info().rss
            plain.records.clear()
            told.records.clear()
        for backend, each in zip(backends, times, strict=True):
            began = time.perf_counter()
            async for _ in backend.ask(ask(turn + 1)):
                pass
            each.append(time.perf_counter() - began)
    grown = process.memory_info().rss - before
    began = time.monotonic()
    await told.tracing.aclose()
    assert time.monotonic() - began < 5
    assert grown < 64 << 20
    without, with_it = map(statistics.median, times)
    # Making four spans takes a fraction of a millisecond; waiting would take hundreds.
    assert with_it - without < 0.01


if __name__ == "__main__":
    asyncio.run(_measure())
