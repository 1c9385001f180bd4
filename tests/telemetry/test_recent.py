"""What is told of the last minute: known schedules, by a clock that the test moves."""

from __future__ import annotations

import pytest

from headrace.core.metrics import InferenceMetrics, Usage
from headrace.core.record import Outcome, Rates, RequestRecord, RunningRequest
from headrace.telemetry import recent
from headrace.telemetry.recent import Recent

WALL = 1_700_000_000.0


class Bench:
    """A Recent, the requests that run, and the time (monotonic, from 1000 s on)."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.running: list[RunningRequest] = []
        self.recent = Recent(
            lambda: self.running, clock=lambda: self.now, wall=lambda: WALL + self.now
        )

    def ended(
        self,
        id: str = "r",
        *,
        model: str = "m",
        outcome: Outcome = "ok",
        error: str = "",
        total_s: float = 1.0,
        queue_s: float | None = 0.0,
        first_s: float | None = None,
        each_ms: float | None = None,
        prompt: int = 0,
        completion: int = 0,
    ) -> None:
        """A request that ends now."""
        metrics = InferenceMetrics(
            started_at=0,
            queue_ms=None if queue_s is None else queue_s * 1000,
            time_to_first_token_ms=None if first_s is None else first_s * 1000,
            time_per_output_token_ms=each_ms,
            total_ms=total_s * 1000,
            usage=Usage(prompt_tokens=prompt, completion_tokens=completion),
        )
        self.recent.record(
            RequestRecord(
                id=id, trace_id="", time=0, operation="chat", model=model, outcome=outcome,
                metrics=metrics, error=error,
            )
        )  # fmt: skip

    def runs(
        self, began: float, tokens: int, *, first_s: float | None = 0.0, prompt: int = 0
    ) -> None:
        """The one request that runs, as it stands now."""
        self.running = [
            RunningRequest(
                id="r",
                model="m",
                operation="chat",
                client="",
                since=WALL + began,
                phase="decode",
                time_to_first_token_ms=None if first_s is None else first_s * 1000,
                prompt_tokens=prompt,
                completion_tokens=tokens,
            )
        ]

    def rates(self, model: str = "m") -> Rates:
        return next(one for one in self.recent.activity().rates if one.model == model)

    @property
    def speed(self) -> float:
        return self.rates().completion_tokens_per_second


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_nothing_has_happened(bench: Bench) -> None:
    assert bench.recent.activity().rates == ()
    assert bench.recent.activity().running == ()


@pytest.mark.parametrize("offset", [0.0, 0.1, 0.37, 0.499])
def test_a_running_answer_counts_as_it_comes(bench: Bench, offset: float) -> None:
    """T: 20 tokens per second for 30 s, looked at each second: 20 when 5 s are known, not before
    and not more at its end."""
    began = bench.now = 1000.0 + offset
    seen: list[float] = []
    for second in range(1, 31):
        bench.now = began + second
        bench.runs(began, 20 * second)
        seen.append(bench.speed)
    assert 3.5 < seen[0] <= 4.0
    assert seen[:6] == sorted(seen[:6])
    assert seen[6:] == [pytest.approx(20.0)] * 24
    bench.running = []
    bench.ended(total_s=30, first_s=0.0, completion=600)
    assert bench.speed == pytest.approx(20.0)
    bench.now += 2
    assert 11 < bench.speed < 13.5
    bench.now += 5
    assert bench.speed == 0
    assert bench.rates().requests == 1


def test_an_answer_nobody_looked_at_is_spread_over_its_time(bench: Bench) -> None:
    """A 60 s answer of 600 tokens has been 10 a second, and is no spike at its end."""
    bench.ended(total_s=60, completion=600)
    assert bench.speed == pytest.approx(10.0)


def test_a_running_answer_seen_for_the_first_time(bench: Bench) -> None:
    """Its first token came 40 s ago, 2 s after it was asked."""
    bench.runs(bench.now - 42, 400, first_s=2.0, prompt=1000)
    assert bench.speed == pytest.approx(10.0)
    assert bench.rates().prompt_tokens_per_second == 0, "it was read long ago"


def test_a_change_of_pace_is_seen(bench: Bench) -> None:
    """50 a second for 20 s, then a stall, of which the whole mean would tell nothing."""
    began = bench.now
    for second in range(1, 21):
        bench.now = began + second
        bench.runs(began, 50 * second)
        bench.recent.activity()
    assert bench.speed == pytest.approx(50.0)
    for second in range(21, 28):
        bench.now = began + second
        bench.recent.activity()
    assert bench.speed == 0


@pytest.mark.parametrize("polls", [0, 1, 3, 17])
def test_each_token_counts_once(bench: Bench, polls: int) -> None:
    """However often it is looked at, a 4 s answer of 100 tokens to 300 adds just these."""
    began = bench.now
    for poll in range(1, polls + 1):
        bench.now = began + 4 * poll / (polls + 1)
        written = max(0, int(100 * (poll / (polls + 1) - 0.25) / 0.75))
        bench.runs(began, written, first_s=1.0 if written else None, prompt=300)
        bench.recent.activity()
    bench.now, bench.running = began + 4, []
    bench.ended(total_s=4, first_s=1.0, prompt=300, completion=100)
    # What is told is over 5.0 s here: the clock stands at the beginning of a slot.
    assert bench.speed * 5 == pytest.approx(100)
    assert bench.rates().prompt_tokens_per_second * 5 == pytest.approx(300)
    bench.now += 1
    assert bench.speed * 5 == pytest.approx(100)
    assert bench.rates().prompt_tokens_per_second * 5 == pytest.approx(300)


def test_several_answers_add_up(bench: Bench) -> None:
    for number in range(8):
        bench.ended(f"r{number}", total_s=10, completion=100)
    bench.runs(bench.now - 10, 50)
    assert bench.speed == pytest.approx(85.0)


def test_prompts_count_while_they_are_read(bench: Bench) -> None:
    """One read for 2 s after 30 s in the queue, and a text to embed, which has no first token."""
    bench.ended(total_s=32, queue_s=30, first_s=32, prompt=500, completion=1)
    assert bench.rates().prompt_tokens_per_second * 5 == pytest.approx(500)
    bench.ended(total_s=1, prompt=250)
    assert bench.rates().prompt_tokens_per_second * 5 == pytest.approx(750)
    assert bench.rates().completion_tokens_per_second * 5 == pytest.approx(1)


def test_what_was_never_begun_has_read_nothing(bench: Bench) -> None:
    bench.ended(outcome="refused", queue_s=None, total_s=3, prompt=900, error="QueueTimeout")
    bench.ended(outcome="error", queue_s=1, total_s=3, prompt=100, error="WorkerDied")
    rates = bench.rates()
    assert rates.prompt_tokens_per_second * 5 == pytest.approx(100)
    assert (rates.requests, rates.failed) == (2, 1)


def test_a_count_that_shrinks_takes_nothing_back(bench: Bench) -> None:
    """A continued answer may begin to count anew."""
    bench.now += 2
    bench.runs(bench.now - 2, 100)
    bench.recent.activity()
    bench.ended(total_s=2, first_s=0, completion=60)
    bench.running = []
    assert bench.speed * 5 == pytest.approx(100)


def test_who_has_left_without_a_record_is_forgotten(bench: Bench) -> None:
    bench.runs(bench.now - 1, 10)
    bench.recent.activity()
    bench.running = []
    bench.recent.activity()
    assert bench.recent._progress == {}


def test_percentiles_are_of_the_last_minute(bench: Bench) -> None:
    """Nearest rank of 1..100; each leaves with its second, and the model with the last."""
    for number in range(1, 101):
        bench.now = 1000 + number / 10
        bench.ended(total_s=0.01, first_s=number / 1000, each_ms=number / 10)
    rates = bench.rates()
    assert (rates.window_s, rates.requests) == (60.0, 100)
    assert rates.time_to_first_token_p50_ms == pytest.approx(50)
    assert rates.time_to_first_token_p99_ms == pytest.approx(99)
    assert rates.time_per_output_token_p50_ms == pytest.approx(5.0)
    assert rates.time_per_output_token_p99_ms == pytest.approx(9.9)
    bench.now = 1059.4
    assert bench.rates().requests == 100
    bench.now = 1065.2
    left = bench.rates()
    assert 40 <= left.requests <= 55
    assert left.time_to_first_token_p50_ms is not None
    assert left.time_to_first_token_p50_ms > 70
    bench.now = 1070.6
    assert bench.recent.activity().rates == ()


def test_figures_that_nobody_has_are_none(bench: Bench) -> None:
    bench.ended(total_s=0.0, outcome="cancelled")
    rates = bench.rates()
    assert rates.time_to_first_token_p99_ms is None
    assert rates.time_per_output_token_p50_ms is None
    assert rates.failed == 0


def test_models_are_told_apart_and_sorted(bench: Bench) -> None:
    for number in range(50):
        bench.ended(model=f"m{number:02}", total_s=5, completion=5 * number)
    told = bench.recent.activity().rates
    assert [one.model for one in told] == [f"m{number:02}" for number in range(50)]
    assert [one.completion_tokens_per_second for one in told] == [
        pytest.approx(number) for number in range(50)
    ]


def test_names_nobody_serves_are_one(bench: Bench) -> None:
    """A client can ask for any name, and for another each time."""
    for number in range(5000):
        bench.ended(model=f"x{number}", outcome="refused", error="UnknownModel", queue_s=None)
    assert [(one.model, one.requests) for one in bench.recent.activity().rates] == [("-", 5000)]


def test_memory_is_bounded(bench: Bench) -> None:
    """20,000 requests over 200 s keep a minute of samples, with as many as there is room for."""
    for number in range(20_000):
        bench.now = 1000 + number / 100
        bench.ended(total_s=500, first_s=0.1, each_ms=1.0, completion=9)
    model = bench.recent._models["m"]
    assert 5950 <= len(model.ended) <= 6001
    assert 450 <= len(model.completion) <= 501, "of 5 s"
    assert 5950 <= bench.rates().requests <= 6000
    for number in range(3000):
        bench.ended(model=f"x{number}")
    assert len(bench.recent._models) == recent._MODELS


def test_with_more_requests_than_room_the_window_is_shorter(bench: Bench) -> None:
    """10,000 in 50 s: the last 8,192 are told, and that they took 41 s."""
    for number in range(10_000):
        bench.now = 1000 + number / 200
        bench.ended(total_s=0.01, first_s=number)
    rates = bench.rates()
    assert rates.requests == recent._SAMPLES
    assert rates.window_s == pytest.approx((recent._SAMPLES - 1) / 200)
    assert rates.time_to_first_token_p99_ms is not None
    assert rates.time_to_first_token_p99_ms > 9_900_000


def test_activity_has_the_oldest_first(bench: Bench) -> None:
    bench.runs(bench.now - 1, 1)
    young = bench.running
    bench.runs(bench.now - 9, 1)
    bench.running = [*young, *bench.running]
    activity = bench.recent.activity()
    assert [one.since for one in activity.running] == [WALL + 991, WALL + 999]
    assert [one.model for one in activity.rates] == ["m"]
