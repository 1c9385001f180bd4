"""The official client against the real server on the real model (issue: must show 2)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from tests.service.serving import Service, served

from headrace import Delta, ModelWorker
from headrace.core.request import Message

# Any, as the client's types want literals where a test wants plain values.
MESSAGES: Any = [{"role": "user", "content": "Name three rivers in Europe."}]
TOKENS = 24
GREEDY: Any = {"model": "smollm2", "max_tokens": TOKENS, "temperature": 0}


@pytest.fixture(scope="module")
def service(smollm2_path: Path) -> Iterator[Service]:
    # One thread each: other tests run beside these, and two would wait for one another.
    flags = ("-o", "slots=17", "-o", "threads=1", "--context-length", "512")
    with served("smollm2", *flags) as running:
        yield running


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def own_text(smollm2_path: Path) -> str:
    """What the worker says without any HTTP, in this process."""
    with ModelWorker(str(smollm2_path), isolate=False, context_length=512, threads=1) as worker:
        streamed = "".join(
            event.text
            for event in worker.generate_stream(messages=MESSAGES, max_tokens=TOKENS, temperature=0)
            if isinstance(event, Delta)
        )
        whole = worker.generate(messages=MESSAGES, max_tokens=TOKENS, temperature=0).text
    assert streamed == whole
    return whole


@pytest.fixture(scope="module")
def engines_text(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What llama.cpp says when it is asked directly, with its own template."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(smollm2_path)
    params.n_ctx, params.verbosity = 512, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.hostnames = [str(tmp_path_factory.mktemp("llama") / "s.sock")]
    server: Any = xllamacpp.Server(params)
    answer: Any = server.handle_chat_completions(
        {"messages": MESSAGES, "max_tokens": TOKENS, "temperature": 0}
    )
    return answer["choices"][0]["message"]["content"]


def streamed(client: openai.OpenAI) -> str:
    chunks = client.chat.completions.create(messages=MESSAGES, stream=True, **GREEDY)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_greedy_text_is_the_workers_and_the_engines(
    client: openai.OpenAI, own_text: str, engines_text: str
) -> None:
    """W10, W13: through HTTP, streamed or not, byte for byte what the engine itself says."""
    whole = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert whole.choices[0].message.content == own_text == engines_text
    assert streamed(client) == own_text


async def test_greedy_text_is_the_same_among_16_others(service: Service, own_text: str) -> None:
    """W20: what runs beside a request does not change it."""
    others: Any = [
        [{"role": "user", "content": f"Tell me about the number {n}."}] for n in range(16)
    ]
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(messages=messages, **GREEDY | {"max_tokens": 12})
                for messages in [*others, MESSAGES]
            )
        )
    assert answers[-1].usage is not None
    assert answers[-1].usage.completion_tokens == 12
    answer = answers[-1].choices[0].message.content
    assert answer
    assert own_text.startswith(answer)


async def test_async_stream_carries_usage_and_metrics(service: Service) -> None:
    """W15, W16: usage and figures on the last chunk."""
    async with openai.AsyncOpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            messages=MESSAGES, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = [chunk async for chunk in stream]
    usage, metrics = chunks[-1].usage, (chunks[-1].model_extra or {})["metrics"]
    assert usage is not None
    assert usage.completion_tokens == metrics["usage"]["completion_tokens"] == TOKENS
    assert metrics["time_to_first_token_ms"] > 0
    assert metrics["decode_tokens_per_second"] > 0
    assert chunks[-2].choices[0].finish_reason == "length"


def test_usage_is_exact(client: openai.OpenAI, service: Service) -> None:
    """W15, W21: the prompt's count is what /tokenize says of the same messages."""
    import httpx

    asked = httpx.post(
        f"{service.url}/tokenize", json={"model": "smollm2", "messages": MESSAGES}, timeout=30
    )
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == asked.json()["count"]
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + TOKENS


def test_completions_take_text_lists_and_ids(client: openai.OpenAI) -> None:
    """A: several prompts each get their own answer, as text or as ids."""
    alone = [
        client.completions.create(prompt=prompt, **GREEDY).choices[0].text
        for prompt in ("The river Rhine", "One, two, three,")
    ]
    both = client.completions.create(prompt=["The river Rhine", "One, two, three,"], **GREEDY)
    assert [choice.text for choice in both.choices] == alone
    ids = client.completions.create(prompt=[[504, 9531], [504]], **GREEDY)
    assert [choice.index for choice in ids.choices] == [0, 1]


def test_sampling_is_seeded_and_n_differs(client: openai.OpenAI) -> None:
    """W11: a seed repeats; n choices are n draws."""
    options = GREEDY | {"temperature": 1.5, "seed": 7}
    once, again = (
        client.chat.completions.create(messages=MESSAGES, n=3, **options) for _ in range(2)
    )
    texts = [choice.message.content for choice in once.choices]
    assert texts == [choice.message.content for choice in again.choices]
    assert len(set(texts)) == 3


def test_stop_strings_are_not_leaked(client: openai.OpenAI, own_text: str) -> None:
    """W12: the text ends before the stop string, in stream and non-stream alike."""
    stop = own_text[10:16]
    whole = client.chat.completions.create(messages=MESSAGES, stop=stop, **GREEDY)
    assert whole.choices[0].message.content == own_text[: own_text.index(stop)]
    assert whole.choices[0].finish_reason == "stop"


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    """W17: the client raises its typed errors, with the message and the field."""
    with pytest.raises(openai.NotFoundError, match="smollm2"):
        client.chat.completions.create(messages=MESSAGES, model="other")
    with pytest.raises(openai.BadRequestError, match="context length") as caught:
        client.chat.completions.create(
            messages=[{"role": "user", "content": "river " * 600}], model="smollm2"
        )
    assert caught.value.code == "context_length_exceeded"


def test_the_caller_objects_are_not_changed(smollm2_path: Path) -> None:
    """W9: messages and options are as they were."""
    message = Message("user", "Hello")
    with ModelWorker("builtin:echo") as worker:
        worker.generate(messages=[message], stop=["zzz"])
    assert message == Message("user", "Hello")
