"""`keep_alive` and the wait for a load, as they reach the backend."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, text


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (0, 0), (300, 300), (1.5, 1.5), (-1, -1), (-0.5, -1), (1e300, -1), ("0", 0), ("-1", -1),
        ("5m", 300), ("1h30m", 5400), ("300ms", 0.3), ("1.5h", 5400), (".5s", 0.5), ("+2s", 2),
        ("-1m", -1), ("-0s", 0), ("90", 90), ("1h1m1s1ms", 3661.001), ("2us", 2e-6),
        ("500000000ns", 0.5), (None, None), ("9" * 64, -1),
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
    "value", ["", " ", "m", "5 m", "5x", "1h-5m", "--1", "1e3", "∞", "٣s", True, [], "1" * 65]
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
