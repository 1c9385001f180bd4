"""The metrics of a service that somebody started: at its port, or at one of their own."""

from __future__ import annotations

import json
import subprocess
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from tests.cli.programs import HELLO, PROGRAM, ask, serving


def get(url: str, key: str = "") -> tuple[int, str]:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_at_the_port_of_the_service(environ: dict[str, str]) -> None:
    """T5: what was asked and how the pool stands, with the key for it."""
    keys = {"HEADRACE_API_KEYS": "user", "HEADRACE_METRICS_KEYS": "meter"}
    with serving(environ | keys, "echo") as (_, url):
        with ask(url, HELLO, "user") as answer:
            assert "hello" in answer.read().decode()
        assert get(f"{url}/metrics", "user")[0] == 403
        status, text = get(f"{url}/metrics", "meter")
    assert status == 200
    found = {
        (one.name, *one.labels.values()): one.value
        for family in parse(text)
        for one in family.samples
    }
    assert found["headrace_http_requests_total", "POST", "/v1/chat/completions", "2xx"] == 1
    assert found["headrace_model_state", "echo", "ready"] == 1
    assert found["headrace_model_load_seconds_count", "echo"] == 1
    assert found["headrace_event_loop_lag_seconds_count",] >= 0


def test_at_a_port_of_their_own(environ: dict[str, str]) -> None:
    """T5: its address is told; the service's port has them no more; both end together."""
    environ = environ | {"HEADRACE_METRICS_PORT": "0"}
    command = [*PROGRAM, "serve", "--json", "--port", "0", "echo"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = json.loads(process.stdout.readline())
            aside = told["metrics"].removesuffix("/metrics")
            assert aside != told["url"]
            assert "headrace_build_info" in get(told["metrics"])[1]
            assert get(f"{aside}/health/live")[0] == 200
            assert get(f"{aside}/v1/models")[0] == 404
            assert get(f"{told['url']}/metrics")[0] == 404
            process.terminate()
            assert process.wait(15) == 0
            with pytest.raises(OSError, match="refused"):
                get(told["metrics"])
        finally:
            process.kill()


def test_none(environ: dict[str, str]) -> None:
    """T5: switched off, and no second port either."""
    off = {"HEADRACE_METRICS": "false", "HEADRACE_METRICS_PORT": "0"}
    with serving(environ | off, "echo") as (_, url):
        assert get(f"{url}/metrics")[0] == 404
