"""What a load will take, before it; held against what it takes."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from tests.models.builders import gguf, safetensors

from headrace import engines
from headrace.core.errors import ConfigError, LoadFailed
from headrace.core.model import ModelFile, ModelSpec
from headrace.core.request import EmbedRequest, GenerateRequest
from headrace.core.sampling import Sampling
from headrace.core.status import Footprint
from headrace.core.stream import collect
from headrace.engines import llamacpp, plan
from headrace.engines.base import OpenRequest
from headrace.machine import Device, process_memory
from headrace.models.inspect import inspect
from headrace.worker.process import WorkerProcess
from headrace.worker.spec import WorkerSpec, open_request

NOTHING = ModelFile(path="", format="none")


async def measured(found: WorkerSpec) -> tuple[int, int]:
    """Bytes of a real child: loaded, and after all its slots have been at work."""
    worker = WorkerProcess(found.model, lambda spec, report: found)
    await worker.start()
    try:
        assert worker.pid is not None
        loaded = process_memory(worker.pid)["cpu"]
        slots = worker.models()[0].max_running or 1
        few = Sampling(max_tokens=4)
        prompts = [tuple(range(n, n + 150)) for n in range(min(slots, 4))]
        asked = [GenerateRequest(prompt=prompt, sampling=few) for prompt in prompts]
        await asyncio.gather(*(collect(worker.ask(request)) for request in asked))
        return loaded, process_memory(worker.pid)["cpu"]
    finally:
        await worker.aclose()


@pytest.mark.parametrize(
    ("context_length", "options"),
    [(512, {"slots": 1}), (4096, {"slots": 3, "kv_type": "q8_0", "batch_size": 256})],
)
async def test_the_estimate_is_near_what_a_child_takes(
    smollm2_path: Path, context_length: int, options: dict[str, Any]
) -> None:
    """M2: memory before the load; rather too much than too little."""
    spec = ModelSpec(name="x", model="x", context_length=context_length, options=options)
    found = WorkerSpec(model=spec, file=inspect(smollm2_path), engine="llamacpp")
    need = engines.footprint("llamacpp", open_request(found))
    assert (need.how, need.max_running) == ("estimated", options["slots"])
    assert need.context_length == context_length
    assert sum(need.parts.values()) == need.devices["cpu"]
    for real in await measured(found):
        assert 0.95 * real <= need.devices["cpu"] <= 1.15 * real


async def test_an_embedder_is_estimated_with_its_longest_input(smollm2_path: Path) -> None:
    """Issue 11.8: one batch for the longest input, with the output layer of each token."""
    options = {"pooling": "mean", "slots": 1}
    spec = ModelSpec(name="x", model="x", context_length=512, task="embed", options=options)
    resolved = WorkerSpec(model=spec, file=inspect(smollm2_path), engine="llamacpp")
    need = engines.footprint("llamacpp", open_request(resolved)).devices["cpu"]
    worker = WorkerProcess(spec, lambda spec, report: resolved)
    await worker.start()
    try:
        assert worker.pid is not None
        inputs = [tuple(range(5, 517)), *(tuple(range(n, n + 8)) for n in range(5, 13))]
        async for _ in worker.ask(EmbedRequest(inputs=tuple(inputs))):
            pass
        real = process_memory(worker.pid)["cpu"]
    finally:
        await worker.aclose()
    assert 0.95 * real <= need <= 1.15 * real


async def test_echo_holds_what_it_is_told_to() -> None:
    """For tests of a pool: memory that is really taken."""
    size = 80 << 20
    spec = ModelSpec(name="x", model="builtin:echo", options={"memory": size, "slots": 2})
    found = WorkerSpec(model=spec, file=NOTHING, engine="echo")
    need = engines.footprint("echo", open_request(found))
    assert need.parts["weights"] == size
    loaded, _ = await measured(msgspec.structs.replace(found))
    assert loaded > size
    assert 0.95 * loaded <= need.devices["cpu"] <= 1.15 * loaded


def small(path: Path, **fields: Any) -> Footprint:
    """The estimate for a small GGUF file, of whose header it is."""
    path.write_bytes(gguf())
    return engines.footprint("llamacpp", OpenRequest(model=inspect(path), **fields))


def test_context_slots_and_cache_type_count(tmp_path: Path) -> None:
    """M2: the KV cache is context * slots * bytes of a token."""
    file = tmp_path / "x.gguf"
    one = small(file, context_length=1024, options={"slots": 1})
    per_token = inspect(file).kv_bytes_per_token
    assert per_token
    assert one.parts["kv_cache"] == 1024 * per_token
    four = small(file, context_length=1024, options={"slots": 4})
    assert four.parts["kv_cache"] == 4 * one.parts["kv_cache"]
    packed = small(file, context_length=1024, options={"slots": 4, "kv_type": "q8_0"})
    assert packed.parts["kv_cache"] == four.parts["kv_cache"] * 34 // 64
    assert (one.context_length, one.max_running) == (1024, 1)


def test_what_is_chosen_depends_on_the_budget_and_on_nothing_else(tmp_path: Path) -> None:
    """W6: the same before the load and at it."""
    file = tmp_path / "x.gguf"
    little = small(file, memory=4 * 2048 * 128)
    assert (little.context_length, little.max_running) == (2048, 1)
    assert small(file, memory=1 << 40).max_running == 4
    assert small(file).max_running == 4


def test_layers_on_a_gpu_are_counted_there(tmp_path: Path) -> None:
    file = tmp_path / "x.gguf"
    big = 1 << 30
    file.write_bytes(gguf())
    model = msgspec.structs.replace(inspect(file), size=big)

    def devices(layers: int) -> dict[str, int]:
        asked = OpenRequest(model=model, device="cuda", options={"gpu_layers": layers})
        return engines.footprint("llamacpp", asked).devices

    assert devices(-1)["cuda:0"] > big > devices(-1)["cpu"]
    assert devices(0)["cpu"] > big > devices(0)["cuda:0"]
    assert devices(1)["cpu"] - devices(2)["cpu"] == pytest.approx(big / 3, rel=0.01)


def test_auto_is_the_gpu_where_the_library_is_built_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W4: told by the files that the library brings, without loading it."""
    assert llamacpp.expected_device("cpu") == "cpu"
    package = tmp_path / "xllamacpp"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        llamacpp._built_for.cache_clear()
        monkeypatch.delitem(sys.modules, "xllamacpp", raising=False)
        monkeypatch.setattr(sys, "platform", "linux")
        assert llamacpp.expected_device("auto") == "cpu"
        (tmp_path / "xllamacpp.libs").mkdir()
        (tmp_path / "xllamacpp.libs" / "libcudart-1.so").touch()
        llamacpp._built_for.cache_clear()
        assert llamacpp.expected_device("auto") == "cpu"
        gpu = Device(name="cuda:0 Mill", kind="cuda", total=1, used=0)
        monkeypatch.setattr(llamacpp.machine, "devices", lambda: (gpu,))
        assert llamacpp.expected_device("auto") == "cuda:0"
        assert llamacpp.devices() == ("cpu", "cuda")
        (tmp_path / "xllamacpp.libs" / "libcudart-1.so").rename(package / "libggml-vulkan.so")
        llamacpp._built_for.cache_clear()
        assert llamacpp.devices() == ("cpu", "vulkan")
    finally:
        llamacpp._built_for.cache_clear()


@pytest.mark.parametrize(
    ("hip", "wanted", "device"),
    [
        (None, "auto", "cuda"),
        (None, "cuda:1", "cuda:1"),
        ("7.1", "auto", "cuda"),
        ("7.1", "rocm", "cuda"),
        ("7.1", "cpu", "cpu"),
    ],
)
def test_torch_has_amd_gpus_under_the_name_of_cuda(
    hip: str | None, wanted: str, device: str
) -> None:
    """Issue 17.7: `rocm` is a device where torch is built for it, and only there."""
    there, absent = (
        SimpleNamespace(is_available=lambda: True),
        SimpleNamespace(is_available=lambda: False),
    )
    torch = SimpleNamespace(
        cuda=there, backends=SimpleNamespace(mps=absent), version=SimpleNamespace(hip=hip)
    )
    assert plan.torch_device(wanted, torch) == device
    with pytest.raises(LoadFailed, match=r"no device \w+ here; it has (rocm|cuda), cpu"):
        plan.torch_device("cuda" if hip else "rocm", torch)


def test_wrong_options_and_lost_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="slots"):
        small(tmp_path / "x.gguf", options={"slots": 0})
    gone = str(tmp_path / "gone.gguf")
    with pytest.raises(LoadFailed, match=r"gone\.gguf"):
        small(tmp_path / "x.gguf", options={"mmproj": gone})


def test_an_engine_that_says_nothing_is_estimated_from_the_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr("headrace.engines.echo.footprint")
    model = ModelFile(path="x", format="none", size=1000, context_length=64)
    assert engines.footprint("echo", OpenRequest(model=model, max_running=2)) == Footprint(
        devices={"cpu": 1100},
        parts={"weights": 1000, "overhead": 100},
        context_length=64,
        max_running=2,
    )
    asked = OpenRequest(model=model, device="cuda")
    assert engines.footprint("echo", asked).devices == {"cuda:0": 1100}


def test_no_library_is_needed(tmp_path: Path) -> None:
    """An estimate is made in the parent, which never loads an engine."""
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf())
    code = (
        "import sys\nfrom pathlib import Path\nfrom headrace import engines\n"
        "from headrace.engines.base import OpenRequest\n"
        "from headrace.models.inspect import inspect\n"
        "engines.footprint('llamacpp', OpenRequest(model=inspect(Path(sys.argv[1]))))\n"
        "print('xllamacpp' in sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"


def test_an_estimate_can_be_passed_on(tmp_path: Path) -> None:
    """Issue 11.10: one beyond 64 bits could not be sent to a front, or by a node."""
    sizes = ("hidden_size", "intermediate_size", "num_attention_heads", "max_position_embeddings")
    (tmp_path / "modules.json").write_text("[]")
    config = dict.fromkeys(sizes, (1 << 32) - 1) | {"max_position_embeddings": 99_999_999}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    (tmp_path / "model.safetensors").write_bytes(safetensors({"a": ("F32", (1,), 4)}))
    request = OpenRequest(model=inspect(tmp_path), task="embed")
    need = engines.footprint("sentence_transformers", request)
    assert need.devices["cpu"] > 1 << 60
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(need), type=Footprint) == need
