"""Asks a running service again what was asked, with the same parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from headrace.cli.client import Client
from headrace.core.errors import HeadraceError, InvalidRequest, RequestError, UpstreamError
from headrace.core.metrics import InferenceMetrics
from headrace.core.record import RequestRecord

_PATHS = {"chat": "/v1/chat/completions", "text_completion": "/v1/completions"}
# What has the same name in a record and on the wire.
_SAME = frozenset(
    {
        "n", "echo", "context_length", "max_tokens", "temperature", "top_p", "top_k", "min_p",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "stop",
        "stop_token_ids", "ignore_eos", "logit_bias",
    }
)  # fmt: skip


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """The second answer, by choice. `differs_at` is the first character that is another one."""

    id: str
    model: str
    answered: tuple[str, ...]
    finish_reasons: tuple[str, ...]
    metrics: InferenceMetrics
    equal: bool
    differs_at: int | None


class _Delta(msgspec.Struct, frozen=True):
    content: str | None = None


class _Choice(msgspec.Struct, frozen=True):
    index: int = 0
    text: str = ""
    delta: _Delta = _Delta()
    finish_reason: str | None = None


class _Problem(msgspec.Struct, frozen=True):
    message: str


class _Chunk(msgspec.Struct, frozen=True):
    choices: tuple[_Choice, ...] = ()
    metrics: InferenceMetrics | None = None
    error: _Problem | None = None


class _Asker(Client):
    async def ask(self, path: str, body: dict[str, Any], each: Callable[[_Chunk], None]) -> None:
        """Call `each` with the chunks of a streamed answer."""
        with self._named():
            async with self._http.stream("POST", path, json=body) as answer:
                if answer.is_error:
                    raise _refusal(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    data = line.removeprefix("data:").strip() if line.startswith("data:") else ""
                    if data not in ("", "[DONE]"):
                        each(self._decoded(data, _Chunk))


class _Answer:
    """What has come so far; the text of the first choice is written as it comes."""

    def __init__(self, write: Callable[[str], None] | None) -> None:
        self._write: Callable[[str], object] = write or len  # which does nothing
        self._metrics: InferenceMetrics | None = None
        self._texts: dict[int, str] = defaultdict(str)
        self._reasons: dict[int, str] = {}

    def take(self, chunk: _Chunk) -> None:
        """Add a chunk.

        Raises:
            UpstreamError: it tells that the answer has failed.
        """
        if chunk.error is not None:
            raise UpstreamError(chunk.error.message)
        self._metrics = chunk.metrics or self._metrics
        for choice in chunk.choices:
            text = choice.delta.content or choice.text
            self._texts[choice.index] += text
            if choice.finish_reason:
                self._reasons[choice.index] = choice.finish_reason
            if choice.index == 0:
                self._write(text)

    def end(self, record: RequestRecord, model: str) -> Replayed:
        """Write the other choices, and compare all with what was answered then.

        Raises:
            UpstreamError: the answer was cut off.
        """
        texts = tuple(text for _, text in sorted(self._texts.items()))
        for number, text in enumerate(texts[1:], 2):
            self._write(f"\n\n{number}: {text}")
        self._write("\n")
        if self._metrics is None:
            raise UpstreamError("The answer ended without its figures.")
        before = record.content.answered if record.content else ()
        return Replayed(
            id=record.id,
            model=model,
            answered=texts,
            finish_reasons=tuple(reason for _, reason in sorted(self._reasons.items())),
            metrics=self._metrics,
            equal=before == texts,
            differs_at=_difference(before, texts),
        )


def _difference(before: Sequence[str], after: Sequence[str]) -> int | None:
    for old, new in zip(before, after, strict=False):
        for place, pair in enumerate(zip_longest(old, new)):
            if pair[0] != pair[1]:
                return place
    return None


def body(record: RequestRecord, model: str | None) -> dict[str, Any]:
    """Return what is to be sent.

    Raises:
        InvalidRequest: it is not known, or it was not asked for a text.
    """
    if record.operation not in _PATHS:
        raise InvalidRequest(f"{record.id} is of {record.operation}; only texts are replayed.")
    if record.content is None or record.content.asked is None:
        raise InvalidRequest(
            f"No content of {record.id} was kept. The service keeps it where"
            " telemetry.trace_content is true, from then on.",
            param="telemetry.trace_content",
        )
    chat = record.operation == "chat"
    given = {**record.parameters, **record.parameters.get("sampling", {})}
    sent = {name: value for name, value in given.items() if name in _SAME and value is not None}
    sent |= {"messages" if chat else "prompt": record.content.asked}
    if (schema := given.get("json_schema")) is not None:
        form = {"name": "answer", "schema": schema}
        sent["response_format"] = {"type": "json_schema", "json_schema": form}
    if options := given.get("template_options"):
        sent["chat_template_kwargs"] = options
    if (most := given.get("logprobs")) is not None:
        sent |= {"logprobs": True, "top_logprobs": most} if chat else {"logprobs": most}
    if name := model or record.model:
        sent["model"] = name
    return sent | {"stream": True}


async def replay(
    url: str, record: RequestRecord, sent: dict[str, Any], write: Callable[[str], None] | None
) -> Replayed:
    """Ask the service at a URL, and write the text of the answer as it comes, where one reads it.

    Raises:
        HeadraceError: it refuses, fails, or is not there.
    """
    answer = _Answer(write)
    client = _Asker(url)
    async with client:
        await client.ask(_PATHS[record.operation], sent, answer.take)
    return answer.end(record, sent.get("model", ""))


def _refusal(status: int, content: bytes) -> HeadraceError:
    try:
        problem = msgspec.json.decode(content, type=_Chunk).error
    except msgspec.DecodeError:
        problem = None
    said = problem.message if problem else f"The service answered with status {status}."
    if status in (401, 403):
        said += " Set HEADRACE_API_KEY."
    return RequestError(said) if status < 500 else UpstreamError(said)
