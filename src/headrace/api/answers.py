"""What the two generating routes do alike: stream or not, the head, and the figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from headrace.api.exchange import Exchange, Service
from headrace.api.frames import Form, Frames
from headrace.api.sse import send_stream
from headrace.api.timing import server_timing
from headrace.api.wire_common import GenerateFields, usage_body
from headrace.core.events import Choice
from headrace.core.stream import Stream, collect


class Reply(NamedTuple):
    """How a route answers; `write` makes the whole answer of a head and the choices."""

    prefix: str
    form: Form
    choices: int
    write: Callable[[dict[str, Any], tuple[Choice, ...]], msgspec.Struct]


async def answer(
    service: Service, exchange: Exchange, wire: GenerateFields, stream: Stream, reply: Reply
) -> None:
    """Send a stream, or what it comes to.

    Raises:
        HeadraceError, ClientGone: nothing has been sent.
    """
    head = _head(service, exchange, reply.prefix, wire.model)
    if wire.stream:
        frames = Frames(head, reply.form, reply.choices, usage=wire.wants_usage)
        await exchange.unless_gone(send_stream(exchange, stream, frames))
        return
    result = await exchange.unless_gone(collect(stream))
    head |= {"usage": usage_body(result.usage), "metrics": result.metrics}
    body = msgspec.json.encode(reply.write(head, result.choices))
    await exchange.reply(body, headers=server_timing(result.metrics))


def _head(service: Service, exchange: Exchange, prefix: str, model: str | None) -> dict[str, Any]:
    return {
        "id": prefix + exchange.call.id,
        "created": int(time.time()),
        "model": model_name(service, model),
        "system_fingerprint": exchange.settings.system_fingerprint,
    }


def model_name(service: Service, asked: str | None) -> str:
    """Return the name that an answer gives: what was asked for, or the only model's."""
    served = service.backend.models() if not asked else ()
    return asked or (served[0].id if len(served) == 1 else "")
