"""Unknown fields, and those of other servers' APIs, on every route."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, sent, text

from headrace.api import fields
from headrace.api.anthropic_request import CountTokensRequest, MessagesRequest
from headrace.api.chat import ChatRequest
from headrace.api.fields import Body, Peers, bodies
from headrace.api.responses_request import ResponsesRequest
from headrace.core.constraint import Constraint
from headrace.core.request import GenerateRequest

WARNING = "x-headrace-warning"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(),
    TEXT: text(),
    "/v1/responses": {"model": "m", "input": "hi"},
    "/v1/responses/input_tokens": {"model": "m", "input": "hi"},
    "/v1/messages": chat(max_tokens=9),
    "/v1/messages/count_tokens": chat(),
    "/v1/embeddings": {"model": "m", "input": "hi"},
    "/v1/rerank": {"model": "m", "query": "q", "documents": ["d"]},
    "/v1/score": {"model": "m", "text_1": "a", "text_2": "b"},
    "/tokenize": {"model": "m", "content": "hi"},
    "/detokenize": {"model": "m", "tokens": [1]},
}


@pytest.mark.parametrize("path", BODIES)
async def test_an_unknown_field_is_a_warning(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Issue 12.5: the client sees its name, and the log has it once."""
    body = {**BODIES[path], "modell": "x", "zzz": [{"a": 1}]}
    async with client(FakeBackend()) as http:
        answers = [await http.post(path, json=body) for _ in range(3)]
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.headers[WARNING] == "unknown fields: modell (did you mean model?), zzz"
    logged = [record.getMessage() for record in caplog.records if "unknown" in record.message]
    assert logged == [
        f"{path}: unknown field modell (did you mean model?) is ignored",
        f"{path}: unknown field zzz is ignored",
    ]


@pytest.mark.parametrize("path", BODIES)
async def test_unknown_fields_as_it_is_set(path: str, caplog: pytest.LogCaptureFixture) -> None:
    """Issue 12.5: `unknown_fields` ignores or refuses them."""
    body = {**BODIES[path], "modell": "x"}
    answer, _ = await sent(path, body, unknown_fields="ignore")
    assert (answer.status_code, WARNING in answer.headers) == (200, False)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    answer, backend = await sent(path, body, unknown_fields="refuse")
    assert (answer.status_code, backend.requests) == (400, [])
    error = answer.json()["error"]
    assert error.get("param", "modell") == "modell", "Anthropic's errors have no param"
    assert "modell" in error["message"]
    assert "Did you mean model?" in error["message"]


@pytest.mark.parametrize(
    ("field", "value", "near"),
    [("max_token", 5, "max_tokens"), ("tempreature", 0.5, "temperature"),
     ("Stream", True, "stream"), ("topk", 3, "top_k"), ("qqqqqq", None, "")],
)  # fmt: skip
async def test_misspelt_fields(field: str, value: Any, near: str) -> None:
    """Issue 12.5: the nearest name, where one is near."""
    answer, _ = await sent(CHAT, chat(**{field: value}))
    hint = f" (did you mean {near}?)" if near else ""
    assert answer.headers[WARNING] == f"unknown field: {field}{hint}"


NESTED = {
    "stream_options.include_usag": {"stream": True, "stream_options": {"include_usag": True}},
    "response_format.nmae": {"response_format": {"type": "text", "nmae": "x"}},
    "response_format.json_schema.scheme": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "scheme": {}}}
    },
    "messages[].conten": {
        "messages": [{"role": "user", "content": "a", "conten": text} for text in "bc"]
    },
    "messages[].content[].txt": {
        "messages": [{"role": "user", "content": [{"txt": "x", "type": "text", "text": "a"}]}]
    },
}  # fmt: skip


@pytest.mark.parametrize("place", NESTED)
async def test_unknown_fields_of_nested_objects(place: str) -> None:
    """Issue 12.5: with their place, once for all items of a list; streams have the header too."""
    answer, _ = await sent(CHAT, chat(**NESTED[place]))
    assert answer.status_code == 200, answer.text
    assert answer.headers[WARNING].removeprefix("unknown field: ").split(" ")[0] == place


async def test_free_objects_have_no_unknown_fields() -> None:
    """Issue 12.5: what is the client's own stays whole."""
    schema = {"type": "object", "properties": {"modell": {"type": "null"}}}
    answer, backend = await sent(
        CHAT,
        chat(
            user="u",
            chat_template_kwargs={"modell": {"a": 1}},
            response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
        ),
    )
    assert (answer.status_code, WARNING in answer.headers) == (200, False)
    request = backend.requests[0]
    assert isinstance(request, GenerateRequest)
    assert request.constraint == Constraint(json_schema=schema)
    assert request.template_options == {"modell": {"a": 1}}


async def test_a_name_cannot_break_the_header() -> None:
    """Issue 12.5: a client may write anything, of any length and number."""
    names = ["a\r\nx-evil: 1", "é,日", "n" * 10_000, *(f"f{i}" for i in range(100_000))]
    answer, _ = await sent(CHAT, chat(**dict.fromkeys(names, 1)))
    assert answer.status_code == 200
    assert "x-evil" not in answer.headers
    warning = answer.headers[WARNING]
    assert warning.startswith("unknown fields: a??x-evil:?1, ???, nnn")
    assert warning.endswith(" more")
    assert len(warning) < 800


async def test_the_log_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    """Issue 12.5: new names in each request do not fill the log."""
    async with client(FakeBackend()) as http:
        for turn in range(20):
            await http.post(CHAT, json=chat(**{f"f{turn}_{i}": 1 for i in range(100)}))
    assert len([record for record in caplog.records if "unknown" in record.message]) == 1000


REFUSED: dict[str, tuple[tuple[str, Any], ...]] = {
    CHAT: (
        ("truncate_prompt_tokens", 5), ("use_beam_search", True), ("echo", True), ("suffix", "a"),
        ("options", {"temperature": 0}), ("n_predict", 3), ("mirostat", 2),
        ("chat_template", "{{ x }}"), ("top_a", 0.1), ("typical_p", 0.5), ("bad_words", ["x"]),
        ("include_stop_str_in_output", True), ("skip_special_tokens", False), ("format", "json"),
        ("length_penalty", 2), ("system", "be brief"), ("structural_tag", {}), ("best_of", 2),
        ("samplers", ["top_k"]), ("t_max_predict_ms", 100), ("repeat_last_n", 8),
        ("stop_sequences", ["x"]), ("max_output_tokens", 3), ("extra_body", {"top_k": 1}),
        ("do_sample", False), ("disable_parallel_tool_use", True),
    ),
    TEXT: (
        ("add_generation_prompt", False), ("use_beam_search", True), ("max_completion_tokens", 4),
    ),
    "/v1/responses": (
        ("conversation", "c"), ("background", True),
        ("stop", "x"), ("prompt", {"id": "p"}), ("messages", []), ("response_format", {}),
        ("json_schema", {"type": "null"}), ("thinking", {"type": "enabled"}), ("n", 2),
    ),
    "/v1/embeddings": (
        ("truncate_prompt_tokens", 5), ("instruction", "query"), ("options", {"a": 1}),
    ),
    "/v1/rerank": (("truncate_prompt_tokens", 5), ("rank_fields", ["a"]), ("top_k", 1)),
    "/v1/score": (
        ("truncate_prompt_tokens", 5), ("activation", False), ("add_special_tokens", False),
    ),
    "/tokenize": (("with_pieces", True),),
}  # fmt: skip


@pytest.mark.parametrize(
    ("path", "name", "value"), [(path, *given) for path, some in REFUSED.items() for given in some]
)
async def test_what_would_change_the_answer_is_refused_by_name(
    path: str, name: str, value: Any
) -> None:
    """Issue 12.5: whatever is set for unknown fields."""
    for setting in ("ignore", "refuse"):
        answer, backend = await sent(path, {**BODIES[path], name: value}, unknown_fields=setting)
        error = answer.json()["error"]
        assert (answer.status_code, backend.requests) == (400, [])
        assert (error["param"], error["code"]) == (name, "unsupported_parameter")
        assert error["message"].startswith(f"{name} is not supported here.")


async def test_fields_of_a_message_are_refused_with_their_place() -> None:
    """Issue 12.5, 12.6: tool calls, and answers that are begun."""
    for field in ({"prefix": True}, {"images": ["aGk="]}):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **field}]
        answer, _ = await sent(CHAT, chat(messages=turns))
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, f"messages[1].{next(iter(field))}")
        assert error["code"] == "unsupported_parameter"


async def test_what_changes_nothing_is_accepted_in_silence() -> None:
    """Issue 12.5: the value that has no effect, null, and fields that have none at all."""
    harmless: dict[str, Any] = {
        "use_beam_search": False, "add_generation_prompt": True, "continue_final_message": False,
        "prompt_logprobs": None, "echo": False, "skip_special_tokens": True, "typical_p": 1.0,
        "length_penalty": 1, "cache_prompt": True, "store": False, "tools": [], "options": {},
        "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc",
                     "temperature"], "repeat_last_n": 64, "do_sample": True, "best_of": 1,
    }  # fmt: skip
    past = {
        "role": "assistant",
        "content": "b",
        "refusal": None,
        "annotations": [],
        "tool_calls": None,
    }
    messages = [*chat()["messages"], past]
    answer, _ = await sent(
        CHAT, chat(**{**harmless, "messages": messages}), unknown_fields="refuse"
    )
    assert (answer.status_code, WARNING in answer.headers) == (200, False), answer.text


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_the_alias_of_a_penalty_is_honoured(path: str) -> None:
    """Issue 12.5: llama.cpp's and Ollama's name for it."""
    _, backend = await sent(path, {**BODIES[path], "repeat_penalty": 1.3})
    request = backend.requests[0]
    assert isinstance(request, GenerateRequest)
    assert request.sampling.repetition_penalty == 1.3
    answer, _ = await sent(path, {**BODIES[path], "repeat_penalty": 1.3, "repetition_penalty": 1.2})
    assert answer.json()["error"]["param"] == "repeat_penalty"
    answer, _ = await sent(path, {**BODIES[path], "repeat_penalty": 0})
    error = answer.json()["error"]
    assert error["param"] == "repeat_penalty"
    assert error["message"] == "repeat_penalty must be above 0 and at most 100."


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    "given",
    [
        {"json_schema": SCHEMA},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"response_format": {"type": "json_schema", "schema": SCHEMA}},
        {"json_schema": SCHEMA, "response_format": {"type": "json_object", "schema": SCHEMA}},
    ],
)
async def test_schemas_in_other_places_are_honoured(given: Any) -> None:
    """Issue 12.5: llama-server's places for a schema."""
    answer, backend = await sent(CHAT, chat(**given))
    assert (answer.status_code, WARNING in answer.headers) == (200, False)
    request = backend.requests[0]
    assert isinstance(request, GenerateRequest)
    assert request.constraint == Constraint(json_schema=SCHEMA)


async def test_two_schemas_are_refused() -> None:
    """Issue 12.5: which of them is meant is not guessed."""
    two = {"json_schema": SCHEMA, "response_format": {"type": "json_object"}}
    answer, _ = await sent(CHAT, chat(**two))
    assert answer.json()["error"]["param"] == "json_schema"


@pytest.mark.parametrize("kind", [ResponsesRequest, CountTokensRequest, MessagesRequest])
def test_other_dialects_know_the_fields_of_chat_completions(kind: type[Body]) -> None:
    """Issue 14.1, 14.2: a field of chats that another dialect has not is refused or harmless."""
    unknown = {*ChatRequest.__struct_fields__} - {*kind.__struct_fields__} - {*kind.peers}
    assert unknown == set()


def test_each_struct_of_a_body_has_a_table() -> None:
    """Issue 12.5: the tables name no field that a struct has: it would never be read."""
    shared = {"echo", "user", "prompt", "messages"}
    for body in bodies():
        assert not body.peers.keys() & set(body.__struct_fields__) - shared, body
    tables: list[Peers] = [
        fields.CHAT,
        fields.COMPLETIONS,
        fields.EMBED,
        fields.RERANK,
        fields.SCORE,
    ]
    assert [table for table in tables if table not in [body.peers for body in bodies(Body)]] == []
