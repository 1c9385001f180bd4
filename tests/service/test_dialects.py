"""/v1/responses and /v1/messages with the official clients, on echo and on the real model."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from anthropic.types import Message as TheirMessage
from anthropic.types import RawMessageStreamEvent
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, Field, TypeAdapter
from tests.pictures_made import data_url, png
from tests.service.serving import Service, served

MODELS = """
[models.smollm2]
model = "{path}"
context_length = 1024
[models.echo]
model = "echo"
aliases = ["claude-echo"]
# Thinks as Qwen does, and repeats the last message with the thinking that is in it.
[models.thinker]
model = "echo"
chat_template = {template}
[models.seer]
model = "echo"
options = {{ images = true }}
[server]
list_aliases = true
"""
TEMPLATE = (
    "{% for m in messages %}{% if loop.last %}\x1e{% endif %}"
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% endfor %}"
)
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
ARGUMENTS = '{"city": "Paris </tool_call>", "days": 3}'
CALL = f'Let me see. <tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
PATCH = '<tool_call>\n{"name": "patch", "arguments": {"input": "*** Begin\\n+é"}}\n</tool_call>'
THOUGHT = "<think>\nHm, let me see.\n</think>\n\nParis."
WEATHER: Any = {"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}
TOOL: Any = {"name": "get_weather", "input_schema": SCHEMA}


class City(BaseModel):
    """What the real model has to write."""

    name: str = Field(min_length=1, max_length=12)


@pytest.fixture(scope="module")
def service(smollm2_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    file = tmp_path_factory.mktemp("dialects") / "headrace.toml"
    file.write_text(MODELS.format(path=smollm2_path, template=json.dumps(TEMPLATE)))
    with served(environment={"CONFIG": str(file)}, ready=False) as running:
        yield running


@pytest.fixture(scope="module")
def their(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(service: Service) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=service.url, api_key="none", max_retries=0) as client:
        yield client


def strict(kind: Any, value: BaseModel) -> None:
    """Check an answer or an event against the client's own types, which it does not do itself."""
    TypeAdapter(kind).validate_json(value.to_json(), strict=True)  # pyright: ignore[reportAttributeAccessIssue]


def test_responses_of_text(their: openai.OpenAI) -> None:
    """Issue 14.1: whole, streamed by hand and by the client's own accumulator."""
    whole = their.responses.create(model="echo", input="Hello", instructions="Be brief.")
    strict(Response, whole)
    assert (whole.output_text, whole.status) == ("Hello", "completed")
    events = list(their.responses.create(model="echo", input="Hello", stream=True))
    for event in events:
        strict(ResponseStreamEvent, event)
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "Hello"
    with their.responses.stream(model="echo", input="Hello") as stream:
        last = stream.get_final_response()
    assert (last.output_text, last.usage and last.usage.output_tokens) == ("Hello", 6)
    cut = their.responses.create(model="echo", input="Hello", max_output_tokens=2)
    assert (cut.status, cut.output_text) == ("incomplete", "He")
    count = their.responses.input_tokens.count(model="echo", input="Hello")
    assert count.input_tokens == whole.usage.input_tokens - len("Be brief.\x1e")  # pyright: ignore[reportOptionalMemberAccess]


def test_a_loop_of_an_agent_by_responses(their: openai.OpenAI) -> None:
    """Issue 14.1: a call, its result and the answer, streamed; items go back as they came."""
    history: list[Any] = [{"role": "user", "content": CALL}]
    tools: Any = [WEATHER, {"type": "web_search"}]
    with their.responses.stream(model="echo", input=history, tools=tools) as stream:
        first = stream.get_final_response()
    strict(Response, Response.model_validate(first.model_dump()))
    message, call = first.output
    assert (message.type, first.output_text) == ("message", "Let me see. ")
    assert call.type == "function_call"
    assert (call.name, call.arguments) == ("get_weather", ARGUMENTS)
    history += [item.model_dump(exclude={"parsed_arguments"}) for item in first.output]
    history.append(
        {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}
    )
    second = their.responses.create(model="echo", input=history, tools=tools)
    assert "22 degrees" in second.output_text
    raw = their.responses.with_raw_response.create(model="echo", input=history, tools=tools)
    assert raw.headers["x-headrace-warning"] == "not supported here, left out: tool web_search"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_of_free_text(their: openai.OpenAI, stream: bool) -> None:
    """Issue 14.1: Codex's patches; the model writes JSON, the client reads text."""
    tools: Any = [{"type": "custom", "name": "patch"}]
    if stream:
        with their.responses.stream(model="echo", input=PATCH, tools=tools) as events:
            (item,) = events.get_final_response().output
    else:
        (item,) = their.responses.create(model="echo", input=PATCH, tools=tools).output
    assert item.type == "custom_tool_call"
    assert (item.name, item.input) == ("patch", "*** Begin\n+é")


def test_thinking_by_responses(their: openai.OpenAI) -> None:
    """Issue 14.1: an item of its own, which the model sees again when it is sent back."""
    include: Any = ["reasoning.encrypted_content"]
    first = their.responses.create(
        model="thinker", input=THOUGHT, include=include, reasoning={"effort": "low"}
    )
    output: Any = first.output
    reasoning, message = output
    assert (reasoning.type, message.type, first.output_text) == ("reasoning", "message", "Paris.")
    assert (reasoning.content or [])[0].text.strip() == "Hm, let me see."
    history: Any = [
        {"role": "user", "content": "x"},
        reasoning.model_dump(exclude={"content", "status"}),
        message.model_dump(),
        {"role": "user", "content": "y"},
    ]
    with_it = their.responses.input_tokens.count(model="thinker", input=history).input_tokens
    del history[1]
    without = their.responses.input_tokens.count(model="thinker", input=history).input_tokens
    assert with_it - without == len("<think>\nHm, let me see.\n</think>\n\n")
    kinds = [e.type for e in their.responses.create(model="thinker", input=THOUGHT, stream=True)]
    assert kinds.index("response.reasoning_text.delta") < kinds.index("response.output_text.delta")


def test_errors_of_responses(their: openai.OpenAI) -> None:
    """Issue 14.1: the client's own, by status and code."""
    with pytest.raises(openai.NotFoundError):
        their.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match="send the earlier items") as refused:
        their.responses.create(model="echo", input="x", previous_response_id="resp_1")
    assert refused.value.param == "previous_response_id"
    # By this code, clients such as VS Code's send the whole conversation.
    assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        their.responses.retrieve("resp_1")
    with pytest.raises(openai.BadRequestError) as long:
        their.responses.create(model="smollm2", input="river " * 1500)
    assert long.value.code == "context_length_exceeded"


def test_images_by_responses(their: openai.OpenAI) -> None:
    """Issue 14.1: in a message and in the output of a tool; a model without images refuses them."""
    picture = png()
    image: Any = {"type": "input_image", "image_url": data_url(picture), "detail": "auto"}
    message: Any = {"role": "user", "content": [{"type": "input_text", "text": "a "}, image]}
    answer = their.responses.create(model="seer", input=[message])
    digest = hashlib.sha256(picture).hexdigest()[:8]
    assert digest in answer.output_text
    assert answer.usage is not None
    assert answer.usage.input_tokens > 100
    # The echo engine's template shows the last turn alone.
    given: list[Any] = [
        *user("Look."), {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": [image]},
    ]  # fmt: skip
    answer = their.responses.create(model="seer", input=given)
    assert digest in answer.output_text
    assert their.responses.input_tokens.count(model="seer", input=given).input_tokens > 64
    with pytest.raises(openai.BadRequestError, match="echo takes no images") as refused:
        their.responses.create(model="echo", instructions="Be brief.", input=[message])
    assert refused.value.param == "input[0].content[1]"


def test_the_real_model_by_responses(their: openai.OpenAI) -> None:
    """Issue 14.1: a structured answer, and an enforced call of a tool."""
    parsed = their.responses.parse(
        model="smollm2",
        input="Name a city.",
        text_format=City,
        max_output_tokens=60,
        temperature=0,
    )
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.name
    answer = their.responses.create(
        model="smollm2",
        input="What is the weather in Paris for the next 3 days?",
        tools=[WEATHER],
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=0,
        max_output_tokens=100,
    )
    (call,) = answer.output
    assert call.type == "function_call"
    assert json.loads(call.arguments).keys() == {"city", "days"}


def user(text: Any) -> Any:
    return [{"role": "user", "content": text}]


def test_messages_of_text(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: whole, streamed by hand and by the client's own accumulator, and counted."""
    given: Any = {"model": "claude-echo", "messages": user("Hello"), "system": "Be brief."}
    whole = claude.messages.create(max_tokens=9, **given)
    strict(TheirMessage, whole)
    assert [block.to_dict() for block in whole.content] == [{"type": "text", "text": "Hello"}]
    assert (whole.stop_reason, whole.usage.output_tokens) == ("end_turn", 6)
    for event in claude.messages.create(max_tokens=9, stream=True, **given):
        strict(RawMessageStreamEvent, event)
        if event.type == "message_start":
            assert event.message.usage.input_tokens == whole.usage.input_tokens == 15
    with claude.messages.stream(max_tokens=9, **given) as stream:
        assert stream.get_final_text() == "Hello"
        assert stream.get_final_message().usage.output_tokens == 6
    assert claude.messages.count_tokens(**given).input_tokens == 15
    stopped = claude.messages.create(max_tokens=9, stop_sequences=["lo", "zz"], **given)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "lo")
    stopped = claude.messages.create(max_tokens=9, stop_sequences=["l"], tools=[TOOL], **given)
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "l")
    cut = claude.messages.create(max_tokens=2, **given)
    assert cut.stop_reason == "max_tokens"


def test_a_loop_of_an_agent_by_messages(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: a call, its result and the answer; the beta client sends its own headers."""
    history = user(CALL)
    with claude.messages.stream(
        model="echo", max_tokens=200, messages=history, tools=[TOOL]
    ) as stream:
        first = stream.get_final_message()
    assert first.stop_reason == "tool_use"
    text, call = first.content
    assert (text.type, call.type) == ("text", "tool_use")
    assert call.type == "tool_use"
    assert (call.name, call.input) == ("get_weather", json.loads(ARGUMENTS))
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "22 degrees"}
    history += [{"role": "assistant", "content": first.content}, *user([result])]
    second = claude.beta.messages.create(
        model="echo", max_tokens=200, messages=history, tools=[TOOL], betas=["some-beta"]
    )
    assert second.content[0].type == "text"
    assert "22 degrees" in second.content[0].text


def test_thinking_by_messages(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: blocks only where they are requested."""
    given: Any = {"model": "thinker", "max_tokens": 99, "messages": user(THOUGHT)}
    assert [b.type for b in claude.messages.create(**given).content] == ["text"]
    thinking: Any = {"type": "adaptive"}
    with claude.messages.stream(thinking=thinking, **given) as stream:
        final = stream.get_final_message()
    thought, text = final.content
    assert final.usage.output_tokens_details is not None
    assert 0 < final.usage.output_tokens_details.thinking_tokens < final.usage.output_tokens
    assert thought.type == "thinking"
    assert (thought.thinking.strip(), thought.signature) == ("Hm, let me see.", "headrace")
    assert text.type == "text"
    assert text.text == "Paris."


def test_images_by_messages(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: in a message and in the result of a tool; a model without images refuses them."""
    picture = png()
    data = base64.b64encode(picture).decode()
    image: Any = {
        "type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}
    }  # fmt: skip
    given: list[Any] = user([{"type": "text", "text": "a "}, image])
    answer = claude.messages.create(model="seer", max_tokens=400, messages=given)
    digest = hashlib.sha256(picture).hexdigest()[:8]
    assert digest in str(answer.content)
    call: Any = {"type": "tool_use", "id": "c", "name": "f", "input": {}}
    result: Any = {"type": "tool_result", "tool_use_id": "c", "content": [image]}
    turns: list[Any] = [*user("Look."), {"role": "assistant", "content": [call]}, *user([result])]
    answer = claude.messages.create(model="seer", max_tokens=400, messages=turns)
    assert digest in str(answer.content)
    assert claude.messages.count_tokens(model="seer", messages=turns).input_tokens > 64
    refused = r"messages\[0\].content\[1\]: echo takes no images"
    with pytest.raises(anthropic.BadRequestError, match=refused):
        claude.messages.create(model="echo", max_tokens=9, system="Be brief.", messages=given)


def test_errors_of_messages(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: the client's own; Claude Code looks for the text of the last."""
    with pytest.raises(anthropic.NotFoundError) as unknown:
        claude.messages.create(model="other", max_tokens=1, messages=user("x"))
    assert unknown.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="image"):
        claude.messages.create(model="echo", max_tokens=1, messages=user([
            {"type": "image", "source": {"type": "url", "url": "http://x"}}]))  # fmt: skip
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 1024 m"):
        claude.messages.create(model="smollm2", max_tokens=9, messages=user("river " * 1500))


NEUTRAL: dict[str, Any] = {
    "temperature": 1,
    "top_p": 1,
    "top_k": -1,
    "min_p": 0,
    "seed": None,
    "n": 1,
    "stop": [],
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1,
    "min_tokens": 0,
    "logit_bias": {},
    "stop_token_ids": [],
    "ignore_eos": False,
    "logprobs": None,
    "user": None,
    "stream_options": None,
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}]}
CHAT_NEUTRAL: dict[str, Any] = {
    "logprobs": False,
    "top_logprobs": None,
    "tools": [],
    "tool_choice": None,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "functions": None,
}


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", CHAT | NEUTRAL | CHAT_NEUTRAL),
        ("/v1/chat/completions", CHAT | {"logit_bias": {"7": 0}, "top_k": 0, "stop": None}),
        ("/v1/completions", {"prompt": "Hello"} | NEUTRAL | {"echo": False, "best_of": 1}),
        ("/v1/completions", {"prompt": "Hello", "suffix": None, "logit_bias": {"7": 0}}),
        (
            "/v1/responses",
            {
                "input": "Hello",
                "temperature": 1,
                "top_p": 1,
                "tools": [],
                "top_logprobs": 0,
                "text": {"format": {"type": "text"}},
                "tool_choice": "auto",
                "include": [],
                "truncation": "disabled",
                "reasoning": None,
                "previous_response_id": None,
            },
        ),
        (
            "/v1/messages",
            CHAT
            | {"max_tokens": 9, "temperature": 1, "top_p": 1, "top_k": 0, "stop_sequences": []}
            | {"tools": [], "thinking": {"type": "disabled"}, "metadata": {}},
        ),
        (
            "/api/chat",
            CHAT
            | {"stream": False, "tools": [], "format": ""}
            | {"options": {"top_p": 1.0, "top_k": 0, "repeat_penalty": 1.0, "min_p": 0.0}},
        ),
        (
            "/api/generate",
            {"prompt": "Hello", "stream": False, "system": "", "suffix": "", "images": []}
            | {"options": {"temperature": 1, "presence_penalty": 0, "frequency_penalty": 0}}
            | {"template": "", "context": [], "raw": False},
        ),
        (
            "/completion",
            {"prompt": "Hello", "top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0}
            | {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
            | {"logit_bias": [], "stop": [], "n_probs": 0, "mirostat": 0, "typical_p": 1.0}
            | {"dry_multiplier": 0.0, "xtc_probability": 0.0, "dynatemp_range": 0.0}
            | {"grammar": "", "ignore_eos": False, "min_keep": 0, "n_indent": 0, "n_keep": 0},
        ),
    ],
)
def test_what_changes_nothing_is_accepted(
    service: Service, route: str, body: dict[str, Any]
) -> None:
    """Issue 14: by each dialect, on an engine that has few of the fields."""
    answer = httpx.post(f"{service.url}{route}", json={"model": "echo"} | body, timeout=60)
    assert answer.status_code == 200, answer.text
    assert "Hello" in answer.text


@pytest.mark.parametrize(
    ("route", "name", "given"),
    [
        ("/v1/chat/completions", "top_p", {"top_p": 0.9}),
        ("/v1/messages", "top_k", {"max_tokens": 9, "top_k": 3}),
        ("/v1/responses", "top_p", {"top_p": 0.9, "input": "Hello", "messages": None}),
        ("/api/chat", "min_p", {"options": {"min_p": 0.1}}),
    ],
)
def test_what_changes_something_is_refused_by_its_name(
    service: Service, route: str, name: str, given: dict[str, Any]
) -> None:
    body = {key: value for key, value in (CHAT | given).items() if value is not None}
    answer = httpx.post(f"{service.url}{route}", json={"model": "echo"} | body, timeout=60)
    assert answer.status_code == 400, answer.text
    assert name in answer.text


def test_models_by_both_clients(their: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Issue 14.2: one list in both forms, with aliases."""
    names = [model.id for model in claude.models.list(limit=1000)]
    assert names == [model.id for model in their.models.list()]
    assert names == ["smollm2", "echo", "claude-echo", "thinker", "seer"]
    assert claude.models.retrieve("claude-echo").display_name == "echo"


def test_a_begun_answer_is_continued(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: the real model goes on where its turn ends, and does not begin another."""
    begun: Any = {"role": "assistant", "content": "1, 2, 3, 4,"}
    answer = claude.messages.create(
        model="smollm2",
        max_tokens=6,
        messages=[*user("Count from 1 to 9."), begun],
        extra_body={"temperature": 0},
    )
    (text,) = answer.content
    assert text.type == "text"
    assert text.text.lstrip().startswith("5")


def test_the_real_model_by_messages(claude: anthropic.Anthropic) -> None:
    """Issue 14.2: a forced call; max_tokens beyond the context is cut to its room."""
    answer = claude.messages.create(
        model="smollm2",
        max_tokens=16_000,
        extra_body={"temperature": 0},
        messages=user("What is the weather in Paris for the next 3 days?"),
        tools=[TOOL],
        tool_choice={"type": "tool", "name": "get_weather", "disable_parallel_tool_use": True},
    )
    (call,) = answer.content
    assert call.type == "tool_use"
    assert call.input.keys() == {"city", "days"}
    assert answer.stop_reason == "tool_use"


VERDICT: Any = {
    "type": "object",
    "properties": {"rain": {"enum": ["yes", "no"]}},
    "required": ["rain"],
    "additionalProperties": False,
}


def test_tools_with_a_form(their: openai.OpenAI, claude: anthropic.Anthropic) -> None:
    """Issue 13: calls, or content that keeps to the form, whole and streamed, in three dialects."""
    question = "Will it rain? Answer yes or no."
    tool: Any = {**WEATHER, "strict": True}
    function: Any = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
    named: Any = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": VERDICT}}
    texts, calls = list[str | None](), list[str]()
    for seed in (1, 2):
        message = their.chat.completions.create(
            model="smollm2", messages=user(question), tools=[function], response_format=named,
            parallel_tool_calls=False, seed=seed,
        ).choices[0].message  # fmt: skip
        calls += [call.function.arguments for call in message.tool_calls or ()]  # pyright: ignore[reportAttributeAccessIssue]
        texts.append(message.content)
    text: Any = {"format": {"type": "json_schema", "name": "verdict", "schema": VERDICT}}
    with their.responses.stream(
        model="smollm2", input=question, tools=[tool], text=text, parallel_tool_calls=False
    ) as stream:
        output = stream.get_final_response().output
    calls += [item.arguments for item in output if item.type == "function_call"]
    texts += [item.content[0].text for item in output if item.type == "message"]  # pyright: ignore[reportAttributeAccessIssue]
    answer = claude.messages.create(
        model="smollm2", max_tokens=600, messages=user(question), tools=[TOOL],
        tool_choice={"type": "auto", "disable_parallel_tool_use": True},
        extra_body={"output_config": {"format": {"type": "json_schema", "schema": VERDICT}}},
    )  # fmt: skip
    texts += [block.text for block in answer.content if block.type == "text"]
    assert answer.stop_reason in {"end_turn", "tool_use"}
    assert all(json.loads(call).keys() == {"city", "days"} for call in calls)
    assert {content for content in texts if content} <= {'{"rain": "yes"}', '{"rain": "no"}'}
    assert calls or any(texts)


def test_thinking_that_is_not_sent(their: openai.OpenAI) -> None:
    """Issue 13, thinking: by a real worker it is counted, and neither body nor stream has it."""
    for more in ({"include_reasoning": False}, {"reasoning": {"exclude": True}}):
        given: Any = {"model": "thinker", "messages": user(THOUGHT), "extra_body": more}
        whole = their.chat.completions.create(**given)
        assert whole.choices[0].message.content == "Paris."
        assert "see" not in whole.choices[0].message.model_dump_json()
        assert whole.usage is not None
        assert whole.usage.completion_tokens_details is not None
        assert whole.usage.completion_tokens_details.reasoning_tokens
        chunks = [
            chunk.model_dump_json()
            for chunk in their.chat.completions.create(
                **given, stream=True, stream_options={"include_usage": True}
            )
        ]
        assert "reasoning_content" not in "".join(chunks)
        assert '"reasoning_tokens":0' not in chunks[-1]
