"""Two services that share keys, limits and usage by one PostgreSQL."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tests.keys.postgres import Postgres
from tests.service.serving import served

from headrace.core.keys import Limits, NewKey
from headrace.keys.book import KeyBook
from headrace.keys.database import open_database

pytestmark = pytest.mark.postgres
CHAT = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


def test_a_race_at_two_services(server: Postgres, tmp_path: Path) -> None:
    """Issue 16, shown 5: of 100 requests at two services, 25 are served, and all are in usage."""
    url = server.new()
    book = KeyBook(open_database(url, tmp_path))
    admin, _ = book.create(NewKey(name="me", scope="admin"))
    plain, key = book.create(NewKey(name="k", limits=Limits(requests_per_day=25)))
    book.close()
    homes = [{"HOME": str(tmp_path / name), "DATABASE": url} for name in "ab"]
    with (
        served("builtin:echo", environment=homes[0]) as first,
        served("builtin:echo", environment=homes[1]) as second,
    ):
        headers = {"authorization": f"Bearer {plain}"}

        def ask(number: int) -> int:
            place = f"{(first, second)[number % 2].url}/v1/chat/completions"
            return httpx.post(place, json=CHAT, headers=headers, timeout=60).status_code

        with ThreadPoolExecutor(16) as threads:
            statuses = list(threads.map(ask, range(100)))
        assert (statuses.count(200), statuses.count(429)) == (25, 75)
        place = f"{first.url}/admin/usage?by=key&key={key.id}"
        headers, end, counted = {"authorization": f"Bearer {admin}"}, time.monotonic() + 20, 0
        while counted < 25 and time.monotonic() < end:
            counted = httpx.get(place, headers=headers).json()["total"]["requests"]
        assert counted == 25
