"""Loading, cancelling, running out of memory, closing. In a worker: the contract suite."""

from __future__ import annotations

import asyncio
import json
import shutil
import weakref
from contextlib import aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import psutil
import pytest
from tests.engines.transformers.asking import answered, asked, events, finish, tokens
from tests.engines.transformers.conftest import opened

from headrace import engines
from headrace.core.errors import ConfigError, GenerationFailed, LoadFailed, OutOfMemory
from headrace.engines.base import Admitted, OpenRequest, RawDelta
from headrace.models.inspect import inspect

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

LONG = "word " * 400


def running(engine: Engine) -> int:
    manager = getattr(engine._runner, "_manager", None)
    if manager is None:
        return len(engine._model._forward_pre_hooks)
    if manager.batch_processor is None:  # a new one, that has not had a request yet
        return 0
    scheduler = manager.batch_processor.scheduler
    return len(scheduler.active_requests) + len(scheduler.waiting_requests)


@pytest.mark.parametrize("phase", [Admitted, RawDelta])
async def test_cancelling_frees_the_slot(tiny: Engine, phase: type) -> None:
    """W17: in prefill and in decode."""
    for _ in range(3):
        async with aclosing(tiny.generate(asked(tiny, LONG, 100, ignore_eos=True))) as stream:
            async for event in stream:
                if isinstance(event, phase):
                    break
        assert running(tiny) == 0
    assert len(await answered(tiny, "Why?", 4, ignore_eos=True)) == 4


async def test_cancelling_at_once_leaves_nothing(tiny: Engine) -> None:
    """W17: before the engine has seen the request."""
    stream = tiny.generate(asked(tiny, LONG, 100, ignore_eos=True))
    task = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await stream.aclose()
    assert running(tiny) == 0


async def test_a_prompt_is_computed_in_steps(tiny: Engine) -> None:
    """W16: the progress of a prefill is told."""
    seen = await events(tiny, asked(tiny, "step " * 400, 1))
    done = [event.done for event in seen if isinstance(event, Admitted)]
    assert done[:3] == [0, 32, 64]
    assert done == sorted(done)
    assert finish(seen).prompt_tokens == 410


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", OutOfMemory),
        ("[enforce fail] DefaultCPUAllocator: can't allocate memory", OutOfMemory),
        ("shapes cannot be multiplied", GenerationFailed),
    ],
)
async def test_a_failure_of_torch_is_survived(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch, said: str, error: type[Exception]
) -> None:
    """W19, W20: those that run fail with an error of ours; the engine goes on."""
    import torch

    forward, kind = tiny._model.forward, RuntimeError
    if said.startswith("CUDA"):
        kind = torch.OutOfMemoryError
    calls = 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise kind(said)
        return forward(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tiny._model, "forward", fails)
        asking = [answered(tiny, "Why?", 8, ignore_eos=True) for _ in range(2)]
        ended = await asyncio.gather(*asking, return_exceptions=True)
    assert any(isinstance(one, error) for one in ended)
    assert all(isinstance(one, error | tuple | GenerationFailed) for one in ended)
    assert running(tiny) == 0
    assert len(await answered(tiny, "Why?", 8, ignore_eos=True)) == 8


async def test_closing_gives_the_memory_back(smollm2_folder: Path) -> None:
    """W8: in bfloat16, as asked for."""
    process = psutil.Process()
    engine = opened(smollm2_folder, dtype="bfloat16")
    assert engine._model.dtype.itemsize == 2
    assert len(await answered(engine, "Why?", 2)) == 2
    model, loaded = weakref.ref(engine._model), process.memory_info().rss
    engine.close()
    engine.close()
    assert model() is None
    assert loaded - process.memory_info().rss > 200 << 20
    with pytest.raises(GenerationFailed, match="closed"):
        await answered(engine, "Why?", 2)


def copied(folder: Path, to: Path, **config: Any) -> Path:
    shutil.copytree(folder, to)
    table = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(table | config))
    return to


def test_what_is_not_there_is_said_before_loading(tiny_folder: Path) -> None:
    """W24: quantisation without CUDA, a device that is missing, an option that is wrong."""
    for options, message in (
        ({"quantization": "int4"}, "bitsandbytes"),
        ({"dtype": "float8"}, "dtype"),
        ({"slot": 1}, "slots"),
    ):
        with pytest.raises(ConfigError, match=message):
            engines.open_engine(
                "transformers", OpenRequest(model=inspect(tiny_folder), options=options)
            )
    with pytest.raises(LoadFailed, match="no device cuda"):
        engines.open_engine("transformers", OpenRequest(model=inspect(tiny_folder), device="cuda"))


def test_code_of_a_model_is_not_run(tiny_folder: Path, tmp_path: Path) -> None:
    """W28: it is refused, and what it is for is said."""
    folder = copied(
        tiny_folder,
        tmp_path / "own",
        model_type="own",
        auto_map={"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    )
    (folder / "own.py").write_text("raise SystemExit('it was run')\n")
    with pytest.raises(LoadFailed, match="trust_remote_code"):
        opened(folder)


def test_pickled_weights_are_not_read(tiny_folder: Path, tmp_path: Path) -> None:
    """W28: safetensors only."""
    folder = copied(tiny_folder, tmp_path / "pickled")
    file = inspect(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LoadFailed, match="could not load"):
        engines.open_engine("transformers", OpenRequest(model=file, device="cpu"))


async def test_a_model_that_knows_no_batches_answers_alone(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the manager computes is compared with the model alone before it is used."""
    from headrace.engines.transformers import batched

    right = batched._unbatched_logits

    def wrong(model: Any, prompt: Any) -> Any:
        return [logits.flip(0) for logits in right(model, prompt)]

    monkeypatch.setattr(batched, "_unbatched_logits", wrong)
    engine = opened(tiny_folder)
    try:
        assert engine.facts.max_running == 1
        assert "one request at a time" in engine.facts.notes[0]
        assert len(await answered(engine, "Why?", 2, ignore_eos=True)) == 2
    finally:
        engine.close()


def test_the_estimate_follows_the_options(tiny_folder: Path) -> None:
    def estimated(**options: Any):
        model = inspect(tiny_folder)
        return engines.footprint(
            "transformers", OpenRequest(model=model, device="cpu", options=options)
        )

    whole, half = estimated(), estimated(dtype="bfloat16")
    assert sum(whole.parts.values()) == sum(whole.devices.values())
    assert half.parts["weights"] * 2 == whole.parts["weights"]
    assert half.parts["kv_cache"] * 2 == whole.parts["kv_cache"]
    assert whole.max_running == 16
    assert estimated(cache_tokens=1024).parts["kv_cache"] == 1024 * 512


def test_the_memory_of_a_gpu_that_the_service_does_not_list(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M6: torch knows AMD's GPU; the list of GPUs is NVIDIA's, and the budget the host's."""
    import torch

    from headrace.engines.transformers.engine import _with_memory

    request = OpenRequest(model=inspect(tiny_folder), device="rocm", memory=1 << 40)
    assert _with_memory(request, "cuda:0") == request
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6 << 30, 8 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1 << 30)
    assert _with_memory(request, "cpu") == request
    assert _with_memory(request, "cuda:0").memory == 7 << 30


async def test_more_tokens_than_the_cache_holds(tiny_folder: Path) -> None:
    """W4: requests that are pushed out of it are computed again, and say the same."""
    engine = opened(tiny_folder, context_length=256, cache_tokens=256, slots=4)
    try:
        asking = [asked(engine, f"{number} " * 60, 60, ignore_eos=True) for number in range(4)]
        alone = [tokens(await events(engine, one)) for one in asking]
        seen = await asyncio.gather(*(events(engine, one) for one in asking))
        assert [tokens(one) for one in seen] == alone
        assert {finish(one).completion_tokens for one in seen} == {60}
        with_seed = [asked(engine, "1 " * 60, 60, temperature=1, seed=3, logprobs=0)] * 4
        made = await asyncio.gather(*(events(engine, one) for one in with_seed))
        assert len({tokens(one) for one in made}) == 1
    finally:
        engine.close()


def test_answers_that_must_repeat_come_one_at_a_time(tiny_folder: Path) -> None:
    request = OpenRequest(model=inspect(tiny_folder), device="cpu", repeatable=True)
    engine = cast("Engine", engines.open_engine("transformers", request))
    engine.close()
    assert engine.facts.max_running == 1
    assert engine.facts.capabilities.batch_invariant
    assert engines.footprint("transformers", request).max_running == 1
