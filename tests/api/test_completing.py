"""Issue 13 on the wire: suffix, echo with log probabilities, and continued messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from tests.api.fakes import FakeBackend, client

from headrace.core.events import (
    Delta,
    FinishReason,
    PromptToken,
    PromptTokens,
    TokenLogprob,
    TopLogprob,
)
from headrace.core.request import MAX_PROMPT_CANDIDATES, CountRequest, GenerateRequest
from headrace.testing import Step, finish

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
PROMPT = (
    PromptToken(5, b"He"),
    PromptToken(6, b"\xc3", -1.5, (TopLogprob(8, b"", -0.5), TopLogprob(9, b"", -0.7)), 4),
    PromptToken(7, b"\xa9", -0.25, (TopLogprob(7, b"\xa9", -0.25), TopLogprob(9, b"x", -2.0)), 1),
)


def scored(request: GenerateRequest) -> Iterator[Step]:
    for index in range(request.n):
        yield PromptTokens(PROMPT, "Hé" if request.echo else "", index)
        token = TokenLogprob(3, b"!", -0.125, (TopLogprob(3, b"!", -0.125),))
        logprobs = () if request.sampling.logprobs is None else (token,)
        yield Delta("!", (3,), index, logprobs=logprobs)
    reasons: list[FinishReason] = ["length"] * request.n
    yield finish(*reasons)


async def sent(path: str, body: dict[str, Any], **keywords: Any) -> tuple[Any, FakeBackend]:
    backend = FakeBackend(keywords.pop("script", None) or scored)
    async with client(backend) as http:
        return await http.post(path, json=body), backend


async def asked(path: str, **body: Any) -> Any:
    answer, backend = await sent(path, body)
    assert answer.status_code == 200, answer.text
    return backend.requests[0]


async def test_a_suffix() -> None:
    """Issue 13: an empty one is none, as in OpenAI's API."""
    assert (await asked(TEXT, prompt="a", suffix="b")).suffix == "b"
    assert (await asked(TEXT, prompt="a", suffix="")).suffix is None
    _, backend = await sent(TEXT, {"prompt": ["a", "c"], "suffix": "b"})
    suffixes = [r.suffix for r in backend.requests if isinstance(r, GenerateRequest)]
    assert suffixes == ["b", "b"]


EXPECTED = {
    "tokens": ["He", "bytes:\\xc3", "bytes:\\xa9", "!"],
    "token_logprobs": [None, -1.5, -0.25, -0.125],
    "top_logprobs": [None, {"": -0.5}, {"bytes:\\xa9": -0.25, "x": -2.0}, {"!": -0.125}],
    "text_offset": [0, 2, 2, 3],
}


async def test_an_echo_with_log_probabilities() -> None:
    """Issue 13: null first, the likelier of two with one text, offsets within the text."""
    body = {"prompt": "Hé", "echo": True, "logprobs": 2, "max_tokens": 1}
    answer, _ = await sent(TEXT, {**body, "n": 2})
    choices = answer.json()["choices"]
    assert [choice["text"] for choice in choices] == ["Hé!", "Hé!"]
    assert [choice["logprobs"] for choice in choices] == [EXPECTED, EXPECTED]
    assert all("prompt_logprobs" not in choice for choice in choices)


async def test_an_echo_with_log_probabilities_in_a_stream() -> None:
    """Issue 13: the echo is a chunk with its tokens, and offsets go on after it."""
    body = {"prompt": ["Hé", "Hé"], "echo": True, "logprobs": 1, "max_tokens": 1, "stream": True}
    answer, _ = await sent(TEXT, body)
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    for index in (0, 1):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [choice["text"] for choice in mine] == ["Hé", "!", ""]
        assert mine[0]["logprobs"]["token_logprobs"] == [None, -1.5, -0.25]
        assert mine[0]["logprobs"]["top_logprobs"] == [None, {"": -0.5}, {"bytes:\\xa9": -0.25}]
        assert mine[1]["logprobs"]["text_offset"] == [3]


PLACES = [
    None,
    {
        "6": {"logprob": -1.5, "rank": 4, "decoded_token": "\ufffd"},
        "8": {"logprob": -0.5, "rank": 1, "decoded_token": ""},
        "9": {"logprob": -0.7, "rank": 2, "decoded_token": ""},
    },
    {
        "7": {"logprob": -0.25, "rank": 1, "decoded_token": "\ufffd"},
        "9": {"logprob": -2.0, "rank": 2, "decoded_token": "x"},
    },
]


async def test_prompt_logprobs_as_vllm_has_them() -> None:
    """Issue 13: of a choice in completions, of the answer in a chat; not in a stream."""
    answer, backend = await sent(TEXT, {"prompt": "a", "prompt_logprobs": 2})
    (choice,) = answer.json()["choices"]
    assert (choice["prompt_logprobs"], choice["text"], choice["logprobs"]) == (PLACES, "!", None)
    (request,) = backend.requests
    assert isinstance(request, GenerateRequest)
    assert request.prompt_candidates == 2
    answer, _ = await sent(CHAT, {"messages": TURNS[:1], "prompt_logprobs": 2, "max_tokens": 0})
    assert answer.json()["prompt_logprobs"] == PLACES
    answer, _ = await sent(CHAT, {"messages": TURNS[:1]}, script=lambda _: [Delta("a"), finish()])
    assert "prompt_logprobs" not in answer.json()
    for path, body in ((TEXT, {"prompt": "a"}), (CHAT, {"messages": TURNS[:1]})):
        answer, _ = await sent(path, {**body, "prompt_logprobs": 0, "stream": True})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt": [[1] * 40_000] * 8, "echo": True, "logprobs": 1}, "prompt"),
        ({"prompt": "a" * 200_000, "prompt_logprobs": 2}, "prompt"),
    ],
)
async def test_what_is_too_much_or_nothing(body: dict[str, Any], param: str) -> None:
    """Issue 13: an answer without tokens needs something else in it, and all have a limit."""
    answer, backend = await sent(TEXT, {"prompt": "a", **body})
    assert (answer.status_code, backend.requests) == (400, [])
    assert answer.json()["error"]["param"] == param
    assert MAX_PROMPT_CANDIDATES < 8 * 40_000 * 2


async def test_no_new_tokens_with_an_echo() -> None:
    """Issue 13: max_tokens 0."""
    for more in ({"echo": True}, {"prompt_logprobs": 0}):
        assert (await asked(TEXT, prompt="a", max_tokens=0, **more)).sampling.max_tokens == 0


async def test_a_continued_message() -> None:
    """Issue 13: vLLM's fields, in a chat and where its tokens are counted."""
    for given in (None, False):
        request = await asked(
            CHAT, messages=TURNS, continue_final_message=True, add_generation_prompt=given
        )
        assert request.continue_final
    request = await asked(CHAT, messages=TURNS, add_generation_prompt=False)
    assert (request.continue_final, request.template_options) == (
        False,
        {"add_generation_prompt": False},
    )
    backend = FakeBackend()
    async with client(backend) as http:
        await http.post("/tokenize", json={"messages": TURNS, "continue_final_message": True})
    (counted,) = backend.requests
    assert isinstance(counted, CountRequest)
    assert counted.continue_final


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": TURNS, "add_generation_prompt": True}, "add_generation_prompt"),
        (
            {"messages": TURNS, "chat_template_kwargs": {"add_generation_prompt": True}},
            "add_generation_prompt",
        ),
        ({"messages": TURNS[:1]}, "continue_final_message"),
    ],
)
async def test_nothing_to_continue(path: str, body: dict[str, Any], param: str) -> None:
    """Issue 13: the error has the client's name of the field."""
    answer, _ = await sent(path, {**body, "continue_final_message": True})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
