from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from tests.engines.remote.rig import ask, started
from tests.fakes.upstream import (
    DONE,
    Play,
    Seen,
    chunk,
    event,
    eventually,
    said,
    upstream,
    usage,
)
from tests.pictures_made import asked, png, question
from tests.sounds_made import spoken, wav

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    ConstraintViolated,
    DeadlineExceeded,
    Draining,
    HeadraceError,
    InvalidRequest,
    Unsupported,
)
from headrace.core.events import Delta, Finish, Progress, ToolCall, ToolCallDelta
from headrace.core.media import Pictures
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.stream import collect, collect_count, collect_text
from headrace.core.tools import Tool, ToolChoice


async def test_images_are_passed_on() -> None:
    """Issue 13, pictures: as a data: URL with the type of the bytes; or refused by name."""
    request = asked("What is ", png(), "?")
    async with upstream(said("Red.")) as server, started(server.url) as worker:
        assert worker.models()[0].capabilities.vision
        result = await collect(worker.ask(request))
        (sent,) = server.requests
        count = await collect_count(worker.ask(CountRequest(messages=request.messages)))
    assert result.text == "Red."
    assert sent.body["messages"][0]["content"] == question("What is ", png(), "?")["content"]
    assert count.estimated
    assert count.count > 64
    async with upstream(said("")) as server, started(server.url, "deepseek") as worker:
        with pytest.raises(Unsupported, match="takes no images") as caught:
            await collect(worker.ask(request))
        assert (caught.value.param, server.requests) == ("messages[0].content[1]", [])


async def test_audio_is_passed_on() -> None:
    """Issue 13, audio input: with the format of the bytes; or refused by name."""
    pictures = Pictures()
    content = ("What is ", pictures.add_audio(wav(0.2), "messages[0].content[1]"))
    request = GenerateRequest(messages=(Message("user", content),), media=pictures.data)
    async with upstream(said("A tone.")) as server, started(server.url) as worker:
        assert worker.models()[0].capabilities.audio
        await collect(worker.ask(request))
        (sent,) = server.requests
    assert sent.body["messages"][0]["content"] == spoken("What is ", wav(0.2))["content"]
    for provider in ("deepseek", "anthropic"):
        async with upstream(said("")) as server, started(server.url, provider) as worker:
            with pytest.raises(Unsupported, match="takes no audio") as caught:
                await collect(worker.ask(request))
            assert (caught.value.param, server.requests) == ("messages[0].content[1]", [])


async def test_an_answer_comes_with_its_account() -> None:
    """W9, W14, W15, W16: deltas, a reason, the upstream's exact usage, and figures."""
    play = Play(
        [
            event(chunk(role="assistant", content="")),
            event(chunk(reasoning_content="Hm. ")),
            event(chunk(content="Grüß ")),
            event(chunk(content="Gott 👋")),
            event(chunk(reason="length")),
            event(usage(12, 9, cached=4, thought=3)),
            DONE,
        ]
    )
    async with upstream(play) as server, started(server.url) as worker:
        result = await collect(worker.ask(ask(max_tokens=9, temperature=0)))
        [seen] = server.requests
    assert (result.choices[0].text, result.choices[0].reasoning) == ("Grüß Gott 👋", "Hm. ")
    assert result.finish_reason == "length"
    account = result.usage
    assert (account.prompt_tokens, account.cached_tokens) == (12, 4)
    assert (account.completion_tokens, account.reasoning_tokens) == (9, 3)
    figures = result.metrics
    assert figures.usage == account
    assert (figures.outcome, figures.engine, figures.model) == ("length", "openai", "far")
    assert figures.time_to_first_token_ms is not None
    assert figures.decode_tokens_per_second is not None
    assert seen.path == "/chat/completions"
    assert seen.headers["authorization"].startswith("Bearer sk-")
    assert seen.body == {
        "model": "gpt-x",
        "messages": [{"role": "user", "content": "Hello?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": 9,
        "temperature": 0,
    }


async def test_characters_cut_in_pieces_come_whole() -> None:
    """W13: bytes of one character in different packets, and events without regard to packets."""
    whole = b"".join([event(chunk(content="añ👋ü")), event(chunk(reason="stop")), DONE])
    steps: list[Any] = [step for byte in whole for step in (bytes([byte]), 0.0)]
    async with upstream(Play(steps)) as server, started(server.url) as worker:
        result = await collect(worker.ask(ask()))
    assert result.text == "añ👋ü"


async def test_usage_is_guessed_where_none_is_told() -> None:
    play = Play([event(chunk(content="abcd")), event(chunk(reason="stop")), DONE])
    async with upstream(play) as server, started(server.url) as worker:
        result = await collect(worker.ask(ask("x" * 40)))
    assert result.usage.prompt_tokens >= 10
    assert result.usage.completion_tokens == 1


async def test_stop_strings_are_passed_on_and_kept_here_too() -> None:
    """W12: an upstream that does not stop is cut; nothing of the string is shown."""
    endless = Play([event(chunk(content=text)) for text in ("one E", "ND tw", "o END")] + [9.0])
    async with upstream(endless) as server, started(server.url, stop=("</s>",)) as worker:
        result = await collect(worker.ask(ask(stop=("END",))))
        await eventually(lambda: server.requests[0].left is not None)
        assert server.requests[0].body["stop"] == ["END", "</s>"]
    assert (result.text, result.finish_reason) == ("one ", "stop")


async def test_choices_are_told_apart() -> None:
    play = Play(
        [
            event(chunk(0, content="a")),
            event(chunk(1, content="x")),
            event(chunk(1, content="y", reason="length")),
            event(chunk(0, content="b", reason="stop")),
            DONE,
        ]
    )
    async with upstream(play) as server, started(server.url) as worker:
        result = await collect(worker.ask(ask(n=2)))
        assert server.requests[0].body["n"] == 2
    texts = [(one.text, one.finish_reason) for one in result.choices]
    assert texts == [("ab", "stop"), ("xy", "length")]


async def test_log_probabilities_of_both_forms() -> None:
    chat = {
        "content": [
            {
                "token": "é",
                "logprob": -0.5,
                "bytes": [195, 169],
                "top_logprobs": [{"token": "e", "logprob": -1.5, "bytes": None}],
            }
        ]
    }
    plain = {
        "tokens": ["a", "bytes:\\xc3"],
        "token_logprobs": [-0.1, -0.2],
        "top_logprobs": [{"b": -3.0}, None],
    }
    one = chunk(content="é", reason="stop")
    one["choices"][0]["logprobs"] = chat
    two = {"choices": [{"index": 0, "text": "a", "finish_reason": "stop", "logprobs": plain}]}
    async with (
        upstream(Play([event(one), DONE]), Play([event(two), DONE])) as server,
        started(server.url) as worker,
    ):
        first = (await collect(worker.ask(ask(logprobs=1)))).choices[0].logprobs
        prompt = GenerateRequest(prompt="p", sampling=Sampling(logprobs=1))
        second = (await collect(worker.ask(prompt))).choices[0].logprobs
        bodies = [seen.body for seen in server.requests]
    assert (first[0].data, first[0].logprob, first[0].top[0].data) == ("é".encode(), -0.5, b"e")
    assert [token.data for token in second] == [b"a", b"\xc3"]
    assert (second[0].top[0].data, second[1].top) == (b"b", ())
    assert (bodies[0]["logprobs"], bodies[0]["top_logprobs"]) == (True, 1)
    assert (bodies[1]["logprobs"], bodies[1]["prompt"]) == (1, "p")


FIELDS: dict[str, Any] = {
    "max_tokens": 5,
    "min_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "seed": 5,
    "stop_token_ids": (5,),
    "ignore_eos": True,
    "logprobs": 2,
    "logit_bias": {5: 1.0},
}


@pytest.mark.parametrize("provider", ["openai", "deepseek", "mistral", "ollama", "vllm"])
async def test_each_field_is_honoured_or_refused_by_name(provider: str) -> None:
    """W11: none is dropped silently."""
    async with upstream() as server, started(server.url, provider) as worker:
        able = worker.models()[0].capabilities.sampling
        for name, value in FIELDS.items():
            try:
                await collect(worker.ask(ask(**{name: value})))
            except Unsupported as error:
                assert (name in able, error.param) == (False, name)
            else:
                body = server.requests[-1].body
                own = "random_seed" if (provider, name) == ("mistral", "seed") else name
                assert name in able, name
                sent = body["top_logprobs"] if name == "logprobs" else body[own]
                assert sent == json.loads(json.dumps(value))
    assert able <= FIELDS.keys()


async def test_other_fields_are_refused_by_name() -> None:
    """W11: what an upstream cannot do is said before it is asked."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    cases: list[tuple[str, GenerateRequest, str]] = [
        ("deepseek", ask(n=2), "n"),
        ("deepseek", ask(constraint=Constraint(json_schema=schema)), "response_format"),
        ("minimax", ask(constraint=Constraint(json_schema={})), "response_format"),
        ("deepseek", GenerateRequest(prompt="p"), "prompt"),
        ("openai", GenerateRequest(prompt=(1, 2)), "prompt"),
        ("openai", ask(context_length=10), "context_length"),
        ("openai", ask(template_options={"a": 1}), "chat_template_kwargs"),
        ("openai", ask(answered=(1,)), "answered"),
        ("openai", ask(echo=True), "echo"),
    ]
    async with upstream() as server:
        for provider, request, param in cases:
            async with started(server.url, provider) as worker:
                with pytest.raises(Unsupported) as refused:
                    await collect(worker.ask(request))
                assert refused.value.param == param
        assert server.requests == []


@pytest.mark.parametrize(
    ("text", "reason", "kept"),
    [
        ('{"a": "x"}', "stop", True),
        ('{"a":\n"x"}', "stop", True),
        ("Hello there", "stop", False),
        ('{"a": 1}', "stop", False),
        ('{"a": "x"', "length", True),
        ("Hello", "content_filter", True),
    ],
)
async def test_an_answer_is_checked_here_too(text: str, reason: str, kept: bool) -> None:
    """Issue 11.4: an upstream that does not enforce a schema gives an error, not that answer."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    request = ask(constraint=Constraint(json_schema=schema))
    async with (
        upstream(said(*text, reason=reason)) as server,
        started(server.url, "vllm") as worker,
    ):
        if kept:
            assert (await collect(worker.ask(request))).text == text
        else:
            with pytest.raises(ConstraintViolated, match="does not keep to its JSON schema"):
                await collect(worker.ask(request))


async def test_what_is_asked_beside_sampling() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    async with (
        upstream(script=lambda seen: said('{"a": "x"}')) as server,
        started(server.url, "vllm") as worker,
        started(server.url, "openrouter") as router,
    ):
        constraint = Constraint(json_schema=schema)
        await collect(worker.ask(ask(constraint=constraint, template_options={"think": 1})))
        await collect(worker.ask(ask(constraint=Constraint(json_schema={"type": "object"}))))
        await collect(router.ask(ask()))
        bodies = [seen.body for seen in server.requests]
    assert bodies[0]["response_format"]["json_schema"]["schema"] == schema
    assert bodies[0]["chat_template_kwargs"] == {"think": 1}
    assert bodies[1]["response_format"] == {"type": "json_object"}
    assert bodies[2]["provider"] == {"require_parameters": True}


async def test_prompts_and_their_echo() -> None:
    def script(seen: Seen) -> Play:
        text = "".join(map(str, seen.body["prompt"]))
        choice = {"index": 0, "text": text.upper(), "finish_reason": "stop"}
        return Play([event({"choices": [choice]}), DONE])

    async with upstream(script=script) as server, started(server.url, "vllm") as worker:
        echoed = await collect(worker.ask(GenerateRequest(prompt="ab", echo=True)))
        ids = await collect(worker.ask(GenerateRequest(prompt=(1, 2))))
        assert server.requests[0].path == "/completions"
    assert (echoed.text, ids.text) == ("abAB", "12")


async def test_content_in_parts_and_thinking_in_parts() -> None:
    """Mistral's models that think give lists."""
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
        {"type": "text", "text": "yes"},
    ]
    play = Play([event(chunk(content=parts, reason="stop")), DONE])
    async with upstream(play) as server, started(server.url) as worker:
        choice = (await collect(worker.ask(ask()))).choices[0]
    assert (choice.reasoning, choice.text) == ("hm", "yes")


async def test_a_client_that_leaves_cuts_the_upstream_at_once() -> None:
    """W18: the upstream sees the end within a second, whatever it was at."""
    phases = [
        Play([30.0, DONE]),
        Play([event(chunk(role="assistant", content="")), 30.0]),
        Play([event(chunk(content="a")), 30.0]),
    ]
    async with upstream(*phases) as server, started(server.url) as worker:
        for number, _ in enumerate(phases):
            got: list[str] = []
            reading = asyncio.create_task(_read(worker.ask(ask()), got))
            await eventually(lambda at=number: len(server.requests) > at)
            if number == 2:
                await eventually(lambda at=got: at == ["a"])
            reading.cancel()
            await asyncio.wait({reading})
            await eventually(lambda at=number: server.requests[at].left is not None, 1.0)
            assert worker.load == (0, 0)


async def _read(stream: Any, got: list[str]) -> None:
    try:
        async for one in stream:
            if isinstance(one, Delta):
                got.append(one.text)
    finally:
        await stream.aclose()


async def test_the_deadline_holds_however_silent_the_upstream_is() -> None:
    async with (
        upstream(Play([event(chunk(content="a")), 30.0])) as server,
        started(server.url) as worker,
    ):
        with pytest.raises(DeadlineExceeded) as late:
            await collect(worker.ask(ask(deadline_s=0.2)))
        await eventually(lambda: server.requests[0].left is not None, 1.0)
    assert late.value.metrics is not None
    assert late.value.metrics.usage.completion_tokens == 1


async def test_a_stop_ends_what_runs_and_what_waits() -> None:
    """W8, W20: what still runs at the end gets the reason."""
    async with (
        upstream(script=lambda seen: Play([event(chunk(content="a")), 30.0])) as server,
        started(server.url, max_running=1) as worker,
    ):
        running = asyncio.create_task(collect(worker.ask(ask())))
        waiting = [asyncio.create_task(collect(worker.ask(ask()))) for _ in range(64)]
        await eventually(lambda: worker.load == (1, 64))
        await asyncio.wait_for(worker.aclose(0.05), 2)
        for task in (running, *waiting):
            with pytest.raises(Draining):
                await task
        await worker.aclose()
        with pytest.raises(HeadraceError):
            await collect(worker.ask(ask()))


async def test_64_streams_share_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """W20: as many at once as asked for, over connections that are used again."""
    # A busy machine does not give up a connection for the end of an answer that comes late.
    monkeypatch.setattr("headrace.engines.openai.upstream._DRAIN_S", 30.0)
    texts = [f"t{number} " for number in range(10)]

    def script(seen: Seen) -> Play:
        play = said(*texts, seen.body["messages"][0]["content"])
        return Play([step for one in play.steps for step in (one, 0.002)])

    async with (
        upstream(script=script) as server,
        started(server.url, max_running=64) as one,
        started(server.url, max_running=64, name="other") as other,
    ):
        for worker in (one, other, one):
            asked = [worker.ask(ask(f"q{number}")) for number in range(64)]
            results = await asyncio.gather(*map(collect, asked))
            for number, result in enumerate(results):
                assert result.text == "".join(texts) + f"q{number}"
        assert len(server.requests) == 192
        assert server.connections == 64
        assert server.most_open == 64


async def test_counting_guesses_or_asks() -> None:
    """W21: exact where the upstream can tell; elsewhere marked."""

    def script(seen: Seen) -> Play:
        assert re.fullmatch("/tokenize", seen.path)
        body = json.dumps({"count": 3, "tokens": [1, 2, 3], "max_model_len": 10}).encode()
        return Play([body], kind="application/json", framing="length")

    async with upstream(script=script) as server:
        async with started(server.url) as worker:
            guess = await collect_count(worker.ask(CountRequest(text="a word or two")))
            with pytest.raises(Unsupported):
                await collect_text(worker.ask(DetokenizeRequest(token_ids=(1,))))
        async with started(f"{server.url}/v1", "vllm") as worker:
            exact = await collect_count(worker.ask(CountRequest(text="a word")))
    assert (guess.count > 0, guess.estimated) == (True, True)
    assert (exact.count, exact.token_ids, exact.estimated) == (3, (1, 2, 3), False)


async def test_too_many_choices_are_refused() -> None:
    async with upstream() as server, started(server.url, max_running=1) as worker:
        with pytest.raises(InvalidRequest):
            await collect(worker.ask(ask(n=100)))


async def test_events_come_as_they_are_said() -> None:
    """A stream is not collected first."""
    play = Play([event(chunk(content="a")), 0.3, event(chunk(content="b", reason="stop")), DONE])
    times: list[float] = []
    async with upstream(play) as server, started(server.url) as worker:
        async for one in worker.ask(ask()):
            if isinstance(one, Delta):
                times.append(asyncio.get_running_loop().time())
            else:
                assert isinstance(one, Finish | Progress)
    assert times[1] - times[0] > 0.2


async def test_tools_are_passed_on_and_calls_come_back() -> None:
    """Issue 13: the head of each call once, though the upstream repeats it or leaves the id out."""

    def part(index: int, arguments: str, **more: Any) -> Any:
        function = {"name": "f", "arguments": arguments}
        return event(chunk(tool_calls=[{"index": index, "function": function, **more}]))

    play = Play(
        [
            part(0, '{"a"', id="up_1"),
            part(0, ": 1}", id="up_1"),
            part(1, "{}"),
            event(chunk(reason="tool_calls")),
            DONE,
        ]
    )
    made = ToolCall("call_9", "f", '{"a": 0}')
    request = GenerateRequest(
        messages=(
            Message("user", "x"),
            Message("assistant", tool_calls=(made,)),
            Message("tool", "22", tool_call_id="call_9"),
        ),
        tools=(Tool("f", parameters={"type": "object"}),),
        tool_choice=ToolChoice("required", ("f",), parallel=False),
    )
    async with upstream(play) as server, started(server.url) as worker:
        events = [e async for e in worker.ask(request) if isinstance(e, ToolCallDelta | Finish)]
        [seen] = server.requests
    *parts, finish = events
    # Not the second: the upstream did not know that it may make one only.
    assert parts == [
        ToolCallDelta(0, "up_1", "f", '{"a"'),
        ToolCallDelta(0, arguments=": 1}"),
    ]
    assert isinstance(finish, Finish)
    assert finish.finish_reason == "tool_calls"
    function = {"name": "f", "parameters": {"type": "object"}}
    assert seen.body["tools"] == [{"type": "function", "function": function}]
    assert seen.body["tool_choice"] == {"type": "function", "function": {"name": "f"}}
    assert seen.body["parallel_tool_calls"] is False
    assert seen.body["messages"][1:] == [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "call_9",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": 0}'},
                }
            ],
        },
        {"role": "tool", "content": "22", "tool_call_id": "call_9"},
    ]
