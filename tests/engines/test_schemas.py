"""JSON schemas on the real model: what is answered keeps to them, and the rest is refused."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import jsonschema_rs
import psutil
import pytest
from tests.engines.schemas import SPECIAL, Maker

from headrace import AsyncModelWorker
from headrace.core.errors import InvalidRequest
from headrace.core.options import ModelOptions


@pytest.fixture(scope="module")
async def smol(smollm2_path: Path) -> AsyncIterator[AsyncModelWorker]:
    # Where cores are shared, two threads wait for one another in every layer.
    worker = AsyncModelWorker(str(smollm2_path), context_length=512, slots=4, threads=1)
    async with worker:
        yield worker


READERS: dict[str, tuple[str, Any]] = {
    "uri": ("https://example.com/a", lambda text: urlsplit(text).scheme + "x"),
    "date-time": ("2024-01-02T03:04:05Z", datetime.datetime.fromisoformat),
    "email": ("jo@example.org", re.compile(r"[^@ ]+@[^@ ]+\.[^@ ]+").fullmatch),
    "uuid": ("123e4567-e89b-12d3-a456-426614174000", uuid.UUID),
}


@pytest.mark.parametrize("name", READERS)
async def test_formats_are_kept(smol: AsyncModelWorker, name: str) -> None:
    """Issue 11.4: llama.cpp's own compiler knows no uri and answered freely."""
    example, read = READERS[name]
    schema = {
        "type": "object",
        "properties": {"url": {"type": "string", "format": name}},
        "required": ["url"],
        "additionalProperties": False,
    }
    line = f"JSON: {json.dumps({'url': example})}\n"
    reply = await smol.generate(
        f"{line * 3}JSON:", json_schema=schema, max_tokens=60, temperature=0
    )
    assert reply.finish_reason == "stop"
    assert read(json.loads(reply.text)["url"])
    wild = await smol.generate("Tell me.", json_schema=schema, max_tokens=60, seed=3)
    assert wild.text.startswith('{"url": "')


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        ({"type": "array", "minItems": 1_000_000_000}, "/minItems"),
        (
            {"type": "integer", "multipleOf": 999999937, "minimum": 0, "maximum": 10**15},
            "/multipleOf",
        ),
    ],
)
async def test_the_bombs_of_the_issue(smol: AsyncModelWorker, schema: Any, where: str) -> None:
    """Issue 11.4, 11.5: 14 GB in 80 s before; now milliseconds, and no memory anywhere."""
    await smol.generate("x", json_schema={"type": "null"})
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    before = sum(process.memory_info().rss for process in processes)
    began = time.monotonic()
    for _ in range(20):
        with pytest.raises(InvalidRequest, match=f"^{where} in the JSON schema is .* at most"):
            await smol.generate("x", json_schema=schema)
    took_s = time.monotonic() - began
    after = sum(process.memory_info().rss for process in processes if process.is_running())
    assert took_s / 20 < 0.1
    assert after - before < 8 << 20


async def test_names_of_special_tokens_are_text(smol: AsyncModelWorker) -> None:
    """Issue 11.4: text that had to follow was taken for the token, and the answer was a 500."""

    async def ask(schema: Any, prompt: str) -> None:
        reply = await smol.generate(prompt, json_schema=schema, max_tokens=60, seed=1)
        assert jsonschema_rs.validator_for(schema).is_valid(json.loads(reply.text))
        assert "<|im_" in reply.text

    prompts = ("An example in JSON:\n", "<|im_start|>user\n<|im_start|>")
    await asyncio.gather(*(ask(schema, prompt) for schema in SPECIAL for prompt in prompts))
    # So in the arguments of a tool.
    parameters = {"type": "object", "properties": {"a": SPECIAL[0]}, "required": ["a"]}
    reply = await smol.generate(
        messages=[{"role": "user", "content": "Call f."}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=100,
        seed=1,
    )
    assert json.loads(reply.tool_calls[0].arguments)["a"] in SPECIAL[0]["enum"]


class Tally(NamedTuple):
    finished: int
    cut: int
    refused: int


async def tried(smol: AsyncModelWorker, seeds: Iterable[int]) -> Tally:
    """Ask for each seed's schema; every answer is checked here by formats of jsonschema-rs too."""

    places = asyncio.Semaphore(8)

    async def ask(seed: int) -> str:
        async with places:
            return await outcome(seed)

    async def outcome(seed: int) -> str:
        schema = Maker(seed).schema()
        options = {"max_tokens": 100, "temperature": 0.7, "seed": seed}
        try:
            reply = await smol.generate("An example in JSON:\n", json_schema=schema, **options)
        except InvalidRequest as error:
            assert error.param == "response_format", seed
            return "refused"
        if reply.finish_reason == "length":
            return "cut"
        validator = jsonschema_rs.validator_for(schema, validate_formats=True)
        problems = [str(problem) for problem in validator.iter_errors(json.loads(reply.text))]
        assert problems == [], (seed, schema, reply.text)
        return "finished"

    results = await asyncio.gather(*map(ask, seeds))
    return Tally(*(results.count(name) for name in Tally._fields))


async def test_random_schemas(smol: AsyncModelWorker) -> None:
    """Issue 11.4: every answer validates, and every refusal is the client's to mend."""
    tally = await tried(smol, range(6))
    assert tally.finished >= 3
    assert tally.refused <= 2


@pytest.mark.slow
async def test_many_random_schemas(smol: AsyncModelWorker) -> None:
    """Issue 11.4, issue 13, shown 3: 200 of them, or as many as SCHEMAS says.

    Of 1,000 on 2026-11-28, 683 answers were finished and valid, 132 cut at 100 tokens, 185 refused.
    """
    number = int(os.environ.get("SCHEMAS", "200"))
    tally = await tried(smol, range(10, 10 + number))
    print(tally)  # noqa: T201
    assert tally.finished >= number / 2
    assert tally.refused <= number / 4


@pytest.mark.engines
@pytest.mark.slow
@pytest.mark.timeout(900)
async def test_random_schemas_by_transformers(smollm2_path: Path) -> None:
    """Issue 13, shown 3: the same on another engine, whose sampler asks llguidance itself."""
    from tests import models_made

    folder = str(models_made.smollm2(smollm2_path))
    options: ModelOptions = {"engine": "transformers", "context_length": 512}
    async with AsyncModelWorker(folder, isolate=False, **options) as model:
        tally = await tried(model, range(50))
    assert tally.finished >= 25
    assert tally.refused <= 12
