"""Adapters in torch: the same as merged weights, in any mixture of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tests.adapters_made import TINY_FOLDER, peft_adapter
from tests.engines.transformers.asking import asked, deltas, events, finish
from tests.engines.transformers.conftest import opened

from headrace.core.adapter import AdapterFile
from headrace.core.errors import LoadFailed
from headrace.engines.base import EngineRequest, RawDraft, RawEvent
from headrace.models.adapter import checked
from headrace.models.inspect import inspect

if TYPE_CHECKING:
    from headrace.engines.transformers.engine import Engine

pytestmark = pytest.mark.engines

NAMES = ("", "a", "b")
# Longer than a page of the cache and than a step.
PROMPT = "The rivers of the north are wide, cold and slow. " * 28


@pytest.fixture(scope="module")
def files(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[AdapterFile, ...]:
    folder, model = tmp_path_factory.mktemp("adapters"), inspect(tiny_folder)
    a = checked(peft_adapter(folder / "a", 1, layers=TINY_FOLDER), model)
    b = peft_adapter(
        folder / "b", 2, layers=TINY_FOLDER, rank=4, lora_alpha=16, use_rslora=True, size=0.5
    )
    return (
        msgspec.structs.replace(a, name="a", scale=0.5),
        msgspec.structs.replace(checked(b, model), name="b"),
    )


@pytest.fixture(scope="module", params=["auto", "off"])
async def engine(
    request: pytest.FixtureRequest, tiny_folder: Path, files: tuple[AdapterFile, ...]
) -> AsyncIterator[Engine]:
    """The small random model with both adapters, in batches and one at a time."""
    batching = request.param
    engine = opened(tiny_folder, adapters=files, batching=batching, slots=4, step_tokens=64)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
async def merged(
    tiny_folder: Path, files: tuple[AdapterFile, ...]
) -> AsyncIterator[Mapping[str, Engine]]:
    """The model alone, and one for each adapter whose weights have it added."""
    import torch

    load_file: Any = import_module("safetensors.torch").load_file
    engines = {name: opened(tiny_folder, batching="off") for name in NAMES}
    scales = {"a": 0.5 * 2 / 2, "b": 16 / 4**0.5}
    with torch.no_grad():
        for file in files:
            halves = load_file(Path(file.path) / "adapter_model.safetensors")
            modules = dict(engines[file.name]._model.named_modules())
            for layer in TINY_FOLDER:
                first, second = (
                    halves[f"base_model.model.{layer}.lora_{half}.weight"] for half in "AB"
                )
                weight: Any = modules[layer].weight
                weight += scales[file.name] * second @ first
    yield engines
    for engine in engines.values():
        engine.close()


def adapted(engine: Engine, name: str, text: str = PROMPT) -> EngineRequest:
    return msgspec.structs.replace(asked(engine, text, 8, logprobs=5), adapter=name)


def choices(answer: list[RawEvent]) -> list[tuple[int, list[float]]]:
    """Each token of an answer with the five highest log probabilities."""
    reports = [report for delta in deltas(answer) for report in delta.logprobs]
    return [(report.token_id, [top.logprob for top in report.top]) for report in reports]


def check_equal(answer: list[RawEvent], expected: list[RawEvent]) -> None:
    """Compare two answers, up to a token that is chosen by rounding."""
    pairs = [*zip(choices(answer), choices(expected), strict=True)]
    assert len(pairs) == 8
    for (token, logprobs), (other, others) in pairs:
        assert logprobs == pytest.approx(others, abs=5e-3)
        if token != other:
            assert others[0] - others[1] < 1e-2
            return


async def test_they_are_merged_weights(engine: Engine, merged: Mapping[str, Engine]) -> None:
    """Issue 17.4: the text of each is that of a model with the sum of the weights, in any order."""
    expected = {name: await events(merged[name], adapted(engine, "")) for name in NAMES}
    assert len({choices(answer)[0][1][0] for answer in expected.values()}) == 3
    mixed = [name for _ in range(3) for name in NAMES]
    answers = await asyncio.gather(*(events(engine, adapted(engine, name)) for name in mixed))
    for name, answer in zip(mixed, answers, strict=True):
        check_equal(answer, expected[name])


async def test_scored_prompts(engine: Engine, merged: Mapping[str, Engine]) -> None:
    """Issue 17.4: log probabilities of a prompt are those of the adapter, too."""
    ids = adapted(engine, "").token_ids
    for name in NAMES:
        lists: list[list[float]] = []
        for scorer, adapter in ((engine, name), (merged[name], "")):
            parts = scorer.prompt_tokens(ids, 0, adapter)
            lists.append([token.logprob or 0 async for part in parts for token in part])
        assert lists[0] == pytest.approx(lists[1], abs=1e-3)


async def test_prompts_are_cached_for_each(
    tiny_folder: Path, files: tuple[AdapterFile, ...]
) -> None:
    """Issue 17.4: the second request of an adapter finds its prompt, and no other's."""
    engine = opened(tiny_folder, adapters=files, slots=4)

    async def cached(name: str) -> int:
        return finish(await events(engine, adapted(engine, name))).cached_tokens

    try:
        assert [await cached(name) for name in NAMES] == [0, 0, 0]
        assert min([await cached(name) for name in NAMES]) > 32
    finally:
        engine.close()


async def test_they_change_while_it_answers(
    tiny_folder: Path, files: tuple[AdapterFile, ...], engine: Engine
) -> None:
    """Issue 17.4: first of a model without, then beside running answers, which stay the same."""
    a, b = files
    expected = {name: await events(engine, adapted(engine, name)) for name in NAMES}
    for batching in ("auto", "off"):
        changing = opened(tiny_folder, slots=4, step_tokens=64, batching=batching)
        try:
            check_equal(await events(changing, adapted(changing, "")), expected[""])
            await changing.add_adapter(a)
            running = asyncio.gather(
                *(events(changing, adapted(changing, name)) for name in ("a", "", "a"))
            )
            await changing.add_adapter(b)
            check_equal(await events(changing, adapted(changing, "b")), expected["b"])
            for name, answer in zip(("a", "", "a"), await running, strict=True):
                check_equal(answer, expected[name])
            await changing.remove_adapter("a")
            await changing.add_adapter(msgspec.structs.replace(b, name="a"))
            answer = await events(changing, adapted(changing, "a"))
            assert finish(answer).cached_tokens == 0
            check_equal(answer, expected["b"])
            await changing.remove_adapter("a")
            await changing.remove_adapter("b")
            check_equal(await events(changing, adapted(changing, "")), expected[""])
            assert not any(module._forward_hooks for module in changing._model.modules())
        finally:
            changing.close()


async def test_one_that_is_refused_leaves_nothing(
    tiny_folder: Path, files: tuple[AdapterFile, ...], tmp_path: Path
) -> None:
    """Issue 17.4: added while it serves; the next of its name is another."""
    layers = dict(TINY_FOLDER) | {"model.embed_tokens": (64, 49152)}
    file = checked(peft_adapter(tmp_path / "a", 1, layers=layers), inspect(tiny_folder))
    engine = opened(tiny_folder, slots=4)
    try:
        with pytest.raises(LoadFailed, match=r"embed_tokens' is no linear layer in torch"):
            await engine.add_adapter(msgspec.structs.replace(file, name="x"))
        assert not any(module._forward_hooks for module in engine._model.modules())
        await engine.add_adapter(msgspec.structs.replace(files[0], name="x"))
        assert await events(engine, adapted(engine, "x"))
    finally:
        engine.close()


def test_what_is_no_linear_layer(tiny_folder: Path, tmp_path: Path) -> None:
    """Issue 17.4: refused by its name, and not left out."""
    layers = {"model.embed_tokens": (64, 49152)}
    file = checked(peft_adapter(tmp_path / "a", 1, layers=layers), inspect(tiny_folder))
    with pytest.raises(LoadFailed, match=r"embed_tokens' is no linear layer in torch"):
        opened(tiny_folder, adapters=[msgspec.structs.replace(file, name="a")])


async def test_drafts_of_requests_with_adapters(
    engine: Engine, tiny_folder: Path, files: tuple[AdapterFile, ...]
) -> None:
    """Issue 17.3: several logits of a request are of its adapter; the text repeats itself."""
    bias = dict.fromkeys((41, 42, 43), 100.0)

    def request(name: str) -> EngineRequest:
        given = {"ignore_eos": True, "logit_bias": bias, "logprobs": 5}
        made = asked(engine, "The rivers of the north are wide.", 24, **given)
        return msgspec.structs.replace(made, adapter=name)

    drafting = opened(tiny_folder, adapters=files, slots=4, speculation="ngram", threads=1)
    try:
        mixed = [*NAMES, "a"]
        answers = await asyncio.gather(*(events(drafting, request(name)) for name in mixed))
    finally:
        drafting.close()
    assert all(any(isinstance(event, RawDraft) for event in answer) for answer in answers)
    for name, answer in zip(mixed, answers, strict=True):
        expected = choices(await events(engine, request(name)))
        for (token, logprobs), (other, others) in zip(choices(answer), expected, strict=True):
            assert token == other
            assert logprobs == pytest.approx(others, abs=5e-3)
