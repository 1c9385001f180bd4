"""What can be told of the engine without its library."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from tests.adapters_made import peft_adapter

from headrace import engines
from headrace.core.adapter import AdapterFile
from headrace.core.errors import ConfigError, GenerationFailed
from headrace.core.events import PromptToken, TopLogprob
from headrace.core.model import ModelFile
from headrace.core.sampling import Sampling
from headrace.engines import vllm
from headrace.engines.base import EngineRequest, OpenRequest, RawDelta
from headrace.engines.vllm import footprint, memory_arguments
from headrace.engines.vllm.adapters import adapter_folder, lora_arguments
from headrace.engines.vllm.call import Call, is_out_of_memory, prompt_tokens
from headrace.engines.vllm.engine import check
from headrace.machine import Device
from headrace.models.adapter import inspect

GIB = 1 << 30
KNOWN = ("model", "dtype", "block_size", "attention_backend", "max_model_len", "_private")
MODEL = ModelFile(path="/m", format="safetensors", quantization="BF16", size=16 * GIB)


def gpus(count: int) -> tuple[Device, ...]:
    """The host and some GPUs."""
    host = Device(name="cpu", kind="cpu", total=64 * GIB, used=0)
    cards = [
        Device(name=f"cuda:{number} X", kind="cuda", total=100 * GIB, used=0)
        for number in range(count)
    ]
    return (host, *cards)


def test_that_further_arguments_pass() -> None:
    check(["block_size", "attention_backend"], KNOWN)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("blok_size", "nearest is block_size"),
        ("model", "Headrace sets it"),
        ("structured_outputs_config", "Headrace sets it"),
        ("dtype", "option dtype"),
        ("max_model_len", "context_length"),
        ("_private", "no engine argument"),
    ],
)
def test_that_other_arguments_are_refused(key: str, told: str) -> None:
    """W3: an unknown key is refused with the nearest known one."""
    with pytest.raises(ConfigError, match=told):
        check([key], KNOWN)


def adapter(tmp_path: Path, **changes: Any) -> AdapterFile:
    path = peft_adapter(tmp_path / "a", 1, layers={"model.layers.0.self_attn.q_proj": (8, 8)})
    return msgspec.structs.replace(inspect(path), name="a", **changes)


@pytest.mark.parametrize(("ranks", "most"), [([2], 8), ([8, 2], 8), ([9], 16), ([300], 320)])
def test_arguments_of_adapters(ranks: list[int], most: int, tmp_path: Path) -> None:
    """Issue 17.4: vLLM's buffers are for some ranks, and for a number of adapters in a batch."""
    file = adapter(tmp_path)
    files = [msgspec.structs.replace(file, rank=rank) for rank in ranks]
    assert lora_arguments(files, "cuda") == {
        "enable_lora": True,
        "max_lora_rank": most,
        "max_loras": len(ranks),
        "max_cpu_loras": 64,
    }
    many = lora_arguments([file] * 64, "cuda")
    assert (many["max_loras"], many["max_cpu_loras"]) == (16, 64)
    assert lora_arguments([], "cuda") == {}
    # On a CPU one place stays empty.
    assert lora_arguments(files, "cpu")["max_loras"] == len(ranks) + 1
    assert lora_arguments(files, "cpu", {"max_loras": 1})["max_loras"] == len(ranks) + 1
    given: dict[str, Any] = {"max_loras": 4, "max_lora_rank": 320}
    assert lora_arguments(files, "cuda", given)["max_loras"] == 4
    assert lora_arguments(files, "cuda", given)["max_lora_rank"] == max(320, most)
    assert lora_arguments([], "cuda", given)["max_lora_rank"] == 320
    assert lora_arguments([], "cuda", {"max_loras": 2})["max_lora_rank"] == 16


def test_the_scale_of_an_adapter(tmp_path: Path) -> None:
    """Issue 17.4: vLLM has none, so it is in the alpha of a copy; the weights are not copied."""
    private = tmp_path / "private"
    private.mkdir()
    file = adapter(tmp_path)
    assert adapter_folder(file, private) == file.path
    folder = Path(adapter_folder(msgspec.structs.replace(file, scale=-0.5), private))
    changed = inspect(folder)
    assert folder.parent == private
    assert (changed.alpha, changed.rank) == (-0.5 * file.alpha, file.rank)
    other = adapter_folder(msgspec.structs.replace(file, scale=2.0), private)
    assert inspect(Path(other)).alpha == 2 * file.alpha


def test_that_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="gpu_memory"):
        engines.check_options("vllm", {"gpu_memory": 2})


def test_the_memory_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """M2: vLLM takes its whole share at once, and no more than the budget."""
    monkeypatch.setattr(vllm.machine, "devices", lambda: gpus(1))
    whole = footprint(OpenRequest(model=MODEL))
    # What CUDA takes beside the share is booked too.
    assert whole.devices["cuda:0"] == 92 * GIB
    part = footprint(OpenRequest(model=MODEL, memory=50 * GIB))
    # Issue 11.18: the share leaves room for it within the budget.
    assert part.devices["cuda:0"] == pytest.approx(50 * GIB)
    asked = OpenRequest(model=MODEL, memory=50 * GIB)
    given = memory_arguments(asked, vllm.Options(**asked.options), "cuda:0")[
        "gpu_memory_utilization"
    ]
    assert given == pytest.approx(0.48)
    assert sum(part.parts.values()) == sum(part.devices.values())
    cache = footprint(OpenRequest(model=MODEL, options={"kv_cache_bytes": 4 * GIB}))
    assert 20 * GIB < cache.devices["cuda:0"] < 25 * GIB


def test_the_memory_of_several_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.machine, "devices", lambda: gpus(2))
    found = footprint(OpenRequest(model=MODEL, options={"tensor_parallel": 2, "gpu_memory": 0.5}))
    assert found.devices["cuda:0"] == found.devices["cuda:1"] == 52 * GIB
    # Issue 11.20: each rank is a process on the host.
    assert found.devices["cpu"] == 6 * GIB
    assert sum(found.parts.values()) == sum(found.devices.values())


def test_the_memory_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm.machine, "devices", lambda: gpus(0))
    found = footprint(OpenRequest(model=MODEL, memory=48 * GIB, options={"dtype": "float32"}))
    assert found.parts["weights"] == 32 * GIB
    assert found.parts["kv_cache"] == 4 * GIB
    assert sum(found.parts.values()) == found.devices["cpu"]


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory("OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB")
    assert is_out_of_memory("ValueError: No available memory for the cache blocks.")
    assert not is_out_of_memory(str(GenerationFailed("vLLM failed.")))


def test_each_token_of_a_character_has_its_entry() -> None:
    """Issue 12.9: with its own bytes, also where the answer is cut within a character."""
    request = EngineRequest(token_ids=(1,), max_tokens=3, sampling=Sampling(logprobs=0))
    call = Call(
        request, cast("Any", SimpleNamespace(reader=lambda _: lambda token: bytes([token])))
    )
    token_ids = list("🌍".encode()[:3])
    candidates = [{token: SimpleNamespace(rank=1, logprob=-0.5)} for token in token_ids]
    step = SimpleNamespace(token_ids=token_ids, logprobs=candidates, finish_reason="length")
    events = call.events(SimpleNamespace(outputs=[step], num_cached_tokens=0))
    [delta] = [event for event in events if isinstance(event, RawDelta)]
    assert [(entry.token_id, entry.data) for entry in delta.logprobs] == [
        (token, bytes([token])) for token in token_ids
    ]


def test_the_log_probabilities_of_a_prompt() -> None:
    """Issue 13: vLLM has the prompt's token beside the likeliest ones; one is only asked for."""

    def at(logprob: float, rank: int) -> Any:
        return SimpleNamespace(logprob=logprob, rank=rank)

    vocabulary = cast("Any", SimpleNamespace(full_data=lambda token: b"%d" % token))
    scored = [None, {7: at(float("-inf"), 9), 3: at(-0.5, 1)}, {8: at(-0.25, 1)}]
    first, second, third = prompt_tokens((5, 7, 8), scored, 1, vocabulary)
    assert first == PromptToken(5, b"5")
    assert second == PromptToken(7, b"7", -9999.0, (TopLogprob(3, b"3", -0.5),), 9)
    assert third == PromptToken(8, b"8", -0.25, (TopLogprob(8, b"8", -0.25),), 1)
    (_, only) = prompt_tokens((5, 8), [None, scored[2]], 0, vocabulary)
    assert (only.logprob, only.top) == (-0.25, ())
