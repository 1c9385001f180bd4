"""Issue 17.3: n-grams of a text, and drafts that switch themselves off where they lose."""

from __future__ import annotations

import pytest

from headrace.engines.drafting import Gain, Ngrams


@pytest.mark.parametrize(
    ("text", "draft"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2, 3, 4], [5, 9, 1, 2]),
        # Three tokens are enough, and the latest match counts.
        ([7, 2, 3, 4, 5, 8, 2, 3, 4, 6, 9, 2, 3, 4], [6, 9, 2, 3]),
        ([1, 2, 3, 4, 5, 6], []),
        ([2, 3], []),
        ([], []),
        # What repeats itself is taken to go on.
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),
        ([5, 5, 5, 5, 5], [5, 5, 5, 5]),
        # The bytes of tokens are the same at another place, within tokens.
        ([0, 256, 65536, 1, 0, 0x010000, 0x01000000, 0x100, 1], []),
    ],
)
def test_what_followed_the_last_tokens_is_drafted(text: list[int], draft: list[int]) -> None:
    ngrams = Ngrams(text[:1], 16)
    ngrams.extend(text[1:])
    assert len(ngrams) == len(text)
    assert ngrams.draft(64) == draft
    assert ngrams.draft(1) == draft[:1]
    assert ngrams.draft(0) == ngrams.draft(-1) == []


def test_drafts_are_as_long_as_the_last_ones_were_right() -> None:
    ngrams = Ngrams([*range(30), 0, 1, 2], 10)
    lengths: list[int] = []
    for drafted, accepted in ((4, 4), (8, 8), (10, 3), (4, 0), (1, 0), (1, 1)):
        ngrams.learn(drafted, accepted)
        lengths.append(len(ngrams.draft(64)))
    assert lengths == [8, 10, 4, 1, 1, 2]
    assert len(Ngrams([*range(9), 0, 1, 2], 2).draft(64)) == 2


class Steps:
    """An engine whose steps take `plain` seconds, and with drafts `drafted`."""

    def __init__(self) -> None:
        self.switches: list[tuple[bool, float]] = []
        self.gain = Gain(lambda is_on, gain: self.switches.append((is_on, gain)))
        self.drafts = 0

    def run(self, steps: int, drafted: float, tokens: int, requests: int = 1) -> None:
        for _ in range(steps):
            if self.gain.allows(requests):
                self.drafts += 1
                self.gain.note(requests, tokens, 4, drafted)
            else:
                self.gain.note(requests, requests, 0, 1.0)


def test_drafts_that_win_stay_on() -> None:
    """And one step of so many is without, to compare with."""
    steps = Steps()
    steps.run(1700, drafted=1.5, tokens=2)
    assert steps.drafts == 1600
    assert steps.gain.is_on
    assert not steps.switches


def test_drafts_that_lose_are_off_for_a_while() -> None:
    """Tried again, in vain: in 10,000 steps few have drafts."""
    steps = Steps()
    steps.run(10_000, drafted=3.0, tokens=2)
    states = [is_on for is_on, _ in steps.switches]
    assert states == [False, True] * (len(states) // 2) + [False] * (len(states) % 2)
    assert steps.switches[0][1] == pytest.approx(2 / 3)
    assert 24 <= steps.drafts <= 24 * 6


def test_drafts_that_win_again_are_on_again() -> None:
    steps = Steps()
    steps.run(100, drafted=3.0, tokens=2)
    assert not steps.gain.is_on
    steps.run(400, drafted=1.5, tokens=2)
    assert steps.gain.is_on
    assert [is_on for is_on, _ in steps.switches] == [False, True]


def test_more_requests_are_compared_with_as_many() -> None:
    """With eight requests a step may take longer than with one, and its drafts may lose."""
    steps = Steps()
    steps.run(34, drafted=1.5, tokens=2)
    steps.run(40, drafted=2.0, tokens=10, requests=8)
    assert not steps.gain.is_on


def test_a_single_slow_step_switches_nothing() -> None:
    """Another process has taken the processor for a moment."""
    steps = Steps()
    steps.run(40, drafted=1.2, tokens=2)
    steps.gain.note(1, 2, 4, 1000.0)
    steps.gain.note(1, 1, 0, 1000.0)
    steps.run(200, drafted=1.2, tokens=2)
    assert not steps.switches
