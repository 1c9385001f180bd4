"""The decoder's messages in plain words."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta
from tests.api.fakes import CHAT, TEXT, FakeBackend, chat, client, text

from headrace.core.wording import fault_of, refusal


class Part(msgspec.Struct, forbid_unknown_fields=True):
    kind: Literal["text", "image"]
    text: str = ""


class Sample(msgspec.Struct, forbid_unknown_fields=True):
    number: float | None = None
    count: Annotated[int, Meta(ge=1, le=5)] | None = None
    names: str | Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=2)] | None = (
        None
    )
    weights: dict[Annotated[int, Meta(ge=0)], float] | None = None
    parts: list[Part] | None = None
    flag: bool | None = None
    short: Annotated[str, Meta(max_length=2)] | None = None
    nothing: None = None
    code: Annotated[str, Meta(pattern="^[a-z]+$")] | None = None


CASES = [
    ('{"number": "x"}', "number", "number: expected a number, got a string."),
    ('{"number": true}', "number", "number: expected a number, got a boolean."),
    ('{"number": 1e999}', "number", "number: number out of range."),
    ('{"count": 0}', "count", "count: expected an integer of at least 1."),
    ('{"count": 9}', "count", "count: expected an integer of at most 5."),
    ('{"count": 1.5}', "count", "count: expected an integer, got a number."),
    ('{"names": 3}', "names", "names: expected a string or an array, got an integer."),
    ('{"names": ["a", "b", "c"]}', "names", "names: expected an array of at most 2 items."),
    ('{"names": [""]}', "names[0]", "names[0]: expected a string of at least 1 character."),
    ('{"weights": {"x": 1}}', "weights", "weights: expected an integer, got a string as a key."),
    ('{"weights": {"1": "a"}}', "weights[...]", "weights[...]: expected a number, got a string."),
    ('{"parts": [{"kind": "x"}]}', "parts[0].kind",
     "parts[0].kind: expected one of image, text; got 'x'."),
    ('{"parts": [{}]}', "parts[0].kind", "parts[0].kind: This field is required."),
    ('{"parts": [{"kind": "text", "a": 1}]}', "parts[0].a", "parts[0].a: This field is unknown."),
    ('{"flag": "yes"}', "flag", "flag: expected true or false, got a string."),
    ('{"short": "abc"}', "short", "short: expected a string of at most 2 characters."),
    ('{"nothing": 3}', "nothing", "nothing: expected null, got an integer."),
    ('{"code": "A"}', "code", "code: expected a string that matches ^[a-z]+$."),
    ("[]", None, "Expected an object, got an array."),
]  # fmt: skip


@pytest.mark.parametrize(("data", "param", "message"), CASES)
def test_words(data: str, param: str | None, message: str) -> None:
    """Issue 12.6: no jargon of the decoder, and the place."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.json.decode(data, type=Sample)
    error = refusal(caught.value, Sample)
    assert (error.param, error.message) == (param, message)


def test_the_place_of_a_part() -> None:
    """Issue 12.6: data that is itself a part of the request."""
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert([{"kind": 3}], list[Part])
    assert refusal(caught.value, list[Part], "messages").param == "messages[0].kind"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@given(st.dictionaries(st.sampled_from(Sample.__struct_fields__), JSON, max_size=3))
def test_no_jargon_is_left(data: dict[str, Any]) -> None:
    """Issue 12.6: whatever is wrong."""
    try:
        msgspec.json.decode(msgspec.json.encode(data), type=Sample)
    except msgspec.ValidationError as caught:
        message = refusal(caught, Sample).message
        words = set(message.replace(",", "").replace(".", " ").split())
        assert not words & {"`", "float", "int", "str", "bool", "length", "enum", "|", "<=", ">="}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        (CHAT, chat(temperature="hot"), "temperature: expected a number, got a string."),
        (CHAT, chat(max_completion_tokens=0),
         "max_completion_tokens: expected an integer of at least 1."),
        (CHAT, chat(max_tokens=0), "max_tokens must be between 1 and 2147483647."),
        (CHAT, chat(messages="hi"), "messages: expected an array, got a string."),
        (CHAT, chat(response_format={"type": "xml"}),
         "response_format.type: expected one of json_object, json_schema, text; got 'xml'."),
        (CHAT, chat(messages=[{"role": "robot", "content": "x"}]),
         "messages[0].role: expected one of assistant, developer, system, tool, user, "
         "function; got 'robot'."),
        (CHAT, chat(messages=[{"role": "assistant", "content": "", "tool_calls": [{}]}]),
         "messages[0].tool_calls[0].function: This field is required."),
        (TEXT, text({"a": 1}), "prompt: expected a string or an array, got an object."),
    ],
)  # fmt: skip
async def test_over_http(path: str, body: Any, message: str) -> None:
    """Issue 12.6: as a client reads them."""
    async with client(FakeBackend()) as http:
        answer = await http.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Value error, a name has 1 to 512 characters", "a name has 1 to 512 characters"),
        ("Input should be less than or equal to 8192", "must be at most 8192"),
        ("Input should be greater than 0", "must be above 0"),
        ("Input should be 'f16' or 'bf16'", "must be 'f16' or 'bf16'"),
        (
            "Input should be a valid integer, unable to parse string as an integer",
            "must be an integer",
        ),
        ("Input should be a valid boolean, unable to interpret input", "must be true or false"),
        ("Input should be a valid string", "must be a string"),
        ("List should have at most 3 items after validation, not 4",
         "must have at most 3 items after validation, not 4"),
    ],
)  # fmt: skip
def test_a_setting_is_refused_in_plain_words(message: str, words: str) -> None:
    """Issue 12.6: not in those of pydantic."""
    assert fault_of(message) == words
