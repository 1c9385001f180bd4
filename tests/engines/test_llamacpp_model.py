"""The real model, in this process."""

from __future__ import annotations

import asyncio
import json
import math
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.engines.conftest import listening

from headrace.core.constraint import Constraint
from headrace.core.errors import GenerationFailed, InvalidRequest, LoadFailed
from headrace.core.events import TokenLogprob
from headrace.core.sampling import Sampling
from headrace.engines import open_engine
from headrace.engines.base import Admitted, EngineRequest, OpenRequest, RawDelta, RawFinish
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect

pytestmark = pytest.mark.usefixtures("light_collections")

POEM = "<|im_start|>user\nWrite a short poem about rivers.<|im_end|>\n<|im_start|>assistant\n"
HI = "<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n"


class Said(msgspec.Struct, frozen=True):
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: RawFinish


async def say(
    llama: Engine,
    prompt: str = POEM,
    max_tokens: int = 14,
    schema: dict[str, Any] | None = None,
    **sampling: Any,
) -> Said:
    request = EngineRequest(
        token_ids=tuple(llama.tokenize(prompt, add_special=True)),
        max_tokens=max_tokens,
        sampling=Sampling(**sampling),
        constraint=None if schema is None else Constraint(json_schema=schema),
    )
    events = [event async for event in llama.generate(request)]
    deltas = [event for event in events if isinstance(event, RawDelta)]
    finish = events[-1]
    assert isinstance(events[0], Admitted)
    assert isinstance(finish, RawFinish)
    return Said(
        b"".join(delta.data for delta in deltas).decode(errors="replace"),
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(one for delta in deltas for one in delta.logprobs),
        finish,
    )


@pytest.fixture(scope="session")
async def greedy(llama: Engine) -> Said:
    return await say(llama, temperature=0)


async def test_temperature_0_is_greedy(llama: Engine, greedy: Said) -> None:
    """W11: temperature 0 is deterministic, whatever the seed."""
    assert (await say(llama, temperature=0, seed=5)).text == greedy.text


async def test_a_seed_repeats_and_another_differs(llama: Engine) -> None:
    """W11: seed."""
    one, again, other = [await say(llama, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert one.text == again.text
    assert one.text != other.text


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0001}])
async def test_narrowed_to_one_candidate_it_is_greedy(
    llama: Engine, greedy: Said, narrow: dict[str, Any]
) -> None:
    """W11: top_k, min_p and top_p each cut the candidates."""
    hot = {"temperature": 2.0, "seed": 3, "top_k": 0, "min_p": 0.0, "top_p": 1.0}
    assert (await say(llama, **(hot | narrow))).text == greedy.text
    assert (await say(llama, **hot)).text != greedy.text


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.8}]
)
async def test_penalties_change_the_text(llama: Engine, penalty: dict[str, Any]) -> None:
    """W11: each penalty on its own turns a greedy text that repeats itself."""
    loop = "one two three one two three one two three one two"
    plain = await say(llama, loop, 6, temperature=0)
    assert plain.text != (await say(llama, loop, 6, temperature=0, **penalty)).text


async def test_a_penalty_reaches_over_the_whole_text(llama: Engine) -> None:
    """W11: not over the library's last 64 tokens alone."""
    base = "zebra. " + "The weather was fine and we went for a walk. " * 9 + "I saw a"
    zebra = llama.tokenize(" zebra", add_special=False)[0]
    forced = {"temperature": 0, "logit_bias": {zebra: 40.0}}
    near = (await say(llama, base, 1, **forced)).token_ids
    assert near == (zebra,)
    first = llama.tokenize("zebra", add_special=False)
    barred = {"temperature": 0, "logit_bias": {first[0]: 30.0}}
    said = await say(llama, base, 1, **barred)
    again = await say(llama, base, 1, **barred, repetition_penalty=10.0)
    assert said.token_ids == (first[0],)
    assert again.token_ids != said.token_ids


async def test_logit_bias_forbids_and_forces(llama: Engine, greedy: Said) -> None:
    """W11: logit_bias."""
    first = greedy.token_ids[0]
    assert first not in (await say(llama, temperature=0, logit_bias={first: -100.0})).token_ids
    forced = await say(llama, max_tokens=3, temperature=0, logit_bias={1000: 100.0})
    assert forced.token_ids == (1000,) * 3


async def test_stop_token_ids_end_the_text_before_themselves(llama: Engine, greedy: Said) -> None:
    """W11, W14, W15: stop_token_ids; the token is neither text nor counted."""
    place = next(at for at in range(3, 14) if greedy.token_ids[at] not in greedy.token_ids[:at])
    said = await say(llama, temperature=0, stop_token_ids=(greedy.token_ids[place],))
    assert said.token_ids == greedy.token_ids[:place]
    assert (said.finish.reason, said.finish.completion_tokens) == ("stop", place)


async def test_ignore_eos_reaches_the_limit(llama: Engine) -> None:
    """W11, W14: with ignore_eos length is the reason; without it, stop."""
    stopped = await say(llama, HI, 48, temperature=0)
    assert stopped.finish.reason == "stop"
    ignored = await say(llama, HI, 48, temperature=0, ignore_eos=True)
    assert (ignored.finish.reason, ignored.finish.completion_tokens) == ("length", 48)
    assert ignored.text.startswith(stopped.text)


async def test_usage_is_exact(llama: Engine, greedy: Said) -> None:
    """W15: tokens in are those of the tokenizer, tokens out those of the deltas."""
    assert greedy.finish.prompt_tokens == len(llama.tokenize(POEM, add_special=True))
    assert greedy.finish.completion_tokens == len(greedy.token_ids) == 14
    assert greedy.finish.reason == "length"
    stopped = await say(llama, HI, 48, temperature=0)
    assert stopped.finish.completion_tokens == len(stopped.token_ids)
    assert llama.detokenize(stopped.token_ids) == stopped.text + llama.facts.eos_token


async def test_a_prompt_seen_before_is_cached_and_gives_the_same(
    llama: Engine, greedy: Said
) -> None:
    """W15: cached tokens are counted, and change nothing."""
    again = await say(llama, temperature=0)
    assert 0 < again.finish.cached_tokens < again.finish.prompt_tokens
    assert again.text == greedy.text


@pytest.mark.parametrize("most", [0, 3])
async def test_logprobs_are_probabilities(llama: Engine, greedy: Said, most: int) -> None:
    """W11: one for each token, candidates in order, their sum at most one."""
    said = await say(llama, temperature=0, logprobs=most)
    assert said.text == greedy.text
    assert tuple(one.token_id for one in said.logprobs) == said.token_ids
    assert b"".join(one.data for one in said.logprobs).decode() == said.text
    for one in said.logprobs:
        tops = [top.logprob for top in one.top]
        assert len(tops) == most
        assert tops == sorted(tops, reverse=True)
        assert sum(map(math.exp, tops)) <= 1 + 1e-6
        assert one.logprob <= 0
        if most:
            assert (one.top[0].token_id, one.top[0].logprob) == (one.token_id, one.logprob)


async def test_a_character_of_several_tokens_has_an_entry_for_each(llama: Engine) -> None:
    """Issue 12.9: with the token's own bytes and candidates; the text is the same."""
    emoji = "Repeat: 😀😃😄😁 😀😃😄😁 😀😃😄😁 😀😃😄😁"
    plain = await say(llama, emoji, 12, temperature=0)
    said = await say(llama, emoji, 12, temperature=0, logprobs=2)
    assert (said.text, said.token_ids) == (plain.text, plain.token_ids)
    assert tuple(entry.token_id for entry in said.logprobs) == said.token_ids
    assert len(said.text) < len(said.token_ids) == 12
    assert b"".join(entry.data for entry in said.logprobs).decode() == said.text
    for entry in said.logprobs:
        best = entry.top[0]
        assert (best.token_id, best.data, best.logprob) == (
            entry.token_id,
            entry.data,
            entry.logprob,
        )
        assert entry.logprob > entry.top[1].logprob


async def test_an_answer_that_is_cut_within_a_character_has_all_its_entries(llama: Engine) -> None:
    """Issue 12.9: wherever max_tokens or a stop token ends it; none is added behind it."""
    emoji = "Repeat: 😀😃😄😁 😀😃😄😁 😀😃😄😁 😀😃😄😁"
    whole = await say(llama, emoji, 12, temperature=0, logprobs=1)
    data = b"".join(entry.data for entry in whole.logprobs)
    for most in (1, 2, 3, 6):
        cut = await say(llama, emoji, most, temperature=0, logprobs=1)
        assert [entry.token_id for entry in cut.logprobs] == [*whole.token_ids[:most]]
        assert (cut.finish.reason, cut.finish.completion_tokens) == ("length", most)
        assert data.startswith(b"".join(entry.data for entry in cut.logprobs))
    stops = (whole.token_ids[6],)
    place = whole.token_ids.index(*stops)
    stopped = await say(llama, emoji, 12, temperature=0, logprobs=0, stop_token_ids=stops)
    assert [entry.token_id for entry in stopped.logprobs] == [*whole.token_ids[:place]]
    assert (stopped.finish.reason, stopped.finish.completion_tokens) == ("stop", place)


async def test_a_json_schema_is_kept(llama: Engine) -> None:
    """W11: json_schema gives JSON of that shape."""
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["age"],
        "additionalProperties": False,
    }
    # This prompt once led to white space without an end, which JSON allows.
    said = await say(llama, POEM, 30, schema, temperature=0)
    assert said.finish.reason == "stop"
    answer = json.loads(said.text)
    assert answer.keys() == {"age"}
    assert 0 <= answer["age"] <= 99


@pytest.mark.parametrize("token", [10**6, -1, 1 << 40, 1 << 70])
async def test_a_token_that_does_not_exist_is_refused(llama: Engine, token: int) -> None:
    """W17: by a typed error and never as another token; the engine lives on."""
    with pytest.raises(InvalidRequest):
        _ = [raw async for raw in llama.generate(EngineRequest(token_ids=(token,), max_tokens=2))]
    with pytest.raises(InvalidRequest):
        llama.detokenize([token])
    with pytest.raises(InvalidRequest) as caught:
        await say(llama, logit_bias={token: 100.0})
    assert caught.value.param == "logit_bias"
    assert (await say(llama, max_tokens=1)).finish.completion_tokens == 1


async def test_counting_does_not_wait_behind_generation(llama: Engine) -> None:
    """W21: while all slots decode, tokenize answers."""
    busy = [asyncio.ensure_future(say(llama, max_tokens=24, ignore_eos=True)) for _ in range(4)]
    await asyncio.sleep(0.2)
    began = time.monotonic()
    token_ids = await asyncio.to_thread(llama.tokenize, "Hello world", add_special=False)
    assert time.monotonic() - began < 0.5
    assert not any(task.done() for task in busy)
    assert llama.detokenize(token_ids) == "Hello world"
    await asyncio.gather(*busy)


async def test_the_slot_is_free_once_the_stream_is_closed(llama: Engine) -> None:
    """W18: four abandoned streams, then four at once, without a wait."""
    token_ids = tuple(llama.tokenize(POEM, add_special=True))
    for _ in range(4):
        raw = llama.generate(
            EngineRequest(token_ids=token_ids, max_tokens=1500, sampling=Sampling(ignore_eos=True))
        )
        while not isinstance(await anext(raw), RawDelta):
            pass
        await raw.aclose()
    async with asyncio.timeout(5):
        said = await asyncio.gather(*(say(llama, max_tokens=3) for _ in range(4)))
    assert all(one.finish.completion_tokens == 3 for one in said)


def direct(llama: Engine, prompt: str, max_tokens: int) -> str:
    """What the library itself answers, without anything of ours, in one piece."""
    chunks: list[bytes] = []
    body = {
        "prompt": list(llama.tokenize(prompt, add_special=True)),
        "max_tokens": max_tokens,
        "temperature": 0,
    }

    def take(raw: bytes) -> bool:
        chunks.append(bytes(raw))
        return False

    llama._library().handle_completions(json.dumps(body).encode(), take)
    return json.loads(chunks[-1])["choices"][0]["text"]


async def test_greedy_text_is_the_librarys_own_alone_and_in_a_crowd(
    llama: Engine, greedy: Said
) -> None:
    """W13, W20: byte for byte, streamed or not, alone or among 16 others."""
    own = await asyncio.to_thread(direct, llama, POEM, 14)
    assert greedy.text == own
    others = [say(llama, f"{number}, {number + 1},", 10, temperature=0) for number in range(16)]
    crowd = await asyncio.gather(say(llama, temperature=0), *others)
    assert crowd[0].text == own


async def test_the_listener_is_locked_away(llama: Engine, listening_before: set[int]) -> None:
    """W1: a socket file for this user alone, behind a key, and no port."""
    server = llama._link
    assert server is not None
    mode = stat.S_IMODE(server.folder.stat().st_mode)
    assert mode == 0o700
    assert listening() <= listening_before
    key, server.key = server.key, "wrong"
    try:
        with pytest.raises(GenerationFailed) as caught:
            llama.tokenize("a", add_special=False)
    finally:
        server.key = key
    assert "api key" in (caught.value.detail or "").lower()


async def test_the_facts_are_those_of_the_model(llama: Engine) -> None:
    """W6, W22: context, slots, special tokens."""
    facts = llama.facts
    assert (facts.context_length, facts.max_running, facts.device) == (2048, 4, "cpu")
    assert facts.eos_token == "<|im_end|>"
    assert facts.chat_template
    assert facts.capabilities.json_schema


def test_a_context_beyond_the_models_is_refused(smollm2_path: Path) -> None:
    """W6: never more than the model has, in silence."""
    with pytest.raises(LoadFailed, match="context_length"):
        open_engine(
            "llamacpp",
            OpenRequest(model=inspect(smollm2_path), context_length=8448, options={"slots": 1}),
        )


def test_a_device_is_really_the_one_asked_for(smollm2_path: Path) -> None:
    """W4: cpu is cpu, and what is not there is refused and not replaced."""
    with pytest.raises(LoadFailed, match="no device mps"):
        open_engine("llamacpp", OpenRequest(model=inspect(smollm2_path), device="mps"))


def test_a_load_and_a_close_leave_the_host_as_it_was(smollm2_path: Path, tmp_path: Path) -> None:
    """W8: signals are the host's own, threads end, the private directory is gone."""
    program = """
import os, signal, sys, tempfile, threading, time
from pathlib import Path
from headrace.engines.base import OpenRequest
from headrace.engines.llamacpp.engine import Engine
from headrace.models.inspect import inspect
from tests.engines.conftest import listening
caught = []
signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
engine = Engine(OpenRequest(model=inspect(Path(sys.argv[1])), context_length=256,
                            options={"slots": 1}))
os.kill(os.getpid(), signal.SIGTERM)
assert caught == [signal.SIGTERM], caught
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
except KeyboardInterrupt:
    caught.append("interrupt")
assert caught[1:] == ["interrupt"], caught
engine.tokenize("still here", add_special=False)
assert any(Path(tempfile.gettempdir()).iterdir())
engine.close()
engine.close()
assert not any(Path(tempfile.gettempdir()).iterdir())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(smollm2_path)],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
