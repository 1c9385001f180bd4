"""A stand-in for Anthropic that answers by rule: a text by the prompt, as long as is asked for.

It calls a tool where it has to: with the arguments that all tools of the contract accept.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from zlib import crc32

from tests.fakes.upstream import Play, Seen, answered, refused, upstream

_TEXT = "Rivers run slow and brown, 漢字 🙂 past mills, and towns, and fields. "
_PIECE = 5
_STEP_S = 0.005
_LIMIT = 256


def _text(content: str | list[dict[str, Any]]) -> str:
    """The text of a message, with a word for each image that depends on its bytes."""
    if isinstance(content, str):
        return content
    words = (
        block.get("text") or "x" * (crc32(block["source"]["data"].encode()) % 50 + 1)
        for block in content
    )
    return " ".join(words)


def _tokens(body: dict[str, Any]) -> int:
    return sum(len(_text(one["content"]).split()) + 4 for one in body["messages"])


def _pieces(body: dict[str, Any]) -> list[str]:
    """The answer up to its first stop string, in pieces of some characters."""
    said = '{"rain": true}' if "rain" in json.dumps(body.get("output_config")) else '{"age": 7}'
    if "output_config" not in body:
        start = len(_text(body["messages"][-1]["content"])) % len(_TEXT)
        times = body["max_tokens"] * _PIECE // len(_TEXT) + 2
        said = (_TEXT * times)[start:]
    found = [said.index(stop) for stop in body.get("stop_sequences", []) if stop in said]
    said = said[: min(found)] if found else said
    return [said[at : at + _PIECE] for at in range(0, len(said), _PIECE)]


def _calls(body: dict[str, Any]) -> list[str]:
    """The names of the tools that it calls: all, or the one that is named."""
    choice = body.get("tool_choice", {})
    if choice.get("type") == "tool":
        return [choice["name"]]
    names = [tool["name"] for tool in body["tools"]] if choice.get("type") == "any" else []
    return names[:1] if choice.get("disable_parallel_tool_use") else names


def _called(number: int, name: str) -> list[bytes | float | str]:
    block = {"type": "tool_use", "id": f"toolu_{number}", "name": name, "input": {}}
    whole = '{"city": "Rome", "days": 2}' if name == "rain" else "{}"
    pieces = [whole[at : at + _PIECE] for at in range(0, len(whole), _PIECE)]
    deltas = ({"type": "input_json_delta", "partial_json": piece} for piece in pieces)
    return [
        _event("content_block_start", index=number, content_block=block),
        *(_event("content_block_delta", index=number, delta=delta) for delta in deltas),
        _event("content_block_stop", index=number),
    ]


def _event(kind: str, **data: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode()


def _start(prompt_tokens: int) -> bytes:
    message = {
        "id": "msg",
        "type": "message",
        "role": "assistant",
        "model": "claude",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {"input_tokens": prompt_tokens, "output_tokens": 1},
    }
    return _event("message_start", message=message)


def _answer(seen: Seen) -> Play:
    body = seen.body
    tokens = _tokens(body)
    if seen.path.endswith("count_tokens"):
        return answered({"input_tokens": tokens})
    if tokens > _LIMIT:
        told = f"prompt is too long: {tokens} tokens > {_LIMIT} maximum"
        return refused(400, {"type": "invalid_request_error", "message": told})
    most = body["max_tokens"]
    steps: list[bytes | float | str] = [_start(tokens)]
    if calls := _calls(body):
        for number, name in enumerate(calls):
            steps += _called(number, name)
        return Play([*steps, *_end("tool_use", 20)])
    pieces = _pieces(body)
    reason = "max_tokens" if len(pieces) > most else "end_turn"
    block = {"type": "text", "text": ""}
    steps.append(_event("content_block_start", index=0, content_block=block))
    for piece in pieces[:most]:
        delta = {"type": "text_delta", "text": piece}
        steps += [_STEP_S, _event("content_block_delta", index=0, delta=delta)]
    steps.append(_event("content_block_stop", index=0))
    return Play([*steps, *_end(reason, len(pieces[:most]))])


def _end(reason: str, tokens: int) -> list[bytes]:
    ended = {"stop_reason": reason, "stop_sequence": None}
    delta = _event("message_delta", delta=ended, usage={"output_tokens": tokens})
    return [delta, _event("message_stop")]


@asynccontextmanager
async def claude() -> AsyncIterator[str]:
    """Yield its address."""
    async with upstream(script=_answer) as server:
        yield server.url
