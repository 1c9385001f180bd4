from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from headrace.core.errors import InvalidRequest
from headrace.text.pipeline import StopMatcher

# Few letters, so that stop strings overlap each other and themselves.
TEXT = st.text(alphabet="ab", max_size=40)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=6), max_size=4)
CUTS = st.lists(st.integers(0, 200), max_size=12)


def pieces(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(cut % (len(text) + 1) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def naive(text: str, stops: list[str]) -> tuple[str, str | None]:
    found = [(text.find(stop), order) for order, stop in enumerate(stops) if stop in text]
    if not found:
        return text, None
    start, order = min(found)
    return text[:start], stops[order]


def longest_pending(text: str, stops: list[str]) -> int:
    return max(
        (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])),
        default=0,
    )


def matched(chunks: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    text = "".join([matcher.feed(chunk) for chunk in chunks]) + matcher.flush()
    return text, matcher.matched


@given(TEXT, STOPS, CUTS)
@example("aaab", ["aab"], [])
@example("ababaabababb", ["ababb"], [3])
@example("aabaaabaaac", ["aabaaac"], [5])
def test_equals_a_search_of_the_whole_text(text: str, stops: list[str], cuts: list[int]) -> None:
    """W12: the same text and the same stop string, however the text is cut."""
    assert matched(pieces(text, cuts), stops) == naive(text, stops)


@given(TEXT, STOPS, CUTS)
def test_never_leaks_a_stop_string(text: str, stops: list[str], cuts: list[int]) -> None:
    """W12: at no moment is any part of the stop string released."""
    shown, _ = naive(text, stops)
    matcher = StopMatcher(stops)
    released = ""
    for chunk in pieces(text, cuts):
        released += matcher.feed(chunk)
        assert shown.startswith(released)
    assert not any(stop in released for stop in stops)


@given(TEXT, STOPS)
def test_holds_back_no_more_than_it_must(text: str, stops: list[str]) -> None:
    """W12: held back is the longest end that may still become a stop string, nothing else."""
    matcher = StopMatcher(stops)
    released = ""
    for end, letter in enumerate(text, 1):
        released += matcher.feed(letter)
        if any(stop in text[:end] for stop in stops):
            break
        assert released == text[: end - longest_pending(text[:end], stops)]


def test_of_two_at_one_place_the_first_in_the_list_wins() -> None:
    """W12: the request's stop strings come before the template's."""
    assert matched(list("x<end>y"), ["<end>", "<"]) == ("x", "<end>")
    assert matched(list("x<end>y"), ["<", "<end>"]) == ("x", "<")


def test_a_match_waits_for_one_that_began_before_it() -> None:
    """W12: the match that begins first wins, though it ends later."""
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.feed("xabc") == "x"
    assert matcher.matched is None
    assert matcher.feed("d!") == ""
    assert matcher.matched == "abcd"


def test_a_match_that_waited_is_decided_at_the_end() -> None:
    """W12: what waited in vain ends as the later match."""
    matcher = StopMatcher(["bc", "abcd"])
    assert matcher.feed("xabc") == "x"
    assert matcher.flush() == "a"
    assert matcher.matched == "bc"


def test_nothing_is_released_after_a_match() -> None:
    """W12: after a stop string there is no more text."""
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("before STOP after") == "before "
    assert matcher.feed("more") == ""
    assert matcher.flush() == ""


def test_an_empty_stop_string_is_refused() -> None:
    """W11: refused by name, not dropped."""
    with pytest.raises(InvalidRequest) as error:
        StopMatcher(["a", ""])
    assert error.value.param == "stop"


def seconds_for(length: int) -> float:
    began = time.perf_counter()
    assert matched(list("a" * length), ["a" * 500 + "b"])[1] is None
    return time.perf_counter() - began


def test_time_grows_with_the_text_and_not_its_square() -> None:
    """W12: what was read is not read again, not for the worst of stop strings."""
    short = min(seconds_for(5_000) for _ in range(3))
    assert min(seconds_for(40_000) for _ in range(3)) < 24 * short
