"""The scripted Backend that is shipped for tests."""

from __future__ import annotations

import ast
import asyncio
import textwrap

import pytest

from headrace import testing
from headrace.core.backend import Backend
from headrace.core.errors import QueueFull
from headrace.core.events import (
    Delta,
    Event,
    Progress,
    Ranked,
    Ranking,
    Text,
    TokenCount,
    Vectors,
    floats_of,
)
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    GenerateRequest,
    RerankRequest,
)
from headrace.core.stream import collect, result
from headrace.testing import Barrier, ScriptedBackend, finish


async def test_the_example_of_its_docstring() -> None:
    _, _, example = (testing.__doc__ or "").partition("answer:\n\n")
    code = compile(textwrap.dedent(example), "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, {"asyncio": asyncio})


async def test_every_kind_of_request_has_an_answer_by_default() -> None:
    """Events of the right kind, and a Finish."""
    backend: Backend = ScriptedBackend()
    answer = await collect(backend.ask(GenerateRequest(prompt="x", n=2)))
    assert [choice.text for choice in answer.choices] == ["Hello", "Hello"]
    assert answer.usage.completion_tokens == 4
    made, _ = await result(backend.ask(EmbedRequest(inputs=("a", "b"), dimensions=2)), Vectors)
    assert [list(floats_of(vector)) for vector in made.vectors] == [[0, 0.5], [1, 0.5]]
    rerank = RerankRequest(query="q", documents=("a", "b", "c"), top_n=2)
    ranking, _ = await result(backend.ask(rerank), Ranking)
    assert ranking.ranking == (Ranked(2, 0.25), Ranked(1, 0.125))
    count, _ = await result(backend.ask(CountRequest(text="abc")), TokenCount)
    assert (count.count, count.token_ids) == (3, (0, 1, 2))
    text, _ = await result(backend.ask(DetokenizeRequest(token_ids=(4, 5))), Text)
    assert text.text == "4 5"
    assert [info.id for info in backend.models()] == ["m"]


async def test_steps_are_yielded_raised_and_awaited_in_order() -> None:
    """An error ends the stream where it stands."""
    awaited: list[int] = []

    async def step() -> None:
        awaited.append(len(got))

    got: list[Event] = []
    steps = [Progress("queued"), step, Delta("a", (1,)), QueueFull("Full."), finish()]
    backend = ScriptedBackend(lambda _: steps)
    with pytest.raises(QueueFull):
        async for event in backend.ask(GenerateRequest(prompt="x", id="1")):
            got.append(event)
    assert got == [Progress("queued"), Delta("a", (1,))]
    assert awaited == [1]
    assert (backend.running, backend.ended) == (0, ["1"])


async def test_a_barrier_holds_streams_until_it_is_opened() -> None:
    """What runs, and how many at the most, can be seen meanwhile; a closed stream has ended."""
    barrier = Barrier()
    backend = ScriptedBackend(lambda _: [barrier, Delta("a", (1,)), finish("length")], close_s=0.01)
    asking = [
        asyncio.create_task(collect(backend.ask(GenerateRequest(prompt="x", id=str(number)))))
        for number in range(3)
    ]
    await barrier.reached.wait()
    await asyncio.sleep(0.01)
    assert (backend.running, backend.peak, backend.ended) == (3, 3, [])
    asking[1].cancel()
    await asyncio.wait({asking[1]})
    assert (backend.running, backend.ended) == (2, ["1"])
    barrier.open()
    answers = await asyncio.gather(asking[0], asking[2])
    assert {answer.finish_reason for answer in answers} == {"length"}
    assert sorted(backend.ended) == ["0", "1", "2"]
    assert [request.id for request in backend.requests] == ["0", "1", "2"]
    assert (backend.running, backend.peak) == (0, 3)


async def test_it_is_closed() -> None:
    backend = ScriptedBackend()
    assert not backend.closed
    await backend.aclose()
    assert backend.closed
