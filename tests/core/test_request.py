from __future__ import annotations

from typing import Any

import msgspec
import pytest

from headrace.core.errors import InvalidRequest
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("seed", 1 << 64),
        ("logprobs", 21),
        ("logprobs", -1),
        ("stop", ("a", "")),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: float("nan")}),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    """W11: nothing is clamped or dropped in silence."""
    with pytest.raises(InvalidRequest) as caught:
        Sampling(**{name: value})
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 0),
        ("top_p", 0),
        ("top_k", -1),
        ("seed", (1 << 64) - 1),
        ("seed", -(1 << 63)),
        ("logprobs", 20),
        ("logit_bias", {0: -100}),
    ],
)
def test_the_edges_are_allowed(name: str, value: Any) -> None:
    """W11: temperature 0 is a temperature."""
    assert getattr(Sampling(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "messages"),
        ({"prompt": "a", "messages": (Message("user", "b"),)}, "messages"),
        ({"messages": ()}, "messages"),
        ({"prompt": ()}, "prompt"),
        ({"prompt": "a", "n": 0}, "n"),
    ],
)
def test_messages_or_a_prompt(fields: dict[str, Any], param: str) -> None:
    """W9: messages xor prompt."""
    with pytest.raises(InvalidRequest) as caught:
        GenerateRequest(**fields)
    assert caught.value.param == param


def test_a_request_is_frozen_and_its_own() -> None:
    """W9: nobody on the way can change a request."""
    request = GenerateRequest(prompt="a")
    with pytest.raises(AttributeError):
        request.n = 2  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(AttributeError):
        request.sampling.seed = 2  # pyright: ignore[reportAttributeAccessIssue]
    assert request.id != GenerateRequest(prompt="a").id


def test_a_request_crosses_the_wire_as_it_is() -> None:
    """W9: token ids, sampling and the time of arrival survive."""
    request = GenerateRequest(
        prompt=(1, 2), sampling=Sampling(temperature=0, logit_bias={5: -1.0}), n=2, deadline_s=3
    )
    packed = msgspec.msgpack.encode(request)
    assert msgspec.msgpack.decode(packed, type=GenerateRequest) == request


def test_a_request_out_of_range_is_refused_at_the_wire_too() -> None:
    """W11: decoding checks as making does."""
    with pytest.raises(InvalidRequest):
        msgspec.json.decode(b'{"prompt": "a", "sampling": {"top_p": 2}}', type=GenerateRequest)


def test_min_tokens_is_no_more_than_max_tokens() -> None:
    """W11: the two contradict each other."""
    with pytest.raises(InvalidRequest) as caught:
        Sampling(min_tokens=3, max_tokens=2)
    assert caught.value.param == "min_tokens"
    assert Sampling(min_tokens=2, max_tokens=2).min_tokens == 2
