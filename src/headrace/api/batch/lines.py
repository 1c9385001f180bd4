"""The lines of a batch and of its answers, in OpenAI's form."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

ENDPOINTS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/responses",
    "/v1/rerank",
    "/v1/score",
)
MAX_CUSTOM_ID = 512
MAX_LINE = 33 << 20
"""Bytes of a line: a body with images is the longest."""

MAX_FAULTS = 100
"""Faults of a file that are reported."""

FIRST_BYTES = b'{"id":"batch_req_'
"""What every line of answers begins with."""

_AHEAD = 64
_AHEAD_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Fault(msgspec.Struct, frozen=True):
    """OpenAI's error of a batch: why a line, or the batch, cannot be run."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Faulty(Exception):
    """A line that cannot be run."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.message)
        self.fault = fault


class Item(NamedTuple):
    """A request of a batch. `number` is that of its line, from 1."""

    number: int
    custom_id: str
    url: str
    body: bytes
    model: str


def key_of(custom_id: str) -> bytes:
    """Return what stands for a custom id in a set, as ids may be long."""
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()


class Response(msgspec.Struct, frozen=True):
    """The answer of a route."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class LineError(msgspec.Struct, frozen=True):
    """Why a request has no answer."""

    code: str
    message: str


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A line of answers: it has a response, or an error."""

    id: str = msgspec.field(default_factory=lambda: f"batch_req_{secrets.token_hex(12)}")
    custom_id: str
    response: Response | None = None
    error: LineError | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it belongs into the file of errors."""
        return self.response is None or self.response.status_code >= 400

    def usage(self) -> Usage:
        """Return the tokens that it took."""
        if self.response is None:
            return Usage()
        try:
            return _with_usage.decode(self.response.body).usage or Usage()
        except msgspec.MsgspecError:
            return Usage()


class Details(msgspec.Struct, frozen=True):
    """Parts of the tokens."""

    cached_tokens: int = 0
    reasoning_tokens: int = 0


class Usage(msgspec.Struct, frozen=True):
    """`usage` of an answer: /v1/responses has other names for it than the other routes."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    prompt_tokens_details: Details | None = None
    completion_tokens_details: Details | None = None
    input_tokens_details: Details | None = None
    output_tokens_details: Details | None = None


class _WithUsage(msgspec.Struct, frozen=True):
    usage: Usage | None = None


class Tally:
    """What has been answered, and its tokens; `read` are those of prompts."""

    def __init__(self) -> None:
        self.completed = self.failed = 0
        self.read = self.cached = self.written = self.thought = 0

    def add(self, answer: Answer) -> None:
        """Count an answer."""
        if answer.has_failed:
            self.failed += 1
            return
        usage = answer.usage()
        self.completed += 1
        self.read += usage.prompt_tokens + usage.input_tokens
        self.written += usage.completion_tokens + usage.output_tokens
        details = usage.prompt_tokens_details or usage.input_tokens_details or Details()
        self.cached += details.cached_tokens
        details = usage.completion_tokens_details or usage.output_tokens_details or Details()
        self.thought += details.reasoning_tokens


class _Wire(msgspec.Struct, frozen=True):
    custom_id: Any = None
    method: Any = None
    url: Any = None
    body: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct, frozen=True):
    model: Any = None
    stream: Any = None


_wire = msgspec.json.Decoder(_Wire)
_body = msgspec.json.Decoder(_Body)
_with_usage = msgspec.json.Decoder(_WithUsage)
_answer = msgspec.json.Decoder(Answer)


def parse(number: int, data: bytes, endpoint: str | None = None) -> Item:
    """Return the request of a line.

    Raises:
        Faulty: it is not in OpenAI's form, or not for this endpoint.
    """

    def check(right: object, code: str, message: str, param: str | None = None) -> None:
        if not right:
            raise Faulty(Fault(code, message, number, param))

    try:
        wire = _wire.decode(data)
        body = _body.decode(wire.body) if wire.body else None
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        message = f"The line, or its body, is not an object of JSON: {error}."
        raise Faulty(Fault("invalid_json_line", message, number)) from None
    id, url = wire.custom_id, wire.url
    right = isinstance(id, str) and 0 < len(id) <= MAX_CUSTOM_ID
    message = f"custom_id must be a text of 1 to {MAX_CUSTOM_ID} characters."
    check(right, "invalid_custom_id", message, "custom_id")
    check(wire.method == "POST", "invalid_method", 'method must be "POST".', "method")
    if endpoint is None:
        check(url in ENDPOINTS, "invalid_url", f"url must be one of {', '.join(ENDPOINTS)}.", "url")
    else:
        message = f"url must be the batch's endpoint, {endpoint}."
        check(url == endpoint, "mismatched_endpoint", message, "url")
    check(body is not None, "missing_required_parameter", "body is missing.", "body")
    assert body is not None
    message = "stream: an answer of a batch is not streamed."
    check(body.stream in (None, False), "unsupported_parameter", message, "body.stream")
    return Item(number, id, url, bytes(wire.body), str(body.model or ""))


Items = Iterator[Item]


def read(path: Path, faults: list[Fault] | None = None, endpoint: str | None = None) -> Items:
    """Yield the requests of a file; empty lines are none.

    Faults of lines, and custom ids that occur twice, are appended to `faults`, the first ones only.

    Raises:
        Faulty: there is a fault, and no list for it.
        OSError: it cannot be read.
    """
    ids = set[bytes]()
    for number, data in _lines(path):
        try:
            if len(data) > MAX_LINE:
                fault = Fault("line_too_long", f"The line has more than {MAX_LINE} bytes.", number)
                raise Faulty(fault)
            item = parse(number, data, endpoint)
            if (key := key_of(item.custom_id)) in ids:
                message = f"custom_id {item.custom_id!r} occurs twice."
                raise Faulty(Fault("duplicate_custom_id", message, number, "custom_id"))
        except Faulty as error:
            if faults is None:
                raise
            faults.append(error.fault)
            if len(faults) >= MAX_FAULTS:
                return
            continue
        ids.add(key)
        yield item


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number in itertools.count(1):
            data = file.readline(MAX_LINE + 1)
            if not data:
                return
            if number == 1:
                data = data.removeprefix(_BYTE_ORDER_MARK)
            if data.strip():
                yield number, data
            while len(data) > MAX_LINE and not data.endswith(b"\n"):
                data = file.readline(MAX_LINE + 1)


async def ahead(items: Iterable[Item]) -> AsyncGenerator[Item]:
    """Yield items that are read in a thread, some at a time."""
    iterator = iter(items)
    while chunk := await asyncio.to_thread(_some, iterator):
        for item in chunk:
            yield item


def _some(items: Items) -> list[Item]:
    chunk, size = list[Item](), 0
    while size < _AHEAD_BYTES and len(chunk) < _AHEAD and (item := next(items, None)):
        chunk.append(item)
        size += len(item.body)
    return chunk


def encode(answer: Answer) -> bytes:
    """Return a line of answers."""
    return msgspec.json.encode(answer) + b"\n"


def decode(data: bytes) -> Answer | None:
    """Return the answer of a line; None if it has none."""
    try:
        return _answer.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None


def plain(body: bytes) -> msgspec.Raw:
    """Return the body of an answer as it is put into a line: JSON without line breaks."""
    if b"\n" not in body and b"\r" not in body and body[:1] == b"{":
        return msgspec.Raw(body)
    try:
        value: Any = msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        value = {"error": {"message": body[:1000].decode(errors="replace")}}
    return msgspec.Raw(msgspec.json.encode(value))
