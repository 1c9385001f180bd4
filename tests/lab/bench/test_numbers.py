"""Schedules, statistics, flags and events: what needs no service."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.core.errors import ConfigError
from headrace.lab import figures
from headrace.lab.bench import plot, prompts, record, settings
from headrace.lab.bench.answer import Answer, Row
from headrace.lab.bench.record import Limit
from headrace.lab.bench.runner import schedule
from headrace.lab.bench.settings import Load, Settings, Span
from headrace.lab.http import place
from headrace.text.sse import EventReader

CLOSED = Load("closed", 2)


def plan(**changes: Any) -> Settings:
    return Settings(**{"model": "m", "loads": (CLOSED,), **changes})


@given(st.lists(st.sampled_from(["a", "b c", "é", "{}"]), max_size=8), st.randoms(), st.booleans())
def test_events_are_whole_however_they_are_cut(
    data: list[str], source: random.Random, crlf: bool
) -> None:
    end = "\r\n" if crlf else "\n"
    text = "".join(f": a comment{end}event: x{end}data: {one}{end}{end}" for one in data).encode()
    events, found = EventReader(), list[bytes]()
    while text:
        size = source.randint(1, 5)
        found += events.feed(text[:size])
        text = text[size:]
    assert [one.decode() for one in found] == data


def test_a_line_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headrace.lab.bench.answer._LONGEST_EVENT", 10)
    answer = Answer(0.0, 1)
    answer.head(200, {})
    answer.body(b"data: 0123456789", 0.0)
    row = answer.row(0.0)
    assert (row.fault, row.detail) == ("malformed", "A server-sent event is too long.")


def test_data_of_several_lines_is_one_event() -> None:
    assert list(EventReader().feed(b"data: a\ndata:b\n\n")) == [b"a\nb"]


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=200))
def test_percentiles_are_by_nearest_rank(values: list[float]) -> None:
    found = figures.summary(values)
    assert found is not None
    for percent, value in ((50, found.p50), (90, found.p90), (99, found.p99)):
        least = min(v for v in values if sum(w <= v for w in values) * 100 >= percent * len(values))
        assert value == least
    assert found.max == max(values)
    assert figures.summary([None]) is None


def test_figures_are_of_what_went_well() -> None:
    well = {"ttft_ms": 100.0, "inter_token_ms": 10.0, "usage": True, "wanted_tokens": 50}
    rows = [
        Row(
            at_s=0,
            total_ms=590,
            completion_tokens=50,
            prompt_tokens=100,
            drafted_tokens=8,
            accepted_tokens=6,
            **well,
        ),
        Row(at_s=0, total_ms=690, completion_tokens=40, prompt_tokens=100, **well),
        Row(at_s=0.6, total_ms=5, fault="http 429", detail="full"),
        Row(at_s=0.6, total_ms=5, fault="http 500", detail="broken", ttft_ms=1.0),
    ]
    found = record.level(CLOSED, rows, 2.0, slo={"ttft_ms": 200.0, "total_ms": 600.0})
    assert (found.sent, found.ok, found.failed, found.throttled) == (4, 2, 2, 1)
    assert found.errors == {"http 429": 1, "http 500": 1}
    assert found.examples == {"http 429": "full", "http 500": "broken"}
    assert found.output_tokens_per_s == 45
    assert found.total_tokens_per_s == 145
    assert found.requests_per_s == 1
    assert found.short == 1
    assert (found.drafted_tokens, found.accepted_tokens) == (8, 6)
    assert found.goodput == 0.25
    assert found.counted_by == "usage"
    assert found.ttft_ms == figures.Summary(100, 100, 100, 100, 100)


def test_an_empty_level_divides_nothing_by_zero() -> None:
    found = record.level(CLOSED, [], 0.0, slo={"ttft_ms": 1.0})
    assert found.output_tokens_per_s == found.running == 0
    assert found.ttft_ms is found.total_tokens_per_s is None


def test_the_share_of_the_limit() -> None:
    limit = Limit(weights=100, cache_per_token=1, bandwidth=1000.0)
    # Two streams: 100 of weights, and 2 x 50 of cache, for two tokens.
    assert limit.tokens_per_s(2, 50) == 10
    row = Row(at_s=0, total_ms=1000, prompt_tokens=45, completion_tokens=10, usage=True)
    level = record.level(CLOSED, [row, row], 1.0, slo={})
    assert record.of_limit(level, limit).of_limit == 2.0


def test_constant_arrivals_are_even() -> None:
    offsets = list(schedule(plan(arrival="constant", duration_s=1.0), 10.0))
    assert offsets == pytest.approx([n / 10 for n in range(10)])


def test_poisson_arrivals_repeat_themselves_and_have_the_rate() -> None:
    one = plan(requests=4000, duration_s=None)
    offsets = list(schedule(one, 50.0))
    assert offsets == list(schedule(one, 50.0))
    gaps = [b - a for a, b in itertools.pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 50, rel=0.1)
    # Of gaps that forget, as many are longer than the mean as e tells.
    assert sum(gap > mean for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)


def answered(*chunks: tuple[float, bytes], due: float | None = None, status: int = 200) -> Row:
    answer = Answer(10.0, 3, due)
    answer.head(status, {})
    for at, data in chunks:
        answer.body(data, at)
    return answer.row(10.0)


def chunk(text: str, field: str = "content") -> bytes:
    return b'data: {"choices":[{"delta":{"%s":"%s"}}]}\n\n' % (field.encode(), text.encode())


END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":4,'
    b'"prompt_tokens_details":{"cached_tokens":2},"completion_tokens_details":'
    b'{"accepted_prediction_tokens":2,"rejected_prediction_tokens":1}},'
    b'"metrics":{"queue_ms":1.5}}\n\ndata: [DONE]\n\n'
)


def test_an_answer_is_timed_from_text_to_text() -> None:
    row = answered(
        (11.0, b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'),
        (12.0, chunk("hm", "reasoning_content")),
        (12.5, chunk("a")),
        (13.5, chunk("b")),
        (15.0, END),
        (15.0, USAGE),
    )
    assert row.fault == ""
    assert row.ttft_ms == 2000
    assert row.inter_token_ms == 500
    assert row.gaps_ms == [500, 1000]
    assert (row.prompt_tokens, row.cached_tokens, row.completion_tokens) == (7, 2, 4)
    assert (row.drafted_tokens, row.accepted_tokens) == (3, 2)
    assert row.metrics == {"queue_ms": 1.5}


def test_the_time_to_wait_for_a_turn_counts_in_an_open_loop() -> None:
    row = answered((12.0, chunk("a")), (12.0, END), due=9.0)
    assert (row.ttft_ms, row.late_ms, row.at_s) == (3000, 1000, -1)


def test_without_usage_chunks_are_counted() -> None:
    row = answered((11.0, chunk("a")), (12.0, chunk("b")), (12.0, END))
    assert (row.completion_tokens, row.usage, row.inter_token_ms) == (2, False, 1000)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (chunk("a"), "truncated"),
        (b"", "truncated"),
        (b"data: {not json}\n\n" + END, "malformed"),
        (b'data: {"choices":[{"delta":{"content":5}}]}\n\n' + END, "malformed"),
        (chunk("a") + b'data: {"error":{"message":"oh"}}\n\n' + END, "error in the stream"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_stream_is_named(data: bytes, fault: str) -> None:
    assert answered((11.0, data)).fault == fault


@pytest.mark.parametrize("body", [b'{"error":{"message":"full"}}', b'{"error":"full"}', b"full"])
def test_a_refusal_is_named_by_its_status(body: bytes) -> None:
    row = answered((11.0, body[:3]), (11.1, body[3:]), status=429)
    assert (row.fault, row.detail) == ("http 429", "full")


async def of_bytes(text: str) -> int:
    return len(text)


async def of_words(text: str) -> int:
    return 1 + len(text.split()) + text.count("window") - 1


async def of_nobody(text: str) -> None:
    return None


@pytest.mark.parametrize("count", [of_bytes, of_words])
def test_prompts_have_the_length_that_is_asked_for(count: Any) -> None:
    words = asyncio.run(prompts.vocabulary(count))
    one = plan(prompt=Span(1, 200), output=Span(5, 9))
    for ask in itertools.islice(prompts.synthetic(one, words, "s"), 200):
        assert isinstance(ask.content, str)
        assert 1 <= asyncio.run(count(ask.content)) <= 200
        assert 5 <= ask.max_tokens <= 9
    exact = plan(prompt=Span(77, 77))
    for ask in itertools.islice(prompts.synthetic(exact, words, "s"), 50):
        assert asyncio.run(count(ask.content)) == 77


def test_prompts_differ_from_the_start_and_repeat_with_the_seed() -> None:
    words = asyncio.run(prompts.vocabulary(of_nobody))
    assert not words.exact

    def made(seed: str, **changes: Any) -> list[str]:
        asks = prompts.synthetic(plan(**changes), words, seed)
        return [str(ask.content) for ask in itertools.islice(asks, 100)]

    assert made("a") == made("a") != made("b")
    starts = Counter(" ".join(text.split()[:3]) for text in made("a"))
    assert len(starts) > 95
    shared = made("a", shared_prefix=100)
    assert len({tuple(text.split()[:100]) for text in shared}) == 1
    assert len(set(shared)) == 100
    assert {len(text.split()) for text in shared} == {128}


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "p.jsonl"
    lines.write_text('{"prompt": "a", "max_tokens": 3}\n\n"b"\n{"messages": [{"role": "user"}]}\n')
    found = prompts.read(lines, plan())
    assert [(ask.content, ask.max_tokens) for ask in found[:2]] == [("a", 3), ("b", 64)]
    with pytest.raises(ConfigError, match=r"p\.jsonl:4: messages need"):
        prompts.read(lines, plan(api="completions"))
    text = tmp_path / "p.txt"
    text.write_text("one\n\ntwo words\n")
    assert [ask.content for ask in prompts.read(text, plan())] == ["one", "two words"]


@pytest.mark.parametrize("text", ["", "{}\n", "{\n", '{"prompt": 5}\n'])
def test_a_bad_file_of_prompts_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.jsonl"):
        prompts.read(path, plan())


REFUSED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "clients": (lambda text: settings.loads("closed", text), ("", "0", "1.5", "a", "9999")),
    "rate": (lambda text: settings.loads("open", text), ("-1", "nan", "inf", "1,,2")),
    "tokens": (lambda text: settings.span("--x", text), ("0", "9-3", "x", "-4")),
    "slo": (settings.slo, ("ttft", "foo=1s", "ttft=-1", "ttft=x")),
    "body": (settings.extra_body, ("[]", "{", "1")),
    "bytes": (lambda text: settings.amount("--x", text), ("x", "1QB", "1.2.3MB")),
    "seconds": (lambda text: settings.seconds("--x", text), ("-1", "0", "soon")),
    "url": (place, ("ftp://x", "http://", "http://x:99999", "http://x/?a=b")),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_refused(kind: str) -> None:
    read, texts = REFUSED[kind]
    for text in texts:
        with pytest.raises(ConfigError, match="flag --"):
            read(text)


def test_what_can_be_read() -> None:
    assert settings.loads("open", "0.5,2") == (Load("open", 0.5), Load("open", 2))
    assert settings.span("--x", "64-256") == Span(64, 256)
    assert settings.slo("ttft=500ms,itl=50ms") == {"ttft_ms": 500, "inter_token_ms": 50}
    assert settings.amount("--x", "98MB") == 98e6
    assert settings.amount("--x", "1.5GiB") == 1.5 * 2**30
    assert settings.amount("--x", "3.3TB/s") == 3.3e12
    assert place("h:8").name == "http://h:8/v1"
    assert place("https://user:secret@h/api/v1/").name == "https://h:443/api/v1"
    assert place("http://[::1]:5/v1").is_loopback


@pytest.mark.parametrize("count", [1, 3])
def test_no_point_of_a_plot_is_on_the_frame(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Issue 12.32: the last point and its label are inside."""
    figures: list[Any] = []
    new = plot._figure()

    def recorded(**arguments: Any) -> Any:
        figures.append(new(**arguments))
        return figures[-1]

    monkeypatch.setattr(plot, "_figure", lambda: recorded)
    time = SimpleNamespace(p50=20, p99=40)
    levels = [
        SimpleNamespace(load="256", output_tokens_per_s=100 * n, ttft_ms=time, inter_token_ms=time)
        for n in range(1, count + 1)
    ]
    runs: Any = {"a": SimpleNamespace(levels=levels, settings=SimpleNamespace(model="m"))}
    plot.draw(runs, tmp_path / "a.png")
    for axes in figures[0].axes:
        frame = axes.get_window_extent()
        for label in axes.texts:
            assert frame.x0 < label.get_window_extent().x1 < frame.x1
        assert axes.get_xlim()[1] > 100 * count * 1.05
        assert axes.get_ylim()[1] > 40 * 1.05
