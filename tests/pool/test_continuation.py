"""Whether and how a broken answer goes on, and that the client gets each character once."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headrace.core.constraint import Constraint
from headrace.core.errors import (
    EngineError,
    GenerationFailed,
    LoadFailed,
    OutOfMemory,
    UpstreamError,
    WorkerDied,
)
from headrace.core.events import (
    Delta,
    Finish,
    PromptToken,
    PromptTokens,
    TokenLogprob,
    ToolCallDelta,
)
from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.model import Capabilities
from headrace.core.model import Continuation as Policy
from headrace.core.request import GenerateRequest, Message
from headrace.core.sampling import Sampling
from headrace.core.tools import Tool, ToolChoice
from headrace.pool.continuation import Continuation, Diverged

ABLE = Capabilities(batch_invariant=True, resume=True)
DIED = WorkerDied("was killed")
WORDS = tuple(f"wörd{n} " for n in range(12))
TEXT = "".join(WORDS)


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def answer(continuation: Policy = "fast", time: Time | None = None, **given: Any) -> Continuation:
    sampling = Sampling(
        temperature=given.pop("temperature", 0.0), seed=given.pop("seed", None), max_tokens=12
    )
    request = GenerateRequest(prompt="x", sampling=sampling, received=100.0, **given)
    return Continuation(request, continuation, time or Time())


def begun(*args: Any, **given: Any) -> Continuation:
    one = answer(*args, **given)
    one.new(Delta("a ", (1,)))
    return one


def way_on(one: Continuation, error: EngineError, capabilities: Capabilities) -> str | None:
    """Return how the answer goes on; None where it ends with the error."""
    try:
        return one.retry(error, capabilities)
    except EngineError as raised:
        assert raised is error
        return None


def again(one: Continuation) -> GenerateRequest:
    """Return what the second worker is asked."""
    one.retry(DIED, ABLE)
    request = one.request
    assert isinstance(request, GenerateRequest)
    return request


def finish(**given: Any) -> Finish:
    return Finish(("stop",), Usage(), InferenceMetrics(started_at=0.0, **given))


def ended(one: Continuation, last: Finish) -> Finish:
    got = one.new(last)
    assert isinstance(got, Finish)
    return got


@pytest.mark.parametrize(
    ("given", "capabilities", "way"),
    [
        ({}, ABLE, "fast"),
        ({"continuation": "exact"}, ABLE, "exact"),
        ({"continuation": "off"}, ABLE, None),
        # Fast wants an engine that takes token ids; without, a greedy one is generated again.
        ({}, Capabilities(), "exact"),
        ({"temperature": 1.0}, Capabilities(), None),
        ({"temperature": 1.0, "seed": 7}, Capabilities(), "exact"),
        # Several choices and a grammar have no single beginning to go on from.
        ({"n": 2}, ABLE, "exact"),
        ({"constraint": Constraint(json_schema={})}, ABLE, "exact"),
        ({"echo": True}, ABLE, "exact"),
        ({"n": 2, "temperature": 1.0}, ABLE, None),
        # What was drawn by chance does not come again, unless it has a seed.
        ({"temperature": 1.0}, ABLE, "fast"),
        ({"temperature": 1.0, "continuation": "exact"}, ABLE, None),
        ({"temperature": 1.0, "seed": 7, "continuation": "exact"}, ABLE, "exact"),
        ({"temperature": None, "continuation": "exact"}, ABLE, None),
    ],
)
def test_which_way_an_answer_goes_on(
    given: dict[str, Any], capabilities: Capabilities, way: str | None
) -> None:
    assert way_on(begun(**given), DIED, capabilities) == way


def test_that_what_has_not_begun_is_simply_asked_again() -> None:
    for one in (answer(), answer("exact", temperature=1.0), answer(n=3)):
        assert way_on(one, DIED, Capabilities()) == "exact"
    # Off is off.
    assert way_on(answer("off"), DIED, ABLE) is None


@pytest.mark.parametrize(
    ("error", "goes_on"),
    [
        (WorkerDied("x"), True),
        (GenerationFailed("x"), True),
        (OutOfMemory("x"), True),
        (LoadFailed("x"), False),
        (UpstreamError("x"), False),
        (EngineError("x"), False),
    ],
)
def test_what_an_answer_survives(error: EngineError, goes_on: bool) -> None:
    assert (way_on(begun(), error, ABLE) is not None) == goes_on


def test_that_it_goes_on_once_only() -> None:
    one, second = begun(), WorkerDied("was killed too")
    assert way_on(one, DIED, ABLE) == "fast"
    with pytest.raises(WorkerDied) as caught:
        one.retry(second, ABLE)
    assert caught.value is DIED
    assert caught.value.__cause__ is second


def test_what_the_second_worker_is_asked() -> None:
    one = begun("fast")
    one.new(Delta("b", (2, 3)))
    one.new(Delta("", (4,)))
    assert again(one).answered == (1, 2, 3, 4)
    second = again(begun("exact"))
    assert second.answered == ()
    assert second.sampling == Sampling(temperature=0.0, max_tokens=12)


cuts = st.lists(st.integers(0, len(TEXT)), max_size=12).map(sorted)


def pieces(cuts: list[int]) -> list[Delta]:
    """Cut the text anywhere; each token id comes with the piece that its word begins in."""
    starts = [len("".join(WORDS[:n])) for n in range(len(WORDS))]
    edges = [0, *cuts, len(TEXT)]
    return [
        Delta(TEXT[low:high], tuple(n for n, at in enumerate(starts) if low <= at < high))
        for low, high in pairwise(edges)
    ]


@given(first=cuts, second=cuts, broken=st.integers(0, 13))
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_that_exact_gives_each_character_and_token_once(
    first: list[int], second: list[int], broken: int
) -> None:
    """Wherever the two workers cut their deltas, and wherever the first one ends."""
    one, got = answer("exact"), []
    for delta in pieces(first)[:broken]:
        got.append(one.new(delta))
    again(one)
    for delta in pieces(second):
        got.append(one.new(delta))
    deltas = [delta for delta in got if isinstance(delta, Delta)]
    assert "".join(delta.text for delta in deltas) == TEXT
    assert [n for delta in deltas for n in delta.token_ids] == list(range(len(WORDS)))
    assert ended(one, finish()).metrics.continued == "exact"


@given(first=cuts, broken=st.integers(1, 13), held=st.integers(0, 5))
@settings(max_examples=300, derandomize=True, deadline=None, database=None)
def test_that_fast_gives_what_was_held_back_too(first: list[int], broken: int, held: int) -> None:
    """The second worker begins with the whole text of the ids; some of it may be new."""
    one, got = answer("fast"), []
    for delta in pieces(first)[:broken]:
        got.append(one.new(delta))
    sent = "".join(delta.text for delta in got if isinstance(delta, Delta))
    ids = again(one).answered
    # The words of all ids that were sent, of which the client may lack the end.
    whole = "".join(WORDS[: len(ids)])
    whole = whole if len(whole) >= len(sent) else sent
    got.append(one.new(Delta(whole, ids)))
    rest = Delta(TEXT[len(whole) :], tuple(range(len(ids), len(WORDS))))
    got.append(one.new(rest))
    deltas = [delta for delta in got if isinstance(delta, Delta)]
    assert "".join(delta.text for delta in deltas) == TEXT
    assert [n for delta in deltas for n in delta.token_ids] == list(range(len(WORDS)))
    assert ended(one, finish()).metrics.continued == "fast"


@given(ends=st.lists(st.integers(0, 13), max_size=4), way=st.sampled_from(["exact", "fast"]))
@settings(max_examples=200, derandomize=True, deadline=None, database=None)
def test_that_planned_ends_are_survived_as_often_as_they_come(ends: list[int], way: Policy) -> None:
    """Issue 15, shown 3: a roll of nodes may move an answer several times; a failure once more."""
    one, got = answer(way), list[Delta]()

    def attempt(end: int) -> None:
        request = one.request
        assert isinstance(request, GenerateRequest)
        start = len(request.answered)
        known = [Delta("".join(WORDS[:start]), request.answered)] if start else []
        rest = [Delta(word, (start + n,)) for n, word in enumerate(WORDS[start:])]
        new = map(one.new, [*known, *rest[:end]])
        got.extend(delta for delta in new if isinstance(delta, Delta))

    for end in ends:
        attempt(end)
        one.retry(DIED, ABLE, planned=True)
    attempt(3)
    assert one.retry(DIED, ABLE) in (way, "exact")
    attempt(13)
    assert "".join(delta.text for delta in got) == TEXT
    assert [n for delta in got for n in delta.token_ids] == list(range(len(WORDS)))
    assert ended(one, finish()).metrics.continuations == len(ends) + 1
    with pytest.raises(WorkerDied):
        one.retry(DIED, ABLE)


def test_that_choices_and_reasoning_are_kept_apart() -> None:
    one = answer("exact", n=2)
    one.new(Delta("left", (1,), 0))
    one.new(Delta("right", (2,), 1))
    one.new(Delta("", (3,), 1, "because"))
    again(one)
    assert one.new(Delta("right", (2,), 1)) is None
    assert one.new(Delta("left and", (1, 9), 0)) == Delta(" and", (9,), 0)
    assert one.new(Delta("", (3, 4), 1, "because of")) == Delta("", (4,), 1, " of")
    assert ended(one, finish()).finish_reason == "stop"


def test_that_logprobs_go_with_their_tokens() -> None:
    probable = tuple(TokenLogprob(n, b"x", -0.5) for n in range(3))
    one = answer("exact")
    one.new(Delta("ab", (0, 1), logprobs=probable[:2]))
    again(one)
    assert one.new(Delta("abc", (0, 1, 2), logprobs=probable)) == Delta(
        "c", (2,), logprobs=probable[2:]
    )


def test_that_another_text_is_not_sewn_on() -> None:
    one = begun("exact")
    again(one)
    with pytest.raises(Diverged):
        one.new(Delta("b ", (1,)))
    reasoned = answer("exact")
    reasoned.new(Delta("", (1,), 0, "so"))
    again(reasoned)
    with pytest.raises(Diverged):
        reasoned.new(Delta("", (1,), 0, "no"))


def test_that_one_that_ends_too_early_is_another() -> None:
    one = answer("exact")
    one.new(Delta("a b c ", (1, 2, 3)))
    again(one)
    one.new(Delta("a b ", (1, 2)))
    with pytest.raises(Diverged):
        one.new(finish())


def test_that_the_figures_are_what_the_client_felt() -> None:
    time = Time()
    one = answer("fast", time)
    time.now = 103.0
    assert one.start(2.0).load_ms == 2000
    time.now = 103.5
    one.new(Delta("a ", (1,)))
    again(one)
    # The second worker's load is a pause, and not the one that the request began with.
    assert one.start(60.0).load_ms == 2000
    one.new(Delta("a b", (1, 2)))
    metrics = ended(one, finish(time_to_first_token_ms=9.0, queue_ms=9.0)).metrics
    assert metrics.queue_ms == pytest.approx(1000)
    assert metrics.time_to_first_token_ms == pytest.approx(3500)
    assert (metrics.continuations, metrics.continued) == (1, "fast")


def test_that_an_undisturbed_answer_passes_unchanged() -> None:
    one, last = answer(), finish(time_to_first_token_ms=9.0)
    delta = Delta("a", (1,))
    assert one.new(delta) is delta
    assert one.new(last) is last


def test_calls_go_on_once() -> None:
    """Issue 13: the client gets each head and each part of the arguments once."""
    one = answer()
    one.new(Delta("a ", (1,)))
    one.new(ToolCallDelta(0, "call_1", "f", '{"a"'))
    assert way_on(one, DIED, ABLE) == "fast"
    assert one.new(Delta("a ", (1,))) is None
    assert one.new(ToolCallDelta(0, "call_1", "f")) is None
    assert one.new(ToolCallDelta(0, arguments='{"a": 1')) == ToolCallDelta(0, arguments=": 1")
    assert one.new(ToolCallDelta(1, "call_2", "g")) == ToolCallDelta(1, "call_2", "g")
    other = answer()
    other.new(ToolCallDelta(0, "call_1", "f", "{"))
    way_on(other, DIED, ABLE)
    with pytest.raises(Diverged):
        other.new(ToolCallDelta(0, "call_1", "g", "{"))


def test_enforced_calls_are_not_resumed() -> None:
    """Issue 13: a grammar cannot begin in the middle; a repeatable answer is made again."""
    tools = (Tool("f"),)
    messages = (Message("user", "x"),)
    for choice, way in ((ToolChoice("required"), "exact"), (ToolChoice(), "fast")):
        request = GenerateRequest(
            messages=messages, tools=tools, tool_choice=choice, sampling=Sampling(temperature=0)
        )
        one = Continuation(request, "fast", Time())
        one.new(Delta("a ", (1,)))
        assert way_on(one, DIED, ABLE) == way


def test_the_tokens_of_a_prompt_are_sent_once() -> None:
    """Issue 13: a second worker computes them again, and the client has them."""
    prompt = PromptTokens((PromptToken(1, b"x"),), "x")
    for sent in (False, True):
        one = answer(prompt_logprobs=0, n=2)
        if sent:
            assert one.new(prompt) == prompt
        assert one.retry(DIED, ABLE) == "exact"
        assert one.new(prompt) == (None if sent else prompt)
        assert one.new(msgspec.structs.replace(prompt, index=1)) is not None
