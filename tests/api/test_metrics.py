"""GET /metrics: who may read it, where it is, and what it costs the others."""

from __future__ import annotations

import asyncio
import random
import string
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse
from tests.api.fakes import FakeAdmin, FakeBackend, FakeMonitor, chat

from headrace import runtime
from headrace.api.app import ADMIN_ROUTES, ROUTES, Application, create_app
from headrace.api.limits import ApiSettings
from headrace.api.openapi import document
from headrace.config import hash_key
from headrace.core.model import ModelSpec
from headrace.core.record import Call
from headrace.telemetry.prometheus import Instruments

Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Front(FakeMonitor):
    """A Monitor of metrics alone."""

    def __init__(self, instruments: Instruments | None = None) -> None:
        self.calls: list[Call] = []
        self._instruments = instruments

    def exposition(self, accept: str) -> tuple[bytes, str]:
        if self._instruments is not None:
            return self._instruments.exposition(accept)
        return f"# {accept}".encode(), "text/plain; version=0.0.4; charset=utf-8"

    def called(self, call: Call) -> None:
        self.calls.append(call)
        if self._instruments is not None:
            self._instruments.called(call)


def application(observer: Any = None, **given: Any) -> Application:
    settings = {name: given.pop(name) for name in tuple(given) if name.endswith("_keys")}
    return create_app(FakeBackend(), ApiSettings(**settings), observer=observer or Front(), **given)


def to(app: Application, key: str | None = None) -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost", headers=headers)


KEYS = {"user": "api_keys", "root": "admin_keys", "meter": "metrics_keys"}
ASK, MANAGE, READ = "/v1/models", "/admin/models", "/metrics"
# Of each set of keys: what each key gets at the three paths.
MATRIX: dict[tuple[str, ...], dict[str | None, tuple[int, int, int]]] = {
    (): {None: (200, 200, 200), "user": (200, 200, 200)},
    ("user",): {None: (401, 401, 401), "user": (200, 403, 403), "x": (401, 401, 401)},
    ("root",): {None: (401, 401, 401), "root": (200, 200, 200), "x": (401, 401, 401)},
    ("meter",): {None: (200, 200, 401), "meter": (200, 200, 200), "x": (200, 200, 401)},
    ("user", "root"): {"user": (200, 403, 403), "root": (200, 200, 200), None: (401, 401, 401)},
    ("user", "meter"): {"user": (200, 403, 403), "meter": (403, 403, 200), None: (401, 401, 401)},
    ("root", "meter"): {"root": (200, 200, 200), "meter": (403, 403, 200), "x": (401, 401, 401)},
    ("user", "root", "meter"): {
        None: (401, 401, 401),
        "x": (401, 401, 401),
        "user": (200, 403, 403),
        "root": (200, 200, 200),
        "meter": (403, 403, 200),
    },
}


@pytest.mark.parametrize("keys", MATRIX, ids="+".join)
async def test_who_may_read(keys: tuple[str, ...]) -> None:
    """T5: a scope of its own: keys for the metrics open nothing else, and close nothing else."""
    settings = {KEYS[key]: (hash_key(key),) for key in keys}
    app = application(admin=FakeAdmin(), **settings)
    for key, expected in MATRIX[keys].items():
        async with to(app, key) as http:
            got = [(await http.get(path)).status_code for path in (ASK, MANAGE, READ)]
            live = await http.get("/health/live")
        assert (key, *got) == (key, *expected)
        assert live.status_code == 200


async def test_one_key_for_two_things() -> None:
    """T5: a key that stands in both lists opens both."""
    both = (hash_key("k"),)
    async with to(application(api_keys=both, metrics_keys=both), "k") as http:
        assert [(await http.get(path)).status_code for path in (ASK, READ)] == [200, 200]


async def test_why_a_key_does_not_open() -> None:
    """T5: the answer tells what the key is for."""
    settings = {KEYS[key]: (hash_key(key),) for key in ("user", "meter")}
    app = application(**settings)
    async with to(app, "user") as user, to(app, "meter") as meter:
        refused = [await user.get(READ), await meter.post("/v1/chat/completions", json=chat())]
    told = [one.json()["error"] for one in refused]
    assert {one["code"] for one in told} == {"insufficient_permissions"}
    assert "not read /metrics" in told[0]["message"]
    assert "only read /metrics" in told[1]["message"]


async def test_keys_are_replaced() -> None:
    """M8: by a reload, for what comes next."""
    app = application()
    async with to(app, "meter") as http:
        app.replace_settings(ApiSettings(metrics_keys=(hash_key("other"),)))
        assert (await http.get(READ)).status_code == 401
        app.replace_settings(ApiSettings(metrics_keys=(hash_key("meter"),)))
        assert (await http.get(READ)).status_code == 200


async def test_the_answer_and_its_head() -> None:
    """T5: the kind that the scraper accepts; HEAD has the same head."""
    front = Front()
    async with to(application(front)) as http:
        answer = await http.get(READ, headers={"accept": "application/openmetrics-text"})
        head = await http.head(READ)
        wrong = await http.post(READ)
    assert answer.text == "# application/openmetrics-text"
    assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert head.status_code == 200
    assert "content-length" in head.headers
    assert wrong.status_code == 405
    assert [(one.method, one.route, one.status) for one in front.calls] == [
        ("GET", READ, 200),
        ("HEAD", READ, 200),
        ("POST", READ, 405),
    ]


@pytest.mark.parametrize("given", [{"observer": None}, {"observer": Front(), "metrics": False}])
async def test_where_there_is_none(given: dict[str, Any]) -> None:
    """T5: 404 where nothing is told, or at a port of its own; openapi.json does not name it."""
    app = create_app(FakeBackend(), ApiSettings(), **given)
    async with to(app) as http:
        assert (await http.get(READ)).status_code == 404
        assert READ not in (await http.get("/openapi.json")).json()["paths"]


async def test_the_port_of_its_own() -> None:
    """T5: /metrics and /health/live with the service's keys, and nothing else."""
    app = application(metrics=False, metrics_keys=(hash_key("meter"),))
    alone = app.metrics_alone()
    async with to(alone) as stranger, to(alone, "meter") as meter:
        assert (await stranger.get(READ)).status_code == 401
        assert (await stranger.get("/health/live")).status_code == 200
        assert (await meter.get(READ)).status_code == 200
        for path in (ASK, "/health", "/openapi.json", "/docs", MANAGE):
            assert (await meter.get(path)).status_code == 404
        app.replace_settings(ApiSettings())
        assert (await stranger.get(READ)).status_code == 200


async def test_it_is_described() -> None:
    """A: openapi.json has the route and its two kinds of text."""
    async with to(application()) as http:
        described = (await http.get("/openapi.json")).json()
    content = described["paths"][READ]["get"]["responses"]["200"]["content"]
    assert set(content) == {"text/plain", "application/openmetrics-text"}
    assert READ not in document(ROUTES, ApiSettings())["paths"]


async def test_a_scrape_holds_nobody_up() -> None:
    """T5: while one waits for its figures, others are answered."""
    go = threading.Event()

    class Slow(Front):
        def exposition(self, accept: str) -> tuple[bytes, str]:
            assert go.wait(30)
            return super().exposition(accept)

    async with to(application(Slow())) as http:
        scrape = asyncio.create_task(http.get(READ))
        await asyncio.sleep(0.02)
        for _ in range(3):
            assert (await http.post("/v1/chat/completions", json=chat())).status_code == 200
        assert not scrape.done()
        go.set()
        assert (await scrape).status_code == 200


ECHO = ModelSpec(name="echo", model="builtin:echo", max_running=3, options={"tokens_per_second": 4})


@asynccontextmanager
async def served(home: Any, *specs: ModelSpec) -> AsyncIterator[tuple[Any, Application]]:
    settings = runtime.load_settings(flags={"port": 0})
    admin, told = runtime.open_service(settings, specs, reread=lambda: (settings, specs))
    watch = asyncio.create_task(told.watch())
    try:
        await admin.pool.start()
        yield admin, create_app(admin.pool, ApiSettings(), admin=admin, observer=told)
    finally:
        watch.cancel()
        await admin.aclose()
        await told.aclose()


async def scraped(http: httpx.AsyncClient) -> Series:
    answer = await http.get(READ)
    assert answer.status_code == 200
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in parse(answer.text)
        for one in family.samples
    }


async def until(true: Callable[[], Any]) -> None:
    for _ in range(1000):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true")


async def test_a_real_pool(home: Any) -> None:
    """T5: what is scraped is what the pool tells, while it works and after a model has gone."""
    async with served(home, ECHO) as (admin, app), to(app) as http:
        echo = (("model", "echo"),)
        slow = {"model": "echo", "messages": [{"role": "user", "content": "a b c d e f g h"}]}
        running = [
            asyncio.create_task(http.post("/v1/chat/completions", json=slow)) for _ in range(5)
        ]
        await until(lambda: admin.status().models[0].queued == 2)
        found, status = await scraped(http), admin.status().models[0]
        for one in running:
            one.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        assert found["headrace_requests_running", echo] == status.running == 3
        assert found["headrace_requests_queued", echo] == status.queued == 2
        assert found["headrace_slots", echo] == 3
        held = ("headrace_model_memory_bytes", (("device", "cpu"), *echo))
        assert found[held] > 1 << 20
        state = ("headrace_model_state", (*echo, ("state", "ready")))
        assert found[state] == 1
        cpu = (("device", "cpu"),)
        assert found["headrace_device_memory_booked_bytes", cpu] >= found[held]
        assert (
            found["headrace_device_memory_budget_bytes", cpu]
            <= (found["headrace_device_memory_bytes", cpu])
        )
        await admin.load("builtin:echo", {"preload": False})
        admin.pool.remove(admin.pool.entry("echo"))
        assert not [key for key in await scraped(http) if echo[0] in key[1]]


async def call(app: Application, method: str, path: str, body: bytes = b"") -> None:
    """One request without a client's own ideas of what may be asked."""
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
    }
    first: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> Any:
        if first:
            return first.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        return None

    await app(scope, receive, send)


def dice(seed: int) -> Callable[[str], str]:
    source = random.Random(seed)
    return lambda letters: "".join(source.choices(letters, k=source.randint(1, 24)))


@pytest.mark.parametrize("count", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
async def test_random_requests_add_no_series(home: Any, count: int) -> None:
    """T5, issue 5, shown 3: through the real gate and the real pool."""
    asleep = ModelSpec(name="echo", model="builtin:echo", preload=False)
    async with served(home, asleep) as (_, app), to(app) as http:
        paths = [one.path.partition("{")[0] for one in (*ROUTES, *ADMIN_ROUTES)]
        paths = [one for one in paths if one not in ("/admin/reload", "/admin/events")]
        chatting = b'{"model": "%s", "messages": [{"role": "user", "content": "x"}]}'
        for path in (*paths, "/none", READ):
            for method in ("GET", "HEAD", "POST", "OPTIONS", "BREW"):
                await call(app, method, f"{path}none" if path.endswith("s/") else path, b"{}")
        await call(app, "POST", "/v1/chat/completions", chatting % b"none")
        await scraped(http)
        before = set(await scraped(http))
        word = dice(5)
        for place in range(count):
            kind = place % 4
            if kind == 0:
                await call(app, "GET", f"/{word(string.printable)}")
            elif kind == 1:
                await call(app, word(string.ascii_uppercase), paths[place % len(paths)])
            elif kind == 2:
                await call(
                    app, "GET", f"{'/admin' * (place % 8 > 3) or '/v1'}/models/{word('abc')}"
                )
            else:
                await call(app, "POST", "/v1/chat/completions", chatting % word("xyz-").encode())
        after = await scraped(http)
    assert set(after) - before == set()
    unknown = {labels: value for (name, labels), value in after.items()
               if name == "headrace_http_requests_total" and ("route", "-") in labels}  # fmt: skip
    assert sum(unknown.values()) > count // 5
