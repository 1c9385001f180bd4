"""Requests made from Python are traced as those that come over HTTP, where somebody wants it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.telemetry.collector import collector

pytestmark = pytest.mark.usefixtures("light_collections")

ASK = """
from headrace import ModelWorker
worker = ModelWorker("echo")
def ask():
    with worker:
        list(worker.generate_stream("abc", max_tokens=3))
        worker.generate("abc", max_tokens=3)
"""
HOST = """
import json
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
memory, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(memory))
trace.set_tracer_provider(provider)
with provider.get_tracer("host").start_as_current_span("of the program") as above:
    ask()
ask()
number = above.get_span_context().span_id
found = [(one.name, one.parent.span_id == number if one.parent else None)
    for one in memory.get_finished_spans()]
print(json.dumps(found))
"""


def program(code: str, home: Path, **environment: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("OTEL_")}
    known = {**kept, "HEADRACE_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", ASK + code]
    done = subprocess.run(command, env=known, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_below_the_span_of_the_program(tmp_path: Path) -> None:
    """T1: to the program's own provider, also after a restart."""
    found = [(name, is_below) for name, is_below in json.loads(program(HOST, tmp_path))]
    roots = [is_below for name, is_below in found if name == "text_completion echo"]
    assert roots == [True, True, None, None]
    assert found.count(("headrace.worker.start", None)) == 2
    assert sum(name == "headrace.generate" for name, _ in found) == 4


@pytest.mark.parametrize("isolate", [True, False])
def test_a_stream_that_is_left_open(tmp_path: Path, *, isolate: bool) -> None:
    """T1: its spans have ended when the worker has, whoever holds it still."""
    code = f"""
worker = ModelWorker("echo", isolate={isolate}, tokens_per_second=100)
with worker:
    held = [worker.generate_stream("abc " * 99, max_tokens=99) for _ in range(3)]
    for one in held[:2]:
        while not hasattr(next(one), "text"):
            pass
"""
    with collector() as running:
        program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=running.url)
    roots = [one for one in running.spans if one["name"] == "text_completion echo"]
    attempts = [one for one in running.spans if one["name"] == "headrace.generate"]
    # The third was never begun.
    assert [one["failed"] for one in roots] == [True, True]
    assert [one["failed"] for one in attempts] == [True, True]


@pytest.mark.parametrize("isolate", [True, False])
def test_to_a_collector(tmp_path: Path, *, isolate: bool) -> None:
    """T2: by the standard variables; all of it is sent when the worker stops."""
    code = f"worker = ModelWorker('echo', isolate={isolate})\nask()"
    with collector() as running:
        program(code, tmp_path, OTEL_EXPORTER_OTLP_ENDPOINT=running.url)
    roots = [one for one in running.spans if one["name"] == "text_completion echo"]
    assert len({one["trace_id"] for one in roots}) == len(roots) == 2
    assert not any(one["failed"] for one in running.spans)


def test_off_costs_nothing(tmp_path: Path) -> None:
    """T2: nothing of OpenTelemetry is imported."""
    code = "import sys\nask()\nprint([name for name in sys.modules if 'opentelemetry' in name])"
    assert program(code, tmp_path).strip() == "[]"
