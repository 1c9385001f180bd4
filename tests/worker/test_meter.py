from __future__ import annotations

import time
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.metrics import DeviceUse, Gaps, InferenceMetrics
from headrace.core.request import GenerateRequest
from headrace.worker.meter import Meter, figures


class Clock:
    """Milliseconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, ms: float) -> None:
        self.now += ms / 1000


def metered(load_ms: float = 0.0) -> tuple[Meter, Clock]:
    clock = Clock()
    request = GenerateRequest(prompt="x", received=clock.now, load_ms=load_ms)
    return Meter(request, clock), clock


def test_each_figure_against_the_hand_computed_one() -> None:
    """W16: the definitions, on a request of three tokens."""
    meter, clock = metered(load_ms=300)
    clock.passes(500)
    meter.admitted(10, 0)
    clock.passes(50)
    meter.admitted(10, 4)
    clock.passes(150)
    meter.delta(1, visible=False)
    clock.passes(40)
    meter.delta(1, visible=True)
    clock.passes(60)
    meter.delta(1, visible=True)
    meter.delta(0, visible=True)
    clock.passes(100)
    meter.correct(10, 1, 4)
    device = DeviceUse(name="d", total=9, used=5, worker_used=3, worker_mean=2, worker_peak=3)
    made = meter.finish("stop", (device,))
    near: Any = pytest.approx
    assert made.queue_ms == near(200)
    assert made.load_ms == 300
    assert made.time_to_first_token_ms == near(740)
    assert made.prefill_ms == near(200)
    assert made.prefill_tokens_per_second == near(6 / 0.2)
    # Four tokens by the engine's account, one of which came with no delta.
    assert made.decode_tokens_per_second == near(3 / 0.1)
    assert made.time_per_output_token_ms == near(100 / 3)
    assert made.inter_token_ms == Gaps(p50=near(40), p99=near(60), max=near(60))
    assert made.total_ms == near(900)
    assert made.chunks == 4
    assert made.outcome == "stop"
    assert made.devices == (device,)
    usage = made.usage
    assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens) == (10, 4, 4)
    assert usage.total_tokens == 14
    assert abs(made.started_at - time.time()) < 5


def test_what_is_undefined_is_none() -> None:
    """W16: never admitted; no token; one token."""
    meter, clock = metered()
    clock.passes(7)
    made = meter.finish("cancelled")
    assert made.queue_ms is None
    assert made.prefill_ms is None
    assert made.time_to_first_token_ms is None
    assert made.total_ms == pytest.approx(7)
    meter.admitted(5, 0)
    clock.passes(7)
    assert meter.finish("error").prefill_tokens_per_second is None
    meter.delta(1, visible=True)
    made = meter.finish("length")
    assert made.prefill_tokens_per_second == pytest.approx(5 / 0.007)
    assert made.decode_tokens_per_second is None
    assert made.time_per_output_token_ms is None
    assert made.inter_token_ms is None


def test_nothing_divides_by_zero() -> None:
    """W16: all in one instant, all of the prompt cached, more cached than there is."""
    meter, _ = metered()
    meter.admitted(5, 9)
    for _ in range(3):
        meter.delta(1, visible=True)
    made = meter.finish("stop")
    assert made.usage.cached_tokens == 5
    assert made.prefill_tokens_per_second is None
    assert made.decode_tokens_per_second is None
    assert made.time_per_output_token_ms is None
    assert made.inter_token_ms == Gaps(p50=0, p99=0, max=0)


def test_percentiles_are_of_the_gaps() -> None:
    """W16: nearest rank."""
    meter, clock = metered()
    meter.delta(1, visible=True)
    for gap in (1, *range(100, 0, -1)):
        clock.passes(gap)
        meter.delta(1, visible=True)
    gaps = meter.finish("stop").inter_token_ms
    near: Any = pytest.approx
    assert gaps == Gaps(p50=near(50), p99=near(99), max=near(100))


def test_figures_for_the_log_are_scalars_without_text() -> None:
    """W27: what is logged of a request is numbers and names."""
    meter, _ = metered()
    shown = figures(msgspec.structs.replace(meter.finish("stop"), model="m"))
    assert shown["model"] == "m"
    assert shown["prompt_tokens"] == 0
    assert not {"prefill_ms", "devices", "usage", "engine"} & shown.keys()
    assert all(isinstance(value, int | float | str) for value in shown.values())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["admitted", "delta", "correct", "passes", "finish"]),
        st.integers(0, 1000),
        st.integers(0, 1000),
    )
)


def _numbers(made: InferenceMetrics) -> list[float]:
    found = [value for value in msgspec.structs.astuple(made) if isinstance(value, int | float)]
    gaps = made.inter_token_ms
    return [
        *found,
        *msgspec.structs.astuple(made.usage),
        *(msgspec.structs.astuple(gaps) if gaps else ()),
    ]


@given(STEPS, st.floats(0, 1e6))
def test_no_history_breaks_the_meter(steps: list[tuple[str, int, int]], load_ms: float) -> None:
    """W16: metrics never fail a request, and no figure is negative."""
    meter, clock = metered(load_ms)
    for step, one, other in [*steps, ("finish", 0, 0)]:
        if step == "admitted":
            meter.admitted(one, other)
        elif step == "delta":
            meter.delta(one, visible=bool(other % 2))
        elif step == "correct":
            meter.correct(one, other, other)
        elif step == "passes":
            clock.passes(one)
        else:
            assert all(number >= 0 for number in _numbers(meter.finish("stop")))
