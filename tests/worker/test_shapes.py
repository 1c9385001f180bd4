"""Calls that are not JSON, of a real model: a whole schema is enforced, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from headrace import AsyncModelWorker
from headrace.core.errors import Unsupported

KEYS = {name: {"type": "integer", "minimum": 0, "maximum": 9} for name in "abc"}
KEPT: list[dict[str, Any]] = [
    {"minProperties": 2, "maxProperties": 2},
    {"oneOf": [{"required": ["a"]}, {"required": ["b"]}]},
    {"dependentRequired": {"a": ["b"]}, "minProperties": 1, "not": {"required": ["c"]}},
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen-xml", "gemma-4"])
async def test_schemas_of_all_arguments(smollm2_path: Path, family: str) -> None:
    """Issue 13: they were only checked at the end, so that a wrong call was a 500."""
    async with AsyncModelWorker(
        str(smollm2_path), context_length=512, tool_format=family
    ) as worker:

        async def call(more: dict[str, Any], seed: int) -> Any:
            schema = {"type": "object", "properties": KEYS, "additionalProperties": False} | more
            reply = await worker.generate(
                messages=[{"role": "user", "content": "Call f."}],
                tools=[{"type": "function", "function": {"name": "f", "parameters": schema}}],
                tool_choice="required",
                parallel_tool_calls=False,
                max_tokens=150,
                seed=seed,
            )
            arguments = json.loads(reply.tool_calls[0].arguments)
            jsonschema_rs.validate(schema, arguments)

        for seed, more in enumerate(KEPT):
            await call(more, seed)
        with pytest.raises(Unsupported, match=r"^The tool f: /if in the JSON schema cannot"):
            await call({"if": {"required": ["a"]}, "then": {"required": ["b"]}}, 1)
