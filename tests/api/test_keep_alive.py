"""`keep_alive` and the wait for a load, as they reach the backend."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, text

from headrace.config.tree import hash_key


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0), (300, 300), (1.5, 1.5), (-1, -1), ("-1h", -1), ("0", 0), ("-1", -1),
        ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), (".5s", 0.5), ("+2s", 2),
        ("-1m", -1), ("-0s", 0), ("90", 90), ("1h1m1s1ms", 3661.001), ("2us", 2e-6),
        ("500000000ns", 0.5), (None, None), ("8784h", 366 * 86400),
    ],
    ids=repr,
)  # fmt: skip
async def test_durations(value: Any, seconds: float | None) -> None:
    """A, M5: Ollama's meaning, in both routes, of a number and of a text."""
    backend = FakeBackend()
    async with client(backend) as http:
        await http.post(CHAT, json=chat(keep_alive=value))
        await http.post(TEXT, json=text(["a", "b"], keep_alive=value))
    assert [one.keep_alive for one in backend.requests] == [pytest.approx(seconds)] * 3


@pytest.mark.parametrize(
    "value",
    [
        *("", " ", "m", "5 m", "5x", "1h-5m", "--1", "1e3", "∞", "٣s", True, [], "1" * 65),
        # Issue 11.9: too long, or negative and not -1.
        *(1e300, "9" * 64, "8785h", -0.5, -2, "-5m", -1e300, "NaN", "inf"),
    ],
)
@pytest.mark.parametrize(("path", "body"), [(CHAT, chat()), (TEXT, text())])
async def test_what_is_no_duration(path: str, body: Any, value: Any) -> None:
    """A: refused, and the field is named."""
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post(path, json={**body, "keep_alive": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "keep_alive")
    assert "keep_alive" in answer.json()["error"]["message"]
    assert backend.requests == []


async def test_a_stream_waits_for_its_load_and_others_for_a_time() -> None:
    """M4: a stream can be told how far the load is; who cannot be is sent away after a while."""
    backend = FakeBackend()
    async with client(backend, load_wait_s=7) as http:
        for body in (chat(), chat(stream=True), chat(stream=False)):
            await http.post(CHAT, json=body)
        await http.post(TEXT, json=text(["a", "b"]))
    waits = [one.load_wait_s for one in backend.requests]
    assert waits == [7, None, 7, 7, 7]


@pytest.mark.parametrize("raw", ["NaN", "Infinity", "-Infinity", "1e400", "-1e400"])
async def test_numbers_that_are_none(raw: str) -> None:
    """Issue 11.9."""
    backend = FakeBackend()
    body = json.dumps(chat()).removesuffix("}") + f', "keep_alive": {raw}}}'
    async with client(backend) as http:
        answer = await http.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, backend.requests) == (400, [])


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("user", 0, (0, True)),
        ("user", "10m", (600, True)),
        ("user", "9h", (3600, True)),
        ("user", -1, (3600, True)),
        ("user", None, (None, False)),
        ("admin", 0, (0, False)),
        ("admin", -1, (-1, False)),
    ],
)
async def test_a_client_only_lengthens(key: str, value: Any, expected: tuple[Any, bool]) -> None:
    """Issue 11.9: within the operator's bound, once there are keys; an admin may do all."""
    backend = FakeBackend()
    keys: dict[str, Any] = {"api_keys": (hash_key("user"),), "admin_keys": (hash_key("admin"),)}
    async with client(backend, **keys) as http:
        headers = {"authorization": f"Bearer {key}"}
        answer = await http.post(CHAT, json=chat(keep_alive=value), headers=headers)
    assert answer.status_code == 200
    assert [(one.keep_alive, one.lengthens) for one in backend.requests] == [expected]


async def test_what_does_not_queue_has_a_deadline_too() -> None:
    """The routes for tokens wait for a load no longer than others."""
    backend = FakeBackend()
    async with client(backend, load_wait_s=7, deadline_s=9) as http:
        await http.post("/tokenize", json={"content": "x"})
        await http.post("/detokenize", json={"tokens": [1]})
    assert [(one.load_wait_s, one.deadline_s) for one in backend.requests] == [(7, 9)] * 2
