"""W16: what the server says of a request is what a client outside of it sees.

The client does nothing but note when bytes come. Durations agree within 5 ms and 2 %, in the
median of several requests, as somebody else may have the core for a moment.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from tests.lab.cases.samples import converted
from tests.service.serving import Service, served

from headrace.engines import status

WORDS = ["river", "stone", "winter", "bridge", "light", "water", "wind", "mill", "wheel", "grain"]
TOKENS, REQUESTS, STREAMS = 24, 3, 3


class Seen(NamedTuple):
    """One answer from outside; times are monotonic seconds."""

    sent: float
    times: list[float]
    metrics: dict[str, Any]
    usage: dict[str, Any]

    @property
    def first_ms(self) -> float:
        return (self.times[0] - self.sent) * 1000

    @property
    def gaps(self) -> list[float]:
        pairs = zip(self.times, self.times[1:], strict=False)
        return [(after - before) * 1000 for before, after in pairs]


async def ask(url: str, body: dict[str, Any]) -> Seen:
    """Stream one answer; the time of each read is noted at once, and what it had at the end."""
    place = urlsplit(url)
    payload = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {place.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    reader, writer = await asyncio.open_connection(place.hostname, place.port)
    sent = time.monotonic()
    writer.write(head.encode() + payload)
    reads, told = list[tuple[int, float]](), b""
    try:
        while data := await asyncio.wait_for(reader.read(1 << 16), 60):
            told += data
            reads.append((len(told), time.monotonic()))
    finally:
        writer.close()
    found = [
        (end, json.loads(line[6:])) for end, line in lines(told) if line.startswith(b"data: {")
    ]
    # The last token may come in one read with the end, which has no text.
    ends = [end for end, chunk in found if any(one["text"] for one in chunk["choices"])]
    times = [next(when for read, when in reads if read >= end) for end in ends]
    last = found[-1][1]
    return Seen(sent, times, last["metrics"], last["usage"])


def lines(told: bytes) -> Iterator[tuple[int, bytes]]:
    """The lines of a body that came in chunks, with the number of bytes up to the chunk's end."""
    at = told.index(b"\r\n\r\n") + 4
    while at < len(told):
        begin = told.index(b"\r\n", at) + 2
        at = begin + int(told[at : begin - 2], 16) + 2
        for line in told[begin : at - 2].splitlines():
            yield at, line


def body(model: str, number: int, **more: Any) -> dict[str, Any]:
    words = " ".join(WORDS[number:] + WORDS[:number])
    return {
        "model": model,
        "prompt": f"{number} {words * 4}",
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **more,
    }


def check(seen: list[Seen]) -> None:
    """Compare what was seen with what was said."""
    for one in seen:
        assert one.usage["completion_tokens"] == TOKENS
        assert one.metrics["usage"]["completion_tokens"] == TOKENS
    assert off(seen, lambda one: (one.first_ms, one.metrics["time_to_first_token_ms"])) <= 0
    assert off(seen, lambda one: (statistics.median(one.gaps), gap(one))) <= 0
    assert off(seen, lambda one: (per_token(one), one.metrics["time_per_output_token_ms"])) <= 0


def gap(one: Seen) -> float:
    return one.metrics["inter_token_ms"]["p50"]


def per_token(one: Seen) -> float:
    return (one.times[-1] - one.times[0]) * 1000 / (TOKENS - 1)


def off(seen: list[Seen], both: Callable[[Seen], tuple[float, float]]) -> float:
    """By how much more than 5 ms and 2 % they differ, in the median."""
    pairs = [both(one) for one in seen]
    return statistics.median(abs(out - told) - 5 - 0.02 * told for out, told in pairs)


async def alone_and_together(url: str, model: str) -> list[list[Seen]]:
    await ask(url, body(model, 9, max_tokens=4))
    alone = [await ask(url, body(model, number)) for number in range(REQUESTS)]
    several = await asyncio.gather(*(ask(url, body(model, number)) for number in range(STREAMS)))
    return [alone, list(several)]


def counted(url: str, model: str, prompt: str) -> int:
    answer = httpx.post(f"{url}/tokenize", json={"model": model, "prompt": prompt})
    return answer.raise_for_status().json()["count"]


@contextmanager
def serving(name: str, *arguments: str) -> Iterator[tuple[Service, str]]:
    common = ("--context-length", "1024", "--max-running", "4")
    with served(name, *common, *arguments, ready=False) as service:
        service.wait_until_ready(300)  # vllm takes minutes
        models = httpx.get(f"{service.url}/v1/models").json()["data"]
        yield service, models[0]["id"]


def measure(service: Service, model: str) -> None:
    found = asyncio.run(alone_and_together(service.url, model))
    for seen in found:
        check(seen)
    prompt = body(model, 0)["prompt"]
    assert found[0][0].usage["prompt_tokens"] == counted(service.url, model, prompt)


def test_echo() -> None:
    """W16, issue 5: times and counts of echo are those of the client."""
    speed = ("-o", "tokens_per_second=100", "-o", "prefill_tokens_per_second=500")
    with serving("echo", *speed) as (service, model):
        measure(service, model)


def test_llamacpp(smollm2_path: Path) -> None:
    """W16, issue 5: times and counts of llama.cpp are those of the client."""
    with serving(str(smollm2_path), "-o", "threads=1") as (service, model):
        measure(service, model)


def test_of_an_upstream(smollm2_path: Path) -> None:
    """W16, issue 5: the figures of a remote model are what is felt here, not over there."""
    with serving("echo", "-o", "tokens_per_second=100") as (upstream, model):
        settings = ("-o", f"base_url={upstream.url}/v1")
        with serving(f"headrace:{model}", *settings) as (service, name):
            for seen in asyncio.run(alone_and_together(service.url, name)):
                check(seen)


def _made(gguf: Path) -> Path:
    from tests import models_made

    return models_made.smollm2(gguf)


HEAVY: list[Any] = ["openvino", "transformers"]
if status("vllm").available:
    # It is there only in an environment that is made for it.
    marks = [pytest.mark.timeout(600), pytest.mark.filterwarnings("default")]
    HEAVY.append(pytest.param("vllm", marks=marks))
QUICK = {
    "vllm": ("-o", "eager=true", "-o", f"kv_cache_bytes={1 << 28}", "-o", "dtype=float32"),
    # Two threads of torch spin on the core that the service and the client need.
    "transformers": ("-o", "threads=1"),
}


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.parametrize("engine", HEAVY)
def test_heavy(engine: str, smollm2_path: Path) -> None:
    """W16, issue 5: times and counts of the other engines, counted by another's tokenizer too."""
    from jinja2 import Environment

    made = _made(smollm2_path)
    model = converted(smollm2_path) if engine == "openvino" else str(made)
    template = (made / "chat_template.jinja").read_text(encoding="utf-8")
    chat = Environment(trim_blocks=True, lstrip_blocks=True).from_string(template)
    asked = [{"role": "user", "content": "Name three rivers of Spain — ríos, 川."}]
    text = chat.render(messages=asked, add_generation_prompt=True)
    library: Any = import_module("tokenizers")  # it comes with the engines
    tokenizer = library.Tokenizer.from_file(str(made / "tokenizer.json"))
    expected = len(tokenizer.encode(text, add_special_tokens=False).ids)
    with serving(model, "--engine", engine, *QUICK.get(engine, ())) as (service, name):
        measure(service, name)
        request = {"model": name, "messages": asked, "max_tokens": 5}
        answer = httpx.post(f"{service.url}/v1/chat/completions", json=request, timeout=60).json()
    assert answer["usage"]["prompt_tokens"] == expected
