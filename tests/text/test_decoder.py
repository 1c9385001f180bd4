from __future__ import annotations

import codecs
import itertools

from hypothesis import given
from hypothesis import strategies as st

from headrace.text.pipeline import Utf8Decoder

# Weighted towards bytes that begin, continue and break characters.
ANY_BYTES = st.lists(
    st.sampled_from(b"aZ\n\x80\xa0\xbf\xc0\xc3\xe0\xed\xe2\xef\xf0\xf4\xf5\xff")
    | st.integers(0, 255),
    max_size=24,
).map(bytes)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def decoded(chunks: list[bytes]) -> str:
    decoder = Utf8Decoder()
    return "".join(decoder.feed(chunk) for chunk in chunks) + decoder.flush()


@given(st.text(max_size=30), st.lists(st.integers(0, 200), max_size=8))
def test_any_split_of_text_gives_the_text(text: str, cuts: list[int]) -> None:
    """W13: the concatenation of deltas equals the text, however it is cut."""
    assert decoded(pieces(text.encode(), cuts)) == text


@given(ANY_BYTES, st.lists(st.integers(0, 200), max_size=8))
def test_any_split_of_bytes_gives_the_same_text(data: bytes, cuts: list[int]) -> None:
    """W13: bytes that are no UTF-8 read the same in pieces as at once."""
    whole = codecs.utf_8_decode(data, "replace", False)[0]
    assert decoded(pieces(data, cuts)) == whole


@given(st.text(alphabet="aé水🌍", min_size=1, max_size=12))
def test_only_whole_characters_come_out(text: str) -> None:
    """W13: fed byte by byte, no piece holds half a character or U+FFFD."""
    decoder = Utf8Decoder()
    so_far = ""
    for byte in text.encode():
        so_far += decoder.feed(bytes([byte]))
        assert text.startswith(so_far)
    assert so_far == text


def test_a_character_cut_off_at_the_end_is_dropped() -> None:
    """W13: a token limit inside a character leaves no U+FFFD."""
    decoder = Utf8Decoder()
    assert decoder.feed("a🌍".encode()[:-1]) == "a"
    assert decoder.flush() == ""
    assert decoder.feed(b"b") == "b"


def test_what_can_never_be_utf8_is_marked() -> None:
    """W13: U+FFFD stands for bytes that are wrong, and for nothing else."""
    assert decoded([b"a\xff", b"\xe2\x82", b"b"]) == "a\ufffd\ufffdb"
