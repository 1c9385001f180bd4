"""Keys with limits at a running service, as clients of all dialects meet them."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.service.serving import Service, served

from headrace.cli.app import run
from headrace.core.keys import digest_of
from headrace.core.keys import id_of as id_of_digest

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
MODELS = """
[models.echo]
model = "builtin:echo"
[models.other]
model = "builtin:echo"
preload = false
[models.vectors]
model = "builtin:echo"
task = "embed"
preload = false
"""
_names = map(str, itertools.count())


class Keys:
    """A service, and its admin key, which the command line has made."""

    def __init__(self, service: Service, admin: str) -> None:
        self.url = service.url
        self.service = service
        self.admin = self.client(admin)

    def client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60)

    def create(self, models: tuple[str, ...] = (), **limits: int) -> str:
        body = {"name": next(_names), "limits": limits, "models": models}
        response = self.admin.post("/admin/keys", json=body)
        assert response.status_code == 200, response.text
        return response.json()["key"]

    def used(self, key: str) -> dict[str, Any]:
        listed = self.admin.get("/admin/keys").json()["data"]
        return next(each["used"] for each in listed if each["id"] == id_of(key))


def id_of(key: str) -> str:
    return id_of_digest(digest_of(key.encode()))


def command(home: Path, *arguments: str) -> int:
    return run(["keys", *arguments, "--home", str(home)])


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keys]:
    home = tmp_path_factory.mktemp("home")
    (home / "headrace.toml").write_text(MODELS)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert command(home, "create", "me", "--scope", "admin") == 0
    admin = printed.getvalue().strip()
    environment = {"HOME": str(home), "CONFIG": str(home / "headrace.toml")}
    with served(environment=environment) as service:
        made = Keys(service, admin)
        yield made
        made.admin.close()


def test_the_openai_package_reads_the_limits(keys: Keys) -> None:
    """Issue 16, shown 5: rate headers and the 429, read by the openai package."""
    key = keys.create(requests_per_day=2, tokens_per_day=5000)
    with openai.OpenAI(base_url=f"{keys.url}/v1", api_key=key, max_retries=0) as client:
        usage = _limited(client)
    # What the stream has used is settled right after its end.
    while (used := keys.used(key))["running"]:
        pass
    assert used["day_tokens"] == 2 * usage


def _limited(client: openai.OpenAI) -> int:
    """Use a limit of two requests; return the tokens of each."""
    made = client.chat.completions.with_raw_response.create(model="echo", **CHAT)
    assert made.headers["x-ratelimit-limit-requests"] == "2"
    assert made.headers["x-ratelimit-remaining-requests"] == "1"
    assert made.headers["x-ratelimit-reset-requests"].endswith("s")
    assert int(made.headers["x-ratelimit-remaining-tokens"]) < 5000
    usage = made.parse().usage
    with client.chat.completions.with_streaming_response.create(
        model="echo", stream=True, **CHAT
    ) as stream:
        assert stream.headers["x-ratelimit-remaining-requests"] == "0"
        assert "[DONE]" in stream.text()
    with pytest.raises(openai.RateLimitError) as caught:
        client.chat.completions.create(model="echo", **CHAT)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0
    assert usage is not None
    return usage.total_tokens


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/v1/chat/completions", CHAT, ("error", "code")),
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}, ("error", "code")),
        ("/v1/responses", {"input": "a"}, ("error", "code")),
        ("/v1/embeddings", {"input": "a", "model": "vectors"}, ("error", "code")),
        ("/v1/messages", CHAT, ("error", "type")),
        ("/v1/messages/count_tokens", {"messages": CHAT["messages"]}, ("error", "type")),
        ("/api/chat", {"messages": CHAT["messages"]}, ("error",)),
        ("/api/generate", {"prompt": "a"}, ("error",)),
        ("/completion", {"prompt": "a"}, ("error", "code")),
        ("/tokenize", {"content": "a"}, ("error", "code")),
    ],
)
def test_all_dialects_keep_to_the_limits(
    path: str, body: dict[str, Any], error: tuple[str, ...], keys: Keys
) -> None:
    """Issue 16.1 Keys: 429 in the form of each API; a 403 for models that are not allowed."""
    body = {"model": "echo", **body}
    key = keys.create((body["model"],), requests_per_day=1)
    with keys.client(key) as client:
        assert client.post(path, json=body).status_code == 200
        refused = client.post(path, json=body)
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) > 0
        reason: Any = refused.json()
        for name in error:
            reason = reason[name]
        assert "limit" in reason
        prefix = "anthropic-ratelimit-" if path.startswith("/v1/messages") else "x-ratelimit-"
        assert any(name.startswith(prefix) for name in refused.headers)
        other = client.post(path, json={**body, "model": "other"})
        assert other.status_code == 403
        assert [card["id"] for card in client.get("/v1/models").json()["data"]] == [body["model"]]
        assert client.get("/v1/models/other").status_code == 404


def test_only_the_models_of_a_key_are_shown(keys: Keys) -> None:
    """Issue 14.3 and 16.1 Keys: other models are not there, in whatever form they are listed."""
    with keys.client(keys.create(("echo",))) as client:
        theirs = {"anthropic-version": "2023-06-01"}
        for headers in ({}, theirs):
            listed = client.get("/v1/models", headers=headers).json()
            assert [card["id"] for card in listed["data"]] == [listed["last_id"]] == ["echo"]
            for name, status in (("echo", 200), ("other", 404), ("none", 404)):
                assert client.get(f"/v1/models/{name}", headers=headers).status_code == status
        for path in ("/api/tags", "/api/ps"):
            assert [model["name"] for model in client.get(path).json()["models"]] == ["echo:latest"]
        hidden = client.post("/api/show", json={"model": "other"})
        absent = client.post("/api/show", json={"model": "none"})
        assert client.post("/api/show", json={"model": "echo:latest"}).status_code == 200
        assert (hidden.status_code, absent.status_code) == (404, 404)
        assert hidden.json() == absent.json()
        assert client.get("/props").json()["model_alias"] == "echo"
        assert client.get("/props?model=other").status_code == 404
    with keys.client(keys.create(("other",))) as client:
        assert client.get("/api/ps").json()["models"] == []
        assert client.get("/props").json()["model_alias"] == "other"
    names = {model["name"] for model in keys.admin.get("/api/tags").json()["models"]}
    assert names == {"echo:latest", "other:latest", "vectors:latest"}


def test_the_anthropic_package(keys: Keys) -> None:
    """Issue 16.1 Keys: Anthropic's names in /v1/messages."""
    key = keys.create(requests_per_day=1)
    with anthropic.Anthropic(base_url=keys.url, api_key=key, max_retries=0) as client:
        made = client.messages.with_raw_response.create(model="echo", **CHAT)
        with pytest.raises(anthropic.RateLimitError):
            client.messages.create(model="echo", **CHAT)
    assert made.headers["anthropic-ratelimit-requests-remaining"] == "0"
    assert made.headers["anthropic-ratelimit-requests-reset"].endswith("T00:00:00Z")


def test_a_race_over_http(keys: Keys) -> None:
    """Issue 16, shown 5: of 60 requests that race, seven are served."""
    key = keys.create(requests_per_day=7)
    with keys.client(key) as client, ThreadPoolExecutor(20) as threads:

        def ask(_: int) -> int:
            body = {"model": "echo", **CHAT}
            return client.post("/v1/chat/completions", json=body).status_code

        statuses = list(threads.map(ask, range(60)))
    assert (statuses.count(200), statuses.count(429)) == (7, 53)


def test_tokens_are_never_more_than_the_limit(keys: Keys) -> None:
    """Issue 16.1 Keys: an answer without max_tokens gets what is left; then nothing is."""
    key = keys.create(tokens_per_day=60)
    long = {"model": "echo", "messages": [{"role": "user", "content": "one two three " * 3}]}
    with keys.client(key) as client:
        made = client.post("/v1/chat/completions", json=long).json()
        assert made["usage"]["total_tokens"] <= 60
        assert made["choices"][0]["finish_reason"] == "length"
        refused = client.post("/v1/chat/completions", json=long)
        assert refused.status_code == 429
        assert keys.used(key)["day_tokens"] == made["usage"]["total_tokens"]


def test_change_and_revoke(keys: Keys) -> None:
    """Issue 16.1 Keys: over HTTP; what is wrong is named."""
    key = keys.create(requests_per_day=1)
    place = f"/admin/keys/{id_of(key)}"
    changed = keys.admin.post(place, json={"name": "new", "limits": {"concurrent": 3}})
    assert changed.json()["limits"] == {"concurrent": 3}
    wrong = keys.admin.post(place, json={"limits": {"concurrent": 0}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "limits.concurrent")
    assert keys.admin.post("/admin/keys/none", json={}).status_code == 404
    assert keys.admin.delete(place).json()["revoked"]
    with keys.client(key) as client:
        assert client.get("/v1/models").status_code == 401
        assert client.get("/admin/keys").status_code == 401
    assert "was revoked by" in keys.service.log


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 16.1 Keys: without a service; a key is printed once, alone on stdout."""
    assert command(tmp_path, "list") == 0
    assert not (tmp_path / "keys.sqlite3").exists()
    command(tmp_path, "create", "a", "--requests-per-day", "5", "--models", "x,y")
    assert re.search(r"^hr-\S{43}$", capsys.readouterr().out, re.MULTILINE)
    command(tmp_path, "limit", "a", "--requests-per-day", "0", "--concurrent", "2")
    command(tmp_path, "list")
    listed = capsys.readouterr().out
    assert "2 concurrent" in listed
    assert "x, y" in listed
    assert "requests/day" not in listed
    assert command(tmp_path, "create", "b", "--requests-per-day", "-1") == 2
    assert "limits.requests_per_day" in capsys.readouterr().err
    assert command(tmp_path, "limit", "a") == 2
    assert command(tmp_path, "revoke", "b") == 2
    assert command(tmp_path, "revoke", "a") == 0
    command(tmp_path, "list", "--all", "--json")
    (key,) = json.loads(capsys.readouterr().out.rpartition("revoked\n")[2])
    assert key["revoked"]


def test_processes_for_connections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Issue 16.1 Keys: with `fronts`, a first key that is made while the service runs counts."""
    environment = {"HOME": str(tmp_path), "FRONTS": "2"}
    with served("builtin:echo", environment=environment) as service:
        url = f"{service.url}/v1/chat/completions"
        assert httpx.post(url, json=CHAT, timeout=60).status_code == 200
        made = httpx.post(f"{service.url}/admin/keys", json={"name": "me", "scope": "admin"})
        refused = httpx.post(f"{service.url}/admin/keys", json={"name": "x"})
        assert (made.status_code, refused.status_code) == (200, 401)
        assert httpx.post(url, json=CHAT, timeout=60).status_code == 401
        command(tmp_path, "create", "laptop", "--requests-per-day", "3")
        key = capsys.readouterr().out.strip()
        headers = {"authorization": f"Bearer {key}"}
        statuses = [
            httpx.post(url, json=CHAT, headers=headers, timeout=60).status_code for _ in range(5)
        ]
        assert statuses == [200, 200, 200, 429, 429]
