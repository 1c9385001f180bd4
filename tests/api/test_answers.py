"""Whole answers, and several prompts in one request."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import msgspec
import pytest
from tests.api.fakes import CHAT, METRICS, TEXT, FakeBackend, chat, client, events, finish, text
from tests.api.test_stream import with_logprobs

from headrace.api import limits
from headrace.core.errors import ContextOverflow, QueueFull, Unsupported
from headrace.core.events import Delta, FinishReason
from headrace.core.request import GenerateRequest


async def test_a_chat_answer() -> None:
    """A, W15, W16: OpenAI's body, exact usage, the figures beside it."""
    async with client() as http:
        answer = await http.post(CHAT, json=chat(n=2))
    body = answer.json()
    assert body["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    assert body["choices"] == [
        {
            "index": index,
            "message": {"role": "assistant", "content": 'Hello\n"ü', "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
        for index in (0, 1)
    ]
    assert body["usage"]["total_tokens"] == 8
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
    assert msgspec.convert(body["metrics"], type(METRICS)) == METRICS


async def test_server_timing_has_every_figure() -> None:
    """W16: the figures are also a header."""
    async with client() as http:
        answer = await http.post(CHAT, json=chat())
    figures = dict(part.split(";dur=") for part in answer.headers["server-timing"].split(", "))
    assert {name: float(ms) for name, ms in figures.items()} == {
        "queue": 1.5, "load": 0.0, "prefill": 2.5, "ttft": 4.0, "tpot": 3.0,
        "itl-p50": 1.0, "itl-p99": 2.0, "itl-max": 3.0, "total": 9.0,
    }  # fmt: skip


async def test_reasoning_is_apart_from_the_answer() -> None:
    """W24: in its own field."""
    script = [Delta("a", (1,), 0, "why"), finish()]
    async with client(FakeBackend(lambda _: script)) as http:
        answer = await http.post(CHAT, json=chat())
    message = answer.json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == ("a", "why")


async def test_logprobs_in_both_forms() -> None:
    """W11: the forms of OpenAI."""
    async with client(FakeBackend(with_logprobs)) as http:
        one = (await http.post(CHAT, json=chat(logprobs=True))).json()["choices"][0]
        two = (await http.post(TEXT, json=text(logprobs=0))).json()["choices"][0]
    assert [token["bytes"] for token in one["logprobs"]["content"]] == [[97], [0xC3], [0xA9]]
    assert one["logprobs"]["content"][0]["top_logprobs"][0]["token"] == "b"
    assert two["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
        "token_logprobs": [-0.5, -0.1, -0.2],
        "top_logprobs": [{"b": -1.0}, {}, {}],
        "text_offset": [0, 1, 1],
    }


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (ContextOverflow("Too long.", param="messages"), 400, "context_length_exceeded"),
        (Unsupported("top_k is not supported.", param="top_k"), 400, "unsupported_parameter"),
        (QueueFull("Full."), 429, "queue_full"),
    ],
)
async def test_the_backends_errors(error: Exception, status: int, code: str) -> None:
    """W17, W11: what the engine refuses names the field."""
    async with client(FakeBackend(lambda _: [Delta("x", (1,)), error])) as http:
        answer = await http.post(CHAT, json=chat())
    assert answer.status_code == status
    assert answer.json()["error"] == {
        "message": str(error),
        "type": "rate_limit_error" if status == 429 else "invalid_request_error",
        "param": getattr(error, "param", None),
        "code": code,
    }


def echo_prompt(request: GenerateRequest) -> Iterable[Any]:
    prompt = request.prompt if isinstance(request.prompt, str) else str(request.prompt)
    for index in range(request.n):
        yield lambda: asyncio.sleep(0)
        yield Delta(f"{prompt}/{index}", (1,), index)
    reasons: list[FinishReason] = ["length"] * request.n
    yield finish(*reasons)


PROMPTS = [
    ("one", ["one"]),
    (["one", "two", "three"], ["one", "two", "three"]),
    ([1, 2], ["(1, 2)"]),
    ([[1, 2], [3]], ["(1, 2)", "(3,)"]),
]


@pytest.mark.parametrize(("prompt", "shown"), PROMPTS)
@pytest.mark.parametrize("streamed", [False, True])
async def test_each_prompt_gets_its_own_answers(
    prompt: Any, shown: list[str], streamed: bool
) -> None:
    """A: several prompts in one call each get their own answer, n choices for each."""
    async with client(FakeBackend(echo_prompt)) as http:
        answer = await http.post(TEXT, json=text(prompt, n=2, stream=streamed))
    expected = [f"{one}/{index}" for one in shown for index in (0, 1)]
    texts = [""] * len(expected)
    reasons: list[str | None] = [None] * len(expected)
    chunks = events(answer.text)[:-1] if streamed else [answer.json()]
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = choice["finish_reason"]
    assert (texts, reasons) == (expected, ["length"] * len(expected))
    assert chunks[-1]["metrics"]["usage"]["completion_tokens"] == 3 * len(shown), "W15"


async def test_prompts_run_side_by_side_but_not_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A: a bounded number of prompts runs at a time, each under its own id."""
    backend = FakeBackend(echo_prompt)
    monkeypatch.setattr(limits, "PARALLEL_PROMPTS", 2)
    async with client(backend) as http:
        answer = await http.post(TEXT, json=text(list("abcdef")))
    assert answer.json()["usage"]["prompt_tokens"] == 30
    assert backend.peak == 2
    assert len({request.id for request in backend.requests}) == 6


@pytest.mark.parametrize("streamed", [False, True])
async def test_one_failing_prompt_fails_all(streamed: bool) -> None:
    """W17: the failure is the answer, and nothing keeps running."""

    def script(request: GenerateRequest) -> Iterable[Any]:
        if request.prompt == "bad":
            yield QueueFull("Full.", retry_after_s=1)
        yield lambda: asyncio.sleep(60)

    backend = FakeBackend(script)
    async with client(backend) as http:
        answer = await http.post(TEXT, json=text(["a", "bad", "c"], stream=streamed))
    assert answer.status_code == 429
    assert (backend.running, len(backend.ended)) == (0, 3)


async def test_model_of_the_answer() -> None:
    """A: the model asked for; the only one where none is named."""
    backend = FakeBackend()
    backend.served = backend.served[:1]
    async with client(backend) as http:
        body = chat()
        named = await http.post(CHAT, json=body | {"model": "best"})
        del body["model"]
        unnamed = await http.post(CHAT, json=body)
    assert (named.json()["model"], unnamed.json()["model"]) == ("best", "m")
    assert [request.model for request in backend.requests] == ["best", ""]
