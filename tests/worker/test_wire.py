from __future__ import annotations

import asyncio
import itertools
import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.pictures_made import asked, png
from tests.worker.rig import ask, echo, resolve

from headrace.core.constraint import Constraint
from headrace.core.errors import ErrorRecord
from headrace.core.events import (
    Delta,
    Finish,
    Progress,
    Ranked,
    Ranking,
    Text,
    TokenCount,
    TokenLogprob,
    TopLogprob,
    Vectors,
)
from headrace.core.metrics import DeviceUse, Gaps, InferenceMetrics, Usage
from headrace.core.model import Capabilities, ModelInfo
from headrace.core.request import (
    CountRequest,
    DetokenizeRequest,
    EmbedRequest,
    Message,
    RerankRequest,
)
from headrace.log import LogSettings
from headrace.worker import wire
from headrace.worker.wire import Link, ToChild, ToParent

METRICS = InferenceMetrics(
    started_at=1.5,
    queue_ms=0.0,
    inter_token_ms=Gaps(p50=1, p99=2, max=3),
    devices=(DeviceUse(name="cpu", total=1, used=1, worker_used=1, worker_mean=1, worker_peak=1),),
)
SPEC = resolve(echo(stop=("a",), context_length=4), lambda *_: None)
LOGPROB = TokenLogprob(1, b"\xff", -0.1, (TopLogprob(2, b"", -9.0),))
ERROR = ErrorRecord(kind="QueueFull", message="m", retry_after_s=1.0, metrics=METRICS)
DOWN: list[Any] = [
    wire.Load(SPEC, LogSettings(level="info", style="json")),
    wire.Ask(1, ask((1, 2), logit_bias={1: 2.0}, stop=("x",), n=2)),
    wire.Ask(
        2,
        ask(
            None,
            messages=(Message("user", "é"),),
            constraint=Constraint(json_schema={"a": [1, None]}),
        ),
    ),
    wire.Ask(5, EmbedRequest(inputs=("a", (1, 2)), dimensions=3, truncate=True)),
    wire.Ask(6, RerankRequest(query="a", documents=("b", "c"), top_n=1)),
    wire.Cancel(1),
    wire.Adapt(7, SPEC),
    wire.Ask(3, CountRequest(text="a")),
    wire.Ask(4, DetokenizeRequest(token_ids=(1,))),
    wire.Close(1.5),
]
INFO = ModelInfo(
    id="m", source="s", engine="e", capabilities=Capabilities(sampling=frozenset({"a", "b"}))
)
UP: list[Any] = [
    wire.Loaded(INFO),
    wire.Loaded(None, ERROR),
    wire.Emitted(1, Delta("é", (1, 2), 1, "r", (LOGPROB,))),
    wire.Emitted(1, Progress("prefill", 1, 2)),
    wire.Emitted(1, Finish(("stop", "length"), Usage(prompt_tokens=1), METRICS)),
    wire.Emitted(5, Vectors((b"\xff\0",))),
    wire.Emitted(6, Ranking((Ranked(1, 0.5),))),
    wire.Emitted(3, TokenCount(count=2, token_ids=(1, 2))),
    wire.Emitted(4, Text("x")),
    wire.Ended(1),
    wire.Ended(2, ERROR),
    wire.Alive({"cpu": 1 << 40, "cuda:0": 1}),
]


def frame(messages: Sequence[Any]) -> bytes:
    payload = msgspec.msgpack.encode(messages)
    return struct.pack(">I", len(payload)) + payload


class Taken:
    """One end that keeps what came, in batches, and why the line was cut."""

    def __init__(self, kind: Any = ToParent) -> None:
        self.batches: list[list[Any]] = []
        self.cut: list[str] = []
        decoder = msgspec.msgpack.Decoder(list[kind])
        self.link: Link[Any] = Link(
            decoder, lambda batch: self.batches.append(list(batch)), self.cut.append
        )

    @property
    def messages(self) -> list[Any]:
        return list(itertools.chain.from_iterable(self.batches))


@pytest.mark.parametrize(("kind", "messages"), [(ToChild, DOWN), (ToParent, UP)])
def test_every_message_arrives_as_it_was_sent(kind: Any, messages: list[Any]) -> None:
    taken = Taken(kind)
    taken.link.data_received(frame(messages))
    assert taken.batches == [messages]
    kinds = {type(message) for message in messages}
    assert kinds == set(kind.__args__), "a message without an example"


@given(st.lists(st.integers(0, 3000)), st.lists(st.integers(1, 4), min_size=1, max_size=4))
@settings(max_examples=50)
def test_frames_split_and_joined_anywhere(cuts: list[int], sizes: list[int]) -> None:
    batches = [UP[size : size + 3] for size in sizes]
    data = b"".join(frame(batch) for batch in batches)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    taken = Taken()
    for start, end in itertools.pairwise(edges):
        taken.link.data_received(data[start:end])
    assert taken.batches == batches


def test_a_byte_at_a_time() -> None:
    taken = Taken()
    for byte in frame(UP):
        taken.link.data_received(bytes([byte]))
    assert taken.batches == [UP]


class Transport(asyncio.Transport):
    aborted = False

    def abort(self) -> None:
        self.aborted = True


@pytest.mark.parametrize(
    "data",
    [
        struct.pack(">I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack(">I", wire.MAX_FRAME + 1),
        b"\xff" * 64,
        frame([["unknown", 1]]),
        frame([["e", "one", []]]),
        frame([7]),
        struct.pack(">I", 0),
    ],
)
def test_garbage_cuts_the_line_and_says_why(data: bytes) -> None:
    """W17: a frame that is not valid is never guessed at."""
    taken, transport = Taken(), Transport()
    taken.link.connection_made(transport)
    taken.link.data_received(frame([wire.Ended(1)]) + data)
    assert transport.aborted
    assert taken.messages == [wire.Ended(1)]
    taken.link.connection_lost(None)
    assert "not valid" in taken.cut[0]


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    """W17: whatever comes is a message, an unfinished frame, or a cut line."""
    taken = Taken()
    taken.link.connection_made(Transport())
    taken.link.data_received(struct.pack(">I", len(data)) + data)


async def test_large_messages_leave_in_frames_of_their_own() -> None:
    """Issue 13, pictures: many requests with images at once are no frame beyond its limit."""
    sent: list[bytes] = []
    taken, transport = Taken(), Transport()
    transport.write = sent.append  # type: ignore[method-assign]
    taken.link.connection_made(transport)
    large = wire.Ask(1, asked("a", png() + bytes(2 << 20)))
    for message in (wire.Cancel(1), large, large, wire.Cancel(2)):
        taken.link.send(message)
    await asyncio.sleep(0)
    assert [len(frame) > 1 << 20 for frame in sent] == [True, True, False]
    frames = [msgspec.msgpack.decode(frame[4:], type=list[Any]) for frame in sent]
    assert [len(messages) for messages in frames] == [2, 1, 1]
    assert png() + bytes(2 << 20) in frames[1][0][2]["media"].values()


async def test_what_is_passed_on_leaves_with_the_read_that_brought_it() -> None:
    """Issue 15: at once, and all frames of a read in one."""
    sent: list[bytes] = []
    passed, transport = Taken(), Transport()
    transport.write = sent.append  # type: ignore[method-assign]
    passed.link.connection_made(transport)

    def pass_on(messages: Sequence[Any]) -> None:
        for message in messages:
            passed.link.send(message)

    source: Link[Any] = Link(msgspec.msgpack.Decoder(list[ToParent]), pass_on, lambda _: None)
    ended = [wire.Ended(number) for number in range(3)]
    source.data_received(frame(ended[:2]) + frame(ended[2:]))
    (whole,) = sent
    assert msgspec.msgpack.decode(whole[4:], type=list[ToParent]) == ended
    # What is sent between two reads still waits for the end of the loop's iteration.
    passed.link.send(wire.Ended(4))
    passed.link.send(wire.Ended(5))
    assert len(sent) == 1
    await asyncio.sleep(0)
    assert len(sent) == 2


async def test_what_is_said_in_one_turn_leaves_in_one_frame() -> None:
    ours, theirs = socket.socketpair()
    one, other = Taken(), Taken()
    loop = asyncio.get_running_loop()
    await loop.create_connection(lambda: one.link, sock=ours)
    await loop.create_connection(lambda: other.link, sock=theirs)
    for message in UP:
        one.link.send(message)
    await asyncio.sleep(0.01)
    one.link.send(wire.Ended(9))
    one.link.close()
    await asyncio.sleep(0.01)
    assert other.batches == [UP, [wire.Ended(9)]]
    assert other.cut == ["the socket was closed"]
    one.link.send(wire.Ended(10))
    await asyncio.sleep(0)
