"""Compiling constraints in processes of their own, and what answers are worth after a check."""

from __future__ import annotations

import asyncio
import resource
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import xllamacpp.xllamacpp
from tests.worker.rig import ask, listed, lying, text, until

from headrace.core.constraint import Constraint
from headrace.core.errors import ConstraintViolated, GenerationFailed, InvalidRequest
from headrace.core.events import Delta, Finish
from headrace.core.model import Capabilities
from headrace.core.request import GenerateRequest
from headrace.worker import compiling
from headrace.worker.compiler import Compiler
from headrace.worker.prompt import check_supported

PACKAGE, LLAMACPP = "", str(xllamacpp.xllamacpp.__file__)
URL = {
    "type": "object",
    "properties": {"url": {"type": "string", "format": "uri"}},
    "required": ["url"],
    "additionalProperties": False,
}
SLOW = {"allOf": [{"type": "integer", "multipleOf": prime} for prime in (97, 89, 83)]}
"""Takes a compiler seconds and hundreds of megabytes."""


@pytest.fixture(scope="module", params=[PACKAGE, LLAMACPP], ids=["package", "llamacpp"])
async def compiler(request: pytest.FixtureRequest) -> AsyncIterator[Compiler]:
    made = Compiler(request.param)
    yield made
    await made.aclose()


@contextmanager
def refused(where: str) -> Iterator[None]:
    with pytest.raises(InvalidRequest) as caught:
        yield
    assert where in caught.value.message
    assert caught.value.param == "response_format"


ENFORCED: list[dict[str, Any]] = [
    {},
    URL,
    {"type": "string", "format": "uri", "minLength": 1, "maxLength": 2083},
    {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "null"}]},
    {"type": "array", "items": {"type": "integer"}, "maxItems": 4096},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10**15},
    {"$schema": "http://json-schema.org/draft-07/schema#", "definitions": {"a": {"type": "null"}},
     "properties": {"x": {"$ref": "#/definitions/a"}}},
    {"type": "array", "items": {"$ref": "#"}},
    {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
     "required": ["next"]},
    {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
    {"enum": [2**53 - 1, 1e-300, 0.30000000000000004]},
    {"type": "integer", "minimum": 0, "maximum": 2**63 - 1},
    {"oneOf": [{"type": "object", "properties": {"k": {"const": name}}, "required": ["k"]}
               for name in "ab"]},
]  # fmt: skip
NOT_ENFORCED: list[tuple[dict[str, Any], str]] = [
    ({"properties": {"a/b": {"items": {"not": {}}}}}, "/properties/a~1b/items in the JSON schema"),
    ({"type": "array", "uniqueItems": True}, "uniqueItems"),
    ({"properties": {"a": {"type": "nothing"}}}, "/properties/a/type in the JSON schema is no"),
    ({"minLength": "x"}, "/minLength"),
    ({"minItems": -1}, "/minItems"),
    ({"properties": 3}, "/properties"),
    ({"exclusiveMinimum": True}, "/exclusiveMinimum"),
    ({"$defs": {"x": {"pattern": "(?=a)"}}, "$ref": "#/$defs/x"}, "/$defs/x/pattern"),
    ({"pattern": "[a"}, "/pattern"),
    ({"pattern": r"(a)\1"}, "/pattern"),
    ({"$schema": "http://127.0.0.1:1/meta"}, "meta-schema"),
    ({"type": "integer", "minimum": 5, "maximum": 3}, "The JSON schema"),
    ({"enum": []}, "The JSON schema"),
    ({"$ref": "#"}, "The JSON schema allows no text"),
    ({"properties": {"a": {"$ref": "#/properties/a"}}}, "/properties/a in the JSON schema has no"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no answer that"),
    ({"type": "array", "minItems": 1, "items": {"allOf": [{"$ref": "#"}]}}, "no answer that ends"),
    ({"type": "array", "prefixItems": [{}, {"$ref": "#"}], "minItems": 2}, "no answer that ends"),
    ({"items": {"anyOf": [{"$ref": "#/items/anyOf/1"}, {"$ref": "#/items/anyOf/0"}]}}, "/items in"),
    ({"type": "integer", "minimum": 2**63, "maximum": 2**63 + 5}, "/minimum"),
    ({"items": {"type": "integer", "exclusiveMinimum": 2**53, "maximum": 2**55}}, "/items/excl"),
    ({"type": "integer", "minimum": 0, "maximum": 2**62 - 1}, "/maximum"),
    ({"items": {"const": 2**53 + 1}}, "/items/const in the JSON schema is 9007199254740993"),
    ({"enum": [1, [{"a": 1e308}]]}, "/enum/1/0/a"),
    ({"type": "integer", "minimum": 2**64 - 1, "maximum": 2**64 - 1}, "/minimum"),
    ({"minimum": 2**53, "multipleOf": 1.5}, "/minimum"),
    (
        {
            "$defs": {
                "a": {"$ref": "#/$defs/b"},
                "b": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "null"}]},
            },
            "$ref": "#/$defs/a",
        },
        "refers to itself for the same value",
    ),
    ({"oneOf": [{"type": "string"}, {"maxLength": 3}]}, "oneOf"),
    ({"items": {"type": "string", "format": "regex"}}, "/items/format"),
    ({"type": "object", "properties": {"a": True}, "minProperties": 3}, "maxProperties"),
]


@pytest.mark.parametrize("schema", ENFORCED, ids=str)
async def test_what_can_be_enforced_is_compiled(compiler: Compiler, schema: Any) -> None:
    """Issue 11.4: by the llguidance that the engine has, whose formats are others."""
    await compiler.compile(Constraint(json_schema=schema))


@pytest.mark.parametrize(("schema", "where"), NOT_ENFORCED, ids=str)
async def test_what_cannot_be_enforced_is_refused(
    compiler: Compiler, schema: Any, where: str
) -> None:
    """Issue 11.4: with the path in the schema."""
    with refused(where):
        await compiler.compile(Constraint(json_schema=schema))


async def test_a_compiler_that_takes_too_much_is_stopped(compiler: Compiler) -> None:
    """Issue 11.5: by the kernel; the next schema is compiled, and the memory is given back."""
    before = psutil.Process().memory_info().rss
    with refused("takes too much to compile"):
        await compiler.compile(Constraint(json_schema=SLOW))
    await compiler.compile(Constraint(json_schema={"type": "boolean"}))
    assert psutil.Process().memory_info().rss - before < 8 << 20
    assert all(process.memory_info().rss < 120 << 20 for process in _family(compiler))


async def test_a_client_that_leaves_stops_the_compiler() -> None:
    """Issue 11.5: at once, and with the process that works for it."""
    compiler = Compiler(LLAMACPP)
    try:
        job = asyncio.ensure_future(compiler.compile(Constraint(json_schema=SLOW)))
        # The one that waits, and the one that does the job.
        await until(lambda: len(_family(compiler)) == 2)
        processes = _family(compiler)
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        await until(lambda: not any(process.is_running() for process in processes))
    finally:
        await compiler.aclose()


async def test_one_client_leaves_another_a_compiler() -> None:
    """Issue 11.5: one schema of each client is compiled at a time."""
    compiler = Compiler()
    slow = [
        asyncio.ensure_future(compiler.compile(Constraint(json_schema=SLOW), "mallory"))
        for _ in range(5)
    ]
    try:
        await until(lambda: len(_family(compiler)) == 2)
        await compiler.compile(Constraint(json_schema={"type": "boolean"}), "alice")
        assert not any(job.done() for job in slow[1:])
    finally:
        for job in slow:
            job.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        await compiler.aclose()
    assert _family(compiler) == []


async def test_a_schema_is_compiled_once() -> None:
    compiler = Compiler()
    try:
        await compiler.compile(Constraint(json_schema=URL))
        [process] = _family(compiler)
        process.suspend()
        async with asyncio.timeout(5):
            await compiler.compile(Constraint(json_schema=dict(URL)))
        process.resume()
    finally:
        await compiler.aclose()


async def test_a_compiler_that_was_killed_is_replaced() -> None:
    """Issue 11.5: whoever killed it."""
    compiler = Compiler()
    try:
        await compiler.compile(Constraint(json_schema={}))
        [process] = _family(compiler)
        process.kill()
        await until(lambda: all(own.returncode is not None for own in compiler._processes))
        await compiler.compile(Constraint(json_schema=URL))
    finally:
        await compiler.aclose()


async def test_a_compiler_that_was_stopped_is_replaced() -> None:
    """Issue 11.5: the client was told after 20 s that its schema takes too much."""
    compiler = Compiler()
    try:
        await compiler.compile(Constraint(json_schema={}))
        [process] = _family(compiler)
        process.suspend()
        await compiler.compile(Constraint(json_schema=URL))
        assert process not in _family(compiler)
    finally:
        await compiler.aclose()


async def test_a_machine_that_is_too_busy_is_no_fault_of_the_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Issue 11.5: a job that takes too much is ended by its time of a core, long before."""
    monkeypatch.setattr("headrace.worker.compiler._WALL_S", 0.2)
    monkeypatch.setattr("headrace.worker.compiler._LOOK_S", 60.0)
    compiler = Compiler()
    try:
        process = await compiler._process()
        psutil.Process(process.pid).suspend()
        compiler._rest(process)
        with pytest.raises(GenerationFailed, match="did not answer within"):
            await compiler.compile(Constraint(json_schema=URL))
        monkeypatch.undo()
        await compiler.compile(Constraint(json_schema=URL))
    finally:
        await compiler.aclose()


async def test_a_compiler_keeps_to_lower_limits_and_has_no_rights() -> None:
    """Issue 11.5, 11.14: under a lower `ulimit -v` each schema took too much to compile."""
    compiler = Compiler()
    try:
        await compiler.compile(Constraint(json_schema={}))
        [process] = _family(compiler)
        most = process.memory_info().vms + compiling.MEMORY - (32 << 20)
        process.rlimit(resource.RLIMIT_AS, (most, most))
        await compiler.compile(Constraint(json_schema=URL))
        assert _family(compiler) == [process]
        assert "NoNewPrivs:\t1" in Path(f"/proc/{process.pid}/status").read_text()
        assert process.rlimit(resource.RLIMIT_CORE) == (0, 0)
    finally:
        await compiler.aclose()


@pytest.mark.parametrize(
    ("answer", "cut", "kept"),
    [
        ('{"url": "http://example.com/a"}', False, True),
        ('{"url": "nope"}', False, False),
        ('{"url": 3}', False, False),
        ('{"url": "http://example.com/a", "x": 1}', False, False),
        ("Sure! Here is", False, False),
        ("", False, False),
        ('{"url": NaN}', False, False),
        ("[" * 100_000, False, False),
        ('{"url": "htt', True, True),
        ('{"url": "nope', True, True),
        ('{"url": "no pe', True, False),
        ("Sure! Here is", True, False),
        ("", True, True),
    ],
)
async def test_an_answer_is_checked(compiler: Compiler, answer: str, cut: bool, kept: bool) -> None:
    """Issue 11.4: a whole one by its schema, one that was cut by its beginning."""
    checking = compiler.check(Constraint(json_schema=URL), answer, cut=cut)
    if kept:
        await checking
        return
    with pytest.raises(ConstraintViolated) as caught:
        await checking
    # Answers are not logged.
    assert "nope" not in f"{caught.value.message} {caught.value.detail}"


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^(a|aa)+$", "^(a*)*b$"])
async def test_a_pattern_takes_linear_time(compiler: Compiler, pattern: str) -> None:
    """Patterns that take exponential time where a search backtracks."""
    constraint = Constraint(json_schema={"type": "string", "pattern": pattern})
    before = time.monotonic()
    await compiler.compile(constraint)
    for cut in (False, True):
        with pytest.raises(ConstraintViolated):
            await compiler.check(constraint, f'"{"a" * 5000}!"', cut=cut)
    assert time.monotonic() - before < 10


@pytest.mark.parametrize("pattern", [r"^(a+)+\1$", "^(?=(a+)+$)a", "^(?<!a)(a+)+$"])
def test_no_search_of_an_answer_backtracks(pattern: str) -> None:
    """Issue 11.5: the validator takes no pattern that needs it, whatever a compiler takes."""
    with pytest.raises(compiling.Refused, match="is no JSON schema"):
        compiling.checked({"type": "string", "pattern": pattern}, '"aa"', None)


def test_a_job_has_limits() -> None:
    """Issue 11.5: the figures that the documentation has."""
    assert (compiling.MEMORY, compiling.CPU_S) == (192 << 20, 2)


def typed(kind: str, prompt: str = "x", **given: Any) -> GenerateRequest:
    return ask(prompt, constraint=Constraint(json_schema={"type": kind}), **given)


async def test_an_engine_that_does_not_enforce_is_found_out() -> None:
    """Issue 11.4: no free text is called good, streamed or not, cut or not."""
    async with lying(text="Sure!") as worker:
        events: list[Any] = []
        with pytest.raises(ConstraintViolated) as caught:
            async for event in worker.ask(typed("object")):
                events.append(event)
        assert "".join(event.text for event in events if isinstance(event, Delta)) == "Sure!"
        assert not any(isinstance(event, Finish) for event in events)
        assert caught.value.metrics is not None
        assert caught.value.metrics.usage.completion_tokens == 6
        with pytest.raises(ConstraintViolated):
            await listed(worker.ask(typed("object", max_tokens=3)))
        assert worker.load == (0, 0)


async def test_what_keeps_to_it_is_passed_on() -> None:
    """Issue 11.4: whole, cut by the limit, cut by a stop string, or one of several."""
    async with lying(text='"Sure!"') as worker:
        assert text(await listed(worker.ask(typed("string")))) == '"Sure!"'
        assert text(await listed(worker.ask(typed("string", max_tokens=3)))) == '"Su'
        assert text(await listed(worker.ask(typed("string", stop=("!",))))) == '"Sure'
        both = await listed(worker.ask(typed("string", n=2)))
        assert [text(both, index) for index in (0, 1)] == ['"Sure!"'] * 2
        with pytest.raises(ConstraintViolated):
            await listed(worker.ask(typed("integer", n=2)))


@pytest.mark.parametrize("given", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_the_end_is_the_schema_s(given: dict[str, Any]) -> None:
    """Issue 11.4: what forbids the end of an answer cannot go with what demands it."""
    able = Capabilities(json_schema=True, sampling=frozenset(given))
    with pytest.raises(InvalidRequest, match="cannot be combined") as caught:
        check_supported(typed("string", **given), able)
    assert caught.value.param in given


async def test_compiling_is_not_queueing() -> None:
    """Issue 12.32b: it has a figure of its own."""
    async with lying(text='"x"') as worker:
        began = time.monotonic()
        events = await listed(worker.ask(typed("string")))
        took_ms = (time.monotonic() - began) * 1000
        metrics = events[-1].metrics  # type: ignore[union-attr]
        assert metrics.compile_ms is not None
        assert metrics.queue_ms is not None
        # Starting the compiler's process takes a tenth of a second and more.
        assert 20 < metrics.compile_ms <= took_ms
        assert metrics.queue_ms < metrics.compile_ms / 2
        plain = await listed(worker.ask(ask("x")))
        assert plain[-1].metrics.compile_ms is None  # type: ignore[union-attr]


def _family(compiler: Compiler) -> list[psutil.Process]:
    """Its processes, with those of their jobs."""
    own = [psutil.Process(process.pid) for process in compiler._processes]
    return [*own, *(child for process in own for child in process.children())]


async def test_a_tool_that_cannot_be_called_is_refused(compiler: Compiler) -> None:
    """Issue 11.4: its part of the grammar is compiled when it is reached: the answer was a 500."""
    grammar = Constraint(lark='start: "x"')
    tools = {"good": {"type": "object"}}
    with pytest.raises(InvalidRequest, match="tool bad allows no text") as caught:
        await compiler.compile(grammar, tools=tools | {"bad": {"$ref": "#"}})
    assert caught.value.param == "tools"
    part = {"type": "object", "properties": {"a": {"exclusiveMinimum": True}}}
    with pytest.raises(InvalidRequest, match=r"^/properties/a/.* of the tool bad is no JSON"):
        await compiler.compile(grammar, tools={"bad": part})
    assert await compiler.compile(grammar, tools=tools) == grammar
