"""Keys, hosts, origins, limits, ids and the access log."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from tests.api.fakes import CHAT, FakeAdmin, FakeBackend, chat, client, hello

from headrace.api import limits
from headrace.api.app import ADMIN_ROUTES, ROUTES, create_app
from headrace.api.batch.routes import BatchRoutes
from headrace.api.limits import ApiSettings
from headrace.config import hash_key
from headrace.core.errors import ConfigError

KEYS: dict[str, Any] = {"api_keys": (hash_key("other"), hash_key("secret"))}
BEARER = {"authorization": "Bearer secret"}


@pytest.mark.parametrize(
    "headers", [BEARER, {"authorization": "bearer  secret"}, {"x-api-key": "secret"}]
)
async def test_a_known_key_opens(headers: dict[str, str]) -> None:
    """A: API keys, in either header."""
    async with client(**KEYS) as http:
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic secret"},
     {"authorization": f"Bearer {hash_key('secret')}"}, {"x-api-key": ""}],
)  # fmt: skip
async def test_an_unknown_key_does_not(headers: dict[str, str]) -> None:
    """A: OpenAI's 401; the hash itself is no key."""
    backend = FakeBackend()
    async with client(backend, **KEYS) as http:
        answer = await http.post(CHAT, json=chat(), headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert backend.requests == []


@pytest.mark.parametrize(
    "path", ["/openapi.json", "/nope", "/v1/models/m", "/health/other", "/health/live/"]
)
async def test_every_route_but_health_needs_the_key(path: str) -> None:
    """A: also the description of the API, and what does not exist."""
    async with client(**KEYS) as http:
        assert (await http.get(path)).status_code == 401
        for open_path in ("/health", "/health/live", "/health/ready"):
            assert (await http.get(open_path)).status_code == 200


async def test_no_route_passes_without_a_key() -> None:
    """Issue 14: in whatever dialect, each refuses in its form, and before the body is read."""
    backend = FakeBackend()
    open_paths = {"/", "/health", "/health/live", "/health/ready"}
    routes = (*ROUTES, *ADMIN_ROUTES, *BatchRoutes(None).routes())
    closed = [route for route in routes if route.path not in open_paths]
    app = create_app(backend, ApiSettings(**KEYS), admin=FakeAdmin(), batches="off")
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        for route in closed:
            path = re.sub(r"\{\w+(:path)?\}", "m", route.path)
            answer = await http.request(route.method, path, content=b"{")
            body = answer.json()
            assert answer.status_code == 401, path
            error = body["error"]
            assert "key" in (error if path.startswith("/api/") else error["message"]), path
            assert ("request_id" in body) == path.startswith("/v1/messages"), path
    assert backend.requests == []


async def test_all_keys_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: the time does not tell which key it was: all are compared, and in constant time."""
    compared: list[str] = []

    def spy(one: str, other: str) -> bool:
        compared.append(other)
        return one == other

    monkeypatch.setattr("headrace.api.edge.hmac.compare_digest", spy)
    async with client(api_keys=tuple(hash_key(key) for key in ("secret", "b", "c"))) as http:
        assert (await http.get("/v1/models", headers=BEARER)).status_code == 200
    assert len(compared) == 3


def test_hash_of_a_key() -> None:
    """A: SHA-256 in hex; anything else is refused before serving."""
    assert hash_key("k") == "sha256:" + hashlib.sha256(b"k").hexdigest()
    with pytest.raises(ConfigError, match="api_keys"):
        ApiSettings(api_keys=("secret",))
    with pytest.raises(ConfigError, match="api_keys"):
        ApiSettings(api_keys=("0" * 64,))
    with pytest.raises(ConfigError, match="admin_keys"):
        ApiSettings(admin_keys=("secret",))


def test_limits_are_positive() -> None:
    with pytest.raises(ConfigError, match="max_body_bytes"):
        ApiSettings(max_body_bytes=0)
    with pytest.raises(ConfigError, match="load_wait_s"):
        ApiSettings(load_wait_s=-1)
    assert ApiSettings(load_wait_s=0).load_wait_s == 0, "who does not want to wait"


HOSTS = [
    ("localhost", {}, True), ("LOCALHOST:81", {}, True), ("127.0.0.1:8000", {}, True),
    ("[::1]:8000", {}, True), ("[::1]", {}, True), ("evil.example", {}, False),
    ("localhost.evil.example", {}, False), ("127.0.0.1.evil.example", {}, False),
    ("192.168.1.5", {}, False), ("[::1]evil", {}, False), ("", {}, False),
    ("box.lan", {"allowed_hosts": ("Box.lan",)}, True), ("any", {"allowed_hosts": ("*",)}, True),
    ("192.168.1.5:80", {"host": "192.168.1.5"}, True),
    ("192.168.1.6", {"host": "192.168.1.5"}, False),
    ("192.168.1.5", {"host": "0.0.0.0"}, True), ("[fe80::1]:1", {"host": "::"}, True),
    ("evil.example", {"host": "0.0.0.0"}, False),
]  # fmt: skip


@pytest.mark.parametrize(("host", "settings", "allowed"), HOSTS)
async def test_hosts(host: str, settings: Any, allowed: bool) -> None:
    """A: a foreign Host is refused (a name may have been rebound to this address)."""
    async with client(**settings) as http:
        answer = await http.get("/health", headers={"host": host})
    assert answer.status_code == (200 if allowed else 403)
    if not allowed:
        assert answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("second", ["localhost", "evil.example"])
async def test_each_of_several_hosts_has_to_be_served(second: str) -> None:
    """A: what reads the first, and what reads the last, find a name that is known."""
    for hosts in (("localhost", second), (second, "localhost")):
        async with client() as http:
            answer = await http.get("/health", headers=[("host", host) for host in hosts])
        assert answer.status_code == (200 if second == "localhost" else 403)


ORIGINS = [
    ("http://localhost:3000", {}, True), ("https://127.0.0.1", {}, True),
    ("http://[::1]:1", {}, True),
    ("https://evil.example", {}, False), ("null", {}, False), ("http://localhost.evil", {}, False),
    ("http://[", {}, False),
    ("https://ui.example", {"allowed_origins": ("https://ui.example",)}, True),
    ("https://any.example", {"allowed_origins": ("*",)}, True),
]  # fmt: skip


@pytest.mark.parametrize(("origin", "settings", "allowed"), ORIGINS)
async def test_origins(origin: str, settings: Any, allowed: bool) -> None:
    """A: a foreign Origin is refused; an allowed one may read the answer."""
    backend = FakeBackend()
    async with client(backend, **settings) as http:
        answer = await http.post(CHAT, json=chat(), headers={"origin": origin})
        preflight = await http.options(
            CHAT,
            headers={
                "origin": origin,
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization",
            },
        )
    assert answer.status_code == (200 if allowed else 403)
    assert preflight.status_code == (204 if allowed else 403)
    assert answer.headers.get("access-control-allow-origin") == (origin if allowed else None)
    assert len(backend.requests) == allowed
    if allowed:
        assert preflight.headers["access-control-allow-headers"] == "authorization"
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


async def test_without_origin_no_cors_headers() -> None:
    async with client() as http:
        answer = await http.get("/health")
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_preflight_needs_no_key() -> None:
    """A: a browser sends none with it."""
    async with client(**KEYS) as http:
        headers = {"origin": "http://localhost", "access-control-request-method": "POST"}
        assert (await http.options(CHAT, headers=headers)).status_code == 204
        assert (await http.options(CHAT)).status_code == 401


async def test_declared_and_real_size_of_a_body() -> None:
    """A: 413, whether the size is declared or not; the last allowed byte is allowed."""
    backend = FakeBackend()

    async def chunks(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b" " * 100

    async with client(backend, max_body_bytes=300) as http:
        declared = await http.post(CHAT, content=b" " * 301)
        streamed = await http.post(CHAT, content=chunks(4))
        fits = await http.post(CHAT, content=chunks(3))
    assert [declared.status_code, streamed.status_code, fits.status_code] == [413, 413, 400]
    assert declared.json()["error"]["code"] == "body_too_large"
    assert backend.requests == []


FORMS = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]


@pytest.mark.parametrize("kind", [*FORMS, "application/octet-stream", "nonsense", None])
async def test_json_under_any_type(kind: str | None) -> None:
    """Issue 12.3: what `curl -d` sends is read; what is not JSON is refused as such."""
    headers = {} if kind is None else {"content-type": kind}
    async with client() as http:
        answer = await http.post(CHAT, content=json.dumps(chat()), headers=headers)
        form = await http.post(CHAT, content=b"model=m&stream=1", headers=headers)
    assert answer.status_code == 200
    assert form.status_code == 400
    assert "not valid JSON: invalid character (byte 0)" in form.json()["error"]["message"]


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(
    ("headers", "status"),
    [({"origin": "https://evil.example"}, 403), ({"origin": "null"}, 403),
     ({"sec-fetch-site": "cross-site"}, 403),
     ({"sec-fetch-site": "cross-site", "origin": "http://localhost:3000"}, 200),
     ({"sec-fetch-site": "same-origin"}, 200)],
)  # fmt: skip
async def test_forms_of_foreign_pages(kind: str, headers: dict[str, str], status: int) -> None:
    """Issue 12.3: a foreign page can send a form without a preflight, but with its Origin."""
    backend = FakeBackend()
    async with client(backend) as http:
        headers = {**headers, "content-type": kind}
        answer = await http.post(CHAT, content=json.dumps(chat()), headers=headers)
    assert (answer.status_code, len(backend.requests)) == (status, status == 200)


async def test_a_body_that_never_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A: 408, and the connection's memory is free again."""

    async def never() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(60)

    monkeypatch.setattr(limits, "BODY_TIMEOUT_S", 0.05)
    async with client() as http:
        answer = await http.post(CHAT, content=never())
    assert answer.status_code == 408


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("POST", "/v1/models", 405), ("GET", CHAT, 405),
     ("GET", "/health", 200), ("POST", CHAT, 400), ("GET", "/docs", 200)],
)  # fmt: skip
async def test_every_answer_has_the_servers_id(method: str, path: str, status: int) -> None:
    """A: x-request-id is made here, also on errors, and the client's is not taken."""
    async with client() as http:
        answer = await http.request(method, path, headers={"x-request-id": "mine"})
        again = await http.request(method, path)
    assert answer.status_code == status
    ids = {answer.headers["x-request-id"], again.headers["x-request-id"]}
    assert len(ids) == 2
    assert "mine" not in ids
    if status >= 400:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    if status == 405:
        assert answer.headers["allow"]


async def test_access_log(caplog: pytest.LogCaptureFixture) -> None:
    """W27: one structured line for each request, with the template of the path, no content."""
    caplog.set_level(logging.INFO, "headrace.access")
    async with client() as http:
        headers = {"x-request-id": "client-7"}
        answer = await http.post(CHAT, json=chat(), headers=headers)
        await http.get("/v1/models/private-name")
        await http.get("/secret?q=1", headers={"x-request-id": 'a" b'})
    lines = [vars(one)["data"] for one in caplog.records if one.name == "headrace.access"]
    seen = [(one["method"], one["route"], one["status"], one["outcome"]) for one in lines]
    assert seen == [
        ("POST", CHAT, 200, "ok"),
        ("GET", "/v1/models/{model_id:path}", 404, "refused"),
        ("GET", "-", 404, "refused"),
    ]
    assert lines[0]["request_id"] == answer.headers["x-request-id"]
    assert [one["client_request_id"] for one in lines] == ["client-7", "", ""]
    assert lines[0]["ms"] > 0
    assert "private-name" not in caplog.text
    assert "secret" not in caplog.text
    assert "'hi'" not in str(lines)


async def test_broken_stream_in_the_access_log(caplog: pytest.LogCaptureFixture) -> None:
    """W27: a stream that broke after its headers is an error, whatever its status."""
    from headrace.core.events import Delta

    caplog.set_level(logging.INFO, "headrace.access")
    script = [Delta("a", (1,)), ValueError("x")]
    async with client(FakeBackend(lambda _: script)) as http:
        await http.post(CHAT, json=chat(stream=True))
    record = next(one for one in caplog.records if one.name == "headrace.access")
    data = vars(record)["data"]
    assert (data["status"], data["outcome"]) == (200, "error")


async def test_head_and_lifespan() -> None:
    """A: the application starts and stops under a server."""
    app = create_app(FakeBackend(), ApiSettings())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        assert (await http.head("/v1/models")).status_code == 200


async def test_settings_are_replaced_for_what_comes_next() -> None:
    """M8: keys, hosts, origins and times as a reload has them; who is inside stays inside."""
    go = asyncio.Event()
    backend = FakeBackend(lambda request: [go.wait, *hello(request)])
    app = create_app(backend, ApiSettings(api_keys=(hash_key("secret"),)), admin=FakeAdmin())
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        running = asyncio.ensure_future(http.post(CHAT, json=chat(), headers=BEARER))
        async with asyncio.timeout(2):
            await backend.received.wait()
        new = ApiSettings(
            api_keys=(hash_key("new"),), admin_keys=(hash_key("root"),),
            allowed_hosts=("models.example",), deadline_s=9, load_wait_s=3,
        )  # fmt: skip
        app.replace_settings(new)
        go.set()
        assert (await running).status_code == 200
        assert (await http.get("/v1/models", headers=BEARER)).status_code == 401
        fresh = {"authorization": "Bearer new", "host": "models.example"}
        assert (await http.post(CHAT, json=chat(), headers=fresh)).status_code == 200
        assert (await http.get("/admin/models", headers=fresh)).status_code == 403
        root = {"authorization": "Bearer root"}
        assert (await http.get("/admin/models", headers=root)).status_code == 200
        closed = (await http.get("/openapi.json", headers=root)).json()
        app.replace_settings(ApiSettings())
        opened = (await http.get("/openapi.json")).json()
    waits = [(one.deadline_s, one.load_wait_s) for one in backend.requests]
    assert waits == [(None, 30), (9, 3)]
    assert (closed["security"], opened["security"]) == ([{"key": []}], [])
