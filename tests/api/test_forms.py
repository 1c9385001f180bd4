"""What an answer has to be, in the fields of every server that has some."""

from __future__ import annotations

from typing import Any

import pytest
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, text

from headrace.core.constraint import Constraint
from headrace.core.request import GenerateRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
LARK, GBNF = 'start: "a"', 'root ::= "a"'


async def post(path: str, **given: Any) -> tuple[Any, FakeBackend]:
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post(path, json=(chat if path == CHAT else text)(**given))
    return answer, backend


FIELDS: list[tuple[dict[str, Any], Constraint | None]] = [
    ({"structured_outputs": {"json": SCHEMA}}, Constraint(json_schema=SCHEMA)),
    (
        {"structured_outputs": {"json": '{"type": "null"}'}},
        Constraint(json_schema={"type": "null"}),
    ),
    ({"structured_outputs": {"json_object": True}}, Constraint(json_schema={"type": "object"})),
    ({"structured_outputs": {"json_object": False}}, None),
    ({"structured_outputs": {"regex": "a+"}}, Constraint(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint(choice=("a", "b"))),
    ({"structured_outputs": {"grammar": LARK, "regex": None}}, Constraint(grammar=LARK)),
    ({"guided_json": SCHEMA}, Constraint(json_schema=SCHEMA)),
    ({"guided_regex": "a+"}, Constraint(regex="a+")),
    ({"guided_choice": ["a"]}, Constraint(choice=("a",))),
    ({"guided_grammar": GBNF}, Constraint(grammar=GBNF)),
    ({"grammar": GBNF}, Constraint(grammar=GBNF)),
    ({"grammar": "", "regex": ""}, None),
    ({"json_schema": '{"type": "null"}'}, Constraint(json_schema={"type": "null"})),
    ({"regex": "a+"}, Constraint(regex="a+")),
    ({"ebnf": GBNF}, Constraint(grammar=GBNF)),
    ({"regex": "a", "response_format": {"type": "text"}}, Constraint(regex="a")),
    ({"regex": "a", "guided_regex": "a"}, Constraint(regex="a")),
]


@pytest.mark.parametrize(("given", "constraint"), FIELDS)
@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_every_place_of_a_constraint(path: str, given: Any, constraint: Any) -> None:
    """Issue 13, exact form: those of OpenAI, vLLM, llama.cpp and SGLang are one constraint."""
    answer, backend = await post(path, **given)
    assert answer.status_code == 200, answer.text
    assert "x-headrace-warning" not in answer.headers
    request = backend.requests[0]
    assert isinstance(request, GenerateRequest)
    assert request.constraint == constraint


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"regex": "a", "guided_choice": ["a"]}, "regex", "regex and guided_choice are both given."),
    ({"regex": "a", "response_format": {"type": "json_object"}}, "regex", "both given"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs.json", "both given"),
    ({"guided_choice": []}, "guided_choice", "guided_choice is empty."),
    ({"guided_regex": ""}, "guided_regex", "guided_regex is empty."),
    ({"structured_outputs": {"grammar": ""}}, "structured_outputs.grammar", "is empty."),
    ({"guided_json": ""}, "guided_json", "guided_json is empty."),
    ({"guided_regex": "(a{1000}){1000}"}, "guided_regex", "guided_regex repeats to more than"),
    ({"ebnf": "x" * 70_000}, "ebnf", "The ebnf has more than"),
    ({"guided_json": "{"}, "guided_json", "not the text of a JSON schema"),
    ({"guided_json": {"minItems": 10**9}}, "guided_json", "/minItems in the JSON schema"),
    ({"structured_outputs": {"choice": "a"}}, "structured_outputs.choice", "expected an array"),
    ({"structured_outputs": {"whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern",
     "not supported"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag",
     "not supported"),
    ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "not supported"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "'structural_tag'"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "param", "problem"), WRONG)
async def test_what_is_wrong_is_named_as_the_client_named_it(
    given: Any, param: str, problem: str
) -> None:
    """Issue 13, exact form: two at once too, as which is meant is not guessed."""
    answer, backend = await post(CHAT, **given)
    error = answer.json()["error"]
    assert (answer.status_code, backend.requests) == (400, [])
    assert error["param"] == param
    assert problem in error["message"]


OTHERS = {
    "/v1/responses": {"model": "m", "input": "x"},
    "/v1/messages": {"model": "m", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("path", OTHERS)
@pytest.mark.parametrize("name", ["structured_outputs", "guided_json", "regex", "ebnf", "grammar"])
async def test_a_dialect_with_its_own_field_refuses_the_others(path: str, name: str) -> None:
    """Issue 13, exact form: it is not ignored, which would be free text."""
    backend = FakeBackend()
    async with client(backend) as http:
        answer = await http.post(path, json={**OTHERS[path], name: {"a": 1}})
    assert (answer.status_code, backend.requests) == (400, [])
    assert f"{name} is not supported" in answer.text
