from __future__ import annotations

import asyncio
import codecs
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from headrace.core.constraint import Constraint
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed, OutOfMemory
from headrace.core.model import ModelFile
from headrace.core.sampling import Sampling
from headrace.engines import open_engine
from headrace.engines.base import Admitted, EngineRequest, OpenRequest, RawDelta, RawFinish
from headrace.engines.echo import Engine
from headrace.engines.kept import kept

FILE = ModelFile(path="", format="none")


def opened(**options: Any) -> Engine:
    return Engine(OpenRequest(model=FILE, options=options))


def asked(text: str, max_tokens: int = 1000, **sampling: Any) -> EngineRequest:
    return EngineRequest(
        token_ids=tuple(text.encode()), max_tokens=max_tokens, sampling=Sampling(**sampling)
    )


async def answered(engine: Engine, request: EngineRequest) -> tuple[list[RawDelta], RawFinish]:
    events = [event async for event in engine.generate(request)]
    assert isinstance(events[0], Admitted)
    finish = events[-1]
    assert isinstance(finish, RawFinish)
    return [event for event in events if isinstance(event, RawDelta)], finish


async def test_it_says_the_prompt_again_in_bytes_that_split_characters() -> None:
    deltas, finish = await answered(opened(), asked("né🌍"))
    assert [len(delta.data) for delta in deltas] == [1] * 7 + [0]
    with pytest.raises(UnicodeDecodeError):
        deltas[1].data.decode()
    assert b"".join(delta.data for delta in deltas).decode() == "né🌍"
    # The end token is counted, as in the real engines.
    assert (finish.reason, finish.prompt_tokens, finish.completion_tokens) == ("stop", 7, 8)


async def test_it_says_its_script_in_deltas_of_any_size() -> None:
    deltas, finish = await answered(opened(text="abcdefg", tokens_per_delta=3), asked("x"))
    assert [delta.data for delta in deltas] == [b"abc", b"def", b"g"]
    assert finish.completion_tokens == 8


async def test_it_ends_at_max_tokens() -> None:
    """W11, W14: max_tokens is honoured and is the reason."""
    deltas, finish = await answered(opened(tokens_per_delta=2), asked("abcdef", 3))
    assert b"".join(delta.data for delta in deltas) == b"abc"
    assert (finish.reason, finish.completion_tokens) == ("length", 3)


async def test_stop_token_ids_end_it_and_are_not_part_of_it() -> None:
    """W11: stop_token_ids."""
    deltas, finish = await answered(opened(), asked("abcd", stop_token_ids=(ord("c"),)))
    assert b"".join(delta.data for delta in deltas) == b"ab"
    assert (finish.reason, finish.completion_tokens) == ("stop", 2)


async def test_ignore_eos_goes_on_to_the_limit() -> None:
    """W11: ignore_eos."""
    deltas, finish = await answered(opened(), asked("ab", 7, ignore_eos=True))
    assert b"".join(delta.data for delta in deltas) == b"abababa"
    assert finish.reason == "length"


async def test_logprobs_come_for_each_token_when_asked() -> None:
    """W11: logprobs."""
    deltas, _ = await answered(opened(), asked("ab", logprobs=0))
    assert [one.data for delta in deltas for one in delta.logprobs] == [b"a", b"b", b""]
    deltas, _ = await answered(opened(), asked("ab"))
    assert not any(delta.logprobs for delta in deltas)


@pytest.mark.parametrize("size", [1, 4])
async def test_each_token_of_a_character_has_its_entry(size: int) -> None:
    """Issue 12.9: also where the answer is cut within one."""
    request = asked("é🌍", 4, logprobs=0)
    deltas, finish = await answered(opened(tokens_per_delta=size), request)
    entries = [entry for delta in deltas for entry in delta.logprobs]
    assert [(entry.token_id, entry.data) for entry in entries] == [
        (token, bytes([token])) for token in "é🌍".encode()[:4]
    ]
    assert (finish.reason, finish.completion_tokens) == ("length", 4)


async def test_it_keeps_the_scripted_speed() -> None:
    began = time.monotonic()
    await answered(opened(tokens_per_second=100), asked("a" * 20, 20))
    assert 0.19 <= time.monotonic() - began < 1
    began = time.monotonic()
    engine = opened(prefill_tokens_per_second=1000, text="x")
    events = [event async for event in engine.generate(asked("a" * 200))]
    assert 0.19 <= time.monotonic() - began < 1
    done = [event.done for event in events if isinstance(event, Admitted)]
    assert done == [0, 64, 128, 192]


@pytest.mark.parametrize(
    ("option", "error"), [("fail_after", GenerationFailed), ("oom_after", OutOfMemory)]
)
async def test_it_fails_when_told_to(option: str, error: type[Exception]) -> None:
    """W19: after the tokens that came before."""
    seen: list[bytes] = []
    with pytest.raises(error):
        async for event in opened(**{option: 2}).generate(asked("abcd")):
            if isinstance(event, RawDelta):
                seen.append(event.data)
    assert seen == [b"a", b"b"]


def test_it_fails_to_load_when_told_to() -> None:
    with pytest.raises(LoadFailed, match="no luck"):
        open_engine("echo", OpenRequest(model=FILE, options={"fail_load": "no luck"}))


@pytest.mark.parametrize("number", [0, signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_it_crashes_when_told_to(number: int) -> None:
    program = f"""
import asyncio
from tests.engines.test_echo import answered, asked, opened
asyncio.run(answered(opened(crash_after=1, crash_signal={int(number)}), asked("abc")))
raise SystemExit(3)
"""
    ended = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True)
    assert ended.returncode == -number


def test_it_hangs_with_the_loop_when_told_to() -> None:
    program = """
import asyncio
from tests.engines.test_echo import answered, asked, opened
async def main():
    asyncio.get_running_loop().call_later(0.1, print, "the loop turns")
    print("begun", flush=True)
    await answered(opened(hang_after=1), asked("abc"))
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.4)
        child.kill()
        assert child.stdout.read() == b""


async def test_it_goes_on_after_what_was_answered() -> None:
    """W19: the script from that token on, as long as it lasts."""
    for cut in range(6):
        prompt = asked("abcd")
        request = msgspec.structs.replace(prompt, answered=(*b"abcd", 256)[:cut])
        deltas, finish = await answered(opened(tokens_per_delta=2), request)
        assert b"".join(delta.data for delta in deltas) == b"abcd"[cut:]
        assert (finish.reason, finish.completion_tokens) == ("stop", max(0, 5 - cut))
    assert opened().shown(tuple("né".encode())) == "né"


@pytest.mark.parametrize(("fault", "error"), [("raise", RuntimeError), ("oom", MemoryError)])
async def test_whoever_finds_the_trigger_fails_and_nobody_else(
    fault: str, error: type[Exception], tmp_path: Path
) -> None:
    """W19: one of many, once, in the middle of it."""
    trigger = tmp_path / "now"
    engine = opened(trigger=str(trigger), fault=fault, tokens_per_second=100)
    running = [asyncio.ensure_future(answered(engine, asked("a" * 20))) for _ in range(5)]
    await asyncio.sleep(0.05)
    trigger.touch()
    ended = await asyncio.gather(*running, return_exceptions=True)
    assert [type(one) for one in ended if isinstance(one, BaseException)] == [error]
    assert not trigger.exists()
    await answered(engine, asked("ab"))


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"fault": "exit"}, 0),
        ({"fault": "crash", "crash_signal": 11}, -11),
        ({"fault": "crash"}, -9),
    ],
)
def test_the_trigger_ends_the_process(options: dict[str, Any], code: int, tmp_path: Path) -> None:
    trigger = tmp_path / "now"
    trigger.touch()
    program = f"""
import asyncio
from tests.engines.test_echo import answered, asked, opened
asyncio.run(answered(opened(trigger={str(trigger)!r}, **{options!r}), asked("abc")))
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == code
    assert not trigger.exists()


async def test_tokens_are_bytes_both_ways() -> None:
    """W21: tokenize is what generate counts."""
    engine = opened()
    token_ids = engine.tokenize("né🌍", add_special=True)
    _, finish = await answered(engine, asked("né🌍"))
    assert finish.prompt_tokens == len(token_ids)
    assert engine.detokenize(token_ids) == "né🌍"
    assert engine.detokenize([*token_ids, 256]) == "né🌍"
    with pytest.raises(InvalidRequest):
        engine.detokenize([257])
    with pytest.raises(InvalidRequest):
        await answered(engine, EngineRequest(token_ids=(999,), max_tokens=1))


async def test_closing_it_midway_leaves_nothing() -> None:
    """W18: no task, and the next request is served."""
    engine = opened(tokens_per_second=50)
    before = asyncio.all_tasks()
    for count in (1, 3):
        raw = engine.generate(asked("abcdef"))
        for _ in range(count):
            await anext(raw)
        await raw.aclose()
    assert asyncio.all_tasks() == before
    assert (await answered(opened(), asked("ok")))[1].reason == "stop"


def test_the_text_is_whole_whatever_the_pieces() -> None:
    """W13: the bytes of the deltas are the bytes of the text."""
    for size, text in itertools.product((1, 2, 3, 5), ("né🌍", "日本語")):
        deltas, _ = asyncio.run(answered(opened(tokens_per_delta=size), asked(text)))
        whole = codecs.iterdecode((delta.data for delta in deltas), "utf-8")
        assert "".join(whole) == text


@pytest.mark.parametrize("length", [1, 64, 65])
async def test_all_of_a_prompt_takes_its_time(length: int) -> None:
    engine = opened(prefill_tokens_per_second=500, text="x")
    began = time.monotonic()
    await answered(engine, asked("a" * length))
    assert time.monotonic() - began >= length / 500


async def test_streams_in_step_write_at_the_same_moments() -> None:
    engine = opened(tokens_per_second=20, in_step=True)
    loop = asyncio.get_running_loop()
    moments: list[list[float]] = []

    async def read(wait_s: float) -> None:
        await asyncio.sleep(wait_s)
        stream = engine.generate(asked("abc"))
        moments.append([loop.time() async for one in stream if isinstance(one, RawDelta)])

    await asyncio.gather(read(0.0), read(0.02))
    # By themselves they are 0.4 of a step apart; a late machine does not move them all.
    apart = [abs(one - other) * 20 % 1 for one, other in itertools.product(*moments)]
    assert min(min(one, 1 - one) for one in apart) < 0.1


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "n": {"type": "integer"}},
    "required": ["name", "n"],
}


@pytest.mark.parametrize(
    ("text", "constraint", "answer"),
    [
        ('{"name": "x", "n": 1}', Constraint(json_schema=SCHEMA), '{"name": "x", "n": 1}'),
        ('Here:\n{"name": "x"', Constraint(json_schema=SCHEMA), '{"name": "x", "n": 0}'),
        ("Hello", Constraint(json_schema=SCHEMA), '{"name": "", "n": 0}'),
        ("ab", Constraint(regex="[a-z]+;x*y"), "ab;y"),
        ("n", Constraint(choice=("yes", "no")), "no"),
    ],
)
def test_it_keeps_to_a_form(text: str, constraint: Constraint, answer: str) -> None:
    """Issue 13, shown 1: what a form allows of the text, then the soonest end."""
    assert bytes(kept(text.encode(), constraint)).decode() == answer
