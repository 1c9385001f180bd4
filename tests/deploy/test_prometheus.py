"""A real Prometheus reads /metrics, and every query of the dashboard gives data."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.conftest import ROOT
from tests.ports import free_port
from tests.service.serving import served

pytestmark = [
    pytest.mark.deploy,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not installed"),
]

DASHBOARD = json.loads((ROOT / "dashboards" / "headrace.json").read_text())
KEY = "a-key-of-this-test"
# Without a batch, a cache of prompts, a load that is waited for or a bounded queue there is none.
EMPTY = (
    "headrace_batch_",
    "headrace_prefix_cache_",
    "headrace_kv_cache_",
    "headrace_request_load_wait_",
    "headrace_workers_drafting",
)


def queries() -> list[str]:
    """The queries of all panels and variables, as Grafana would send them."""
    panels = [*DASHBOARD["panels"]]
    panels += [inner for panel in panels for inner in panel.get("panels", ())]
    texts = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    variables = {"$__rate_interval": "1m", "$instance": ".*", "$model": ".*"}
    for name, text in variables.items():
        texts = [query.replace(name, text) for query in texts]
    return texts


@contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """Prometheus with the configuration of compose.yaml, for another address."""
    text = (ROOT / "deploy" / "compose" / "prometheus.yml").read_text()
    (folder / "key").write_text(KEY)
    for before, after in (
        ("15s", "1s"),
        ("/run/secrets/metrics_key", str(folder / "key")),
        ("headrace:11511", target),
    ):
        assert before in text
        text = text.replace(before, after)
    (folder / "prometheus.yml").write_text(text)
    address = f"127.0.0.1:{free_port()}"
    words = (
        "config.file=prometheus.yml",
        "storage.tsdb.path=data",
        f"web.listen-address={address}",
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            ["prometheus", *(f"--{word}" for word in words)], cwd=folder, stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=30) as client:
            yield client
    finally:
        process.terminate()
        process.wait()


def result(client: httpx.Client, query: str) -> list[Any]:
    """What a query gives; nothing while Prometheus starts."""
    try:
        answer = client.get("/api/v1/query", params={"query": query})
    except httpx.TransportError:
        return []
    if answer.status_code == 503:
        return []
    assert answer.status_code == 200, f"{query}: {answer.text}"
    return answer.json()["data"]["result"]


def test_the_dashboard_shows_what_prometheus_has(tmp_path: Path) -> None:
    """Issue 15.5: Grafana is not run; what it asks is, of metrics that a service has written."""
    settings = {"METRICS_KEYS": KEY, "HOME": str(tmp_path / "home")}
    with (
        served("echo", environment=settings) as service,
        prometheus(tmp_path, service.url.removeprefix("http://")) as client,
    ):
        missing = [query for query in queries() if not query_of(EMPTY, query)]
        assert len(missing) > 30
        end = time.monotonic() + 90
        while missing and time.monotonic() < end:
            ask(service.url)
            missing = [query for query in missing if not result(client, query)]
        assert missing == []
        for query in queries():
            result(client, query)


def query_of(names: tuple[str, ...], query: str) -> bool:
    return any(name in query for name in names)


def ask(url: str) -> None:
    """Send a request that is answered, and two that fail."""
    for model, prompt in (("echo", "a b c"), ("other", "x"), ("echo", "")):
        body = {"model": model, "prompt": prompt, "max_tokens": 4}
        httpx.post(f"{url}/v1/completions", json=body, timeout=30)
