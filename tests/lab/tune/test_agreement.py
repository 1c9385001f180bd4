"""What counts as the same answers."""

from __future__ import annotations

import math

from headrace.engines.measured import MAX_DISTANCE, MIN_FORCED, Agreement
from headrace.lab.tune.agreement import CLEAR, Guess, Reply, agreement


def said(*answer: int, prompt: tuple[int, ...] = (1, 2)) -> Reply:
    return Reply(prompt, answer)


def sure(token: int, logprob: float = -0.1) -> Guess:
    return Guess(token, {token: logprob, 99: logprob - 3})


def test_the_same_answers_agree_in_every_figure() -> None:
    found = agreement([said(5, 6)], [said(5, 6)], [sure(5)] * 4, [sure(5)] * 4)
    assert found == Agreement(prompts=1, greedy=1, forced=1, distance=0, compared=4)
    assert found.fault() is None


def test_an_answer_counts_up_to_its_first_other_token() -> None:
    steps = [sure(5)], [sure(5)]
    assert agreement([said(5, 6, 7, 8)], [said(5, 6, 9, 8)], *steps).greedy == 0.5
    assert agreement([said(5, 6, 7, 8)], [said(5, 6)], *steps).greedy == 0.5
    assert agreement([said()], [said()], *steps).greedy == 1


def test_only_tokens_that_the_reference_prefers_clearly_are_counted() -> None:
    near = Guess(5, {5: -0.7, 6: -0.7 - CLEAR / 2})
    other = Guess(6, {6: -0.6, 5: -0.8})
    found = agreement([said(5)], [said(6)], [sure(5), near], [sure(5), other])
    assert (found.forced, found.compared) == (1, 1)
    clear = agreement([said(5)], [said(6)], [sure(5), near], [sure(6), other])
    assert clear.forced == 0


def test_without_logprobs_every_token_counts_and_there_is_no_distance() -> None:
    found = agreement([said(5)], [said(5)], [Guess(5), Guess(6)], [Guess(5), Guess(7)])
    assert (found.forced, found.compared, found.distance) == (0.5, 2, None)


def test_the_distance_is_that_of_the_references_own_token() -> None:
    found = agreement([said(5)], [said(5)], [sure(5, -1.0)], [sure(5, -1.5)])
    assert found.distance is not None
    assert math.isclose(found.distance, 0.5)
    gone = agreement([said(5)], [said(5)], [sure(5, -1.0)], [Guess(7, {7: -0.5, 8: -4.0})])
    assert gone.distance == 3


def test_each_fault_is_named() -> None:
    """Issue 4: an engine that does not agree is not chosen, and the table says why."""
    good = {"prompts": 1, "greedy": 1, "forced": 1, "distance": 0, "compared": 9}
    faults = {
        "prompts": (0.5, "only 50% of the prompts"),
        "forced": (MIN_FORCED - 0.05, "only 90% of its tokens"),
        "distance": (MAX_DISTANCE + 0.05, "log-probabilities are off by 0.20"),
    }
    for name, (value, words) in faults.items():
        fault = Agreement(**{**good, name: value}).fault()
        assert fault is not None
        assert words in fault
    # How far a greedy answer goes depends on one near tie: it is shown and decides nothing.
    assert Agreement(**{**good, "greedy": 0.1}).fault() is None
