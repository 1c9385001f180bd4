"""An engine without a model: repeats the prompt at a scripted speed, and fails on demand.

Of a conversation it repeats the last message; one that is written as a call of a tool becomes one.

Its tokens are the bytes of UTF-8, so every character beyond ASCII comes in pieces. As an embedder
it gives vectors that depend on the tokens only, as a reranker the share of the query's bytes
that a document has.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import signal
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from headrace.core.audio import is_sound, read_sound
from headrace.core.constraint import FORMS
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed, OutOfMemory
from headrace.core.events import PromptToken, TokenLogprob, TopLogprob, bytes_of
from headrace.core.media import image_header
from headrace.core.model import Capabilities
from headrace.core.status import Footprint
from headrace.engines import base, pictures
from headrace.engines.base import (
    About,
    Admitted,
    EngineFacts,
    EngineRequest,
    OpenRequest,
    Pair,
    RawDelta,
    RawDraft,
    RawEvent,
    RawFinish,
)
from headrace.engines.kept import kept
from headrace.engines.speculation import SpeculationOptions, Way

ABOUT = About(
    formats=("none",),
    tasks=("generate", "embed", "rerank"),
    able=frozenset(
        {"forms", "json_schema", "logprobs", "prompt_logprobs", "resume", "vision", "audio"}
    )
    | {"speculation"},
    confined=True,
)

Fault = Literal["raise", "oom", "exit", "crash", "hang"]
_SAMPLING = frozenset(
    {"max_tokens", "temperature", "seed", "stop_token_ids", "ignore_eos", "logprobs"}
)
_EOS = 256
_VOCABULARY = 257
_SYSTEM_END = 0x1E
_CHAT_TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}\x1e{% endif %}"
    "{{ messages[-1].content }}"
)
_PREFILL_STEP = 64
_IMAGE, _PER_IMAGE = "<image>", 100
_CONTEXT = 1 << 20
_PROCESS = 80 << 20  # and the process that renders chat templates


class Options(SpeculationOptions):
    """Options of the script. `*_after` count tokens of one request; -1 is never.

    All tokens of its drafts are accepted, but those after the end.
    """

    ways: ClassVar[tuple[Way, ...]] = ("off", "auto", "ngram")
    of_ngrams: ClassVar[int] = 8

    tokens_per_second: float = Field(0, ge=0, description="Speed of decoding; 0 is unlimited.")
    in_step: bool = Field(
        False, description="All streams write at the same moments, as with a batching engine."
    )
    prefill_tokens_per_second: float = Field(0, ge=0, description="Speed of prefill; 0: unlimited.")
    slots: int = Field(1024, ge=1, le=65536, description="Requests that run at the same time.")
    text: str | None = Field(
        None, description="Text of the answer; by default the prompt is repeated."
    )
    load_s: float = Field(0, ge=0, description="Seconds that loading takes.")
    memory: int = Field(0, ge=0, description="Additional bytes to hold while it is loaded.")
    tokens_per_delta: int = Field(1, ge=1, description="Tokens in each delta.")
    images: bool = Field(False, description="Take images, and repeat of each its size and digest.")
    audio: bool = Field(False, description="Take sounds, and repeat of each length and digest.")
    forms: bool = Field(
        False, description="Keep to forms of answers: write what they allow of the text."
    )
    dimensions: int = Field(8, ge=1, le=65536, description="Length of the vectors it embeds to.")
    fail_load: str | None = Field(None, description="Loading fails with this message.")
    fail_after: int = Field(-1, ge=-1, description="Raise after so many tokens.")
    hang_after: int = Field(-1, ge=-1, description="Hang after so many tokens.")
    crash_after: int = Field(-1, ge=-1, description="End the process after so many tokens.")
    crash_signal: int = Field(
        signal.SIGKILL, ge=0, le=64, description="Signal for `crash_after`; 0 exits."
    )
    oom_after: int = Field(-1, ge=-1, description="Run out of memory after so many tokens.")
    trigger: str | None = Field(
        None, description="A file: the first request that finds it removes it and fails."
    )
    fault: Fault = Field("raise", description="How the request fails that found the trigger.")


def footprint(request: OpenRequest) -> Footprint:
    """Return the memory of the process, and that of the option `memory`."""
    options = Options(**request.options)
    return Footprint(
        devices={"cpu": _PROCESS + options.memory},
        parts={"overhead": _PROCESS, "weights": options.memory},
        context_length=request.context_length or _CONTEXT,
        max_running=_slots(options, request),
    )


def writes(request: OpenRequest) -> Sequence[Path]:
    """Return the folder of the trigger, which is removed."""
    trigger = Options(**request.options).trigger
    return (Path(trigger).parent,) if trigger else ()


class Engine(base.Embedder):
    """A scripted model, which is served like the real ones."""

    def __init__(self, request: OpenRequest) -> None:
        self._options = options = Options(**request.options)
        time.sleep(options.load_s)
        if options.fail_load is not None:
            raise LoadFailed(options.fail_load)
        # Written to: the system assigns memory when it is first used.
        self._held = bytearray(b"\1") * options.memory
        self.facts = EngineFacts(
            device="cpu",
            context_length=request.context_length or _CONTEXT,
            max_running=_slots(options, request),
            chat_template=_CHAT_TEMPLATE,
            image_marker=_IMAGE if options.images or options.audio else "",
            capabilities=Capabilities(
                sampling=_SAMPLING,
                batch_invariant=True,
                resume=request.task == "generate",
                vision=options.images,
                audio=options.audio,
                json_schema=options.forms,
                forms=frozenset(FORMS if options.forms else ()),
                speculation=options.way if options.drafts else "",
                prompt_logprobs=request.task == "generate",
                tasks=frozenset({request.task}),
                dimensions=options.dimensions if request.task == "embed" else None,
            ),
        )

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RawEvent, None]:
        """Yield the script, one token (a byte) after another."""
        if any(not 0 <= token < _VOCABULARY for token in request.token_ids):
            raise InvalidRequest("The prompt has a token id that the model does not know.")
        await _decode(request.media)
        total = len(request.token_ids) + len(request.answered) + _PER_IMAGE * len(request.media)
        async for done in self._prefill(total):
            yield Admitted(done=done, total=total)
        started, sent, reason = time.monotonic(), 0, "length"
        script = itertools.islice(self._script(request), len(request.answered), None)
        drafted = self._options.most_drafted
        for chunk in _chunks(script, max(self._options.tokens_per_delta, 1 + drafted)):
            token_ids = chunk[: request.max_tokens - sent]
            await self._pace(started, sent)
            self._misbehave(sent)
            kept = _before_end(token_ids, request)
            sent += len(kept)
            if drafted:
                yield RawDraft(drafted, max(0, len(kept) - 1))
            yield _delta(kept, with_logprobs=request.sampling.logprobs is not None)
            if len(kept) < len(token_ids) or (kept and kept[-1] == _EOS):
                reason = "stop"
                break
            if sent >= request.max_tokens:
                break
        else:
            # `answered` was all of it.
            reason = "stop"
        yield RawFinish(reason=reason, prompt_tokens=total, completion_tokens=sent)

    async def prompt_tokens(
        self, token_ids: Sequence[int], candidates: int, adapter: str = ""
    ) -> AsyncGenerator[Sequence[PromptToken], None]:
        """Yield all tokens of a prompt; each is certain."""
        del adapter
        if any(not 0 <= token < _VOCABULARY for token in token_ids):
            raise InvalidRequest("The prompt has a token id that the model does not know.")
        yield [_scored(token, place, candidates) for place, token in enumerate(token_ids)]

    def embed(self, batch: Sequence[Sequence[int]]) -> Sequence[bytes]:
        """Return vectors made of a hash of the tokens."""
        self._read(batch)
        return [_vector(token_ids, self._options.dimensions) for token_ids in batch]

    def pair(self, query: str, document: str) -> Pair:
        """Return both with an end token behind the query."""
        first = (*query.encode(), _EOS)
        return Pair((*first, *document.encode()), len(first))

    def score(self, batch: Sequence[Pair]) -> Sequence[float]:
        """Return the share of the query's bytes that the document has."""
        self._read([pair.token_ids for pair in batch])
        parts = [({*p.token_ids[: p.second]} - {_EOS}, p.token_ids[p.second :]) for p in batch]
        return [len(query.intersection(document)) / len(query) for query, document in parts]

    def tokenize(self, text: str, *, add_special: bool) -> Sequence[int]:
        """Return the bytes of the text."""
        del add_special
        return list(text.encode())

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of the bytes."""
        if any(not 0 <= token < _VOCABULARY for token in token_ids):
            raise InvalidRequest("A token id is outside of the vocabulary.", param="tokens")
        return _bytes(token_ids).decode(errors="replace")

    def shown(self, token_ids: Sequence[int], visible: frozenset[int] = frozenset()) -> str:
        """Return the text of the bytes; all of them are shown."""
        del visible
        return self.detokenize(token_ids)

    def close(self) -> None:
        """Release the memory."""
        self._held = bytearray()

    def _script(self, request: EngineRequest) -> Iterator[int]:
        text = self._options.text
        prompt = _with_media(request) if request.media else request.token_ids
        token_ids = _spoken(prompt) if text is None else tuple(text.encode())
        if self._options.forms and request.constraint is not None:
            yield from kept(token_ids, request.constraint)
            token_ids = ()
        while token_ids:
            yield from token_ids
            if not request.sampling.ignore_eos:
                break
        yield _EOS

    async def _prefill(self, total: int) -> AsyncGenerator[int, None]:
        yield 0
        speed = self._options.prefill_tokens_per_second
        for done in range(_PREFILL_STEP, total, _PREFILL_STEP) if speed else ():
            await asyncio.sleep(_PREFILL_STEP / speed)
            yield done
        if speed and total:
            await asyncio.sleep(((total - 1) % _PREFILL_STEP + 1) / speed)

    def _read(self, batch: Sequence[Sequence[int]]) -> None:
        if any(not 0 <= token < _VOCABULARY for ids in batch for token in ids):
            raise InvalidRequest("An input has a token id that the model does not know.")
        if speed := self._options.prefill_tokens_per_second:
            time.sleep(len(batch) * max(map(len, batch)) / speed)
        self._misbehave(0)

    async def _pace(self, started: float, sent: int) -> None:
        speed = self._options.tokens_per_second
        if speed and self._options.in_step:
            started = int(started * speed) / speed
        due = started + (sent + 1) / speed if speed else 0.0
        await asyncio.sleep(max(0.0, due - time.monotonic()) if speed else 0)

    def _misbehave(self, sent: int) -> None:
        options = self._options
        if 0 <= options.fail_after <= sent:
            raise GenerationFailed("The echo engine fails as configured.")
        if 0 <= options.oom_after <= sent:
            raise OutOfMemory("The echo engine runs out of memory as configured.")
        if 0 <= options.crash_after <= sent:
            _crash(options.crash_signal)
        if 0 <= options.hang_after <= sent:
            _hang()
        if options.trigger is not None and taken(options.trigger):
            misbehave(options.fault, options.crash_signal)


def _slots(options: Options, request: OpenRequest) -> int:
    return min(options.slots, request.max_running or options.slots)


def taken(trigger: str) -> bool:
    """Remove a file; return whether this call did."""
    try:
        os.unlink(trigger)  # noqa: PTH108  # called for each token
    except FileNotFoundError:
        return False
    return True


def misbehave(fault: Fault, crash_signal: int) -> None:
    """Fail like a real engine."""
    if fault == "oom":
        bytearray(1 << 60)
    elif fault == "exit":
        _crash(0)
    elif fault == "crash":
        _crash(crash_signal)
    elif fault == "hang":
        _hang()
    raise RuntimeError("The engine fails as configured.")


def _crash(number: int) -> None:
    if number == 0:
        os._exit(0)
    os.kill(os.getpid(), number)


def _hang() -> None:
    # Blocks the event loop as well: a native library that hangs while it holds the GIL does that.
    while True:
        time.sleep(3600)


def _chunks(tokens: Iterator[int], size: int) -> Iterator[tuple[int, ...]]:
    while chunk := tuple(itertools.islice(tokens, size)):
        yield chunk


async def _decode(media: Sequence[bytes]) -> None:
    # As engines of real models do; without Pillow, the headers are enough.
    for data in media if pictures.is_installed() else ():
        if not is_sound(data):
            await asyncio.to_thread(pictures.decoded, data)


def _with_media(request: EngineRequest) -> tuple[int, ...]:
    text = request.text
    for data in request.media:
        digest = hashlib.sha256(data).hexdigest()
        text = text.replace(_IMAGE, f"[{_described(data)} {digest}]", 1)
    return tuple(text.encode())


def _described(data: bytes) -> str:
    if is_sound(data):
        sound = read_sound(data)
        return f"{sound.format} {sound.seconds:g}s"
    kind, width, height = image_header(data)
    return f"{kind} {width}x{height}"


def _spoken(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """Return what is repeated of a prompt: without a system message."""
    if _SYSTEM_END not in prompt:
        return prompt
    return prompt[len(prompt) - prompt[::-1].index(_SYSTEM_END) :]


def _before_end(token_ids: tuple[int, ...], request: EngineRequest) -> tuple[int, ...]:
    ends = request.sampling.stop_token_ids
    for index, token in enumerate(token_ids):
        if token in ends:
            return token_ids[:index]
    return token_ids


def _vector(token_ids: Sequence[int], dimensions: int) -> bytes:
    seed = b"".join(token.to_bytes(4, "little") for token in token_ids)
    values = hashlib.shake_128(seed).digest(dimensions)
    return bytes_of(value / 127.5 - 1 for value in values)


def _bytes(token_ids: Sequence[int]) -> bytes:
    return bytes(token for token in token_ids if token < _EOS)


def _scored(token: int, place: int, candidates: int) -> PromptToken:
    data = _bytes((token,))
    if not place:
        return PromptToken(token, data)
    return PromptToken(token, data, 0.0, (TopLogprob(token, data, 0.0),)[:candidates], 1)


def _delta(token_ids: tuple[int, ...], *, with_logprobs: bool) -> RawDelta:
    logprobs: tuple[TokenLogprob, ...] = ()
    if with_logprobs:
        logprobs = tuple(TokenLogprob(token, _bytes((token,)), 0.0) for token in token_ids)
    return RawDelta(_bytes(token_ids), token_ids, logprobs)
