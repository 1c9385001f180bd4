"""llama-server's routes: what its editors send, with a scripted backend."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from msgspec.structs import replace
from tests.api import published
from tests.api.fakes import MODELS, FakeBackend, accepted, client, events, finish, sent
from tests.api.published import LLAMA_SERVER, hold

from headrace.core.constraint import Constraint
from headrace.core.errors import ContextOverflow, GenerationFailed
from headrace.core.events import Delta, Progress, TokenLogprob, TopLogprob
from headrace.core.gap import Gap, LineLimits, SourceText
from headrace.core.model import Capabilities
from headrace.core.request import CountRequest, GenerateRequest
from headrace.core.sampling import Sampling

# As llama.vim and llama.vscode send them.
VIM: dict[str, Any] = {
    "input_prefix": "def f():\n", "input_suffix": "\nf()\n", "prompt": "    return ",
    "input_extra": [{"text": "x = 1\n", "time": [1, 2], "filename": "a.py"}],
    "n_predict": 256, "n_indent": 4, "top_k": 40, "top_p": 0.99, "stream": False,
    "samplers": ["top_k", "top_p", "infill"], "cache_prompt": True, "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1500,
    "response_fields": [
        "content", "timings/prompt_n", "timings/prompt_ms", "timings/prompt_per_token_ms",
        "timings/prompt_per_second", "timings/predicted_n", "timings/predicted_ms",
        "timings/predicted_per_token_ms", "timings/predicted_per_second", "truncated",
        "tokens_cached",
    ],
}  # fmt: skip
WARM: dict[str, Any] = {
    "input_prefix": "", "input_suffix": "", "prompt": "", "n_predict": 0, "temperature": 0.0,
    "input_extra": [{"text": "x = 1\n", "time": [1, 2], "filename": "a.py"}], "stream": False,
    "samplers": [], "cache_prompt": True, "t_max_prompt_ms": 1, "t_max_predict_ms": 1,
    "response_fields": [""],
}  # fmt: skip
EDIT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "x"}], "stream": False, "cache_prompt": True,
    "samplers": "edkypmxt", "temperature": 0.8, "dynatemp_range": 0, "dynatemp_exponent": 1,
    "top_k": 40, "top_p": 0.95, "min_p": 0.05, "typical_p": 1, "xtc_probability": 0,
    "xtc_threshold": 0.1, "repeat_last_n": 64, "repeat_penalty": 1, "presence_penalty": 0,
    "frequency_penalty": 0, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2,
    "dry_penalty_last_n": -1, "max_tokens": -1, "timings_per_token": False,
}  # fmt: skip


async def core(path: str, **body: Any) -> GenerateRequest:
    return await accepted(path, {"model": "m", **body}, unknown_fields="refuse")


async def test_an_editor_fills_a_gap() -> None:
    """Issue 14.4: every field that llama.vim sends, and the answer that it reads."""
    answer, backend = await sent("/infill", VIM, unknown_fields="refuse")
    assert answer.status_code == 200
    request = backend.requests[0]
    assert (request.prompt, request.suffix) == ("def f():\n", "\nf()\n")
    assert request.gap == Gap("    return ", (SourceText("x = 1\n", "a.py"),))
    assert request.line_limits == LineLimits(4, 1500)
    assert request.fit_max_tokens
    # Its sampler for gaps is near to greedy.
    assert request.sampling == Sampling(max_tokens=256, top_k=40, top_p=0.99, temperature=0.0)
    given = answer.json()
    assert set(given) == set(VIM["response_fields"])
    assert (given["content"], given["tokens_cached"], given["truncated"]) == ('Hello\n"ü', 2, False)
    assert (given["timings/prompt_n"], given["timings/predicted_n"]) == (3, 3)
    assert all(isinstance(given[name], int | float) for name in given if "timings" in name)
    assert "ttft;dur=" in answer.headers["server-timing"]


async def test_an_editor_warms_the_cache() -> None:
    """Issue 14.4: `n_predict` 0 computes the prompt; nothing of the answer is sent."""
    answer, backend = await sent("/infill", WARM, unknown_fields="refuse")
    assert (answer.status_code, answer.json()) == (200, {})
    assert backend.requests[0].sampling.max_tokens == 1
    everything = {name: value for name, value in WARM.items() if name != "response_fields"}
    whole = (await sent("/infill", everything))[0].json()
    assert (whole["content"], whole["tokens"]) == ("", [])
    streamed = events((await sent("/infill", {**everything, "stream": True}))[0].text)
    assert [(event["content"], event["stop"]) for event in streamed] == [("", True)]


async def test_an_editor_rewrites_a_text() -> None:
    """Issue 14.4: the chat of llama.vscode, with its samplers as letters."""
    answer, _ = await sent("/v1/chat/completions", EDIT, unknown_fields="refuse")
    assert answer.status_code == 200, answer.text


async def test_a_gap_without_a_name_goes_to_the_model_that_fills_gaps() -> None:
    """Issue 14.4: editors name no model."""
    able = replace(MODELS[1], capabilities=Capabilities(infill=True))
    for served, name in (([MODELS[0], able], "org/big"), (list(MODELS), "")):
        backend = FakeBackend(models=served)
        async with client(backend) as http:
            await http.post("/infill", json=VIM)
        assert [request.model for request in backend.requests] == [name]


@pytest.mark.parametrize("path", ["/completion", "/completions"])
async def test_a_completion(path: str) -> None:
    """Issue 14.4: llama-server's own form; the path with /v1 stays OpenAI's."""
    body = {"prompt": "hi", "n_predict": -1, "seed": -1, "temperature": -1, "stop": ["x"],
            "repeat_penalty": 1.1, "json_schema": {"type": "object"}, "id_slot": -1,
            "logit_bias": [[5, 1.5], [6, False], ["7", -2]], "return_tokens": True,
            "n_keep": 0, "typical_p": 1.0, "mirostat": 0}  # fmt: skip
    answer, backend = await sent(path, {"model": "m", **body}, unknown_fields="refuse")
    hold(LLAMA_SERVER, "completion", answer.json())
    request = backend.requests[0]
    assert request.prompt == "hi"
    assert request.constraint == Constraint(json_schema={"type": "object"})
    assert request.sampling == Sampling(
        temperature=0.0, stop=("x",), repetition_penalty=1.1,
        logit_bias={5: 1.5, 6: -100.0, 7: -2.0},
    )  # fmt: skip
    given = answer.json()
    assert (given["content"], given["tokens"], given["model"]) == ('Hello\n"ü', [1, 2, 3], "m")
    assert (given["stop_type"], given["stopping_word"], given["has_new_line"]) == ("eos", "", True)
    assert given["generation_settings"]["n_predict"] == -1
    assert given["metrics"]["usage"]["prompt_tokens"] == given["tokens_evaluated"] == 5
    assert (await core(path, prompt=[1, 2])).prompt == (1, 2)
    assert (await core(path, prompt="a", logit_bias={"5": 2})).sampling.logit_bias == {5: 2.0}
    assert (await core(path, prompt="a", max_tokens=7)).sampling.max_tokens == 7


@pytest.mark.parametrize(
    ("samplers", "expected"),
    [
        (["temperature"], {"temperature": 0.5}),
        ("kt", {"temperature": 0.5, "top_k": 5}),
        (["penalties", "min_p"], {"min_p": 0.1, "repetition_penalty": 1.2, "temperature": 1.0}),
        (["top_p", "infill"], {"top_p": 0.9, "temperature": 0.0}),
        ([], {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.1,
              "repetition_penalty": 1.2}),
    ],
)  # fmt: skip
async def test_samplers_that_are_not_listed(samplers: Any, expected: dict[str, Any]) -> None:
    """Issue 14.4: as in llama-server, their parameters have no effect."""
    request = await core(
        "/completion", prompt="a", samplers=samplers, temperature=0.5, top_k=5, top_p=0.9,
        min_p=0.1, repeat_penalty=1.2,
    )  # fmt: skip
    assert request.sampling == Sampling(**expected)


def told(_request: Any) -> Iterator[Any]:
    yield Progress("prefill", 0, 5)
    top = (TopLogprob(1, b"a", -0.5), TopLogprob(2, b"\xc3", -1.5))
    yield Delta("a", (1,), logprobs=(TokenLogprob(1, b"a", -0.5, top),))
    yield Delta("", (2,))
    yield Delta("b\u2028\n", (3,))
    yield replace(finish("stop"), stops=("x",))


async def test_a_stream() -> None:
    """Issue 14.4: parts with text and tokens, and one with the figures; no `[DONE]`."""
    body = {"prompt": "hi", "stream": True, "n_probs": 2, "stop": ["x"]}
    answer, backend = await sent("/completion", body, told)
    assert backend.requests[0].sampling.logprobs == 2
    parts = events(answer.text)
    for part in parts:
        hold(LLAMA_SERVER, "event", part)
    assert [part["content"] for part in parts] == ["a", "b\u2028\n", ""]
    assert [part["tokens"] for part in parts] == [[1], [2, 3], []]
    assert [part["tokens_predicted"] for part in parts] == [1, 3, 3]
    assert [part["tokens_evaluated"] for part in parts] == [5, 5, 5]
    assert parts[0]["completion_probabilities"][0]["top_logprobs"][1]["bytes"] == [195]
    last = parts[-1]
    assert (last["stop_type"], last["stopping_word"], last["has_new_line"]) == ("word", "x", True)
    assert "\u2028" not in answer.text
    body |= {"response_fields": ["content", "timings/predicted_n", "none"]}
    assert events((await sent("/completion", body, told))[0].text)[-1] == {
        "content": "", "timings/predicted_n": 3,
    }  # fmt: skip


async def test_an_answer_that_is_cut() -> None:
    answer, _ = await sent("/completion", {"prompt": "a"}, lambda _: [Delta("b"), finish("length")])
    assert answer.json()["stop_type"] == "limit"


async def test_errors() -> None:
    """Issue 14.4: with their status before the first part, as an event after it."""
    long = ContextOverflow("Too long.", param="prompt")
    answer, _ = await sent("/completion", {"prompt": "a", "stream": True}, lambda _: [long])
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    hold(LLAMA_SERVER, "error", answer.json())
    script: Any = [Delta("a", (1,)), GenerationFailed("Broken.")]
    answer, _ = await sent("/infill", {**WARM, "n_predict": 5, "stream": True}, lambda _: script)
    last = events(answer.text)[-1]
    hold(LLAMA_SERVER, "error", last)
    assert last["error"]["message"] == "Broken."


@pytest.mark.parametrize(
    ("path", "fields", "part"),
    [
        ("/completion", {"prompt": ["a", "b"]}, "One prompt is taken here"),
        ("/completion", {"prompt": ["a", 5]}, "prompt mixes texts"),
        ("/completion", {"prompt": {"prompt_string": "a"}}, "prompt"),
        ("/completion", {}, "prompt"),
        ("/completion", {"n_predict": -3}, "n_predict"),
        ("/completion", {"samplers": ["none"]}, "'none' is unknown"),
        ("/completion", {"samplers": "z"}, "'z' is unknown"),
        ("/completion", {"logit_bias": [["Hello", 1]]}, "token id"),
        ("/completion", {"logit_bias": [[5, 101]]}, "from -100 to 100"),
        ("/completion", {"logit_bias": [[5, True]]}, "or false"),
        ("/completion", {"logit_bias": {"99999999999": 1}}, "from -100 to 100"),
        ("/completion", {"logit_bias": [[5]]}, "logit_bias"),
        ("/completion", {"n": 2}, "One choice"), ("/completion", {"n_cmpl": 2}, "n_cmpl"),
        ("/completion", {"mirostat": 2}, "mirostat"),
        ("/completion", {"temperature": 3}, "temperature"),
        ("/completion", {"repeat_penalty": 0}, "repeat_penalty"),
        ("/completion", {"n_probs": 21}, "n_probs"),
        ("/completion", {"suffix": "x"}, "Use /infill"),
        ("/infill", {"input_extra": [{"filename": "a"}]}, "input_extra[0]"),
        ("/infill", {"n_indent": -1}, "n_indent"),
        ("/apply-template", {"messages": []}, "messages"),
    ],
)  # fmt: skip
async def test_wrong_requests_are_refused_by_name(path: str, fields: Any, part: str) -> None:
    base = {"prompt": "a"} if path == "/completion" and fields else {}
    answer, backend = await sent(path, base | fields)
    assert (answer.status_code, backend.requests) == (400, []), answer.text
    assert part in answer.json()["error"]["message"]


async def test_a_model_is_described() -> None:
    """Issue 14.4: by name, or the first that is loaded."""
    seeing = replace(
        MODELS[1], context_length=512, max_running=3, chat_template="{{ x }}", aliases=("b",),
        capabilities=Capabilities(vision=True),
    )  # fmt: skip
    asleep = replace(MODELS[0], state="stopped")
    async with client(FakeBackend(models=[asleep, seeing])) as http:
        for query, name in (("", "org/big"), ("?model=b", "org/big"), ("?model=m", "m")):
            props = (await http.get(f"/props{query}")).json()
            hold(LLAMA_SERVER, "props", props)
            assert props["model_alias"] == name
            assert props["is_sleeping"] == (name == "m")
        assert (await http.get("/props?model=none")).status_code == 404
        props = (await http.get("/props")).json()
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert (props["total_slots"], props["chat_template"]) == (3, "{{ x }}")
    assert props["modalities"] == {"vision": True, "audio": False}
    assert "secret" not in json.dumps(props)


async def test_a_template_is_applied() -> None:
    """Issue 14.4: the request for it is that of a count."""

    def script(_request: Any) -> Iterator[Any]:
        from headrace.core.events import Text

        yield Text("<|user|>hi")
        yield finish()

    body = {"messages": [{"role": "user", "content": "hi"}], "add_generation_prompt": False}
    answer, backend = await sent("/apply-template", body, script)
    hold(LLAMA_SERVER, "apply-template", answer.json())
    assert answer.json() == {"prompt": "<|user|>hi"}
    request = backend.requests[0]
    assert isinstance(request, CountRequest)
    assert request.as_text
    assert request.template_options == {"add_generation_prompt": False}


def test_the_schemas_are_schemas() -> None:
    """A schema that holds nothing would be worth nothing."""
    for schemas in (published.OLLAMA, LLAMA_SERVER):
        for name in schemas:
            with pytest.raises(AssertionError):
                hold(schemas, name, {})
