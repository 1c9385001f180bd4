"""Answers: streams, usage, stop strings, characters, errors, figures."""

from __future__ import annotations

import contextlib
import itertools

from headrace.core.errors import DeadlineExceeded, InvalidRequest, Unsupported
from headrace.core.events import Delta
from headrace.core.metrics import InferenceMetrics
from headrace.core.request import CountRequest, DetokenizeRequest, GenerateRequest, Message
from headrace.core.stream import collect, collect_count, collect_text
from headrace.lab.cases.case import case
from headrace.lab.cases.subject import (
    POEM,
    TOKENS,
    Declared,
    Reply,
    Subject,
    check,
    read,
    refusal,
)

SCRIPTS = (
    "🙂🙃🙂🙃🙂🙃🙂🙃",
    "👩‍👩‍👧‍👦 🇪🇺 👩‍👩‍👧‍👦 🇪🇺",
    "漢字かな交じり文、漢字かな交じり文、",
    "e\u0301 n\u0303 o\u0308 e\u0301 n\u0303 o\u0308",
    "שלום مرحبا שלום مرحبا",
)
"""Characters of several tokens, of several code points, and from right to left."""

_HALF = 3
_DEADLINE_S = 0.15


def sound(
    subject: Subject, reply: Reply, prompt_tokens: int | None = None, *, held: int = 0
) -> None:
    """Check what holds for every answer.

    `held` is how many of the last tokens may be counted without being in a delta: libraries hold
    back those of an incomplete character when the answer reaches its limit.

    Raises:
        Broken: a check fails.
    """
    usage, reason = reply.finish.usage, reply.reason
    check(reason in ("stop", "length"), f"The finish reason is {reason!r}.")
    if prompt_tokens is not None:
        message = f"Usage has {usage.prompt_tokens} prompt tokens; there are {prompt_tokens}."
        check(usage.prompt_tokens == prompt_tokens, message)
    check(usage.cached_tokens <= usage.prompt_tokens, "More tokens are cached than the prompt has.")
    if not subject.is_remote:
        message = f"Usage has {usage.completion_tokens} tokens, the deltas {len(reply.ids)}."
        allowed = held if reason == "length" else 0
        check(0 <= usage.completion_tokens - len(reply.ids) <= allowed, message)


async def counted(subject: Subject, request: GenerateRequest) -> int:
    """Return the number of tokens of a prompt, by the model's tokenizer.

    Raises:
        Declared: the engine can only estimate, and declares that.
    """
    if isinstance(request.prompt, tuple):
        return len(request.prompt)
    if request.messages is None:
        ask = CountRequest(text=request.prompt, add_special=True)
    else:
        ask = CountRequest(messages=request.messages)
    result = await collect_count(subject.backend.ask(ask))
    check(result.count > 0, f"The count of tokens is {result.count}.")
    if result.estimated:
        raise Declared("Its count of tokens is an estimate, and is marked as one.")
    return result.count


@case("W9 W10 W13")
async def stream_equals_whole(subject: Subject) -> None:
    """A stream put together is the answer in one piece: text, tokens, reason and usage."""
    streamed = await subject.greedy()
    sampling = subject.able(max_tokens=TOKENS, temperature=0.0)
    whole = await collect(subject.backend.ask(subject.request(**sampling)))
    check(streamed.text, "The answer is empty.")
    check(whole.text == streamed.text, f"{whole.text!r} is not {streamed.text!r}.")
    check(whole.choices[0].token_ids == streamed.ids, "The tokens differ.")
    check(whole.finish_reason == streamed.reason, "The reasons differ.")
    parts, total = streamed.finish.usage, whole.usage
    check(parts.prompt_tokens == total.prompt_tokens, "The prompt tokens differ.")
    check(parts.completion_tokens == total.completion_tokens, "The completion tokens differ.")


@case("W11 W20")
async def greedy_repeats(subject: Subject) -> None:
    """Temperature 0 gives the same answer again, with any seed."""
    first = await subject.greedy()
    again = await subject.short(**subject.able(seed=5))
    check(again.text == first.text, f"First {first.text!r}, then {again.text!r}.")


@case("W15")
async def usage_is_exact(subject: Subject) -> None:
    """Prompt tokens are the tokenizer's count, completion tokens those of the deltas."""
    reply = await subject.greedy()
    sound(subject, reply, await counted(subject, subject.request(POEM)))
    request = subject.request("The river runs", raw=True)
    reply = await subject.short("The river runs", raw=True)
    sound(subject, reply, await counted(subject, request))
    # Most models end this answer; the end token counts if it is in a delta.
    sound(subject, await subject.short("Say hi.", **subject.able(max_tokens=40)))
    ids = await subject.noise(37)
    sound(subject, await subject.short(ids), len(ids))


@case("W11")
async def several_choices(subject: Subject) -> None:
    """`n` gives `n` answers, each with its own seed, and the usage of all."""
    fields = subject.able(max_tokens=6, temperature=1.5, seed=3)
    try:
        reply = await subject.ask(n=3, **fields)
    except Unsupported as error:
        check(error.param == "n", f"It names {error.param}, not n.")
        raise Declared("It gives one answer at a time.") from error
    check(len(reply.finish.finish_reasons) == 3, "There are not three finish reasons.")
    deltas = [event for event in reply.events if isinstance(event, Delta)]
    texts = ["".join(delta.text for delta in deltas if delta.index == index) for index in range(3)]
    check(all(texts), f"A choice is empty: {texts}.")
    if not subject.is_remote:
        total = sum(len(delta.token_ids) for delta in deltas)
        held = reply.finish.usage.completion_tokens - total
        check(0 <= held <= 3 * _HALF, "Usage is not that of all choices.")
    if {"seed", "temperature"} <= fields.keys() and not await subject.certain():
        check(len(set(texts)) > 1, "All choices are the same.")


@case("W11")
async def echo_comes_first(subject: Subject) -> None:
    """`echo` repeats the prompt before the answer."""
    prompt = "The river runs"
    try:
        reply = await subject.short(prompt, raw=True, echo=True)
    except (Unsupported, InvalidRequest) as error:
        check(error.param == "echo", f"It names {error.param}, not echo.")
        raise Declared("It does not repeat the prompt.") from error
    check(reply.text.startswith(prompt), f"It begins with {reply.text[:20]!r}.")
    check(len(reply.text) > len(prompt), "After the prompt there is no answer.")


def _stops(text: str, pieces: list[str]) -> list[str]:
    """Return stop strings of a text: across the ends of its pieces, at its beginning, none."""
    ends = itertools.accumulate(len(piece) for piece in pieces)
    inside = [end for end in ends if 2 <= end <= len(text) - 2]
    across = [text[end - 2 : end + 2] for end in inside[1:-1:3]]
    return [*across, text[: min(3, len(text))], text[len(text) // 2 :]]


@case("W12 W13")
async def stop_strings(subject: Subject) -> None:
    """The text ends before the first stop string, wherever tokens end, and leaks none of it."""
    plain = await subject.greedy()
    whole = plain.text
    check(len(whole) >= 4, f"{whole!r} is too short an answer to be stopped.")
    for stop in _stops(whole, [delta.text for delta in plain.deltas]):
        reply = await subject.short(stop=(stop, "\0never\0"))
        expected = whole[: whole.index(stop)]
        check(reply.text == expected, f"Stopped at {stop!r}: {reply.text!r}, not {expected!r}.")
        check(reply.reason == "stop", f"Stopped at {stop!r}, its reason is {reply.reason!r}.")
        sound(subject, reply)
    unstopped = await subject.short(stop=(whole + "\0",))
    check(unstopped.text == whole, "A stop string that does not come changes the text.")
    check(unstopped.reason == plain.reason, "A stop string that does not come ends the answer.")


@case("W13 W15")
async def every_script(subject: Subject) -> None:
    """Emoji, CJK, combining and right-to-left text go in and come out whole."""
    for prompt in SCRIPTS:
        request = subject.request(prompt, raw=True)
        reply = await subject.short(prompt, raw=True)
        tokens = None if subject.is_remote else await counted(subject, request)
        sound(subject, reply, tokens, held=_HALF)
        if subject.is_remote:
            check("\ufffd" not in reply.text, f"Half a character is in {reply.text!r}.")
            continue
        ask = DetokenizeRequest(token_ids=reply.ids)
        whole = (await collect_text(subject.backend.ask(ask))).lstrip()
        check(whole.startswith(reply.text.lstrip()), f"{reply.text!r} is not the text {whole!r}.")


@case("W21")
async def text_and_tokens(subject: Subject) -> None:
    """Text becomes tokens and again the same text; an unknown token is refused."""
    text = "A river runs to the sea, 42 times."
    ids = await subject.tokens(text)
    check(ids, f"{text!r} has no tokens.")
    if subject.is_remote:
        return
    back = await collect_text(subject.backend.ask(DetokenizeRequest(token_ids=ids)))
    check(back.strip() == text, f"{text!r} became {back!r}.")
    for unknown in (-1, 1 << 40):
        await refusal(subject.backend.ask(subject.request((unknown,))), InvalidRequest)
    check((await subject.short()).text, "After an unknown token an answer is empty.")


@case("W11 W17")
async def wrong_requests(subject: Subject) -> None:
    """A wrong request is a typed error that names the field, and harms nothing."""
    limit = subject.info.context_length
    if limit is not None:
        request = subject.request(context_length=limit + 1)
        error = await refusal(subject.backend.ask(request), InvalidRequest, Unsupported)
        check(error.param == "context_length", f"It names {error.param}.")
    if not subject.capabilities.chat:
        request = GenerateRequest(messages=(Message("user", POEM),))
        error = await refusal(subject.backend.ask(request), Unsupported)
        check(error.param == "messages", f"It names {error.param}, not messages.")
    sound(subject, await subject.short())


@case("W16")
async def figures_are_complete(subject: Subject) -> None:
    """Every figure is there and agrees with the others; engine, model and worker are named."""
    reply = await subject.ask(**subject.able(max_tokens=TOKENS, ignore_eos=True, temperature=0.0))
    figures, usage = reply.finish.metrics, reply.finish.usage
    _defined(figures)
    check(figures.usage == usage, "The usage of the figures is another.")
    check(figures.engine == subject.engine, f"The engine is {figures.engine!r}.")
    check(figures.model and figures.worker, "Model or worker is not named.")
    check(figures.outcome == reply.reason, f"The outcome is {figures.outcome!r}.")
    message = f"{figures.chunks} chunks are reported, and there are {len(reply.deltas)}."
    check(0 < figures.chunks <= len(reply.deltas), message)
    check(figures.devices or subject.is_remote, "No device is reported.")
    for device in figures.devices[:1]:
        check(
            0 < device.worker_mean <= device.worker_peak < device.total,
            f"The memory of {device} is inconsistent.",
        )


def _defined(figures: InferenceMetrics) -> None:
    first, queue, prefill = (
        _given(figures, name) for name in ("time_to_first_token_ms", "queue_ms", "prefill_ms")
    )
    rate, per_token, prefill_rate = (
        _given(figures, name)
        for name in (
            "decode_tokens_per_second",
            "time_per_output_token_ms",
            "prefill_tokens_per_second",
        )
    )
    check(figures.started_at > 1e9, f"It started at {figures.started_at}.")
    check(0 < first <= figures.total_ms + 1, "The first token came after the end.")
    check(queue + prefill <= first + 1, "Queue and prefill took longer than the first token.")
    check(prefill_rate > 0, f"Prefill runs at {prefill_rate} tokens a second.")
    check(abs(rate * per_token - 1000) < 1, "Rate and time per token disagree.")
    gaps = figures.inter_token_ms
    check(gaps, "inter_token_ms is not defined.")
    if gaps:
        check(gaps.p50 <= gaps.p99 <= gaps.max <= figures.total_ms, f"The gaps are {gaps}.")


def _given(figures: InferenceMetrics, name: str) -> float:
    value = getattr(figures, name)
    check(value is not None, f"{name} is not defined.")
    return value


@case("W17 W16")
async def errors_carry_figures(subject: Subject) -> None:
    """The error of an answer that its deadline cut carries the figures."""
    endless = subject.able(ignore_eos=True, temperature=1.0)
    deadline_s = _DEADLINE_S
    with contextlib.suppress(DeadlineExceeded):
        # Some fill their context before that.
        whole = await read(subject.backend.ask(subject.request(deadline_s=deadline_s, **endless)))
        deadline_s = whole.finish.metrics.total_ms / 3000
    request = subject.request(deadline_s=deadline_s, **endless)
    error = await refusal(subject.backend.ask(request), DeadlineExceeded)
    figures = error.metrics or InferenceMetrics(started_at=0.0)
    check(error.metrics, "The error has no figures.")
    check(figures.outcome == "error", f"The outcome is {figures.outcome!r}.")
    check(figures.total_ms > 0, "It took no time.")


CASES = (
    stream_equals_whole,
    greedy_repeats,
    usage_is_exact,
    several_choices,
    echo_comes_first,
    stop_strings,
    every_script,
    text_and_tokens,
    wrong_requests,
    figures_are_complete,
    errors_carry_figures,
)
