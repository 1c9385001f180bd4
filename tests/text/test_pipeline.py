from __future__ import annotations

import codecs
import itertools
import time

from hypothesis import given
from hypothesis import strategies as st

from headrace.text.pipeline import TextPipeline

CUTS = st.lists(st.integers(0, 200), max_size=12)
STOPS = st.lists(st.text(alphabet="aé🌍\ufffd", min_size=1, max_size=3), max_size=3)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def shown(chunks: list[bytes], stops: list[str]) -> tuple[str, bool]:
    pipeline = TextPipeline(stops)
    text = "".join([pipeline.feed(chunk) for chunk in chunks]) + pipeline.flush()
    return text, pipeline.stopped


def naive(data: bytes, stops: list[str]) -> tuple[str, bool]:
    text = codecs.utf_8_decode(data, "replace", False)[0]
    cut = min((text.find(stop) for stop in stops if stop in text), default=-1)
    return (text, False) if cut < 0 else (text[:cut], True)


@given(st.text(alphabet="aé🌍 ", max_size=20), STOPS, CUTS)
def test_any_split_of_text(text: str, stops: list[str], cuts: list[int]) -> None:
    """W12, W13: streamed equals whole, with stop strings and without."""
    assert shown(pieces(text.encode(), cuts), stops) == naive(text.encode(), stops)


@given(st.binary(max_size=20), STOPS, CUTS)
def test_any_split_of_bytes(data: bytes, stops: list[str], cuts: list[int]) -> None:
    """W12, W13: so it is for bytes that are no text."""
    assert shown(pieces(data, cuts), stops) == naive(data, stops)


def test_a_stop_string_across_tokens_and_inside_a_character() -> None:
    """W12: a stop string is found though its character came in two tokens."""
    pipeline = TextPipeline(["🌍!"])
    earth = "🌍".encode()
    assert pipeline.feed(b"hello " + earth[:2]) == "hello "
    assert pipeline.feed(earth[2:]) == ""
    assert not pipeline.stopped
    assert pipeline.feed(b"! and more") == ""
    assert pipeline.stopped
    assert pipeline.matched == "🌍!"


def test_what_was_held_comes_at_the_end() -> None:
    """W12, W13: nothing is lost when the stop string was never completed."""
    pipeline = TextPipeline(["<|im_end|>"])
    assert pipeline.feed(b"x <|im") == "x "
    assert pipeline.flush() == "<|im"
    assert not pipeline.stopped


def test_is_cheap() -> None:
    """W13: a token costs microseconds, with stop strings too."""
    pipeline = TextPipeline(["<|im_end|>", "\n\nUser:"])
    began = time.process_time()
    for _ in range(20_000):
        pipeline.feed(b" token")
    assert (time.process_time() - began) / 20_000 < 20e-6
