from __future__ import annotations

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.text.sse import LONGEST_EVENT, EventReader, EventTooLong


def read(data: bytes, *cuts: int) -> list[bytes]:
    reader, got = EventReader(), list[bytes]()
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, end in itertools.pairwise(places):
        if start != end:
            got += reader.feed(data[start:end])
    return got + list(reader.rest())


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (b"data: a\n\ndata: b\n\n", [b"a", b"b"]),
        (b"data: a\r\n\r\ndata: b\r\n\r\n", [b"a", b"b"]),
        (b"data: a\r\rdata: b\r\r", [b"a", b"b"]),
        (b"data:a\n\n", [b"a"]),
        (b"data:  a\n\n", [b" a"]),
        (b"data: {\ndata: }\n\n", [b"{\n}"]),
        (b": keep alive\n\ndata: a\n\n", [b"a"]),
        (b"event: x\nid: 1\nretry: 5\ndata: a\n\n", [b"a"]),
        (b"\xef\xbb\xbfdata: a\n\n", [b"a"]),
        (b"data: a\n\ndata: [DONE]", [b"a", b"[DONE]"]),
        (b"event: ping\n\n\n\n", []),
        (b"data:\n\ndata: \n\ndata: a\n\n", [b"a"]),
    ],
)
def test_events_are_found(sent: bytes, expected: list[bytes]) -> None:
    assert read(sent) == expected
    assert read(sent, *range(len(sent))) == expected


@given(
    st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=6),
    st.sampled_from([b"\n", b"\r\n", b"\r"]),
    st.lists(st.integers(0, 1 << 16), max_size=8),
)
def test_pieces_do_not_matter(texts: list[str], end: bytes, cuts: list[int]) -> None:
    """W13: wherever the stream is cut, inside a character too, the events are the same."""
    said = [json.dumps(text, ensure_ascii=False).encode() for text in texts]
    sent = b"".join(b": c" + end + b"data: " + one + end + end for one in said)
    assert read(sent, *cuts) == said


@pytest.mark.parametrize("piece", [b"data: " + b"x" * 65536, b"data: x\n" * 8192])
def test_an_endless_event_is_refused(piece: bytes) -> None:
    reader = EventReader()
    with pytest.raises(EventTooLong, match="too long"):
        for _ in range(LONGEST_EVENT // 10000):
            assert list(reader.feed(piece)) == []


def test_comments_without_an_end_are_endured() -> None:
    reader = EventReader()
    for _ in range(LONGEST_EVENT // 8192 * 2):
        assert list(reader.feed(b": keep\n" * 2048)) == []
    assert list(reader.feed(b"data: a\n\n")) == [b"a"]
