"""`headrace serve` as a worker of a DB-GPT cluster, with a controller that notes its calls.

DB-GPT's own parts are in tests/dbgpt, which scripts/test-dbgpt runs.
"""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.fakes.controller import BEAT, MODELS, FakeController, controller
from tests.service.serving import Service, served

from headrace import config
from headrace.cli.dbgpt import advertised, worker_settings
from headrace.cli.serve import listen_for_dbgpt
from headrace.config import Config
from headrace.core.errors import ConfigError

CONFIGURATION = """
[dbgpt]
controller = "{url}"
port = 0
heartbeat_s = 0.2

[models.echo]
model = "builtin:echo"

[models.low]
base = "echo"
system = "Whisper."

[models."a@b"]
model = "builtin:echo"
preload = false

[models.vectors]
model = "builtin:echo"
task = "embed"
preload = false

[models.ranks]
model = "builtin:echo"
task = "rerank"
preload = false
"""
ROWS = {
    "WorkerManager@service", "echo@llm", "low@llm", "vectors@text2vec", "ranks@reranker"
}  # fmt: skip


def configured(folder: Path, url: str, more: str = "") -> str:
    file = folder / "headrace.toml"
    file.write_text(more + CONFIGURATION.format(url=url))
    return str(file)


def worker_url(service: Service) -> str:
    match = re.search(r"worker on (http://\S+)", service.log)
    assert match, service.log
    return f"{match[1]}/api/worker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the configuration of the service is."""
    return tmp_path_factory.mktemp("dbgpt")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[tuple[FakeController, Service]]:
    """A service, and the controller that it has registered at."""
    with controller() as (fake, url), served("--config", configured(folder, url)) as service:
        fake.until(lambda: fake.rows.keys() == ROWS)
        yield fake, service


def test_all_models_are_registered(cluster: tuple[FakeController, Service]) -> None:
    """Issue 14.5: each with its worker type, and the row for starting and stopping; heartbeats."""
    fake, service = cluster
    registered = [call[2] for call in fake.calls if call[:2] == ("POST", MODELS)]
    assert {row["model_name"] for row in registered} == ROWS
    port = int(worker_url(service).rpartition(":")[2].partition("/")[0])
    assert registered[0] == {
        "model_name": "WorkerManager@service", "host": "127.0.0.1", "port": port, "weight": 1.0,
        "check_healthy": True, "healthy": False, "enabled": True, "prompt_template": None,
        "last_heartbeat": None, "remove_from_registry": False,
    }  # fmt: skip
    before = fake.count("POST", BEAT)
    fake.until(lambda: fake.count("POST", BEAT) >= before + 2 * len(ROWS))
    assert "Registered WorkerManager@service, echo@llm" in service.log


def test_an_answer_in_frames(cluster: tuple[FakeController, Service]) -> None:
    _, service = cluster
    body = {"model": "echo", "messages": [{"role": "human", "content": "one two"}], "echo": False}
    answer = httpx.post(f"{worker_url(service)}/generate_stream", json=body)
    *frames, rest = answer.content.split(b"\0")
    assert rest == b""
    last = json.loads(frames[-1])
    assert last["content"]["object"]["data"] == "one two"
    assert last["finish_reason"] == "stop"
    assert last["metrics"]["completion_tokens"] == last["usage"]["completion_tokens"] > 0


def test_stop_and_start(cluster: tuple[FakeController, Service]) -> None:
    """Issue 14.5: a stopped model keeps its row, as one that is not healthy, until it is loaded."""
    fake, service = cluster
    url = worker_url(service)
    order: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "model": "echo", "params": {}}
    assert httpx.post(f"{url}/models/shutdown", json=order, timeout=60).text == "null"
    assert fake.rows["echo@llm"] is False
    assert httpx.get(f"{service.url}/admin/models/echo").json()["state"] == "stopped"
    assert httpx.post(f"{url}/models/startup", json=order, timeout=60).text == "null"
    assert fake.rows["echo@llm"] is True
    assert httpx.get(f"{service.url}/admin/models/echo").json()["state"] == "ready"
    # A client of another API loads it, and the cluster has it again.
    assert httpx.post(f"{url}/models/shutdown", json=order, timeout=60).text == "null"
    assert fake.rows["echo@llm"] is False
    httpx.post(f"{service.url}/v1/completions", json={"model": "echo", "prompt": "x"}, timeout=60)
    fake.until(lambda: fake.rows["echo@llm"])
    gone = order | {"delete_after": True}
    assert httpx.post(f"{url}/models/shutdown", json=gone, timeout=60).text == "null"
    assert "echo@llm" not in fake.rows
    assert httpx.post(f"{url}/models/startup", json=order, timeout=60).text == "null"
    assert fake.rows["echo@llm"] is True


def test_a_controller_that_restarts(cluster: tuple[FakeController, Service]) -> None:
    """Issue 14, what it must show 3: it knows nothing, and the next heartbeats register again."""
    fake, service = cluster
    fake.status = 503
    fake.until(lambda: "cannot be reached: it answered POST" in service.log)
    fake.rows.clear()
    fake.status = 200
    fake.until(lambda: fake.rows.keys() == ROWS and all(fake.rows.values()))
    fake.until(lambda: "answers" in service.log)


def test_a_controller_that_comes_late_and_an_orderly_end(
    tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Issue 14.5: no row is left behind; heartbeats end first, as one would register again."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    file = tmp_path / "headrace.toml"
    file.write_text('[models.echo]\nmodel = "builtin:echo"\n')
    more = {"DBGPT_PORT": "0", "DBGPT_HEARTBEAT_S": "0.2", "CONFIG": str(file)}
    with served("--dbgpt-controller", url, environment=more) as service:
        fake = FakeController()
        fake.until(lambda: "cannot be reached" in service.log)
        with controller(port, fake):
            fake.until(lambda: fake.rows.keys() == {"WorkerManager@service", "echo@llm"})
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(30) == 0
        assert fake.rows == {}
        assert fake.calls[-1][0] == "DELETE"
        assert "Deregistered at the DB-GPT controller" in service.log


def loaded(folder: Path, text: str) -> Config:
    file = folder / "headrace.toml"
    file.write_text(text)
    return config.load(file=file, environ={"HEADRACE_HOME": str(folder)}).config


KEYED = '[server]\napi_keys = ["secret"]\n'
CLUSTER = '[dbgpt]\ncontroller = "http://127.0.0.1:9"\nport = 0\n'


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (KEYED + CLUSTER, "DB-GPT sends no key, and requests to this service need one"),
        (f'{CLUSTER}host = "0.0.0.0"\n', "0.0.0.0 is reachable from other machines, and DB-GPT"),
        (f'{CLUSTER}host = "::"\n[server]\nallow_public = true\n', ":: is reachable"),
    ],
)
def test_it_is_no_way_around_the_keys(tmp_path: Path, text: str, reason: str) -> None:
    """Issue 14.5: DB-GPT sends no key; where one is needed it has to be allowed by name."""
    with pytest.raises(ConfigError, match=reason):
        listen_for_dbgpt(loaded(tmp_path, text))
    for without_key in ("use", "manage"):
        allowed = text.replace(CLUSTER, f'{CLUSTER}without_key = "{without_key}"\n')
        settings = loaded(tmp_path, allowed)
        with listen_for_dbgpt(settings) as listener:
            assert listener is not None
            address = advertised(settings.dbgpt, listener)
        assert not worker_settings(settings, address).has_keys


@pytest.mark.parametrize(
    ("own", "address", "hosts"),
    [
        ("", "127.0.0.1:{port}", {"127.0.0.1"}),
        ('host = "::1"', "[::1]:{port}", {"::1"}),
        ('host = "0.0.0.0"', "127.0.0.1:{port}", {"127.0.0.1"}),
        ('advertise = "gpu1.example"', "gpu1.example:{port}", {"gpu1.example"}),
        ('advertise = "10.0.0.5:80"', "10.0.0.5:80", {"10.0.0.5"}),
        ('advertise = "[fd00::5]:80"', "[fd00::5]:80", {"fd00::5"}),
    ],
)
def test_the_address_that_is_registered(
    tmp_path: Path, own: str, address: str, hosts: set[str]
) -> None:
    """Issue 14.5: DB-GPT puts it into URLs as it is, and its Host header is accepted."""
    settings = loaded(tmp_path, f'{CLUSTER}without_key = "use"\n{own}\n')
    with listen_for_dbgpt(settings) as listener:
        assert listener is not None
        place = advertised(settings.dbgpt, listener)
        assert str(place) == address.format(port=listener.getsockname()[1])
    assert hosts <= {*worker_settings(settings, place).allowed_hosts}


@pytest.mark.parametrize(
    "own",
    [
        'controller = "127.0.0.1:8000"',
        'controller = "http://x/api"',
        'controller = "ftp://x"',
        'controller = "http://x"\nadvertise = "a/b"',
        'controller = "http://x"\nadvertise = "a:b"',
        'controller = "http://x"\nheartbeat_s = 0',
        'controller = "http://x"\nwithout_key = "yes"',
    ],
)
def test_wrong_settings(tmp_path: Path, own: str) -> None:
    with pytest.raises(ConfigError, match=r"line \d"):
        loaded(tmp_path, f"[dbgpt]\n{own}\n")


def test_keys_that_are_set_later_count(
    cluster: tuple[FakeController, Service], folder: Path
) -> None:
    """Issue 14.5: a reload that sets keys closes the routes. The last test of the service."""
    fake, service = cluster
    url, body = worker_url(service), {"model": "echo", "prompt": "one"}
    assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 200
    file = folder / "headrace.toml"
    file.write_text(f'[server]\nadmin_keys = ["secret"]\n{file.read_text()}')
    assert httpx.post(f"{service.url}/admin/reload").status_code == 200
    assert httpx.post(f"{url}/generate", json=body).status_code == 401
    assert httpx.post(f"{url}/models/shutdown", json={"model": "echo"}).status_code == 401
    fake.until(lambda: "needs a key now" in service.log)
