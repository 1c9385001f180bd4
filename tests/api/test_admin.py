"""The /admin routes: what they do, who may, and the stream of events."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import pytest
from tests.api.fakes import (
    ASLEEP,
    CHAT,
    DEVICES,
    LOADED,
    METRICS,
    MODELS,
    FakeAdmin,
    FakeBackend,
    FakeMonitor,
    chat,
    client,
)

from headrace.api import limits
from headrace.api.app import ADMIN_ROUTES, create_app
from headrace.api.limits import ApiSettings
from headrace.config import hash_key
from headrace.core.errors import Draining
from headrace.core.model import ModelInfo
from headrace.core.record import Activity, Rates, RequestRecord, RunningRequest
from headrace.core.status import ModelStatus, Plan, PoolEvent, PoolStatus

KEYS: dict[str, Any] = {
    "api_keys": (hash_key("user"),),
    "admin_keys": (hash_key("root"), hash_key("other")),
}
BODIES: dict[str, Any] = {
    "/admin/models/load": {"model": "m"},
    "/admin/models/unload": {"model": "m"},
    "/admin/models/restart": {"model": "m"},
    "/admin/models/pin": {"model": "m"},
    "/admin/models/update": {"model": "m", "settings": {"keep_alive": "5m"}},
    "/models/load": {"model": "m"},
    "/models/unload": {"model": "m"},
}
OF_ADAPTERS: dict[str, Any] = {
    "/admin/models/m/adapters": {"adapter": "a", "source": "/a.gguf"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/a.gguf", "model": "m"},
    "/v1/unload_lora_adapter": {"lora_name": "m:m"},
}
ADAPTED = ModelInfo(id="m:m", source="s", engine="echo", base="m", adapter="/m.gguf")
PULL = {"model": "m", "stream": False}
CALLS = [(one.method, re.sub(r"\{\w+(:path)?\}", "m", one.path)) for one in ADMIN_ROUTES]


def bearer(key: str | None) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"} if key else {}


ACTIVITY = Activity(
    running=(
        RunningRequest(
            id="r", model="m", operation="chat", client="ab", since=1.5, phase="decode",
            time_to_first_token_ms=20, completion_tokens=3,
        ),
    ),
    rates=(Rates(model="m", window_s=60, requests=7, completion_tokens_per_second=12.5),),
)  # fmt: skip


KEPT = RequestRecord(
    id="m", trace_id="t", time=1.5, operation="chat", model="m", outcome="ok", metrics=METRICS
)


class Busy(FakeMonitor):
    """Knows one request that runs, and one that has ended."""

    def __init__(self) -> None:
        super().__init__(KEPT)

    def activity(self) -> Activity:
        return ACTIVITY


def observed(admin: FakeAdmin, **settings: Any) -> httpx.AsyncClient:
    backend = FakeBackend(models=(*MODELS, ADAPTED))
    app = create_app(backend, ApiSettings(**settings), admin=admin, observer=Busy())
    transport = httpx.ASGITransport(app, client=("127.0.0.1", 1))
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


async def test_activity() -> None:
    """A: what runs and how fast, where somebody looks; nothing of what was asked or answered."""
    async with observed(FakeAdmin()) as http:
        answer = await http.get("/admin/activity")
    assert msgspec.json.decode(answer.content, type=Activity) == ACTIVITY
    async with client(admin=FakeAdmin()) as http:
        answer = await http.get("/admin/activity")
    assert answer.status_code == 400
    assert "does not observe" in answer.json()["error"]["message"]


async def test_status() -> None:
    """A, M1: all models and devices; one by its name, with slashes, or by an alias."""
    async with client(admin=FakeAdmin()) as http:
        everything = await http.get("/admin/models")
        one = await http.get("/admin/models/best")
        slashed = await http.get("/admin/models/org/big")
        missing = await http.get("/admin/models/none")
    assert msgspec.json.decode(everything.content, type=PoolStatus) == PoolStatus(
        models=(LOADED, ASLEEP), devices=DEVICES
    )
    assert msgspec.json.decode(one.content, type=ModelStatus) == LOADED
    assert msgspec.json.decode(slashed.content, type=ModelStatus) == ASLEEP
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("path", "body", "call"),
    [
        ("load", {"model": "m"}, ("load", "m", None)),
        ("load", {"model": "m", "settings": {"device": "cpu"}}, ("load", "m", {"device": "cpu"})),
        ("unload", {"model": "best"}, ("unload", "best")),
        ("restart", {"model": "m"}, ("restart", "m")),
        ("pin", {"model": "m"}, ("update", "m", {"pinned": True})),
        ("pin", {"model": "m", "pinned": False}, ("update", "m", {"pinned": False})),
        (
            "update",
            {"model": "m", "settings": {"options": {"threads": 2}}},
            ("update", "m", {"options": {"threads": 2}}),
        ),
    ],
)
async def test_changes(path: str, body: Any, call: Any) -> None:
    """A, M4: each order reaches the pool once, and the answer is how the model stands then."""
    admin = FakeAdmin()
    async with client(admin=admin) as http:
        answer = await http.post(f"/admin/models/{path}", json=body)
    assert answer.status_code == 200
    assert admin.calls == [call]
    told = msgspec.json.decode(answer.content, type=ModelStatus)
    assert (told.id, told.pinned) == ("m", bool(call[-1] == {"pinned": True}))


@pytest.mark.parametrize(
    ("method", "path", "body", "change"),
    [
        (
            "POST",
            "/admin/models/best/adapters",
            {"adapter": "a.b", "source": "/a", "scale": 2, "name": "n"},
            {"adapters.a.b": {"source": "/a", "scale": 2.0, "name": "n"}},
        ),
        ("DELETE", "/admin/models/m/adapters/m", None, {"adapters.m": False}),
        (
            "POST",
            "/v1/load_lora_adapter",
            {"lora_name": "a", "lora_path": "/a", "model": "m"},
            {"adapters.a": {"source": "/a", "name": "a"}},
        ),
        ("POST", "/v1/unload_lora_adapter", {"lora_name": "m:m"}, {"adapters.m": False}),
    ],
)
async def test_adapters(method: str, path: str, body: Any, change: Any) -> None:
    """Issue 17.4: each is one change of the model's settings."""
    admin = FakeAdmin()
    async with observed(admin) as http:
        answer = await http.request(method, path, json=body)
    assert answer.status_code == 200, answer.text
    assert admin.calls == [("update", "m", change)]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/load_lora_adapter", {"lora_name": "m:m", "lora_path": "/a"}, 400, "lora_name"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, 400, "model"),
        ("/v1/load_lora_adapter", {"lora_name": "a"}, 400, "lora_path"),
        ("/v1/unload_lora_adapter", {"lora_name": "none"}, 404, "model"),
        ("/admin/models/m/adapters", {"adapter": "a"}, 400, "source"),
        ("/admin/models/m/adapters", {"adapter": "a", "source": "/a", "x": 1}, 400, "x"),
        ("/admin/models/m:m/adapters", {"adapter": "a", "source": "/a"}, 404, "model"),
    ],
)
async def test_wrong_adapters(path: str, body: Any, status: int, param: str) -> None:
    """Issue 17.4: names what is wrong, and changes nothing."""
    admin = FakeAdmin()
    async with observed(admin) as http:
        answer = await http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert admin.calls == []


async def test_plan_and_reload() -> None:
    """A: a plan changes nothing; a reload tells what it changed."""
    admin = FakeAdmin()
    async with client(admin=admin) as http:
        planned = await http.get("/admin/plan", params={"model": "hub:org/x:Q4_K_M@main"})
        reloaded = await http.post("/admin/reload")
    assert planned.status_code == 404, "the fake knows no such model"
    assert admin.calls == [("plan", "hub:org/x:Q4_K_M@main"), ("reload", "m")]
    assert reloaded.json() == {
        "added": ["new"], "changed": [], "removed": [], "needs_restart": ["server.port"],
    }  # fmt: skip
    async with client(admin=admin) as http:
        answer = await http.get("/admin/plan?model=m")
    plan = msgspec.json.decode(answer.content, type=Plan)
    assert (plan.model, plan.fits, plan.need.devices) == ("m", True, {"cpu": 10})


WRONG: list[tuple[str, Any, str | None]] = [
    *[(path, {**body, "modle": "x"}, "modle") for path, body in BODIES.items()],
    *[(path, {**body, "model": ""}, "model") for path, body in BODIES.items()],
    *[(path, {}, "model") for path in BODIES],
    ("/admin/models/load", {"model": "m", "settings": [1]}, "settings"),
    ("/admin/models/pin", {"model": "m", "pinned": "yes"}, "pinned"),
    ("/admin/models/update", {"model": "m"}, "settings"),
    ("/admin/models/update", {"model": "m", "settings": {"nonsense": 1}}, "nonsense"),
    ("/admin/models/load", [], None),
]


@pytest.mark.parametrize(("path", "body", "param"), WRONG)
async def test_wrong_bodies(path: str, body: Any, param: str | None) -> None:
    """A: what is not understood changes nothing, and the field is named."""
    admin = FakeAdmin()
    async with client(admin=admin) as http:
        answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_value"
    assert answer.json()["error"]["param"] == param
    assert admin.calls == []


@pytest.mark.parametrize(
    "query", ["", "?model=", "?modle=m", "?model=a&model=b", f"?model={513 * 'x'}"]
)
async def test_wrong_plans(query: str) -> None:
    """A: a plan is for one model."""
    async with client(admin=FakeAdmin()) as http:
        answer = await http.get(f"/admin/plan{query}")
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == ("modle" if "modle" in query else "model")


async def test_unknown_models() -> None:
    """A: OpenAI's 404 from every order."""
    async with client(admin=FakeAdmin()) as http:
        for path, body in BODIES.items():
            answer = await http.post(path, json={**body, "model": "none"})
            assert (answer.status_code, answer.json()["error"]["param"]) == (404, "model")


async def test_without_an_admin_there_are_no_such_routes() -> None:
    """A: a bare backend cannot be managed."""
    async with client() as http:
        for method, path in CALLS:
            assert (await http.request(method, path, json={"model": "m"})).status_code == 404


@pytest.mark.parametrize(("method", "path"), CALLS)
@pytest.mark.parametrize(
    ("settings", "key", "status"),
    [
        ({}, None, 200),
        (KEYS, None, 401),
        (KEYS, "wrong", 401),
        (KEYS, "user", 403),
        (KEYS, "root", 200),
        (KEYS, "other", 200),
        ({"api_keys": KEYS["api_keys"]}, "user", 403),
        ({"admin_keys": KEYS["admin_keys"]}, None, 401),
        ({"admin_keys": KEYS["admin_keys"]}, "root", 200),
        ({"api_keys": (hash_key("root"),), **KEYS}, "root", 200),
    ],
)
async def test_scopes(method: str, path: str, settings: Any, key: Any, status: int) -> None:
    """A: with any key, models are managed with an admin key alone, whatever they are called."""
    admin = FakeAdmin()
    asked = path + "?model=m" * path.endswith("plan")
    body = (BODIES | OF_ADAPTERS).get(path, PULL)
    async with observed(admin, **settings) as http:
        answer = await http.request(method, asked, json=body, headers=bearer(key))
    assert answer.status_code == status
    code = {401: "invalid_api_key", 403: "insufficient_permissions"}.get(status)
    if code and path.startswith("/api/"):
        assert list(answer.json()) == ["error"]
        assert admin.calls == []
    elif code:
        assert answer.json()["error"] | {"message": ""} == {
            "message": "", "type": "invalid_request_error", "param": None, "code": code,
        }  # fmt: skip
        assert (admin.calls, admin.listeners) == ([], 0)


@pytest.mark.parametrize(
    ("settings", "key", "status", "name"),
    [
        ({}, None, 200, ""),
        (KEYS, None, 401, None),
        (KEYS, "user", 200, hash_key("user")[7:23]),
        (KEYS, "root", 200, hash_key("root")[7:23]),
        ({"admin_keys": KEYS["admin_keys"]}, None, 401, None),
    ],
)
async def test_inference_takes_both_kinds_of_keys(
    settings: Any, key: Any, status: int, name: str | None
) -> None:
    """A, M7: and the pool gets to know who asks, to be fair between them."""
    backend = FakeBackend()
    async with client(backend, admin=FakeAdmin(), **settings) as http:
        answer = await http.post(CHAT, json=chat(), headers=bearer(key))
    assert answer.status_code == status
    assert [one.client for one in backend.requests] == ([] if name is None else [name])


async def test_all_keys_of_both_kinds_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: the time does not tell which key it was, nor of which kind."""
    compared: list[str] = []

    def spy(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("headrace.api.edge.hmac.compare_digest", spy)
    async with client(admin=FakeAdmin(), **KEYS) as http:
        for key in ("root", "user", "wrong"):
            compared.clear()
            await http.get("/v1/models", headers=bearer(key))
            assert len(compared) == 3


@pytest.mark.parametrize(
    ("peer", "host", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("::1", "[::1]:80", 200),
        ("::ffff:127.0.0.1", "localhost", 200),
        ("10.1.2.3", "localhost", 403),
        ("127.0.0.1", "models.example", 403),
    ],
)
async def test_without_keys_only_this_machine_manages(peer: str, host: str, status: int) -> None:
    """A: a service that is open to all, or behind a proxy, does not let all change it."""
    headers = {"host": host}
    async with client(admin=FakeAdmin(), peer=(peer, 1), allowed_hosts=("*",)) as http:
        assert (await http.get("/admin/models", headers=headers)).status_code == status
        assert (await http.get("/v1/models", headers=headers)).status_code == 200
    async with client(admin=FakeAdmin(), peer=(peer, 1), allowed_hosts=("*",), **KEYS) as http:
        answer = await http.get("/admin/models", headers=headers | bearer("root"))
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "name", ["forwarded", "via", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "X-Real-IP"]
)
async def test_what_a_proxy_sends_on_is_not_local(name: str) -> None:
    """A: a proxy on this machine does not make all that it serves an operator."""
    headers = {"host": "localhost", name: "127.0.0.1"}
    async with client(admin=FakeAdmin(), peer=("127.0.0.1", 1)) as http:
        assert (await http.get("/admin/models", headers=headers)).status_code == 403
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
        ({"sec-fetch-site": "none"}, 200),
        ({"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"}, 403),
        ({"origin": "http://localhost"}, 200),
        ({"x-forwarded-for": "10.0.0.1"}, 403),
    ],
)
async def test_foreign_pages_cannot_make_plans(headers: dict[str, str], status: int) -> None:
    """A: a picture on somebody's page sends no Origin, and a plan may fetch a model's header."""
    admin = FakeAdmin()
    async with client(admin=admin) as http:
        answer = await http.get("/admin/plan?model=m", headers=headers)
    assert answer.status_code == status
    assert len(admin.calls) == (status == 200)


async def test_the_words_of_others() -> None:
    """A: llama-server's router and Ollama's ps."""
    admin = FakeAdmin()
    async with client(admin=admin) as http:
        assert (await http.post("/models/load", json={"model": "m"})).json() == {"success": True}
        assert (await http.post("/models/unload", json={"model": "m"})).json() == {"success": True}
        running = (await http.get("/api/ps")).json()
    assert admin.calls == [("load", "m", None), ("unload", "m")]
    (model,) = running["models"]
    expected = {
        "name": "m:latest",
        "model": "m:latest",
        "size": 30,
        "size_vram": 10,
        "expires_at": "1970-01-01T00:00:01.500000Z",
        "context_length": 64,
    }
    assert expected.items() <= model.items()


class Caller:
    """One raw connection to the application, whose client can leave."""

    def __init__(self, app: Any, method: str, path: str, body: Any = None) -> None:
        self.sent: list[dict[str, Any]] = []
        self._sending = asyncio.Condition()
        self._gone = asyncio.Event()
        self._incoming = [{"type": "http.request", "body": json.dumps(body).encode()}]
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": b"model=m",
            "headers": [(b"host", b"localhost")],
        }
        self.task = asyncio.ensure_future(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._incoming:
            return self._incoming.pop()
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        async with self._sending:
            self.sent.append(message)
            self._sending.notify_all()

    @property
    def body(self) -> bytes:
        return b"".join(one.get("body", b"") for one in self.sent)

    async def until(self, reached: Callable[[bytes], bool]) -> None:
        async with asyncio.timeout(2), self._sending:
            await self._sending.wait_for(lambda: bool(self.sent) and reached(self.body))

    def leave(self) -> None:
        self._gone.set()


EVENT = PoolEvent(time=1.5, kind="loading", model="a\u2028b", data={"done": 1})


async def test_events() -> None:
    """A: one event with its kind and its data each; the stream ends when the pool does."""
    admin = FakeAdmin(EVENT, PoolEvent(time=2, kind="ready", model="m"))
    async with client(admin=admin) as http:
        answer = await http.get("/admin/events")
    assert answer.headers["content-type"].startswith("text/event-stream")
    first, *blocks, end = answer.text.split("\n\n")
    assert (first, end) == (": listening", "")
    kinds, told = zip(*(block.splitlines() for block in blocks), strict=True)
    assert kinds == ("event: loading", "event: ready")
    datas = [msgspec.json.decode(one.removeprefix("data: "), type=PoolEvent) for one in told]
    assert datas == [EVENT, PoolEvent(time=2, kind="ready", model="m")]
    assert admin.listeners == 0


async def test_events_that_cannot_be_told() -> None:
    """W17: a failure at the start has its status; a later one does not look like an end."""
    async with client(admin=FakeAdmin(Draining("It stops."))) as http:
        answer = await http.get("/admin/events")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
    admin = FakeAdmin(EVENT, Draining("It stops."))
    caller = Caller(create_app(FakeBackend(), ApiSettings(), admin=admin), "GET", "/admin/events")
    with pytest.raises(Draining):
        await caller.task
    assert caller.body.endswith(b"}\n\n")
    assert caller.sent[-1]["more_body"]


async def test_comments_between_events_and_a_client_that_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """W18: the line is kept alive, and nothing is left when nobody listens any more."""
    before = asyncio.all_tasks()
    admin = FakeAdmin(EVENT, None)
    monkeypatch.setattr(limits, "COMMENT_EVERY_S", 0.01)
    caller = Caller(create_app(FakeBackend(), ApiSettings(), admin=admin), "GET", "/admin/events")
    await caller.until(lambda body: body.count(b": listening") >= 3)
    assert caller.body.count(b"event: ") == 1
    assert admin.listeners == 1
    caller.leave()
    async with asyncio.timeout(0.25):
        await caller.task
    assert admin.listeners == 0
    assert asyncio.all_tasks() == before
    assert caller.sent[-1]["more_body"], "it did not end, the client left"


async def test_who_has_seen_the_headers_misses_nothing() -> None:
    """A: listening begins before the answer does."""
    admin = FakeAdmin(None)
    caller = Caller(create_app(FakeBackend(), ApiSettings(), admin=admin), "GET", "/admin/events")
    await caller.until(lambda _: True)
    assert caller.sent[0]["type"] == "http.response.start"
    assert admin.listeners == 1
    admin.closing.set()
    await caller.task
    assert caller.sent[-1] == {"type": "http.response.body", "body": b""}


@pytest.mark.parametrize(("state", "status"), [("created", 200), ("failed", 503)])
async def test_readiness_of_a_pool(state: Any, status: int) -> None:
    """W7: a model that is not loaded will be when it is asked for; a failed one will not."""
    admin = FakeAdmin()
    admin.models = [ModelStatus(id="m", source="s", state=state)]
    models = [ModelInfo(id="m", source="s", engine="fake", state=state)]
    async with client(FakeBackend(models=models), admin=admin) as http:
        answer = await http.get("/health/ready")
        assert answer.status_code == status
        admin.models = [
            ModelStatus(id="m", source="s", state="stopped", enabled=False),
            *admin.models,
        ]
        assert (await http.get("/health")).status_code == status
        admin.models = [LOADED, *admin.models]
        assert (await http.get("/health")).status_code == 200
    async with client(FakeBackend(), admin=admin, ready=lambda: False) as http:
        assert (await http.get("/health")).status_code == 503


@pytest.mark.parametrize(
    "path", [one for one in BODIES if "update" not in one and "pin" not in one]
)
async def test_an_order_outlives_its_client(path: str) -> None:
    """M4: a load that takes long is waited for, and done also when nobody waits any more."""
    go = asyncio.Event()
    admin = FakeAdmin(wait=go.wait)
    app = create_app(FakeBackend(), ApiSettings(), admin=admin)
    caller = Caller(app, "POST", path, BODIES[path])
    async with asyncio.timeout(2):
        await admin.begun.wait()
    caller.leave()
    await asyncio.sleep(0.01)
    assert (admin.finished, caller.sent) == (0, [])
    go.set()
    await caller.task
    assert admin.finished == 1


async def test_a_plan_ends_with_its_client() -> None:
    """W18: what changes nothing is not done for nobody."""
    admin = FakeAdmin(wait=asyncio.Event().wait)
    app = create_app(FakeBackend(), ApiSettings(), admin=admin)
    caller = Caller(app, "GET", "/admin/plan")
    async with asyncio.timeout(2):
        await admin.begun.wait()
        caller.leave()
        await caller.task
    assert (admin.finished, caller.sent) == (0, [])


async def test_events_to_a_head_request_end() -> None:
    """A: HEAD tells what GET would, and does not stay."""
    admin = FakeAdmin(None)
    async with asyncio.timeout(2), client(admin=admin) as http:
        answer = await http.head("/admin/events")
    assert (answer.status_code, answer.text, admin.listeners) == (200, "", 0)
