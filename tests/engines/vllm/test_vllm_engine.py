"""The engine on its build for CPUs: scripts/install-vllm-cpu makes what this needs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import psutil
import pytest
from tests import models_made
from tests.adapters_made import SMOLLM2_FOLDER, peft_adapter

from headrace.core.constraint import Constraint
from headrace.core.errors import ConfigError, InvalidRequest, Unsupported, WorkerDied
from headrace.core.sampling import Sampling
from headrace.engines.base import Admitted, EngineRequest, OpenRequest, RawDelta, RawFinish
from headrace.engines.vllm.engine import Engine
from headrace.models.adapter import checked
from headrace.models.inspect import inspect

pytestmark = [
    pytest.mark.engines,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    # vLLM and what it imports warn of one another.
    pytest.mark.filterwarnings("default"),
]

OPTIONS = {"eager": True, "kv_cache_bytes": 256 << 20, "dtype": "float32"}
CHAT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"

OPENED = f"""
import multiprocessing, sys, time
from pathlib import Path
import psutil
from headrace.engines.base import OpenRequest
from headrace.engines.vllm.engine import Engine
from headrace.models.inspect import inspect
if __name__ == "__main__":
    model = inspect(Path(sys.argv[1]))
    engine = Engine(OpenRequest(model=model, context_length=256, options={OPTIONS!r}))
    below = [one.pid for one in psutil.Process().children(recursive=True)]
    print("below", *below, flush=True)
    time.sleep(600)
"""


def asked(folder: Path) -> OpenRequest:
    return OpenRequest(model=inspect(folder), context_length=512, max_running=8, options=OPTIONS)


@pytest.fixture(scope="module")
def folder(smollm2_path: Path) -> Path:
    return models_made.smollm2(smollm2_path)


@pytest.fixture(scope="module")
async def engine(folder: Path) -> AsyncIterator[Engine]:
    engine = await asyncio.to_thread(Engine, asked(folder))
    yield engine
    await asyncio.to_thread(engine.close)


class Answer:
    def __init__(self, events: Sequence[object]) -> None:
        deltas = [event for event in events if isinstance(event, RawDelta)]
        self.text = b"".join(delta.data for delta in deltas).decode()
        self.ids = tuple(token for delta in deltas for token in delta.token_ids)
        self.logprobs = [one for delta in deltas for one in delta.logprobs]
        assert isinstance(events[0], Admitted)
        assert isinstance(events[-1], RawFinish)
        self.finish = events[-1]


async def ask(engine: Engine, text: str = CHAT, most: int = 24, **fields: object) -> Answer:
    schema, answered = fields.pop("schema", None), fields.pop("answered", ())
    adapter = str(fields.pop("adapter", ""))
    request = EngineRequest(
        token_ids=tuple(engine.tokenize(text, add_special=False)),
        max_tokens=most,
        answered=answered,  # type: ignore[arg-type]
        constraint=None if schema is None else Constraint(json_schema=schema),  # type: ignore[arg-type]
        adapter=adapter,
        sampling=Sampling(**{"temperature": 0.0, **fields}),  # type: ignore[arg-type]
    )
    return Answer([event async for event in engine.generate(request)])


async def test_an_answer_and_its_account(engine: Engine) -> None:
    """W15: the end token is no part of the answer; the prefix comes from the cache."""
    long = CHAT.replace("What", "Tell me, as you know everything: what " + "really " * 200)
    first, second = await ask(engine, long, 4), await ask(engine, long, 4)
    assert first.ids == second.ids
    assert second.finish.cached_tokens > first.finish.cached_tokens
    whole = await ask(engine)
    assert whole.text == "The capital of France is Paris."
    assert whole.finish.reason == "stop"
    assert whole.finish.completion_tokens == len(whole.ids)


async def test_limits_and_ends(engine: Engine) -> None:
    """W11: max_tokens, stop_token_ids and ignore_eos."""
    whole = await ask(engine)
    cut = await ask(engine, stop_token_ids=(whole.ids[3],))
    assert (cut.ids, cut.finish.reason) == (whole.ids[:3], "stop")
    assert cut.finish.completion_tokens == 3
    on = await ask(engine, most=12, ignore_eos=True)
    assert (on.finish.reason, len(on.ids)) == ("length", 12)


async def test_logprobs(engine: Engine) -> None:
    """W11: the chosen token and the candidates, best first, with their bytes."""
    found = await ask(engine, logprobs=3)
    assert [one.token_id for one in found.logprobs] == list(found.ids)
    assert b"".join(one.data for one in found.logprobs).decode() == found.text
    assert all(len(one.top) == 3 for one in found.logprobs)
    assert all(one.top[0].token_id == one.token_id for one in found.logprobs)


async def test_json(engine: Engine) -> None:
    """W11: what a schema asks for comes; one that cannot be kept to is refused."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    schema["additionalProperties"] = False
    assert list(json.loads((await ask(engine, most=40, schema=schema)).text)) == ["city"]
    with pytest.raises(InvalidRequest):
        await ask(engine, schema={"type": "nonsense"})


async def test_going_on(engine: Engine) -> None:
    """W25: the tokens that were answered are the beginning of the answer."""
    whole = await ask(engine)
    rest = await ask(engine, answered=whole.ids[:3])
    assert whole.ids[:3] + rest.ids == whole.ids
    assert engine.shown(whole.ids) == whole.text


async def test_characters_of_several_tokens(engine: Engine) -> None:
    """W9: bytes are exact, wherever a character is cut."""
    text = "naïve 🦙 日本"
    ids = engine.tokenize(text, add_special=False)
    assert engine.shown(ids) == text
    assert b"".join(engine._vocabulary.data(one) for one in ids).decode() == text


async def test_that_leaving_frees_the_slot(engine: Engine) -> None:
    """W14: a closed stream is aborted."""
    request = EngineRequest(
        token_ids=tuple(engine.tokenize(CHAT, add_special=False)),
        max_tokens=400,
        sampling=Sampling(ignore_eos=True),
    )
    stream = engine.generate(request)
    async for event in stream:
        if isinstance(event, RawDelta):
            break
    await stream.aclose()
    assert engine._llm.output_processor.get_num_unfinished_requests() == 0


async def test_adapters_change_while_it_answers(folder: Path, tmp_path: Path) -> None:
    """Issue 17.4: in places that are there, and none in others; what runs stays the same."""
    model = inspect(folder)
    a, b = (
        msgspec.structs.replace(
            checked(
                peft_adapter(tmp_path / name, seed, layers=SMOLLM2_FOLDER, rank=8, size=0.2), model
            ),
            name=name,
        )
        for seed, name in enumerate("ab")
    )
    places = {"engine_args": {"max_loras": 3}}
    request = msgspec.structs.replace(asked(folder), options=OPTIONS | places)
    engine = await asyncio.to_thread(Engine, request)
    try:
        alone = await ask(engine, ignore_eos=True)
        await engine.add_adapter(a)
        first = await ask(engine, adapter="a", ignore_eos=True)
        running = asyncio.gather(
            *(ask(engine, adapter=name, ignore_eos=True) for name in ("a", "", "a"))
        )
        await engine.add_adapter(b)
        other = await ask(engine, adapter="b", ignore_eos=True)
        assert len({alone.ids, first.ids, other.ids}) == 3
        assert [answer.ids for answer in await running] == [first.ids, alone.ids, first.ids]
        with pytest.raises(Unsupported, match="fewer places"):
            await engine.add_adapter(msgspec.structs.replace(b, name="c"))
        with pytest.raises(Unsupported, match="rank"):
            await engine.add_adapter(msgspec.structs.replace(b, name="c", rank=64))
        await engine.remove_adapter("a")
        await engine.add_adapter(msgspec.structs.replace(b, name="a (2)"))
        again = await ask(engine, adapter="a (2)", ignore_eos=True)
        assert again.ids == other.ids
        assert (await ask(engine, ignore_eos=True)).ids == alone.ids
    finally:
        await asyncio.to_thread(engine.close)


async def test_that_a_strange_argument_is_refused(folder: Path) -> None:
    options = OPTIONS | {"engine_args": {"block_sise": 16}}
    with pytest.raises(ConfigError, match="block_size"):
        await asyncio.to_thread(Engine, OpenRequest(model=inspect(folder), options=options))


async def test_that_a_dead_core_is_told_and_closed(folder: Path) -> None:
    """W6: the death of the core is the worker's."""
    engine = await asyncio.to_thread(Engine, asked(folder))
    try:
        for core in engine._cores:
            core.kill()
        with pytest.raises(WorkerDied):
            await ask(engine)
    finally:
        await asyncio.to_thread(engine.close)
    assert not any(core.is_running() for core in engine._cores)


def test_that_the_core_ends_with_its_owner(folder: Path) -> None:
    """W6: nothing that holds a GPU is left behind."""
    command = [sys.executable, "-c", OPENED, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("below"))
        below = [psutil.Process(int(pid)) for pid in line.split()[1:]]
        os.kill(process.pid, signal.SIGKILL)
    assert below
    _, alive = psutil.wait_procs(below, 60)
    assert alive == []
