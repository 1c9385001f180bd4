"""The messages between a front and the process with the models, in frames of `worker.wire`.

A front sends Ask and Cancel as the parent of a worker does, and gets Emitted and Ended. A request
that it does not answer itself is passed on: Pass, then one Part for each Want; and a Head or Chunk
of the answer is followed by a Taken before the next is sent.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from headrace.api.limits import ApiSettings
from headrace.api.problems import Headers
from headrace.core.errors import ErrorRecord
from headrace.core.model import ModelInfo
from headrace.core.record import Call
from headrace.log import LogSettings
from headrace.worker.wire import Ask, Cancel, Emitted, Ended, Message

Place = tuple[str, int]
Action = Literal["describe", "unload"]


class Begin(Message, frozen=True, tag="begin"):
    """To a front, first: how it logs, and with how many others it shares what is bounded."""

    log: LogSettings
    settings: ApiSettings
    max_idle: int
    fronts: int


class Configured(Message, frozen=True, tag="settings"):
    """To a front: the settings for later requests."""

    settings: ApiSettings


class Served(Message, frozen=True, tag="served"):
    """To a front: the models that have changed, and the names of all of them in order."""

    changed: tuple[ModelInfo, ...]
    names: tuple[str, ...]


class Stop(Message, frozen=True, tag="stop"):
    """To a front: accept nothing more, close each connection after its answer, and end."""


class Done(Message, frozen=True, tag="done"):
    """To a front: the order `id` is carried out, or why not."""

    id: int
    error: ErrorRecord | None = None


class Want(Message, frozen=True, tag="want"):
    """To a front: send the next part of the body."""

    id: int


class Head(Message, frozen=True, tag="head"):
    """To a front: the beginning of an answer."""

    id: int
    status: int
    headers: Headers


class Chunk(Message, frozen=True, tag="chunk"):
    """To a front: a part of an answer; without `more` it is the last."""

    id: int
    body: bytes
    more: bool


class Over(Message, frozen=True, tag="over"):
    """To a front: nothing more is sent for the request `id`."""

    id: int


class Order(Message, frozen=True, tag="order"):
    """From a front: do this with a model."""

    id: int
    action: Action
    model: str


class Pass(Message, frozen=True, tag="pass"):
    """From a front: a request that it does not answer; the fields are those of ASGI's scope."""

    id: int
    method: str
    path: str
    raw_path: bytes
    query_string: bytes
    http_version: str
    headers: Headers
    client: Place | None
    server: Place | None


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """Why the rest of a body is not read."""

    status: int
    message: str
    code: str
    headers: Headers = ()


class Part(Message, frozen=True, tag="part"):
    """From a front: a part of the body; `gone` is whether the client has left."""

    id: int
    body: bytes = b""
    more: bool = False
    gone: bool = False
    refusal: Refusal | None = None


class Taken(Message, frozen=True, tag="taken"):
    """From a front: the client has room for the next part of the answer."""

    id: int


class Left(Message, frozen=True, tag="left"):
    """From a front: so many connections have ended."""

    count: int


class Called(Message, frozen=True, tag="called"):
    """From a front: an HTTP request has ended."""

    call: Call


class Beat(Message, frozen=True, tag="beat"):
    """From a front, every second: its event loop runs, and was late by so many seconds."""

    lags: tuple[float, ...] = ()


ToFront = Begin | Configured | Served | Stop | Emitted | Ended | Done | Want | Head | Chunk | Over
FromFront = Ask | Cancel | Order | Pass | Part | Taken | Left | Called | Beat

TO_FRONT = msgspec.msgpack.Decoder(list[ToFront])
FROM_FRONT = msgspec.msgpack.Decoder(list[FromFront])
