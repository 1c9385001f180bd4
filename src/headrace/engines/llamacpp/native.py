"""Requests over the socket: of a server of its own, and of models with a projector.

In process the library takes only texts of such a model: neither token ids nor media.
"""

from __future__ import annotations

import asyncio
import base64
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from headrace.core.audio import is_sound, read_sound
from headrace.core.errors import HeadraceError, InvalidRequest
from headrace.core.media import image_header
from headrace.core.stream import Mailbox
from headrace.engines import pictures
from headrace.engines.base import EngineRequest
from headrace.engines.llamacpp.call import (
    CERTAIN,
    Call,
    Constrained,
    Progressed,
    Timings,
    Tokens,
    error_from,
    in_lark,
)
from headrace.engines.llamacpp.logprobs import Candidate, Token
from headrace.engines.threaded import finished

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from concurrent.futures import Executor

    from headrace.engines.base import RawEvent
    from headrace.engines.llamacpp.link import Link
    from headrace.engines.threaded import Inbox

_PATH = "/completion"
# The formats of its decoder.
_KNOWN = ("png", "jpeg", "gif")


class _Chunk(msgspec.Struct):
    content: str = ""
    tokens: tuple[int, ...] = ()
    tokens_predicted: int = 0
    tokens_evaluated: int = 0
    stop: bool = False
    stop_type: str = ""
    prompt_progress: Progressed | None = None
    timings: Timings | None = None
    completion_probabilities: tuple[Token, ...] = ()
    error: dict[str, Any] | None = None


_decode = msgspec.json.Decoder(_Chunk).decode


class NativeCall(Call):
    """A request by llama.cpp's own route, which takes token ids, pictures and sounds."""

    constrained: Constrained = staticmethod(in_lark)

    def __init__(
        self,
        request: EngineRequest,
        split: Callable[[str], tuple[int, ...]],
        visible: Sequence[str] = (),
        *,
        drafts: bool = False,
    ) -> None:
        self._kept: list[RawEvent] = []
        super().__init__(request, self._keep, split, visible, drafts=drafts)

    async def events(
        self, link: Link, inbox: Inbox, executor: Executor
    ) -> AsyncGenerator[RawEvent, None]:
        """Yield the events of the answer; when this is closed, the server has ended the request.

        `executor` runs what takes long: media, and further requests to the server.

        Raises:
            HeadraceError: the server refuses, or does not answer.
        """
        self._begin(link)
        mailbox: Mailbox[bytes | None] = Mailbox()
        run = partial(asyncio.get_running_loop().run_in_executor, executor)
        body = await run(self._body) if self._request.media else self._body()
        with inbox.opened():
            async with link.stream(_PATH, body, partial(inbox.take, mailbox.put)):
                while True:
                    kept, self._kept = self._kept, []
                    for event in kept:
                        yield event
                    if self._ended:
                        return
                    if (line := await mailbox.get()) is None:
                        raise await link.lost(_PATH, "the answer has no end")
                    chunk = _decode(line)
                    if self._asks(chunk):
                        await finished(run(self._take_chunk, chunk))
                    else:
                        self._take_chunk(chunk)

    def _keep(self, event: RawEvent) -> bool:
        self._kept.append(event)
        return False

    def _body(self) -> bytes:
        return _body(self._request, self._fields(self.constrained))

    def _asks(self, chunk: _Chunk) -> bool:
        """Whether the server has to be asked for tokens or candidates that it did not report."""
        known = len(chunk.tokens)
        if self._lookup is not None:
            known = sum(1 for token in chunk.completion_probabilities if token.top_logprobs)
        return chunk.tokens_predicted - self._predicted > known

    def _take_chunk(self, chunk: _Chunk) -> None:
        self._ended = self._take_event(chunk) or self._ended

    def _take_event(self, chunk: _Chunk) -> bool:
        if chunk.error is not None:
            raise _refusal(chunk.error)
        if chunk.prompt_progress is not None:
            return self._progress(chunk.prompt_progress)
        if chunk.timings is not None:
            self._draft(chunk.timings)
        if chunk.stop:
            reason = "length" if chunk.stop_type == "limit" else "stop"
            counts = (chunk.tokens_evaluated, chunk.tokens_predicted, self._cached)
            return self._finish(reason, counts)
        self._prompt = chunk.tokens_evaluated
        token_ids = self._token_ids(Tokens(chunk.tokens, chunk.tokens_predicted), chunk.content)
        data, tokens = chunk.content.encode(), chunk.completion_probabilities
        return self._take_tokens(data, token_ids, tokens)

    def _candidates(
        self, server: Link, text: Sequence[int], most: int, whole: int
    ) -> Sequence[Candidate]:
        body = {
            "prompt": text,
            "n_predict": 1,
            "temperature": 0,
            "n_probs": most,
            "logit_bias": [[whole, CERTAIN]],
            **self._adapted(),
        }
        answer = msgspec.convert(server.ask(_PATH, body), _Chunk)
        return answer.completion_probabilities[0].top_logprobs


def _refusal(error: dict[str, Any]) -> HeadraceError:
    if "image" in str(error.get("message", "")):
        return InvalidRequest("An image or a sound cannot be decoded.", param="messages")
    return error_from(error)


def _body(request: EngineRequest, body: dict[str, Any]) -> bytes:
    if "logprobs" in body:
        body["n_probs"] = body.pop("logprobs")
    if request.media:
        media = [base64.b64encode(_known(data)).decode() for data in request.media]
        body["prompt"] = {"prompt_string": request.text, "multimodal_data": media}
    return msgspec.json.encode(body)


def _known(data: bytes) -> bytes:
    """Return a picture in a format that the library decodes, upright; or a sound as it is."""
    if is_sound(data):
        return read_sound(data).plain(data)
    is_known = image_header(data)[0] in _KNOWN and not pictures.is_turned(data)
    return data if is_known else pictures.as_png(data)
