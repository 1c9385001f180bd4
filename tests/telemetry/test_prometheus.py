"""What is counted, what is read of the pool, and how both are told to Prometheus."""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as open_metrics
from prometheus_client.parser import text_string_to_metric_families as text_format
from tests.conftest import ROOT

from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.record import Call, Operation, RequestRecord, SpanRecord
from headrace.core.status import (
    DeviceStatus,
    EventKind,
    ModelStatus,
    PoolEvent,
    PoolStatus,
    ReplicaStatus,
)
from headrace.telemetry import names
from headrace.telemetry.prometheus import Instruments

DASHBOARD = ROOT / "dashboards" / "headrace.json"
PAGE = ROOT / "docs" / "metrics.md"
MARKED = re.compile(r"(?<=<!-- metrics -->\n).*?(?=<!-- /metrics -->)", re.DOTALL)
OPEN = "application/openmetrics-text; version=1.0.0"
BUSY = ModelStatus(
    id="m",
    source="s",
    state="ready",
    memory={"cpu": 20, "cuda:0": 10},
    running=2,
    max_running=4,
    queued=3,
    places=61,
    restarts=5,
    evictions=6,
    continuations=7,
    replicas=(ReplicaStatus(number=0, state="ready", drafting=True),),
)
ASLEEP = ModelStatus(id="org/big", source="s", state="stopped")
CPU = DeviceStatus(name="cpu", total=100, budget=80, booked=30, free=60)


class Stand:
    """A pool of which only the status is there."""

    def __init__(self) -> None:
        self.models = [BUSY, ASLEEP]
        self.instruments = Instruments(self.status, lambda: {one.id for one in self.models})

    def status(self) -> PoolStatus:
        return PoolStatus(models=tuple(self.models), devices=(CPU,))

    @property
    def text(self) -> str:
        return self.instruments.exposition()[0].decode()

    def families(self) -> dict[str, Metric]:
        return {one.name: one for one in text_format(self.text)}

    def series(self) -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in text_format(self.text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        """The sum of all series of this name with these labels."""
        found = [
            sample.value
            for family in text_format(self.text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        assert found, name
        return sum(found)


def ended(model: str = "m", outcome: Any = "ok", error: str = "", **given: Any) -> RequestRecord:
    operation: Operation = given.pop("operation", "chat")
    batch: bool = given.pop("batch", False)
    root = SpanRecord(
        name="r",
        span_id="s",
        parent_id="",
        start_ms=0,
        ms=900,
        attributes={names.PROVIDER: given.pop("provider", names.HERE)},
    )
    figures = {
        "started_at": 1.0,
        "queue_ms": 30.0,
        "time_to_first_token_ms": 70.0,
        "time_per_output_token_ms": 20.0,
        "total_ms": 900.0,
        "usage": Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=3, reasoning_tokens=1),
        "engine": "llamacpp",
        **given,
    }
    return RequestRecord(
        id="r",
        trace_id="t",
        time=1.0,
        operation=operation,
        model=model,
        outcome=outcome,
        error=error,
        metrics=InferenceMetrics(**figures),
        spans=(root,),
        batch=batch,
    )


def called(route: str = "/x", method: str = "GET", status: int = 200) -> Call:
    return Call(method=method, route=route, status=status, outcome="ok", seconds=0.02)


def filled() -> Stand:
    """Each metric has a series."""
    stand = Stand()
    stand.instruments.record(ended(load_ms=5.0))
    stand.instruments.record(ended(batch=True, usage=Usage()))
    stand.instruments.record(ended(outcome="refused", error="QueueFull"))
    stand.instruments.called(called())
    stand.instruments.watch_controller("http://127.0.0.1:8000", lambda: 2)
    return stand


def test_what_is_counted_is_what_was_recorded() -> None:
    """T5: requests, tokens, cache hits, waits and refusals, by model."""
    stand = Stand()
    for _ in range(3):
        stand.instruments.record(ended())
    stand.instruments.record(ended("org/big", operation="text_completion", provider="gcp.gemini"))
    stand.instruments.record(ended(outcome="error", error="WorkerDied", load_ms=2000.0))
    stand.instruments.record(ended(outcome="error", error="ZeroDivisionError"))
    stand.instruments.record(ended(outcome="cancelled", time_per_output_token_ms=None))
    for reason in ("QueueFull", "QueueFull", "ContextOverflow"):
        stand.instruments.record(
            ended(outcome="refused", error=reason, queue_ms=None, usage=Usage())
        )
    value = stand.value
    count = "gen_ai_server_request_duration_seconds_count"
    assert value(count) == 10
    assert value(count, error_type="", gen_ai_request_model="m") == 3
    assert value(count, gen_ai_operation_name="text_completion") == 1
    assert value(count, gen_ai_provider_name="gcp.gemini", gen_ai_request_model="org/big") == 1
    assert value(count, gen_ai_provider_name="headrace") == 9
    assert value(count, error_type="WorkerDied") == value(count, error_type="cancelled") == 1
    assert value(count, error_type="_OTHER") == 1
    assert value("gen_ai_server_request_duration_seconds_sum") == pytest.approx(9.0)
    assert value("gen_ai_server_time_to_first_token_seconds_count") == 4
    assert value("gen_ai_server_time_to_first_token_seconds_sum") == pytest.approx(0.28)
    assert value("gen_ai_server_time_per_output_token_seconds_count") == 4
    assert value("headrace_request_queue_seconds_count") == 7
    assert value("headrace_request_queue_seconds_bucket", le="0.01") == 0
    assert value("headrace_request_queue_seconds_bucket", le="0.05") == 7
    assert value("headrace_request_load_wait_seconds_sum", model="m") == 2
    assert value("headrace_requests_rejected_total", reason="QueueFull") == 2
    assert value("headrace_requests_rejected_total", reason="ContextOverflow") == 1
    assert value("headrace_prompt_tokens_total") == 70
    assert value("headrace_prompt_tokens_total", model="org/big") == 10
    assert value("headrace_prompt_cached_tokens_total") == 28
    assert value("headrace_completion_tokens_total") == 21
    assert value("headrace_reasoning_tokens_total") == 7
    assert value("headrace_prefix_cache_queries_total") == 7
    assert value("headrace_prefix_cache_hits_total") == 7


def test_requests_of_batches_are_no_latencies() -> None:
    """Issue 14.6: they wait for others, so their times are in a histogram of their own."""
    stand = Stand()
    stand.instruments.record(ended())
    stand.instruments.record(ended(batch=True, total_ms=90_000.0, queue_ms=89_000.0))
    value = stand.value
    assert value("headrace_batch_request_duration_seconds_count", model="m") == 1
    assert value("headrace_batch_request_duration_seconds_sum") == 90
    assert value("gen_ai_server_request_duration_seconds_count") == 1
    assert value("headrace_request_queue_seconds_sum") == pytest.approx(0.03)
    assert value("headrace_prompt_tokens_total") == 20


def test_buckets_are_those_of_the_conventions() -> None:
    """T5: as the conventions for GenAI have them."""
    families = filled().families()

    def bounds(name: str) -> list[float]:
        samples = families[f"gen_ai_server_{name}_seconds"].samples
        found = {float(one.labels["le"]) for one in samples if one.name.endswith("_bucket")}
        assert max(found) == math.inf
        return sorted(found)[:-1]

    assert bounds("request_duration") == [
        0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
    ]  # fmt: skip
    assert bounds("time_to_first_token") == [
        0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10,
    ]  # fmt: skip
    assert bounds("time_per_output_token") == [
        0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5,
    ]  # fmt: skip


def test_the_pool_is_read_when_it_is_asked_for() -> None:
    """T5, M1: queue, slots, memory and states are the pool's own, as they are now."""
    stand = Stand()
    value = stand.value
    assert value("headrace_requests_running", model="m") == 2
    assert value("headrace_requests_queued", model="m") == 3
    assert value("headrace_slots", model="m") == 4
    assert value("headrace_queue_places", model="m") == 61
    assert value("headrace_model_restarts_total", model="m") == 5
    assert value("headrace_model_evictions_total", model="m") == 6
    assert value("headrace_model_continuations_total", model="m") == 7
    assert value("headrace_model_memory_bytes", model="m", device="cuda:0") == 10
    assert value("headrace_model_memory_bytes", device="cpu") == 20
    assert value("headrace_model_state", model="m", state="ready") == 1
    assert value("headrace_model_state", model="org/big", state="stopped") == 1
    assert value("headrace_model_state") == 2
    devices = ("", "budget_", "booked_", "free_")
    told = [value(f"headrace_device_memory_{name}bytes", device="cpu") for name in devices]
    assert told == [100, 80, 30, 60]
    stand.models = [ModelStatus(id="m", source="s", state="failed")]
    assert value("headrace_requests_running") == 0
    assert value("headrace_model_state", model="m", state="failed") == 1


def test_what_happens_in_the_pool() -> None:
    """T5: loads and how long they took; what the pool counts itself is not counted again."""
    stand = Stand()
    told: list[tuple[EventKind, dict[str, int]]] = [
        ("ready", {"ms": 1500}),
        ("load_failed", {}),
        ("evicted", {}),
    ]
    for kind, data in told:
        stand.instruments.happened(PoolEvent(time=1.0, kind=kind, model="m", data=data))
    stand.instruments.happened(PoolEvent(time=1.0, kind="reloaded"))
    assert stand.value("headrace_model_load_seconds_count") == 1
    assert stand.value("headrace_model_load_seconds_sum", model="m") == 1.5
    assert stand.value("headrace_model_load_failures_total", model="m") == 1
    assert stand.value("headrace_model_evictions_total", model="m") == 6


def test_unknown_names_share_a_series() -> None:
    """T5, issue 5, shown 3: 10,000 unknown models, methods and errors add no series."""
    stand = filled()
    stand.instruments.record(ended("nobody", outcome="refused", error="UnknownModel"))
    stand.instruments.record(ended("nobody", outcome="error", error="Strange"))
    stand.instruments.called(called(method="BREW"))
    before = stand.series()
    dice = random.Random(7)
    for _ in range(10_000):
        name = dice.randbytes(6).hex()
        stand.instruments.record(ended(name, outcome="refused", error="UnknownModel"))
        stand.instruments.record(ended(name, outcome="error", error=name))
        stand.instruments.called(called(method=name))
    assert stand.series() == before
    assert stand.value("headrace_http_requests_total", method="other") == 10_001
    assert stand.value("headrace_requests_rejected_total", model="_other") == 10_001


def test_a_removed_model_takes_its_series_along() -> None:
    """T5: no series tells of what is gone, and what still ends has none of its own."""
    stand = filled()
    stand.instruments.record(ended("org/big"))
    # Recorded and removed before anybody looked.
    stand.models.remove(ASLEEP)
    assert "org/big" not in stand.text
    stand.instruments.record(ended("org/big"))
    assert "org/big" not in stand.text
    assert stand.value("headrace_completion_tokens_total", model="_other") == 3
    assert stand.value("headrace_completion_tokens_total", model="m") == 6
    stand.models = [ASLEEP]
    assert '"m"' not in stand.text
    assert stand.value("headrace_completion_tokens_total", model="org/big") == 0


def test_the_parsers_read_both_forms() -> None:
    """Issue 5, shown 3: prometheus_client's parsers, the strict one of OpenMetrics too."""
    stand = filled()
    body, kind = stand.instruments.exposition("text/plain;version=0.0.4;q=0.5,*/*;q=0.1")
    assert kind.startswith("text/plain; version=0.0.4")
    plain = {one.name: one for one in text_format(body.decode())}
    body, kind = stand.instruments.exposition(OPEN)
    assert kind.startswith("application/openmetrics-text; version=1.0.0")
    strict = {one.name: one for one in open_metrics(body.decode())}
    assert body.endswith(b"# EOF\n")
    # An info is a gauge in the older form.
    assert set(plain) - {"headrace_build_info"} == set(strict) - {"headrace_build"}
    ours = [name for name in plain if not name.startswith("process_")]
    assert len(ours) > 30
    for name in set(ours) - {"headrace_build_info"}:
        assert plain[name].type == strict[name].type
        assert {tuple(one)[:3] for one in map(_frozen, plain[name].samples)} == {
            tuple(one)[:3] for one in map(_frozen, strict[name].samples)
        }


def _frozen(sample: Any) -> tuple[Any, ...]:
    return sample.name, tuple(sorted(sample.labels.items())), sample.value


def test_it_keeps_to_itself() -> None:
    """T5: two services in one process do not share what they count, nor the library's globals."""
    one, other = filled(), Stand()
    assert one.value("headrace_completion_tokens_total") == 6
    assert other.value("headrace_completion_tokens_total") == 0
    assert not [found for found in REGISTRY.collect() if found.name.startswith("headrace")]


def test_names_are_as_prometheus_wants_them() -> None:
    """Issue 5, shown 3: HELP, TYPE, base units, `_total` for counters and nothing else."""
    for name, family in filled().families().items():
        assert re.fullmatch(r"(gen_ai|headrace|process)_[a-z_]+[a-z]", name)
        assert family.documentation.endswith(".")
        assert family.samples, name
        assert family.type in {"counter", "gauge", "histogram"}
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|count|sum|bucket|gauge)$", name)
        # The parser takes the ending of a counter away.
        assert not name.endswith("_total")
        assert all(one.name.endswith("_total") == (family.type == "counter")
                   for one in family.samples)  # fmt: skip
        if family.type == "histogram":
            assert name.endswith("_seconds")
        assert ("memory" in name) == name.endswith("_bytes")


def test_promtool_has_nothing_to_say(tmp_path: Path) -> None:
    """Issue 5, shown 3: `promtool check metrics`, and the dashboard's PromQL, where it is."""
    promtool = shutil.which("promtool")
    metrics = filled().text
    rules = [{"record": f"a:{place}", "expr": _plain(one)} for place, one in enumerate(queries())]
    assert metrics.count("# TYPE") > 30
    assert len(rules) > 30
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    commands = (["check", "metrics"], metrics), (["check", "rules", str(file)], "")
    for command, given in commands if promtool else ():
        done = subprocess.run(
            [str(promtool), *command], input=given, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def queries() -> Iterator[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def _plain(query: str) -> str:
    return query.replace("$__rate_interval", "5m").replace("$instance", ".*").replace("$model", "m")


def test_the_dashboard_asks_for_what_there_is() -> None:
    """Issue 5: each metric has its type and labels; rates of counters, quantiles of buckets."""
    families = filled().families()
    types = {f"{name}_total" if one.type == "counter" else name: one.type
             for name, one in families.items()}  # fmt: skip
    asked: set[str] = set()
    for query in queries():
        for name, labels, ranged in re.findall(r"\b([a-z_]{9,})(?:\{(.*?)\})?(\[)?", query):
            family = re.sub(r"_(bucket|count|sum)$", "", name)
            part = name if types.get(name) else family
            if part not in types:
                # A function or a label.
                assert not name.startswith(("headrace", "gen_ai_server", "process")), name
                continue
            asked.add(part)
            assert (types[part] in {"counter", "histogram"}) == bool(ranged), query
            assert (types[part] == "histogram") == (part != name), query
            used = set(re.findall(r"(\w+)\s*(?:=~|!=|=)", labels)) - {"instance"}
            known = {label for one in families[part.removesuffix("_total")].samples
                     for label in one.labels}  # fmt: skip
            assert used <= known, query
        grouped = re.findall(r"histogram_quantile\([\d.]+, sum by \((.*?)\) \(rate\((\w+)", query)
        assert len(grouped) == query.count("histogram_quantile")
        assert all(by.startswith("le") and name.endswith("_bucket") for by, name in grouped)
    ours = {name for name in types if not name.startswith("process_")}
    # All that is told is shown; the first only names the instances, the other is of clusters.
    assert ours - asked <= {"headrace_build_info", "headrace_dbgpt_registered"}


def test_the_dashboard_can_be_imported() -> None:
    """Issue 5: the data source and the models are chosen there; no panel covers another."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    variables = {one["name"]: one for one in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert set(variables) == {"datasource", "instance", "model"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    cells = [
        (x, y)
        for panel in board["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    for panel in board["panels"]:
        for part in (panel, *panel.get("targets", ())):
            if panel["type"] != "row":
                assert part["datasource"]["uid"] == "${datasource}"


async def test_the_loop_is_watched() -> None:
    """T5: how late the loop is; and the pool is looked at on its loop, whoever asks."""
    threads: list[int] = []
    stand = Stand()

    def status() -> PoolStatus:
        threads.append(threading.get_ident())
        return stand.status()

    instruments = Instruments(status, lambda: set())
    watch = asyncio.create_task(instruments.watch_loop())
    try:
        await asyncio.sleep(0.05)
        asyncio.get_running_loop().call_soon(time.sleep, 0.6)
        body, _ = await asyncio.to_thread(instruments.exposition)
    finally:
        watch.cancel()
    assert threads == [threading.get_ident()]
    lag = {one.name: one.value for family in text_format(body.decode()) for one in family.samples}
    assert lag["headrace_event_loop_lag_seconds_count"] >= 1
    # It slept until 0.25 s, and could wake after 0.65 s.
    assert lag["headrace_event_loop_lag_seconds_sum"] >= 0.3
    instruments.exposition()
    assert len(threads) == 2


def table(families: Mapping[str, Metric]) -> str:
    """The metrics in Markdown: name, type, labels, meaning."""
    rows = [
        f"| `{name}{'_total' if one.type == 'counter' else ''}` | {one.type} | {_labels(one)} "
        f"| {one.documentation} |\n"
        for name, one in families.items()
        if not name.startswith("process_")
    ]
    return "\n| metric | type | labels | |\n|---|---|---|---|\n" + "".join(rows) + "\n"


def _labels(family: Metric) -> str:
    names = dict.fromkeys(label for one in family.samples for label in one.labels if label != "le")
    return ", ".join(f"`{name}`" for name in names)


def test_the_page_lists_all_metrics() -> None:
    """Issue 5: `UPDATE_DOCS=1` writes the table."""
    text = PAGE.read_text(encoding="utf-8")
    assert MARKED.search(text), f"{PAGE.name} has no <!-- metrics --> and <!-- /metrics -->"
    expected = MARKED.sub(lambda found: table(filled().families()), text)
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected, "UPDATE_DOCS=1 scripts/test tests/telemetry/test_prometheus.py"
