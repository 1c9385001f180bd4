"""More requests than there are places (issue 3, must show 4)."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from tests.service.serving import Service, served
from tests.service.streams import Got, client, post, status, stream, tell

from headrace.core.events import MAX_TOKEN_IDS

SLOTS, PLACES, ALL = 8, 16, 72
SPEED, TOKENS = 40, 24
RETRY = ("retry-after-ms", "retry-after")
CONFIGURATION = f"""
[server]
api_keys = ["one", "two"]
admin_keys = ["boss"]

[models.many]
model = "builtin:echo"
max_queued = {PLACES}
options = {{slots = {SLOTS}, tokens_per_second = {SPEED}}}

[models.one]
model = "builtin:echo"
max_queued = 16
options = {{slots = 1, tokens_per_second = 100}}

[models.tight]
model = "builtin:echo"
max_queued = 1
options = {{slots = 1, tokens_per_second = 100}}
"""


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    path = tmp_path_factory.mktemp("admission") / "headrace.toml"
    path.write_text(CONFIGURATION)
    with served("--config", str(path)) as running:
        yield running


async def many(http: httpx.AsyncClient) -> Got:
    return await stream(http, "many", "x" * TOKENS, max_tokens=TOKENS)


async def warm_up(http: httpx.AsyncClient) -> None:
    """Let the rate be measured."""
    await asyncio.gather(*(many(http) for _ in range(2 * SLOTS)))


@dataclass
class Reply:
    """An answer, how long it took in all, and how long until it began."""

    text: str
    seconds: float
    first_s: float

    @property
    def status(self) -> int:
        return int(self.text.split(" ", 2)[1])

    @property
    def retry_after(self) -> tuple[float, int]:
        """The exact one, and that in whole seconds."""
        found = [re.search(rf"(?i)\r\n{name}: (\d+)\r\n", self.text) for name in RETRY]
        milliseconds, seconds = (int(match[1]) for match in found if match)
        return milliseconds / 1000, seconds


async def all_at_once(url: str) -> list[Reply]:
    """Ask over connections that are open already, all in one turn of the loop.

    Of a client that does more than that the time would be measured, and not of the service.
    """
    address = urlsplit(url)
    body = json.dumps({"model": "many", "prompt": "x" * TOKENS, "max_tokens": TOKENS})
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Authorization: Bearer boss\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    lines = [await asyncio.open_connection(address.hostname, address.port) for _ in range(ALL)]
    began = time.monotonic()

    async def read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Reply:
        first = await reader.readline()
        first_s = time.monotonic() - began
        rest = await reader.read()
        writer.close()
        return Reply((first + rest).decode(), time.monotonic() - began, first_s)

    for _, writer in lines:
        writer.write((head + body).encode())
    return await asyncio.gather(*(read(*line) for line in lines))


async def fill(service: Service, within_s: float) -> None:
    """72 at once: see who runs, who waits, who is refused, and what those are told."""
    async with client(service.url, headers=key("boss")) as http:
        await warm_up(http)
        asked = asyncio.create_task(all_at_once(service.url))
        most = (0, 0)
        while not asked.done():
            found = await status(http, "many")
            most = max(most, (found["running"], found["queued"]))
            await asyncio.sleep(0.05)
    replies = await asked
    assert most == (SLOTS, PLACES)
    refused = [one for one in replies if one.status == 429]
    done = sorted(one.seconds for one in replies if one.status == 200)
    assert (len(done), len(refused)) == (SLOTS + PLACES, ALL - SLOTS - PLACES)
    assert all('"code":"queue_full"' in one.text for one in refused)
    slowest = max(one.first_s for one in refused)
    told = sorted(one.retry_after for one in refused)
    assert all(exact <= whole < exact + 1 for exact, whole in told)
    # The first request to end makes the first place, and so on.
    ratios = [exact / end for (exact, _), end in zip(told, done, strict=False)]
    tell(f"refused after {slowest:.3f} s; told / true {min(ratios):.2f} to {max(ratios):.2f}")
    assert all(0.5 <= ratio <= 2 for ratio in ratios), ratios
    assert slowest < within_s


async def test_the_queue_is_bounded_and_says_when_to_come_again(service: Service) -> None:
    """M7, W20: 8 run, 16 wait, 48 hear at once that there is no place and when there will be."""
    await fill(service, 0.5)


@pytest.mark.slow
async def test_a_refusal_takes_no_time(service: Service) -> None:
    """M7, W20: the same, within 100 ms, on a machine that does nothing else."""
    for _ in range(5):
        await fill(service, 0.1)
        # The places that were promised are kept for those who do not come again here.
        await asyncio.sleep(6)


async def test_those_who_come_when_told_are_served(service: Service) -> None:
    """M7: the Retry-After proves right: nobody has to come a third time but a few."""

    async def insist(http: httpx.AsyncClient) -> int:
        for times in range(20):
            got = await many(http)
            if got.status == 200:
                return times
            await asyncio.sleep(int(got.headers["retry-after-ms"]) / 1000)
        raise AssertionError("never served")

    async with client(service.url, headers=key("boss")) as http:
        await warm_up(http)
        began = time.monotonic()
        times = await asyncio.gather(*(insist(http) for _ in range(ALL)))
        took_s = time.monotonic() - began
    ideal_s = ALL / SLOTS * TOKENS / SPEED
    tell(f"came again {sorted(times)}, {took_s:.1f} s of at least {ideal_s:.1f} s")
    assert sum(1 for count in times if count > 1) <= ALL // 4, sorted(times)
    assert took_s < 2 * ideal_s


async def test_the_openai_package_gets_all_of_them_served(service: Service) -> None:
    """M7: 72 at once with its own retries: no error reaches the caller."""
    async with openai.AsyncOpenAI(
        base_url=f"{service.url}/v1", api_key="one", max_retries=20, timeout=60
    ) as asker:
        answers = await asyncio.gather(
            *(
                asker.completions.create(
                    model="many", prompt=f"{number:0{TOKENS}}", max_tokens=TOKENS
                )
                for number in range(ALL)
            )
        )
    assert [answer.choices[0].text for answer in answers] == [f"{n:0{TOKENS}}" for n in range(ALL)]


async def test_two_keys_share_fairly(service: Service) -> None:
    """M7: who asks for little does not wait behind all of one who asks for much."""
    order: list[str] = []
    async with client(service.url) as http:

        async def ask(name: str) -> None:
            body = {"model": "one", "prompt": "x" * 20, "max_tokens": 20}
            answer = await http.post("/v1/completions", json=body, headers=key(name))
            assert answer.status_code == 200
            order.append(name)

        first = [asyncio.create_task(ask("one")) for _ in range(12)]
        await until_it_has(http, "one", queued=11)
        second = [asyncio.create_task(ask("two")) for _ in range(4)]
        await asyncio.gather(*first, *second)
    # One after the other, once the one that ran already and the one after it are done.
    assert order[:10].count("two") == 4, order


async def test_a_deadline_passes_in_the_queue(tmp_path: Path) -> None:
    """M7, W20: who would wait too long hears so when his time is over: 408."""
    path = tmp_path / "headrace.toml"
    model = '[models.one]\nmodel = "builtin:echo"\noptions = {slots = 1, tokens_per_second = 100}\n'
    path.write_text(model)
    with served("--config", str(path)) as service:
        async with client(service.url) as http:
            running = asyncio.create_task(stream(http, "one", "x" * 200, max_tokens=200))
            await until_it_has(http, "one", running=1)
            # From now on: the one that runs has none.
            path.write_text("[server]\ndeadline_s = 0.5\n" + model)
            await post(http, "reload")
            began = time.monotonic()
            answer = await http.post("/v1/completions", json={"model": "one", "prompt": "hello"})
            took_s = time.monotonic() - began
            assert (await running).done
    assert (answer.status_code, answer.json()["error"]["code"]) == (408, "queue_timeout")
    assert 0.45 < took_s < 1.4


async def test_ids_of_millions_of_tokens_are_not_returned(service: Service) -> None:
    """M9: they would stop the answers of others while they are read and written."""
    async with client(service.url, headers=key("boss")) as http:
        text = "x" * (MAX_TOKEN_IDS + 1)
        refused = await http.post("/tokenize", json={"model": "tight", "content": text})
        assert refused.status_code == 400
        error = refused.json()["error"]
        assert error["message"].startswith("It has 1,048,577 tokens, and 1,048,576 at most")
        assert error["param"] == "content"
        turn = {"role": "user", "content": text}
        body = {"model": "tight", "messages": [turn]}
        counted = await http.post("/v1/messages/count_tokens", json=body)
        assert counted.json()["input_tokens"] > MAX_TOKEN_IDS
        most = await http.post("/tokenize", json={"model": "tight", "content": text[1:]})
        assert len(most.json()["tokens"]) == MAX_TOKEN_IDS


async def test_counting_never_queues(service: Service) -> None:
    """M9: tokens are counted while every slot and every place is taken."""
    async with client(service.url, headers=key("boss")) as http:
        both = [asyncio.create_task(stream(http, "tight", "x" * 300, max_tokens=300))]
        await until_it_has(http, "tight", running=1)
        both.append(asyncio.create_task(stream(http, "tight", "x", max_tokens=1)))
        await until_it_has(http, "tight", queued=1)
        refused = await stream(http, "tight", "x", max_tokens=1)
        assert refused.status == 429
        began = time.monotonic()
        for _ in range(20):
            answer = await http.post("/tokenize", json={"model": "tight", "content": "river"})
            assert answer.json()["count"] == 5
        models = await http.get("/v1/models")
        took_s = time.monotonic() - began
        assert models.status_code == 200
        found = await status(http, "tight")
        assert (found["running"], found["queued"]) == (1, 1)
        await asyncio.gather(*both)
    assert took_s < 1.5


async def test_who_leaves_the_queue_frees_his_place(service: Service) -> None:
    """M7, W18: at once, and not when his turn would have come."""
    async with client(service.url, headers=key("boss")) as http:
        running = asyncio.create_task(stream(http, "tight", "x" * 300, max_tokens=300))
        await until_it_has(http, "tight", running=1)
        leaving = asyncio.create_task(stream(http, "tight", "y", max_tokens=1))
        await until_it_has(http, "tight", queued=1)
        leaving.cancel()
        began = time.monotonic()
        await until_it_has(http, "tight", queued=0)
        assert time.monotonic() - began < 1
        assert not running.done()
        after = await stream(http, "tight", "z", max_tokens=1)
        assert (after.status, after.text) == (200, "z")
        assert (await running).text == "x" * 300


async def until_it_has(http: httpx.AsyncClient, model: str, **wanted: int) -> None:
    """Wait until a model stands so."""
    async with asyncio.timeout(10):
        while True:
            answer = await http.get(f"/admin/models/{model}", headers=key("boss"))
            found = answer.raise_for_status().json()
            if all(found[name] == value for name, value in wanted.items()):
                return
            await asyncio.sleep(0.005)
