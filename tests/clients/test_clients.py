"""Agents and structured output of other clients, each a whole loop: call, result, answer.

The echo engine repeats the last message: written as a call, it becomes one, and the result of a
tool becomes the answer. SmolLM2 calls what it has to call.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field

from headrace.cli.client import Card
from headrace.cli.clients import CLIENTS
from headrace.cli.setups import Target

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("default")]

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
LATER = f"Let me see. {CALL}"
QUESTION = "Which city is the capital of France, and how many rivers run through it?"


class City(BaseModel):
    """A city and its rivers."""

    name: str = Field(max_length=12)
    rivers: int = Field(ge=0, le=9)


def get_weather(city: str) -> str:
    """Return the weather of a city."""
    return f"It rains in {city}."


LOOK = '<tool_call>\n{"name": "look_up", "arguments": {"city": "Paris"}}\n</tool_call>'
PARIS = City(name="Paris", rivers=1)


def look_up(city: str) -> str:
    """Return what is known of a city."""
    return json.dumps({"name": city, "rivers": 1})


def library(name: str) -> Any:
    return importlib.import_module(name)


# LangChain.


APIS = ("openai", "anthropic", "ollama")


def langchain(url: str, model: str, api: str = "openai") -> Any:
    settings: dict[str, Any] = {"model": model, "temperature": 0}
    root = url.removesuffix("/v1")
    if api == "ollama":
        chat = library("langchain_ollama").ChatOllama
        return chat(base_url=root, num_predict=200, **settings)
    settings |= {"api_key": "none", "max_retries": 0, "max_tokens": 200}
    if api == "anthropic":
        return library("langchain_anthropic").ChatAnthropic(base_url=root, **settings)
    return library("langchain_openai").ChatOpenAI(base_url=url, **settings)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_langchain_calls_tools(url: str, streamed: bool, api: str) -> None:
    """Issue 13, shown 1; issue 14, shown 1: bind_tools."""
    core, messages = library("langchain_core.messages"), list[Any]()
    weather = library("langchain_core.tools").tool(get_weather)
    model = langchain(url, "echo", api).bind_tools([weather])

    def answer() -> Any:
        if not streamed:
            return model.invoke(messages)
        first, *rest = model.stream(messages)
        for chunk in rest:
            first += chunk
        return first

    messages.append(core.HumanMessage(LATER))
    called = answer()
    assert called.text == "Let me see. "
    [call] = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    messages += [called, weather.invoke(call)]
    final = answer()
    assert "It rains in Paris." in final.text
    assert not final.tool_calls


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
@pytest.mark.parametrize("strict", [None, True])
def test_langchain_structured_output(url: str, method: str, strict: bool | None) -> None:
    """Issue 13, shown 1: with_structured_output gives an object."""
    model = langchain(url, "smollm2").with_structured_output(City, method=method, strict=strict)
    assert isinstance(model.invoke(QUESTION), City)


def test_langchain_json_mode(url: str) -> None:
    """Issue 13, shown 1: any JSON object."""
    model = langchain(url, "smollm2").with_structured_output(
        None, method="json_mode", include_raw=True
    )
    answer = model.invoke('Answer in JSON, as {"name": "Paris"}. The capital of France?')
    assert isinstance(answer["parsed"], dict), answer["raw"].content


@pytest.mark.parametrize("streamed", [False, True])
def test_langchain_structured_output_after_tools(url: str, streamed: bool) -> None:
    """Issue 13, shown 1: a call, its result, and the answer in the format, of one model."""
    core, tool = library("langchain_core.messages"), library("langchain_core.tools").tool(look_up)
    chat = langchain(url, "echo")
    model = chat.bind_tools([tool], response_format=City, strict=True)
    messages: list[Any] = [core.HumanMessage(LOOK)]

    def answer() -> Any:
        if not streamed:
            return model.invoke(messages)
        first, *rest = model.stream(messages)
        for chunk in rest:
            first += chunk
        return first

    called = answer()
    [call] = called.tool_calls
    messages += [called, tool.invoke(call)]
    assert City.model_validate_json(answer().text) == PARIS
    whole = chat.with_structured_output(
        City, method="json_schema", include_raw=True, strict=True, tools=[tool]
    )
    assert whole.invoke([core.HumanMessage(LOOK)])["raw"].tool_calls[0]["name"] == "look_up"
    assert whole.invoke(messages)["parsed"] == PARIS


@pytest.mark.parametrize("method", ["function_calling", "json_schema", "json_mode"])
def test_langchain_structured_output_of_a_result(url: str, method: str) -> None:
    """Issue 13, shown 1: a tool is called, and another chain makes an object of its result."""
    core, tool = library("langchain_core.messages"), library("langchain_core.tools").tool(look_up)
    chat = langchain(url, "echo")
    messages: list[Any] = [core.HumanMessage(LOOK)]
    called = chat.bind_tools([tool]).invoke(messages)
    messages += [called, tool.invoke(called.tool_calls[0])]
    city = chat.with_structured_output(City, method=method).invoke(messages)
    # A call that is required cannot be the result's text, which is no call.
    assert city == (City(name="", rivers=0) if method == "function_calling" else PARIS)


@pytest.mark.parametrize("choice", ["any", "get_weather"])
def test_langchain_forces_a_call(url: str, choice: str) -> None:
    """Issue 13, shown 1: a required call and a named one, of the real model."""
    model = langchain(url, "smollm2").bind_tools([get_weather], tool_choice=choice)
    assert {call["name"] for call in model.invoke(QUESTION).tool_calls} == {"get_weather"}


# Pydantic AI.


def pydantic_agent(url: str, model: str, api: str = "chat", **given: Any) -> Any:
    openai = library("pydantic_ai.models.openai")
    provider = library("pydantic_ai.providers.openai").OpenAIProvider(base_url=url, api_key="none")
    settings = {"temperature": 0.0, "max_tokens": 200}
    kind = openai.OpenAIResponsesModel if api == "responses" else openai.OpenAIChatModel
    return library("pydantic_ai").Agent(
        kind(model, provider=provider), model_settings=settings, **given
    )


async def test_pydantic_ai_calls_tools(url: str) -> None:
    """Issue 13, shown 1: a loop of an agent, whole and streamed."""
    agent = pydantic_agent(url, "echo", tools=[get_weather])
    assert "It rains in Paris." in (await agent.run(LATER)).output
    async with agent.run_stream(CALL) as stream:
        assert "It rains in Paris." in await stream.get_output()


async def test_pydantic_ai_output_by_a_tool(url: str) -> None:
    """Issue 13, shown 1: tool output, which has to be called; and output by a schema."""
    agent = pydantic_agent(url, "smollm2", output_type=City)
    assert isinstance((await agent.run(QUESTION)).output, City)
    async with agent.run_stream(QUESTION) as stream:
        assert isinstance(await stream.get_output(), City)
    native = library("pydantic_ai").NativeOutput(City)
    agent = pydantic_agent(url, "smollm2", output_type=native)
    assert isinstance((await agent.run(QUESTION)).output, City)


@pytest.mark.parametrize("mode", ["NativeOutput", "ToolOutput", "PromptedOutput"])
@pytest.mark.parametrize("api", ["chat", "responses"])
async def test_pydantic_ai_output_after_tools(url: str, mode: str, api: str) -> None:
    """Issue 13, shown 1: an agent with tools gives an object, in each of its output modes."""
    package = library("pydantic_ai")
    output = getattr(package, mode)(City)
    final = {"name": "final_result", "arguments": PARIS.model_dump()}
    # The output is a call too, which the echo engine makes beside the other.
    call = f"\n<tool_call>\n{json.dumps(final)}\n</tool_call>"
    prompt = LOOK + call if mode == "ToolOutput" else LOOK
    seen: list[str] = []

    def look(city: str) -> str:
        """Return what is known of a city."""
        seen.append(city)
        return look_up(city)

    tool = package.Tool(look, name="look_up")
    given: Any = {"tools": [tool], "output_type": output, "retries": 3}
    agent = pydantic_agent(url, "echo", api, **given, end_strategy="exhaustive")
    assert (await agent.run(prompt)).output == PARIS
    assert seen == ["Paris"]


# Instructor.


@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_instructor(url: str, mode: str) -> None:
    """Issue 13, shown 1: an object by a tool that has to be called, whole and in parts."""
    instructor = library("instructor")
    client = instructor.from_openai(
        library("openai").OpenAI(base_url=url, api_key="none", max_retries=0),
        mode=getattr(instructor.Mode, mode),
    )
    request: Any = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "response_model": City,
        "max_retries": 0,
        "temperature": 0,
        "max_tokens": 200,
    }
    city = client.chat.completions.create(**request)
    assert isinstance(city, City)
    *_, last = client.chat.completions.create_partial(**request)
    assert City.model_validate(last.model_dump())


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON", "MD_JSON"])
def test_instructor_after_a_call(url: str, mode: str) -> None:
    """Issue 13, shown 1: an object of what a tool has returned."""
    instructor = library("instructor")
    plain = library("openai").OpenAI(base_url=url, api_key="none", max_retries=0)
    tools: Any = [{"type": "function", "function": {"name": "look_up"}}]
    messages: list[Any] = [{"role": "user", "content": LOOK}]
    made = plain.chat.completions.create(model="echo", messages=messages, tools=tools)
    call = made.choices[0].message.tool_calls[0]
    messages.append({"role": "assistant", "content": None, "tool_calls": [call.model_dump()]})
    result = look_up("Paris")
    if mode.startswith("TOOLS"):
        arguments = PARIS.model_dump()
        result = (
            f"<tool_call>\n{json.dumps({'name': 'City', 'arguments': arguments})}\n</tool_call>"
        )
    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    if mode != "JSON_SCHEMA":  # the echo engine repeats the last message
        messages.append({"role": "user", "content": result})
    client = instructor.from_openai(plain, mode=getattr(instructor.Mode, mode))
    city = client.chat.completions.create(
        model="echo", messages=messages, response_model=City, max_retries=0
    )
    assert city.model_dump() == PARIS.model_dump()


# OpenAI's Agents SDK.


def agent_of(url: str, model: str, api: str = "chat", **given: Any) -> Any:
    agents = library("agents")
    agents.set_tracing_disabled(True)
    client = library("openai").AsyncOpenAI(base_url=url, api_key="none", max_retries=0)
    chat = agents.OpenAIChatCompletionsModel(model=model, openai_client=client)
    if api == "default":
        agents.set_default_openai_client(client, use_for_tracing=False)
        chat = model
    return agents.Agent(name="Helper", instructions="Help.", model=chat, **given)


@pytest.mark.parametrize("api", ["chat", "default"])
async def test_the_agents_sdk_calls_tools(url: str, api: str) -> None:
    """Issue 13, shown 1; issue 14, shown 1: chat and its default, responses; whole and streamed."""
    agents = library("agents")
    weather = agents.function_tool(get_weather)
    agent = agent_of(url, "echo", api, tools=[weather])
    assert "It rains in Paris." in (await agents.Runner.run(agent, LATER)).final_output
    streamed = agents.Runner.run_streamed(agent, CALL)
    kinds = [event.type async for event in streamed.stream_events()]
    assert "run_item_stream_event" in kinds
    assert "It rains in Paris." in streamed.final_output


@pytest.mark.parametrize("api", ["chat", "default"])
async def test_the_agents_sdk_output_after_tools(url: str, api: str) -> None:
    """Issue 13, shown 1: a tool, its result and an object; by chat and by responses."""
    agents = library("agents")
    settings = agents.ModelSettings(temperature=0, max_tokens=200)
    tools = [agents.function_tool(look_up)]
    agent = agent_of(url, "echo", api, tools=tools, output_type=City, model_settings=settings)
    run = await agents.Runner.run(agent, LOOK)
    assert run.final_output == PARIS
    assert [item.type for item in run.new_items][:2] == ["tool_call_item", "tool_call_output_item"]
    streamed = agents.Runner.run_streamed(agent, LOOK)
    _ = [event.type async for event in streamed.stream_events()]
    assert streamed.final_output == PARIS


async def test_the_agents_sdk_on_a_real_model(url: str) -> None:
    """Issue 13, shown 1: a strict tool that has to be called, then an answer; an object."""
    agents, seen = library("agents"), list[str]()

    def look(city: str) -> str:
        """Look at a city."""
        seen.append(city)
        return "There is the Seine."

    settings = agents.ModelSettings(tool_choice="required", temperature=0, max_tokens=200)
    agent = agent_of(url, "smollm2", tools=[agents.function_tool(look)], model_settings=settings)
    assert (await agents.Runner.run(agent, "Look at Paris.", max_turns=8)).final_output
    assert seen
    settings = agents.ModelSettings(temperature=0, max_tokens=200)
    agent = agent_of(url, "smollm2", output_type=City, model_settings=settings)
    assert isinstance((await agents.Runner.run(agent, QUESTION)).final_output, City)


# LiteLLM.


PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
FUNCTION = {"name": "get_weather", "description": "Weather.", "parameters": PARAMETERS}


def litellm_of(url: str, provider: str) -> tuple[Any, dict[str, Any], list[dict[str, Any]]]:
    litellm = library("litellm")
    litellm.suppress_debug_info = True
    base = url if provider in ("openai", "hosted_vllm") else url.removesuffix("/v1")
    access: Any = {"api_base": base, "api_key": "none", "temperature": 0, "max_tokens": 200}
    return litellm, access, [{"type": "function", "function": FUNCTION}]


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic", "ollama_chat"])
def test_litellm_calls_tools(url: str, provider: str) -> None:
    """Issue 13, shown 1; issue 14, shown 1: a loop, streamed and whole."""
    litellm, access, tools = litellm_of(url, provider)
    messages: list[Any] = [{"role": "user", "content": LATER}]
    for streamed in (False, True):
        request: Any = {"model": f"{provider}/echo", "tools": tools, **access}
        answer = litellm.completion(messages=messages, stream=streamed, **request)
        if streamed:
            answer = litellm.stream_chunk_builder([*answer], messages=messages)
        message = answer.choices[0].message
        [call] = message.tool_calls
        assert json.loads(call.function.arguments) == {"city": "Paris"}
        assert answer.choices[0].finish_reason == "tool_calls"
        result = {"role": "tool", "tool_call_id": call.id, "content": get_weather("Paris")}
        turns = [*messages, message.model_dump(exclude_none=True), result]
        final = litellm.completion(messages=turns, **request).choices[0].message
        assert "It rains in Paris." in final.content


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "anthropic", "ollama_chat"])
def test_litellm_structured_output_after_tools(url: str, provider: str) -> None:
    """Issue 13, shown 1: a call, its result and the answer in the format."""
    litellm, access, tools = litellm_of(url, provider)
    # Of models that it does not know as able it makes a call of its own, which it forces.
    able = {"litellm_provider": provider, "supports_native_structured_output": True}
    litellm.register_model({f"{provider}/echo": able})
    request: Any = {"model": f"{provider}/echo", "tools": tools, "response_format": City, **access}
    messages: list[Any] = [{"role": "user", "content": CALL}]
    message = litellm.completion(messages=messages, **request).choices[0].message
    [call] = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": look_up("Paris")}
    turns = [*messages, message.model_dump(exclude_none=True), result]
    final = litellm.completion(messages=turns, **request).choices[0].message
    assert City.model_validate_json(final.content) == PARIS


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_litellm_structured_output(url: str, provider: str) -> None:
    """Issue 13, shown 1: a schema, and a tool that has to be called."""
    litellm, access, tools = litellm_of(url, provider)
    answer = litellm.completion(
        model=f"{provider}/smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        response_format=City,
        **access,
    )
    assert City.model_validate_json(answer.choices[0].message.content)
    answer = litellm.completion(
        model=f"{provider}/smollm2",
        messages=[{"role": "user", "content": QUESTION}],
        tools=tools,
        tool_choice="required",
        **access,
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "get_weather"


def test_litellm_responses(url: str) -> None:
    """Issue 14, shown 1: its fourth route."""
    litellm, access, _ = litellm_of(url, "openai")
    access["max_output_tokens"] = access.pop("max_tokens")
    tools = [{"type": "function", **FUNCTION}]
    answer = litellm.responses(model="openai/echo", input=CALL, tools=tools, **access)
    [call] = [item for item in answer.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    turns = [{"role": "user", "content": CALL}, call.model_dump(exclude_none=True), output]
    final = litellm.responses(model="openai/echo", input=turns, tools=tools, **access)
    assert "It rains." in final.output_text


# What `headrace connect` writes.


def target_of(url: str) -> Target:
    return Target(url.removesuffix("/v1"), (Card("echo", tools="generic"),))


def test_langchain_as_connected(url: str) -> None:
    """Issue 14.7: the lines that are printed are a program."""
    code = "\n".join(CLIENTS["langchain"].build(target_of(url), Path()).steps)
    variables: dict[str, Any] = {}
    exec(code, variables)
    assert variables["model"].invoke("Hello.").content == "Hello."


def test_litellm_as_connected(url: str) -> None:
    """Issue 14.7: the models of its configuration."""
    [file] = CLIENTS["litellm"].build(target_of(url), Path()).files
    router = library("litellm").Router(**yaml.safe_load(file.text))
    answer = router.completion(model="echo", messages=[{"role": "user", "content": "Hello."}])
    assert answer.choices[0].message.content == "Hello."


# The openai package, whose other loops are in tests/service/test_tools.py.


def test_openai_parses_tools(url: str) -> None:
    """Issue 13, shown 1: tools of pydantic models, strict, whole and streamed."""
    openai = library("openai")
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    request: Any = {
        "model": "smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "tools": [openai.pydantic_function_tool(City)],
        "tool_choice": "required",
        "temperature": 0,
        "max_tokens": 200,
        "parallel_tool_calls": False,
    }
    message = client.chat.completions.parse(**request).choices[0].message
    city = message.tool_calls[0].function.parsed_arguments
    assert isinstance(city, City)
    with client.chat.completions.stream(**request) as stream:
        kinds = {event.type for event in stream}
        last = stream.get_final_completion().choices[0].message
    assert "tool_calls.function.arguments.delta" in kinds
    assert last.tool_calls[0].function.parsed_arguments == city
