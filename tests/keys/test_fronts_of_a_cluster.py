"""Two fronts of a cluster that share keys, limits and usage by one PostgreSQL."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from tests.keys.postgres import Postgres
from tests.ports import free_port
from tests.service.serving import Service, served

from headrace.core.keys import Limits, NewKey
from headrace.keys.book import KeyBook
from headrace.keys.database import open_database

pytestmark = pytest.mark.postgres
LIMIT = 12
FRONT = ("cluster", "front")
TEXT = "a text of some length, which takes seconds"


class Shared(NamedTuple):
    """The database, the keys, and how a front is started."""

    url: str
    admin: str
    plain: str
    id: str
    settings: dict[str, str]

    def front(self, home: Path) -> Any:
        return served(environment=self.settings | {"HOME": str(home)}, command=FRONT)

    def post(self, front: Service, text: str = "x") -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": 1000}
        headers = {"authorization": f"Bearer {self.plain}"}
        place = f"{front.url}/v1/chat/completions"
        return httpx.post(place, json=body, headers=headers, timeout=60)

    def counted(self, front: Service) -> tuple[int, int]:
        """Requests and tokens of the key, as a front has its usage."""
        place = f"{front.url}/admin/usage?by=key&key={self.id}"
        reply = httpx.get(place, headers={"authorization": f"Bearer {self.admin}"}, timeout=60)
        if reply.status_code != 200:
            return 0, 0
        total = reply.json()["total"]
        return total["requests"], total["completion_tokens"]


def until(condition: Callable[[], object], within_s: float = 60.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.02)


@pytest.fixture
def shared(server: Postgres, tmp_path: Path) -> Iterator[Shared]:
    url = server.new()
    book = KeyBook(open_database(url, tmp_path))
    admin, _ = book.create(NewKey(name="me", scope="admin"))
    plain, key = book.create(NewKey(name="k", limits=Limits(requests_per_day=LIMIT)))
    book.close()
    port = free_port()
    settings = {"NODES": f"127.0.0.1:{port}", "DATABASE": url, "DATABASE_DOWN": "cached"}
    words = ("builtin:echo", "-o", "tokens_per_second=40", "--wire-port", str(port))
    home = {"HOME": str(tmp_path / "node")}
    with served(*words, environment=home, command=("cluster", "node")):
        yield Shared(url, admin, plain, key.id, settings)


def test_a_front_that_is_killed(shared: Shared, tmp_path: Path) -> None:
    """Issue 15 with 16: a limit holds over both fronts, and over one that begins anew."""
    with shared.front(tmp_path / "a") as first:
        with shared.front(tmp_path / "b") as second, ThreadPoolExecutor(8) as threads:
            fronts = (first, second)
            statuses = list(threads.map(lambda n: shared.post(fronts[n % 2]).status_code, range(8)))
            assert statuses == [200] * 8
            until(lambda: shared.counted(first)[0] == 8)
            lost = [threads.submit(shared.post, second, TEXT * 20) for _ in range(2)]
            until(lambda: running(second, shared) == 2)
            second.process.kill()
            for each in lost:
                assert isinstance(each.exception(), httpx.TransportError)
        with shared.front(tmp_path / "b") as second:
            statuses = [shared.post(front).status_code for front in (first, second) * 3]
            assert statuses == [200, 200, 429, 429, 429, 429]
            until(lambda: shared.counted(second)[0] >= 10)
            assert shared.counted(first) == shared.counted(second)


def running(front: Service, shared: Shared) -> int:
    place, headers = f"{front.url}/admin/models", {"authorization": f"Bearer {shared.admin}"}
    models = httpx.get(place, headers=headers, timeout=60).json()["models"]
    return sum(model["running"] for model in models)


def test_the_database_is_killed_under_a_stream(
    server: Postgres, shared: Shared, tmp_path: Path
) -> None:
    """Issue 15 with 16: the stream ends as it should, and its usage is counted later."""
    body = {"messages": [{"role": "user", "content": TEXT}], "stream": True}
    headers = {"authorization": f"Bearer {shared.plain}"}
    with shared.front(tmp_path / "a") as front:
        text, stopped = "", False
        place = f"{front.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", place, json=body, headers=headers, timeout=60) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {"):
                        choices = json.loads(line.removeprefix("data: "))["choices"]
                        text += choices[0]["delta"].get("content") or "" if choices else ""
                    if len(text) > 5 and not stopped:
                        server.stop()
                        stopped = True
            assert text == TEXT
            # What the front knows of the key goes on while the database is away.
            assert shared.post(front).status_code == 200
        finally:
            if stopped:
                server.start()
        until(lambda: shared.counted(front) == (2, len(TEXT) + 3))
